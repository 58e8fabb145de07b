"""A student distilled with a teacher cache is the one distilled without, whatever the models, batches and losses."""

import json
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import CLASSES, VOCABULARY, Encoder, adaptor, make_loader
from tests.losses.samples import PAIRS, feature_of, projection_of
from tests.teacher_cache.jobs import KINDS, SAME, Job, Varied, apart, cache_at, lines, weights
from textbrewer import CustomMatch, DistillationConfig, GeneralDistiller, TeacherCache
from textbrewer.adaptors import auto_adaptor
from textbrewer.presets import MATCH_LOSS_MAP
from textbrewer.teacher_cache import CacheError

__all__ = ["lines"]
# What a student may differ by that learns from rounded teachers, as a share of how far it moved: float16 keeps 11 bits,
# bfloat16 8, int8 one of 255 steps a vector; measured 2e-5, 2e-4 and 5e-4 at most.
ROUNDED = {"float16": 1e-4, "bfloat16": 1e-3, "int8": 3e-3}

# ---- every distiller


@pytest.mark.parametrize("kind", KINDS)
def test_every_distiller_trains_the_same_student(kind, tmp_path):
    """The student has dropout and the loader shuffles: no random number is drawn for the cache."""
    plain = Job(tmp_path / "plain", kind).train()
    first = Job(tmp_path / "first", kind, cache_at(tmp_path)).train()
    again = Job(tmp_path / "again", kind, cache_at(tmp_path)).train()
    assert apart(first, plain) < SAME
    assert torch.equal(again.end, first.end)
    assert again.rows == 0
    if kind != "MultiTaskDistiller":
        assert [sum(calls) for calls in plain.calls] == [72] * len(plain.teachers)
        assert first.calls == [[4] * 6] * len(plain.teachers)
    else:
        # The first batch of a task is looked at beforehand, so the first four rows are there when their turn comes.
        assert all(sum(calls) < 48 for calls in first.calls)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_outputs_give_nearly_the_same_student(kind, dtype, tmp_path):
    plain = Job(tmp_path / "plain", kind).train()
    first = Job(tmp_path / "first", kind, cache_at(tmp_path, dtype)).train()
    again = Job(tmp_path / "again", kind, cache_at(tmp_path, dtype)).train()
    assert 0 < apart(first, plain) < ROUNDED[dtype]
    # The first epoch learns from the rows as they are stored, so a run that finds them all is the same.
    assert torch.equal(again.end, first.end)


def test_one_teacher_for_two_tasks_and_two_numbers(tmp_path):
    """Both share what is stored."""
    for kind, run in (("MultiTeacherDistiller", "teachers"), ("MultiTaskDistiller", "tasks")):
        teacher = Encoder(2, 48, seed=1)
        config = {"intermediate_matches": []}
        plain = Job(tmp_path / f"{run} plain", kind, teachers=[teacher, teacher], config=config).train()
        job = Job(tmp_path / run, kind, cache_at(tmp_path / run), teachers=[teacher, teacher], config=config).train()
        assert apart(job, plain) < SAME
        assert job.cache.info().spaces == 1
        assert job.cache.info().entries == 24


# ---- transformers models


def bert(kind="SequenceClassification", layers=2, width=16, seed=0, **settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=width,
        max_position_embeddings=32,
        num_labels=2 if kind == "QuestionAnswering" else CLASSES,
        attn_implementation="eager",
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"BertFor{kind}")(config)


def match(loss):
    """An intermediate match with a loss, of layers that suit it."""
    layers = {"layer_T": [1, 3], "layer_S": [0, 2]} if loss in PAIRS else {"layer_T": 2, "layer_S": 1}
    return {**layers, "feature": feature_of(loss), "loss": loss, "proj": projection_of(loss), "weight": 1.0}


