"""What every distiller must do: learn what a loop written by hand learns, leave teachers alone, take any batch."""

import collections
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import textbrewer
from tests.conftest import Encoder, adaptor, make_loader, seed_all
from tests.distillers.setups import (
    DISTILLERS,
    EVERY,
    MATCHES,
    Setup,
    batches,
    keep_order,
    make_student,
    make_teacher,
    weights,
)

# ---- learning ----------------------------------------------------------------------------------------------------


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def loss_by_hand(kind, batch, student, teachers, projection):
    """The loss of one batch: KD (temperature 4), the two matches, and half the student's own loss."""
    outputs = student(**batch)
    if kind == "BasicTrainer":
        return outputs["loss"]
    with torch.no_grad():
        targets = [teacher(**batch) for teacher in teachers]
    logits_T = sum(target["logits"] for target in targets) / len(targets)
    loss = -((logits_T / 4).softmax(-1) * (outputs["logits"] / 4).log_softmax(-1)).sum(-1).mean()
    loss = loss + 0.5 * outputs["loss"]
    if kind == "BasicDistiller":
        return loss
    mask = batch["attention_mask"].float()
    squares = (projection(outputs["hidden"][1]) - targets[0]["hidden"][2]).square().mean(-1)
    difference = (outputs["attention"][0] - targets[0]["attention"][1]).square()
    pairs = (mask[:, :, None] * mask[:, None, :]).unsqueeze(1)
    return loss + 2 * masked_mean(squares, mask) + 0.5 * masked_mean(difference, pairs)


