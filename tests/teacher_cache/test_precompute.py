"""The teacher's outputs stored before the training, and a training without the teacher."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset

import textbrewer
from tests.conftest import Encoder, Rows, adaptor, make_config, make_loader
from tests.teacher_cache.jobs import MATCHES, SAME, Job, Varied, apart, cache_at, lines, watch
from textbrewer import DistillationConfig
from textbrewer.teacher_cache import CacheError

__all__ = ["lines"]
KINDS = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller"]


def teacher(seed=1):
    return Encoder(2, 48, seed=seed)


def config_of(kind="GeneralDistiller", **settings):
    matches = [] if kind == "BasicDistiller" else MATCHES
    return DistillationConfig(**{"hard_label_weight": 0.5, "intermediate_matches": matches, **settings})


def store(cache, folder, kind="GeneralDistiller", data=None, **options):
    """Store what the teachers of a kind of distiller say; return the rows that they were run on."""
    data = make_loader(24, 5) if data is None else data
    places = {
        "MultiTeacherDistiller": [{"number": 0}, {"number": 1}],
        "MultiTaskDistiller": [{"task": "a"}, {"task": "b"}],
    }.get(kind, [{}])
    rows = 0
    for place, seed in zip(places, (1, 3), strict=False):
        model = teacher(seed)
        calls = watch(model)
        textbrewer.precompute(model, data, adaptor, cache, config_of(kind), make_config(folder), **place, **options)
        rows += sum(calls)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_training_without_a_teacher(kind, tmp_path):
    """Stored in batches of five, used in shuffled ones of four."""
    count = 1 if kind in ("BasicDistiller", "GeneralDistiller") else 2
    assert store(cache_at(tmp_path), tmp_path / "out", kind) == 24 * count
    plain = Job(tmp_path / "plain", kind).train()
    present = Job(tmp_path / "present", kind, cache_at(tmp_path)).train()
    absent = Job(tmp_path / "absent", kind, cache_at(tmp_path), teachers=[None] * count).train()
    assert present.rows == 0
    assert apart(absent, plain) < SAME
    assert torch.equal(absent.end, present.end)


def test_widths_that_only_the_rows_tell(tmp_path):
    """Projections are built by the width of what is stored."""
    config = {"intermediate_matches": [{**MATCHES[0], "proj": "linear"}]}
    textbrewer.precompute(teacher(), make_loader(24, 5), adaptor, cache_at(tmp_path), config_of(**config))
    plain = Job(tmp_path / "plain", config=config).train()
    absent = Job(tmp_path / "absent", cache=cache_at(tmp_path), teachers=[None], config=config).train()
    assert apart(absent, plain) < SAME


def test_a_configuration_without_logits(tmp_path):
    config = {"kd_loss_weight": 0}
    textbrewer.precompute(teacher(), make_loader(24, 5), adaptor, cache_at(tmp_path), config_of(**config))
    plain = Job(tmp_path / "plain", config=config).train()
    absent = Job(tmp_path / "absent", cache=cache_at(tmp_path), teachers=[None], config=config).train()
    assert apart(absent, plain) < SAME


class StoppedError(Exception):
    """Ends a run in the middle of its data."""


def test_an_interrupted_run_goes_on(tmp_path, lines):
    def interrupted(batch):
        seen.append(batch)
        if len(seen) == 4:
            raise StoppedError
        return batch

    seen = []
    with pytest.raises(StoppedError):
        store(cache_at(tmp_path), tmp_path / "out", batch_postprocessor=interrupted)
    assert cache_at(tmp_path).info().entries == 15
    cache = cache_at(tmp_path)
    assert store(cache, tmp_path / "out") == 9
    assert store(cache_at(tmp_path), tmp_path / "out") == 0
    assert cache.info().entries == 24
    assert len(lines()) == 1
    absent = Job(tmp_path / "absent", cache=cache_at(tmp_path), teachers=[None]).train()
    assert apart(absent, Job(tmp_path / "plain").train()) < SAME


def test_a_part_of_the_rows_is_there(tmp_path):
    """The rows of a training are of use too, and the others are added."""
    Job(tmp_path / "job", cache=cache_at(tmp_path)).train(DataLoader(Subset(Rows(24), range(7)), 4), num_epochs=1)
    assert store(cache_at(tmp_path), tmp_path / "out") == 17


def test_other_padding(tmp_path):
    data = Varied()
    store(cache_at(tmp_path), tmp_path / "out", data=data.loader(7))
    plain = Job(tmp_path / "plain").train(data.loader())
    absent = Job(tmp_path / "absent", cache=cache_at(tmp_path), teachers=[None]).train(data.loader())
    assert apart(absent, plain) < SAME


@pytest.mark.parametrize("how", ["batch_postprocessor", "sides"])
def test_other_batches_for_the_teacher(how, tmp_path):
    def other(batch):
        return {**batch, "input_ids": (batch["input_ids"] * 3) % 40}

    def sides(batch):
        return {"teacher": other(batch), "student": batch}

    batches = list(make_loader(24, 4))
    if how == "sides":
        data, options = [sides(batch) for batch in batches], {}
    else:
        data, options = batches, {"batch_postprocessor": other}
    assert store(cache_at(tmp_path), tmp_path / "out", data=data, **options) == 24
    plain = Job(tmp_path / "plain").train(data, **options)
    absent = Job(tmp_path / "absent", cache=cache_at(tmp_path), teachers=[None]).train(data, **options)
    assert apart(absent, plain) < SAME
    assert apart(absent, Job(tmp_path / "unchanged").train(batches)) > 100 * SAME


def test_the_figures(tmp_path, lines, capsys):
    model = teacher()
    info = textbrewer.precompute(
        model, make_loader(24, 5), adaptor, cache_at(tmp_path), config_of(), make_config(tmp_path / "out")
    )
    assert (info.entries, info.spaces, info.rows_missing) == (24, 1, 24)
    assert model.training
    again = textbrewer.precompute(model, make_loader(24, 7), adaptor, str(tmp_path / "cache"), config_of())
    # Another storage type, so nothing of it is there.
    assert (again.entries, again.spaces, again.rows_missing) == (48, 2, 24)
    assert "stores logits; hidden 2; attention 1 as float16" in lines()[1]
    assert capsys.readouterr().out.count("stores logits") == 1


def test_rows_that_do_not_fit(tmp_path, lines):
    cache = cache_at(tmp_path, max_bytes="60KB")
    with pytest.raises(
        CacheError, match=r"not all rows could be stored in .*: max_bytes is reached; make room or raise"
    ):
        textbrewer.precompute(teacher(), make_loader(96, 4), adaptor, cache, config_of(), make_config(tmp_path / "out"))
    assert 0 < cache.info().entries < 96
    assert "of the rows (max_bytes), the others are recomputed" in lines()[0]
    job = Job(tmp_path / "job", cache=cache_at(tmp_path, max_bytes="60KB"), teachers=[None])
    with pytest.raises(CacheError, match="does not have all rows and features of this batch"):
        job.train(make_loader(96, 4))


# ---- what is missing


def absent(folder, cache, kind="GeneralDistiller", count=1, **options):
    return Job(folder, kind, cache, teachers=[None] * count, **options)


@pytest.mark.parametrize(("kind", "count"), [(KINDS[0], 1), (KINDS[1], 1), (KINDS[2], 2), (KINDS[3], 2)])
def test_no_teacher_and_no_cache(kind, count, tmp_path):
    with pytest.raises(TypeError, match="model_T must be a torch module, got None; only with a teacher_cache"):
        absent(tmp_path, None, kind, count)


def test_an_empty_cache(tmp_path):
    job = absent(tmp_path / "job", cache_at(tmp_path))
    with pytest.raises(CacheError, match=r"does not have what these losses read \(stored: nothing\); run textbrewer"):
        job.train()
    assert torch.equal(job.end[: len(job.start)], job.start)


def test_a_row_that_is_missing(tmp_path):
    store(cache_at(tmp_path), tmp_path / "out", data=make_loader(20, 5))
    job = absent(tmp_path / "job", cache_at(tmp_path))
    with pytest.raises(
        CacheError, match=r"does not have all rows and features of this batch; run textbrewer\.precompute"
    ):
        job.train(make_loader(24, 4))


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"dtype": "float16"}, {}),
        ({"top_k": 2}, {}),
        ({"keep_padding": True}, {}),
        ({"mask": "attention_mask"}, {}),
        ({}, {"intermediate_matches": [{**MATCHES[0], "layer_T": 1}]}),
        ({}, {"intermediate_matches": []}),
        ({}, {"kd_loss_weight": 0}),
    ],
    ids=str,
)
def test_other_settings_than_what_is_stored(settings, config, tmp_path):
    store(cache_at(tmp_path), tmp_path / "out")
    job = absent(tmp_path / "job", cache_at(tmp_path, **settings), config=config)
    with pytest.raises(CacheError, match=r"\(stored: .*logits.*hidden 2.*\); run textbrewer.precompute"):
        job.train()


def test_the_outputs_of_two_teachers(tmp_path):
    """Which of them is meant cannot be told."""
    for seed in (1, 3):
        textbrewer.precompute(teacher(seed), make_loader(24, 5), adaptor, cache_at(tmp_path), config_of())
    job = absent(tmp_path / "job", cache_at(tmp_path))
    with pytest.raises(CacheError, match=r"has the outputs of 2 teachers .*; store each in a folder of its own"):
        job.train()


def test_a_loss_of_the_users_own(tmp_path):
    """It may read all; what is stored is what the configuration names."""

    class Own(textbrewer.GeneralDistiller):
        def compute_loss(self, results_S, results_T):
            return super().compute_loss(results_S, results_T)

    store(cache_at(tmp_path), tmp_path / "out")
    with pytest.raises(CacheError, match="does not have what these losses read"):
        absent(tmp_path / "job", cache_at(tmp_path), Own).train()
    # A training with the teacher stores all.
    Job(tmp_path / "present", Own, cache_at(tmp_path)).train(num_epochs=1)
    absent(tmp_path / "absent", cache_at(tmp_path), Own).train()


def test_what_it_is_given(tmp_path):
    def call(**changes):
        arguments = {"teacher": teacher(), "dataloader": make_loader(24, 5), "adaptor": adaptor, "cache": "cache"}
        textbrewer.precompute(**{**arguments, "cache": str(tmp_path / "cache"), **changes})

    with pytest.raises(TypeError, match="teacher must be a torch module, got None"):
        call(teacher=None)
    with pytest.raises(TypeError, match=r'adaptor must be a function .*, or "auto", got 3'):
        call(adaptor=3)
    with pytest.raises(TypeError, match="distill_config must be a DistillationConfig, got"):
        call(distill_config={"temperature": 2})
    with pytest.raises(TypeError, match="path of a teacher cache must be a folder, got 3"):
        call(cache=3)
    with pytest.raises(ValueError, match="number must be at least 0, got -1"):
        call(number=-1)
    with pytest.raises(TypeError, match="task must be a task's name, got 3"):
        call(task=3)
    with pytest.raises(TypeError, match="train_config must be a TrainingConfig, got"):
        call(train_config={"device": "cpu"})