def bert_job(folder, cache=None, kind="SequenceClassification", losses=(), config=None, **options):
    teacher, student = bert(kind, 3, 24, 1), bert(kind, 2, 16, 2)
    config = {"intermediate_matches": [match(loss) for loss in losses], **(config or {})}
    return Job(
        folder,
        "GeneralDistiller",
        cache,
        [teacher],
        student,
        **{"adaptor_T": "auto", "adaptor_S": "auto", **options},
        config=config,
    )


@pytest.mark.parametrize("loss", [*MATCH_LOSS_MAP, "all"])
def test_every_match_with_rows_of_different_lengths(loss, tmp_path):
    losses = list(MATCH_LOSS_MAP) if loss == "all" else [loss]
    data = Varied()
    plain = bert_job(tmp_path / "plain", losses=losses).train(data.loader())
    job = bert_job(tmp_path / "job", cache_at(tmp_path), losses=losses).train(data.loader())
    assert apart(job, plain) < SAME
    assert job.rows == 24
    # Other batches: the rows have other neighbours and another padding, and are still found.
    plain = bert_job(tmp_path / "other plain", losses=losses).train(data.loader(7))
    other = bert_job(tmp_path / "other", cache_at(tmp_path), losses=losses).train(data.loader(7))
    assert apart(other, plain) < SAME
    assert other.rows == 0


@pytest.mark.parametrize(
    ("training", "config"),
    [
        ({"gradient_accumulation_steps": 3}, {}),
        ({"gradient_accumulation_steps": 3, "accumulation_weighting": "positions"}, {}),
        ({}, {"probability_shift": True}),
        ({}, {"temperature_scheduler": ["flsw", 1, 1]}),
        ({}, {"temperature_scheduler": ["cwsm", 1]}),
        ({}, {"kd_loss_type": "mse", "temperature": 1, "kd_loss_weight_scheduler": "linear_decay"}),
        ({}, {"kd_loss_weight": 0, "hard_label_weight": 0}),
        ({"stack_matches": True}, {}),
    ],
    ids=str,
)
def test_settings(training, config, tmp_path):
    losses = ["hidden_mse", "attention_mse_sum", "nst", "hidden_mse"]
    jobs = [
        bert_job(tmp_path / str(number), cache, losses=losses, training=training, config=config).train(
            Varied().loader()
        )
        for number, cache in enumerate([None, cache_at(tmp_path), cache_at(tmp_path)])
    ]
    assert apart(jobs[1], jobs[0]) < SAME
    assert torch.equal(jobs[2].end, jobs[1].end)
    assert jobs[2].rows == 0


def test_a_run_without_logits_stores_none(tmp_path, lines):
    job = bert_job(tmp_path, cache_at(tmp_path), losses=["hidden_mse"], config={"kd_loss_weight": 0})
    job.train(Varied().loader())
    (line,) = lines()
    assert "stores hidden 2 as float32" in line


@pytest.mark.parametrize("exact", [False, True])
def test_tokens(exact, tmp_path):
    """Logits of every token, in part without a label."""
    data = Varied(by_token=True)
    training = {"gradient_accumulation_steps": 2, "accumulation_weighting": "positions"} if exact else {}
    options = {"kind": "TokenClassification", "losses": ["hidden_mse"], "training": training}
    plain = bert_job(tmp_path / "plain", **options).train(data.loader())
    job = bert_job(tmp_path / "job", cache_at(tmp_path), **options).train(data.loader())
    other = bert_job(tmp_path / "other", cache_at(tmp_path), **options).train(data.loader(6))
    assert apart(job, plain) < SAME
    assert (job.rows, other.rows) == (24, 0)


def test_spans(tmp_path):
    """Two heads whose softmax runs over the positions: rows are found under the same padding only."""
    data = Varied(spans=True)
    jobs = [
        bert_job(tmp_path / str(number), cache, "QuestionAnswering", ["attention_ce_mean"]).train(data.loader())
        for number, cache in enumerate([None, cache_at(tmp_path), cache_at(tmp_path)])
    ]
    assert apart(jobs[1], jobs[0]) < SAME
    assert torch.equal(jobs[2].end, jobs[1].end)
    assert jobs[2].rows == 0