def gradient_descent(parameters):
    """Not Adam: the gradient of the keys' bias is zero but for rounding, which Adam would blow up."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train_by_hand(kind, student, teachers, projection, data, steps):
    """The few lines that anybody would write; tasks are drawn as TextBrewer draws them."""
    optimizer = gradient_descent([*student.parameters(), *(projection.parameters() if projection else ())])
    iterators = [iter(data * steps) for _ in teachers]
    student.train()
    for _ in range(steps):
        task = "ab".index(np.random.choice(["a", "b"], p=[0.5, 0.5])) if kind == "MultiTaskDistiller" else 0
        now = [teachers[task]] if kind == "MultiTaskDistiller" else teachers
        loss = loss_by_hand(kind, next(iterators[task]), student, [item.eval() for item in now], projection)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", EVERY)
def test_against_a_loop_by_hand(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    student = copy.deepcopy(setup.student)
    with_projection = kind not in ("BasicDistiller", "BasicTrainer")
    projection = copy.deepcopy(setup.distiller.projections[0]) if with_projection else None
    seed_all(1)
    setup.train(optimizer=gradient_descent(setup.student.parameters()), num_steps=12)
    seed_all(1)
    train_by_hand(kind, student, copy.deepcopy(setup.teachers), projection, batches(), 12)
    ours, by_hand = weights(setup.student), weights(student)
    start = weights(make_student())
    assert (by_hand - start).norm() > 0.1
    assert (ours - by_hand).norm() / (by_hand - start).norm() < 1e-5


@pytest.mark.parametrize("kind", EVERY)
def test_the_loss_falls(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    data = batches()

    def loss():
        with torch.no_grad():
            each = [loss_by_hand("BasicDistiller", batch, setup.student.eval(), setup.teachers, None) for batch in data]
            own = [nn.functional.cross_entropy(setup.student(**batch)["logits"], batch["labels"]) for batch in data]
        return sum(own if kind == "BasicTrainer" else each).item()

    for teacher in setup.teachers:
        teacher.eval()
    before = loss()
    setup.train(num_steps=60)
    assert loss() < 0.95 * before if kind != "BasicTrainer" else loss() < 0.7 * before


# ---- teachers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", DISTILLERS)
def test_teachers_are_frozen_and_put_back(kind, caching, tmp_path):
    seen = []

    def watching(batch, outputs):
        seen.append((torch.is_grad_enabled(), outputs["logits"].requires_grad))
        return adaptor(batch, outputs)

    setup = Setup(tmp_path, kind, adaptor_T=watching, config={"is_caching_logits": caching})
    inside = []
    for teacher in setup.teachers:
        teacher.train()
        teacher.layers[1].eval()
        teacher.embedding.requires_grad_(False)
        teacher.register_forward_pre_hook(
            lambda module, inputs: inside.append(
                (any(part.training for part in module.modules()), any(v.requires_grad for v in module.parameters()))
            )
        )
    before = [weights(teacher) for teacher in setup.teachers]
    flags = [
        [part.training for model in (teacher, setup.student) for part in model.modules()] for teacher in setup.teachers
    ]
    setup.train()
    assert set(seen) == {(False, False)}
    assert set(inside) == {(False, False)}
    for teacher, old, modes in zip(setup.teachers, before, flags, strict=True):
        assert torch.equal(weights(teacher), old)
        assert [part.training for model in (teacher, setup.student) for part in model.modules()] == modes
        needs = {name.partition(".")[0]: value.requires_grad for name, value in teacher.named_parameters()}
        assert needs == {"embedding": False, "layers": True, "classifier": True}
        assert all(value.grad is None for value in teacher.parameters())


@pytest.mark.parametrize("kind", DISTILLERS)
def test_teachers_are_put_back_after_an_error(kind, tmp_path):
    def fails(batch, outputs):
        raise ArithmeticError

    setup = Setup(tmp_path, kind, adaptor_S=fails)
    with pytest.raises(ArithmeticError):
        setup.train()
    assert all(part.training for teacher in setup.teachers for part in teacher.modules())
    assert all(value.requires_grad for teacher in setup.teachers for value in teacher.parameters())


@pytest.mark.parametrize("kind", DISTILLERS)
def test_a_layer_shared_with_the_teacher_is_trained(kind, tmp_path):
    teacher = make_teacher()
    student = Encoder(layers=1, width=48, seed=2)
    student.embedding = teacher.embedding
    before = student.embedding.weight.detach().clone()
    match = [{**MATCHES[0], "proj": None}] if kind != "BasicDistiller" else []
    Setup(tmp_path, kind, teachers=[teacher], student=student, config={"intermediate_matches": match}).train()
    assert not torch.equal(student.embedding.weight, before)


# ---- with and without `with` -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_with(kind, tmp_path):
    results = []
    for within in (False, True):
        setup = Setup(tmp_path / str(within), kind)
        if within:
            with setup.distiller as entered:
                assert entered is setup.distiller
                assert setup.student.training
                if kind != "BasicTrainer":
                    assert not any(part.training for teacher in setup.teachers for part in teacher.modules())
                seed_all(0)
                setup.train()
                assert setup.student.training
        else:
            setup.student.eval()
            seed_all(0)
            setup.train()
            assert not setup.student.training
        results.append(weights(setup.student))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", EVERY)
def test_with_puts_modes_back(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    setup.student.eval()
    with pytest.raises(ArithmeticError), setup.distiller:
        raise ArithmeticError
    assert not setup.student.training
    if kind != "BasicTrainer":
        assert all(teacher.training for teacher in setup.teachers)


@pytest.mark.parametrize("kind", EVERY)
def test_modes_of_every_training(kind, tmp_path):
    """Each training sets the modes anew, whatever was done to them between, and puts back what it found."""
    setup = Setup(tmp_path, kind)
    seen = []
    setup.student.register_forward_pre_hook(lambda model, inputs: seen.append(model.training))
    for mode in (False, True, False):
        setup.student.train(mode)
        setup.distiller.t_config.output_dir = str(tmp_path / str(len(seen)))
        setup.train(num_steps=2)
        assert setup.student.training is mode
    assert seen == [True] * 6


# ---- remembered teachers -----------------------------------------------------------------------------------------


def backwards(batch, outputs):
    """An adaptor that picks other positions than the student's, as with another tokenisation."""
    views = adaptor(batch, outputs)
    if "logits_mask" in views:
        views |= {key: views[key].flip(1) for key in ("logits", "logits_mask")}
    return views


@pytest.mark.parametrize("by_token", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("kind", DISTILLERS)
def test_remembering_changes_nothing(kind, by_token, tmp_path, monkeypatch):
    """In the same order of batches the student is the same, bit for bit; the teachers run once over the data."""
    keep_order(monkeypatch)
    results, runs = [], []
    for caching in (False, True):
        student = make_student(by_token=by_token)
        several = kind.startswith("Multi")
        teachers = [make_teacher(seed, by_token) for seed in (1, 3)][: 2 if several else 1]
        config = {"is_caching_logits": caching, "probability_shift": True}
        setup = Setup(tmp_path / str(caching), kind, teachers, student, backwards, config=config)
        counted = []
        for teacher in teachers:
            teacher.register_forward_pre_hook(lambda *ignored, counted=counted: counted.append(1))
        seed_all(0)
        setup.train(batches(12, by_token=by_token), num_steps=9)
        results.append(weights(student))
        runs.append(len(counted))
        assert setup.distiller.d_config.is_caching_logits is caching
    assert torch.equal(*results)
    teachers_a_batch = 2 if kind == "MultiTeacherDistiller" else 1
    # Tasks are read when they are first drawn; with nine draws, both are.
    passes = 2 if kind == "MultiTaskDistiller" else 1
    assert runs == [9 * teachers_a_batch, 3 * teachers_a_batch * passes]


@pytest.mark.parametrize("kind", DISTILLERS)
def test_remembered_batches_are_shuffled(kind, tmp_path):
    order = []

    def watching(batch, outputs):
        order.append(int(batch["input_ids"][0, 0]))
        return adaptor(batch, outputs)

    setup = Setup(tmp_path, kind, teachers=[make_teacher()], adaptor_S=watching, config={"is_caching_logits": True})
    setup.train(num_steps=18)
    passes = [order[start : start + 6] for start in (0, 6, 12)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert len({tuple(item) for item in passes}) == 3


@pytest.mark.parametrize("kind", DISTILLERS)
def test_compute_loss_of_the_user_s_sees_all_when_remembering(kind, tmp_path):
    base = getattr(textbrewer, kind)
    seen = []

    class Mine(base):
        def compute_loss(self, results_S, results_T):
            every = results_T if isinstance(results_T, list) else [results_T]
            seen.append([sorted(results) for results in every])
            return super().compute_loss(results_S, results_T)

    Setup(tmp_path, Mine, config={"is_caching_logits": True}).train()
    keys = ["attention", "hidden", "inputs_mask", "labels", "logits", "losses"]
    assert all(every == [keys] * len(every) for every in seen)


# ---- batches -----------------------------------------------------------------------------------------------------


def sides(batch):
    """Another batch for each side: the student reads the words in another order."""
    return {"teacher": batch, "student": {**batch, "input_ids": batch["input_ids"].flip(0)}}


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", DISTILLERS)
def test_each_side_its_batch(kind, caching, tmp_path, monkeypatch):
    keep_order(monkeypatch)
    read = {"T": [], "S": []}

    def watching(side):
        def watch(batch, outputs):
            read[side].append(batch["input_ids"].clone())
            return adaptor(batch, outputs)

        return watch

    setup = Setup(
        tmp_path,
        kind,
        teachers=[make_teacher()],
        adaptor_T=watching("T"),
        adaptor_S=watching("S"),
        config={"is_caching_logits": caching},
    )
    setup.train([sides(batch) for batch in batches()])
    assert len(read["T"]) == len(read["S"]) == 6
    for ids_T, ids_S in zip(read["T"], read["S"], strict=True):
        assert torch.equal(ids_T.flip(0), ids_S)


@pytest.mark.parametrize("form", ["with the teacher's batch", "without", "remembered"])
@pytest.mark.parametrize("kind", DISTILLERS)
def test_stored_teacher_outputs(kind, form, tmp_path, monkeypatch):
    """A batch's 'teacher_cache' stands for what the teacher would return; the teacher does not run."""
    keep_order(monkeypatch)
    results = []
    for stored in (False, True):
        teachers = [make_teacher(1), make_teacher(3)] if kind == "MultiTeacherDistiller" else [make_teacher()]

        def reading(batch, outputs):
            views = adaptor(batch or {"attention_mask": None}, outputs)
            return {key: value for key, value in views.items() if value is not None}

        data = [sides(batch) for batch in batches()]
        if stored:
            for batch in data:
                with torch.no_grad():
                    outputs = [teacher.eval()(**batch["teacher"]) for teacher in teachers]
                batch["teacher_cache"] = outputs if len(outputs) > 1 else outputs[0]
                if form == "without":
                    del batch["teacher"]
            for teacher in teachers:
                teacher.forward = None
        config = {"is_caching_logits": form == "remembered"}
        setup = Setup(tmp_path / str(stored), kind, teachers, adaptor_T=reading, config=config)
        seed_all(0)
        setup.train(data)
        results.append(weights(setup.student))
    assert torch.equal(*results)


class Encoding(collections.UserDict):
    """What tokenizers of transformers return: like a dict, but not one."""


Fields = collections.namedtuple("Fields", ["input_ids", "attention_mask", "labels"])

FORMS = {
    "dict": dict,
    "ordered dict": collections.OrderedDict,
    "like a dict": Encoding,
    "tuple": lambda batch: tuple(batch.values()),
    "list": lambda batch: list(batch.values()),
    "named tuple": lambda batch: Fields(**batch),
}


@pytest.mark.parametrize("form", [*FORMS, "BatchEncoding"])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_forms_of_batches(kind, form, caching, tmp_path, monkeypatch):
    """The student is the same, whatever its batches come in; the adaptors get them as they came."""
    form_of = FORMS.get(form) or pytest.importorskip("transformers").BatchEncoding
    keep_order(monkeypatch)
    results, types = [], set()
    for make_batch in (dict, form_of):

        def reading(batch, outputs):
            types.add(type(batch))
            if not isinstance(batch, collections.abc.Mapping):
                batch = dict(zip(Fields._fields, batch, strict=True))
            return adaptor(batch, outputs)

        config = {"is_caching_logits": caching}
        setup = Setup(tmp_path / str(len(results)), kind, adaptor_T=reading, adaptor_S=reading, config=config)
        seed_all(0)
        setup.train([make_batch(batch) for batch in batches()])
        results.append(weights(setup.student))
    assert torch.equal(*results)
    assert type(form_of(batches()[0])) in types


class Bag(nn.Module):
    """Classifies rows of words; takes nothing but the words."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.EmbeddingBag(40, 3)

    def forward(self, words):
        return self.body(words)


class Recurrent(nn.Module):
    """Classifies packed sequences."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, packed):
        return self.head(self.body(packed)[1][0])


def packed_batches():
    generator = torch.Generator().manual_seed(0)
    return [pack_sequence([torch.randn(length, 3, generator=generator) for length in (4, 3, 1)]) for _ in range(4)]


@pytest.mark.parametrize(
    ("model", "data", "kind_of_batch"),
    [
        (Bag, lambda: [batch["input_ids"] for batch in batches()], torch.Tensor),
        (Recurrent, packed_batches, PackedSequence),
    ],
    ids=["bare tensor", "packed sequence"],
)
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_batches_of_one_object(kind, caching, model, data, kind_of_batch, tmp_path):
    seen = set()

    def reading(batch, outputs):
        seen.add(type(batch))
        return {"logits": outputs, "losses": outputs.square()}

    config = {"intermediate_matches": [], "is_caching_logits": caching}
    setup = Setup(tmp_path, kind, [model(1)], model(2), reading, reading, config=config)
    before = weights(setup.student)
    setup.train(data())
    assert seen == {kind_of_batch}
    assert not torch.equal(weights(setup.student), before)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_batch_postprocessor(kind, caching, tmp_path, monkeypatch):
    """The student is that of data processed beforehand; a batch is processed once each time it is read."""
    keep_order(monkeypatch)

    def process(batch):
        calls.append(1)
        return {**batch, "input_ids": batch["input_ids"].roll(1, dims=0)}

    calls, results = [], []
    ready = [process(batch) for batch in batches()]
    for arguments in ({"data": ready}, {"data": batches(), "batch_postprocessor": process}):
        setup = Setup(tmp_path / str(len(arguments)), kind, config={"is_caching_logits": caching})
        calls.clear()
        seed_all(0)
        setup.train(**arguments, num_steps=12)
        results.append(weights(setup.student))
    assert torch.equal(*results)
    if caching and kind != "BasicTrainer":
        assert len(calls) in (6, 12)  # once a batch of each task
    else:
        assert len(calls) == 12


@pytest.mark.parametrize("kind", EVERY)
def test_further_arguments_reach_the_models(kind, tmp_path):
    class Scaled(Encoder):
        def forward(self, *inputs, scale=1.0, **named):
            scales.append(scale)
            outputs = super().forward(*inputs, **named)
            return {**outputs, "logits": outputs["logits"] * scale}

    scales = []
    setup = Setup(tmp_path, kind, [Scaled(layers=2, width=48)], Scaled(layers=1))
    setup.train(scale=3.0, num_steps=2)
    assert scales == [3.0] * (2 if kind == "BasicTrainer" else 4)


# ---- compute_loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTILLERS)
def test_compute_loss_is_the_override_point(kind, tmp_path):
    """A subclass that doubles the loss doubles the movement of one step of plain gradient descent, and logs a term."""
    base, seen = getattr(textbrewer, kind), []

    class Mine(base):
        factor = 1.0

        def compute_loss(self, results_S, results_T):
            total, parts = super().compute_loss(results_S, results_T)
            first = results_T[0] if kind == "MultiTeacherDistiller" else results_T
            seen.append((len(results_S["hidden"]), len(first["hidden"]), "labels" in results_S, "value" in results_S))
            return self.factor * total, {**parts, "unweighted_mine": total.detach()}

    moved = []
    for factor in (1.0, 2.0):
        student = make_student(dropout=0.0)
        setup = Setup(tmp_path / str(factor), Mine, [make_teacher()], student)
        setup.distiller.factor = factor
        before = weights(student)
        logs = []
        step = setup.distiller.step
        setup.distiller.step = lambda *call, step=step, logs=logs: logs.append(step(*call)) or logs[-1]
        setup.train(optimizer=torch.optim.SGD(student.parameters(), lr=0.1), num_steps=1)
        moved.append(weights(student) - before)
        assert "unweighted_mine" in logs[0][1]
    assert seen == [(2, 3, True, False)] * 2
    assert torch.allclose(moved[1], 2 * moved[0], atol=1e-6)
    assert moved[0].norm() > 1e-3


@pytest.mark.parametrize("kind", DISTILLERS)
def test_logs_are_named_and_add_up(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    seen = setup.losses()
    setup.train()
    matches = {"unweighted_hidden_hidden_mse_1_2": 2, "unweighted_attention_attention_mse_0_1": 0.5}
    expected = {"unweighted_kd_loss": 1, "unweighted_hard_label_loss": 0.5}
    expected |= matches if kind != "BasicDistiller" else {}
    for entry in seen:
        assert set(entry) == {"total", *expected}
        assert entry["total"] == pytest.approx(sum(weight * entry[name] for name, weight in expected.items()), rel=1e-5)


@pytest.mark.parametrize("kind", DISTILLERS)
def test_weight_schedules(kind, tmp_path):
    """Growth from 0 and decay to 0 multiply the configured weights; the configuration stays."""
    config = {
        "kd_loss_weight": 3,
        "kd_loss_weight_scheduler": "linear_decay",
        "intermediate_matches": [],
        "hard_label_weight": 2,
        "hard_label_weight_scheduler": "linear_growth",
    }
    setup = Setup(tmp_path, kind, config=config)
    seen = setup.losses()
    setup.train(num_steps=8)
    for step, entry in enumerate(seen):
        x = step / 8
        expected = 3 * (1 - x) * entry["unweighted_kd_loss"] + 2 * x * entry["unweighted_hard_label_loss"]
        assert entry["total"] == pytest.approx(expected, rel=1e-5)
    assert (setup.distiller.d_config.kd_loss_weight, setup.distiller.d_config.hard_label_weight) == (3, 2)


# ---- again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTILLERS[1:])
def test_training_twice_adds_projections_once(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    optimizer = torch.optim.AdamW(setup.student.parameters(), lr=1e-2)
    for folder in ("first", "second"):
        setup.distiller.t_config.output_dir = str(tmp_path / folder)
        setup.train(optimizer=optimizer)
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    assert len(optimizer.param_groups) == 2
    assert len({id(value) for value in parameters}) == len(parameters) == len(list(setup.student.parameters())) + 2


@pytest.mark.parametrize("kind", EVERY)
def test_training_twice_is_like_training_once(kind, tmp_path):
    """Two trainings of six steps with one optimiser move the student as one of twelve does."""
    results = []
    for steps in ([12], [6, 6]):
        setup = Setup(tmp_path, kind, student=make_student(dropout=0.0), teachers=[make_teacher()])
        optimizer = torch.optim.AdamW(setup.student.parameters(), lr=1e-2)
        for number, count in enumerate(steps):
            setup.distiller.t_config.output_dir = str(tmp_path / f"{len(steps)} {number}")
            setup.train(optimizer=optimizer, num_steps=count)
        results.append(weights(setup.student))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", DISTILLERS)
def test_a_distiller_keeps_its_own_configuration(kind, tmp_path):
    setup = Setup(tmp_path, kind)
    config = setup.distiller.d_config
    models = {"a": make_teacher()} if kind == "MultiTaskDistiller" else [make_teacher()]
    models = models if kind.startswith("Multi") else models[0]
    named = {"a": adaptor} if kind == "MultiTaskDistiller" else adaptor
    other = getattr(textbrewer, kind)(setup.distiller.t_config, config, models, make_student(), named, named)
    config.temperature = 99
    assert other.d_config.temperature == 4


def test_epochs_of_a_shuffled_loader_are_those_of_a_plain_loop(tmp_path):
    """The loader is read as a ``for`` loop reads it: the same random numbers give the same rows in the same order."""
    setup = Setup(tmp_path, "GeneralDistiller", student=make_student(dropout=0.0))
    read = []
    seed_all(7)
    setup.train(
        make_loader(shuffle=True),
        num_steps=None,
        num_epochs=2,
        batch_postprocessor=lambda batch: read.append(batch["input_ids"]) or batch,
    )
    seed_all(7)
    expected = [batch["input_ids"] for loader in [make_loader(shuffle=True)] for _ in range(2) for batch in loader]
    assert len(read) == len(expected) == 12
    assert all(torch.equal(ours, plain) for ours, plain in zip(read, expected, strict=True))