def gpt(layers, seed, vocabulary=VOCABULARY):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=layers, n_head=2, n_positions=32, attn_implementation="eager"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config)


def lm_job(folder, cache=None, **options):
    return Job(
        folder, "GeneralDistiller", cache, [gpt(2, 1)], gpt(1, 2), adaptor_T="auto", adaptor_S="auto",
        config={"intermediate_matches": [], **options},
    )  # fmt: skip


@pytest.mark.parametrize("left", [False, True])
def test_a_causal_language_model(left, tmp_path):
    data = Varied(by_token=True, left=left, classes=VOCABULARY)
    plain = lm_job(tmp_path / "plain").train(data.loader())
    job = lm_job(tmp_path / "job", cache_at(tmp_path)).train(data.loader())
    again = lm_job(tmp_path / "again", cache_at(tmp_path)).train(data.loader())
    assert apart(job, plain) < SAME
    assert torch.equal(again.end, job.end)
    assert again.rows == 0


def spread(logits, count, temperature):
    """Logits of which all but the largest are equal, with the same probability together: row by row."""
    whole = logits.clone()
    for row in whole.view(-1, logits.shape[-1]):
        order = row.argsort(descending=True)
        rest = torch.softmax(row / temperature, 0)[order[count:]].sum() / (len(row) - count)
        # The level at which each of the others has this share: log p = l / t - log Z, and Z stays what it is.
        row[order[count:]] = temperature * (rest.log() + torch.logsumexp(row / temperature, 0))
    return whole


def test_the_largest_logits_alone(tmp_path):
    """The student is the one taught by the teacher whose other logits are levelled."""
    data, temperature = Varied(by_token=True, classes=VOCABULARY), 2.0

    def levelled(batch, outputs):
        views = auto_adaptor(batch, outputs)
        return {**views, "logits": spread(views["logits"], 5, temperature)}

    config = {"temperature": temperature}
    plain = Job(
        tmp_path / "plain", "GeneralDistiller", None, [gpt(2, 1)], gpt(1, 2), levelled, "auto",
        config={"intermediate_matches": [], **config},
    )  # fmt: skip
    plain.train(data.loader())
    job = lm_job(tmp_path / "job", cache_at(tmp_path, top_k=5), **config).train(data.loader())
    whole = lm_job(tmp_path / "whole", **config).train(data.loader())
    assert apart(job, plain) < 10 * SAME
    assert apart(job, whole) > 100 * SAME
    assert job.rows == 24
    all_logits = lm_job(tmp_path / "all", cache_at(tmp_path / "all"), **config).train(data.loader())
    assert job.cache.info().bytes < 0.75 * all_logits.cache.info().bytes


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_the_left(left, tmp_path):
    data = Varied(left=left)
    losses = ["hidden_mse", "attention_mse_sum", "nst"]
    plain = bert_job(tmp_path / "plain", losses=losses).train(data.loader())
    job = bert_job(tmp_path / "job", cache_at(tmp_path), losses=losses).train(data.loader())
    assert apart(job, plain) < SAME


@pytest.mark.parametrize("name", ["module", "name"])
def test_custom_matches(name, tmp_path):
    def job(number, cache):
        teacher, student = bert(layers=3, width=24, seed=1), bert(layers=2, width=16, seed=2)
        module = teacher.bert.encoder.layer[1].output if name == "module" else "bert.encoder.layer.1.output"
        torch.manual_seed(3)
        projection = nn.Linear(16, 24)
        custom = [CustomMatch(module, "bert.encoder.layer.0", 1.0, "hidden_mse", projection)]
        return Job(
            tmp_path / str(number), "GeneralDistiller", cache, [teacher], student, "auto", "auto",
            config={"intermediate_matches": [match("cos")]}, custom=custom,
        ).train(Varied().loader())  # fmt: skip

    plain, first, again = (
        job(number, cache) for number, cache in enumerate([None, cache_at(tmp_path), cache_at(tmp_path)])
    )
    assert apart(first, plain) < SAME
    assert torch.equal(again.end, first.end)
    assert again.rows == 0


def test_images(tmp_path):
    """A vision transformer: no mask, one row a picture."""
    transformers = pytest.importorskip("transformers")

    def vit(layers, seed):
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_labels=CLASSES, attn_implementation="eager",
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.ViTForImageClassification(config)

    generator = torch.Generator().manual_seed(0)
    pictures = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": n % CLASSES} for n in range(24)]
    losses = ["hidden_mse", "pkd", "nst", "attention_mse"]
    jobs = [
        Job(
            tmp_path / str(number), "GeneralDistiller", cache, [vit(3, 1)], vit(2, 2), "auto", "auto",
            config={"intermediate_matches": [match(loss) for loss in losses]},
        ).train(DataLoader(pictures, size, shuffle=True))
        for number, (cache, size) in enumerate([(None, 4), (cache_at(tmp_path), 4), (cache_at(tmp_path), 5)])
    ]  # fmt: skip
    assert apart(jobs[1], jobs[0]) < SAME
    assert (jobs[1].rows, jobs[2].rows) == (24, 0)


# ---- plain modules


class ByPosition(nn.Module):
    """An encoder called with a tuple ``(tokens, mask)``."""

    def __init__(self, layers, width, seed):
        super().__init__()
        self.inner = Encoder(layers, width, seed=seed)

    def forward(self, tokens, mask):
        return self.inner(tokens, mask)


def views_of_tuple(batch, outputs):
    return {"logits": outputs["logits"], "hidden": outputs["hidden"], "inputs_mask": batch[1]}


@pytest.mark.parametrize("mask", [1, None])
def test_batches_that_are_tuples(mask, tmp_path):
    """Without being told of the mask, rows are found under the same padding only."""
    data = Varied()

    def loader(size):
        return DataLoader(data, size, shuffle=True, collate_fn=lambda rows: tuple(data.collate(rows).values())[:2])

    def job(folder, cache, size):
        config = {"intermediate_matches": [{**match("hidden_mse"), "proj": ["linear", 32, 48]}]}
        models = [ByPosition(2, 48, 1)], ByPosition(1, 32, 2)
        return Job(folder, "GeneralDistiller", cache, *models, views_of_tuple, views_of_tuple, config=config).train(
            loader(size)
        )

    plain = job(tmp_path / "plain", None, 4)
    first = job(tmp_path / "first", cache_at(tmp_path, mask=mask), 4)
    other = job(tmp_path / "other", cache_at(tmp_path, mask=mask), 7)
    assert apart(first, plain) < SAME
    assert apart(other, job(tmp_path / "other plain", None, 7)) < SAME
    assert (other.rows == 0) == (mask == 1)


def test_a_single_tensor(tmp_path):
    def model(width, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def views(batch, outputs):
        return {"logits": outputs}

    rows = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    jobs = [
        Job(tmp_path / str(number), "BasicDistiller", cache, [model(8, 1)], model(4, 2), views, views).train(
            DataLoader(rows, 4, shuffle=True), lr=0.5
        )
        for number, cache in enumerate([None, cache_at(tmp_path), cache_at(tmp_path)])
    ]
    assert apart(jobs[1], jobs[0]) < SAME
    assert [job.rows for job in jobs] == [72, 24, 0]


# ---- students that count padding


def without_mask(batch, outputs):
    return {name: value for name, value in adaptor(batch, outputs).items() if name != "inputs_mask"}


def test_losses_that_count_padding(tmp_path, lines):
    """Only the teacher's adaptor returns the mask: the student's losses run over the padding too, so it is stored."""
    options = {"adaptor_S": without_mask}
    data = make_loader(24, 4, shuffle=True)
    plain = Job(tmp_path / "plain", **options).train(data)
    job = Job(tmp_path / "job", cache=cache_at(tmp_path), **options).train(data)
    masked = Job(tmp_path / "masked").train(data)
    assert apart(job, plain) < SAME
    assert apart(job, masked) > 100 * SAME
    assert job.rows == 24
    (line,) = lines()
    assert "with padding" in line


def test_rows_without_padding_are_refused_where_it_counts(tmp_path):
    Job(tmp_path / "masked", cache=cache_at(tmp_path)).train(num_epochs=1)
    job = Job(tmp_path / "job", cache=cache_at(tmp_path), adaptor_S=without_mask)
    with pytest.raises(CacheError, match=r"stored without padding.*TeacherCache\(\.\.\., keep_padding=True\)"):
        job.train()
    assert torch.equal(weights(job.student), job.start)
    remedy = Job(tmp_path / "remedy", cache=cache_at(tmp_path, keep_padding=True), adaptor_S=without_mask).train()
    plain = Job(tmp_path / "plain", adaptor_S=without_mask).train()
    assert apart(remedy, plain) < SAME


def of_short_rows(batch, outputs):
    """It counts the padding where there is more than one position of it a row."""
    mask = batch["attention_mask"]
    return {**adaptor(batch, outputs), "inputs_mask": torch.ones_like(mask) if (mask == 0).sum() > 4 else mask}


def padded(count, seed):
    batch = next(iter(make_loader(4, 4)))
    ids = torch.randint(1, 9, (4, 6), generator=torch.Generator().manual_seed(seed))
    return {**batch, "input_ids": ids, "attention_mask": (torch.arange(6) < 6 - count).long().repeat(4, 1)}


@pytest.mark.parametrize("first", [0, 1])
def test_rows_without_padding_are_refused_where_only_a_later_batch_counts_it(first, tmp_path):
    """One batch a step; ``first`` has no padding, or leaves it out, and tells nothing of the second."""
    data, options = [padded(0, 1), padded(first, 2), padded(2, 3)], {"adaptor_S": of_short_rows}
    if first:
        data = data[1:]
    with pytest.raises(CacheError, match=r"stored without padding.*TeacherCache\(\.\.\., keep_padding=True\)"):
        Job(tmp_path / "job", cache=cache_at(tmp_path), **options).train(data)
    remedy = Job(tmp_path / "remedy", cache=cache_at(tmp_path, keep_padding=True), **options).train(data)
    assert apart(remedy, Job(tmp_path / "plain", **options).train(data)) < SAME


def test_batches_without_the_mask_that_the_first_had(tmp_path):
    """Nothing tells where their rows end: the teacher is run on them in every epoch."""

    class Either(Encoder):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, self.mask_of(input_ids, attention_mask), labels)

        @staticmethod
        def mask_of(input_ids, attention_mask):
            return torch.ones_like(input_ids) if attention_mask is None else attention_mask

    def either(batch, outputs):
        return adaptor({"attention_mask": torch.ones_like(batch["input_ids"]), **batch}, outputs)

    data = [padded(1, 1), {name: value for name, value in padded(0, 2).items() if name != "attention_mask"}]
    jobs = []
    for cache in (None, cache_at(tmp_path)):
        models = {"teachers": [Either(2, 48, seed=1)], "student": Either(1, 32, seed=2)}
        options = {**models, "adaptor_T": either, "adaptor_S": either}
        jobs.append(Job(tmp_path / str(len(jobs)), cache=cache, **options).train(data))
    assert apart(jobs[1], jobs[0]) < SAME
    assert [job.rows for job in jobs] == [24, 4 + 3 * 4]


def test_means_made_with_another_mask_are_refused(tmp_path):
    """A first run stores means over positions under the teacher's mask, a second one has another."""

    def other(batch, outputs):
        mask = batch["attention_mask"].clone()
        mask[:, 0] = 0
        return {**adaptor(batch, outputs), "inputs_mask": mask}

    match = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "embed_distill", "weight": 1}
    options = {"config": {"intermediate_matches": [match]}}

    def run(name, cache, **more):
        return Job(tmp_path / name, cache=cache, teachers=[Encoder(2, 32, seed=1)], **options, **more).train()

    run("first", cache_at(tmp_path))
    with pytest.raises(CacheError, match="means or products that were made with the teacher's 'inputs_mask'"):
        run("second", cache_at(tmp_path), adaptor_S=other)
    new = run("new", cache_at(tmp_path / "other"), adaptor_S=other)
    assert apart(new, run("plain", None, adaptor_S=other)) < SAME


# ---- losses of the user's own


class ReadsMore(GeneralDistiller):
    """Its loss reads what no match of the configuration names."""

    def compute_loss(self, results_S, results_T):
        total, parts = super().compute_loss(results_S, results_T)
        away = (results_T["labels"][0] == 0).float().mean()
        pooled = (results_T["hidden"][0] * results_T["inputs_mask"].unsqueeze(-1)).mean()
        extra = ((results_S["hidden"][1].mean() - pooled) * (1 + away)).square()
        return total + extra, {**parts, "unweighted_extra": extra}


class OtherTarget(GeneralDistiller):
    """It learns from other logits than the teacher's."""

    def kd_target(self, results_T):
        views = super().kd_target(results_T)
        factor = results_T["hidden"][0].mean() + results_T["labels"][0].float().mean()
        return type(views)({**views, "logits": [logits * factor for logits in views["logits"]]})


@pytest.mark.parametrize(
    "kind",
    [
        ReadsMore,
        OtherTarget,
    ],
)
def test_overriding(kind, tmp_path):
    jobs = [
        Job(tmp_path / str(number), kind, cache).train()
        for number, cache in enumerate([None, cache_at(tmp_path), cache_at(tmp_path)])
    ]
    assert apart(jobs[1], jobs[0]) < SAME
    assert torch.equal(jobs[2].end, jobs[1].end)
    assert [job.rows for job in jobs] == [72, 24, 0]
    plain = Job(tmp_path / "plain").train()
    assert apart(jobs[1], plain) > 100 * SAME


# ---- other teachers, other choices


PROJECTED = {**match("hidden_mse"), "proj": ["linear", 32, 48]}


def doubled(batch, outputs):
    return {**adaptor(batch, outputs), "logits": 2 * outputs["logits"]}


def nudged(seed=1):
    """The teacher after a training step: every weight a little different."""
    model = Encoder(2, 48, seed=seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)
    return model


OTHERS = {
    "weights": lambda: {"teachers": [nudged()]},
    "one weight": lambda: {"teachers": [one_weight()]},
    "adaptor": lambda: {"adaptor_T": doubled},
    "precision": lambda: {"training": {"precision": "bf16"}},
    "teacher precision": lambda: {"training": {"teacher_precision": "bf16"}},
    "layer": lambda: {"config": {"intermediate_matches": [PROJECTED | {"layer_T": 1}]}},
    "loss": lambda: {"config": {"intermediate_matches": [PROJECTED | {"loss": "pkd"}]}},
}


def one_weight():
    model = Encoder(2, 48, seed=1)
    with torch.no_grad():
        model.classifier.bias[1] += 0.5
    return model


@pytest.mark.parametrize("what", OTHERS)
def test_another_teacher_does_not_read_old_rows(what, tmp_path):
    first = Job(tmp_path / "first", cache=cache_at(tmp_path)).train()
    plain = Job(tmp_path / "plain", **OTHERS[what]()).train()
    other = Job(tmp_path / "other", cache=cache_at(tmp_path), **OTHERS[what]()).train()
    # In bf16 every loss is rounded, whatever the cache does.
    assert apart(other, plain) < (SAME if what != "precision" else 1e-2)
    assert apart(other, first) > 10 * SAME
    assert other.rows == 24
    info = other.cache.info()
    assert (info.entries, info.spaces) == (48, 2)
    back = Job(tmp_path / "back", cache=cache_at(tmp_path)).train()
    assert torch.equal(back.end, first.end)
    assert back.rows == 0


def test_another_storage_type_does_not_read_old_rows(tmp_path):
    first = Job(tmp_path / "first", cache=cache_at(tmp_path)).train()
    coarse = Job(tmp_path / "coarse", cache=cache_at(tmp_path, "int8")).train()
    assert coarse.rows == 24
    assert apart(coarse, first) > SAME
    back = Job(tmp_path / "back", cache=cache_at(tmp_path)).train()
    assert torch.equal(back.end, first.end)
    assert back.rows == 0


def test_a_teacher_changed_between_two_trainings_of_one_distiller(tmp_path):
    job = Job(tmp_path / "job", cache=cache_at(tmp_path)).train()
    assert job.rows == 24
    with torch.no_grad():
        job.teachers[0].classifier.weight.mul_(3)
    with pytest.warns(UserWarning, match="output_dir"):
        job.train()
    assert job.rows == 48


# ---- the two ways to name a cache


def test_the_form_of_the_configuration(tmp_path):
    folder = str(tmp_path / "cache")
    config = DistillationConfig(teacher_cache=folder)
    assert json.loads(json.dumps(config.to_dict()))["teacher_cache"] == folder
    config.to_json_file(tmp_path / "config.json")
    assert DistillationConfig.from_json_file(tmp_path / "config.json").teacher_cache == folder
    assert DistillationConfig(teacher_cache=tmp_path / "cache").teacher_cache == folder
    named = Job(tmp_path / "named", config={"teacher_cache": folder}).train()
    given = Job(tmp_path / "given", cache=folder).train()
    own = Job(tmp_path / "own", cache=TeacherCache(folder)).train()
    assert [job.rows for job in (named, given, own)] == [24, 0, 0]
    assert torch.equal(named.end, given.end)
    assert torch.equal(named.end, own.end)


# ---- the figures


def test_the_figures_are_those_counted_by_hand(tmp_path, lines, capsys):
    cache = cache_at(tmp_path)
    job = Job(tmp_path / "job", cache=cache, training={"progress_bar": True})
    job.teachers[0].register_forward_hook(lambda *arguments: time.sleep(0.04))
    job.train(make_loader(24, 4))
    info = cache.info()
    # The first batch was looked at before the training, and stored: 4 + 20 rows were not there, all others were.
    assert (info.rows_missing, info.rows_found) == (24, 52)
    assert info.hit_rate == 52 / 76
    assert (info.entries, info.spaces) == (24, 1)
    assert info.bytes == (tmp_path / "cache" / "data.mdb").stat().st_size
    assert info.seconds_waited < 1
    again = cache_at(tmp_path)
    Job(tmp_path / "again", cache=again, training={"progress_bar": True}).train(make_loader(24, 4))
    info = again.info()
    assert (info.rows_missing, info.rows_found, info.hit_rate) == (0, 72, 1.0)
    # 72 rows of a hundredth of a second each, at least, less the waiting.
    assert info.seconds_saved + info.seconds_waited > 0.3
    # Of the two runs only the first had to plan.
    (line,) = lines()
    assert capsys.readouterr().out.count(line) == 1
    assert "stores logits; hidden 2; attention 1 as float32" in line
    assert "for 24 rows" in line
    assert "24 rows" in str(info)
    assert job.rows == 24


def test_data_of_tensors(tmp_path):
    """TensorDataset gives lists; the first entry is the only one of the model's."""
    rows = TensorDataset(torch.randn(24, 5, generator=torch.Generator().manual_seed(0)))

    def model(seed):
        torch.manual_seed(seed)
        return nn.Linear(5, CLASSES)

    def views(batch, outputs):
        return {"logits": outputs}

    job = Job(tmp_path, "BasicDistiller", cache_at(tmp_path), [model(1)], model(2), views, views)
    job.train(DataLoader(rows, 4))
    assert job.rows == 24
