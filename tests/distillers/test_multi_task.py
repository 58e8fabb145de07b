"""Several tasks: how they are drawn, what each trains, and under which names it is logged."""

import collections

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.distillers.setups import MATCHES, batches, make_student, make_teacher
from textbrewer import DistillationConfig, MultiTaskDistiller
from textbrewer.engine.batches import LoaderBatches, TaskBatches, task_weights


def make(folder, tasks=("a", "b"), adaptors_S=None, student=None, teachers=None, training=None, **config):
    teachers = teachers or {task: make_teacher(seed) for seed, task in enumerate(tasks, 1)}
    adaptors_T = dict.fromkeys(tasks, adaptor)
    student = student or make_student(dropout=0.0)
    settings = DistillationConfig(**config)
    return MultiTaskDistiller(
        make_config(folder, **(training or {})), settings, teachers, student, adaptors_T, adaptors_S or adaptors_T
    )


def train(distiller, loaders, num_steps=4, **arguments):
    optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=0.1)
    distiller.train(optimizer, loaders, num_steps, **arguments)


def drawn_in(distiller):
    """A list to which each step adds its task and its logs."""
    seen, step = [], distiller.step

    def watched(module, batch, progress, share):
        loss, logs = step(module, batch, progress, share)
        seen.append((batch.task, {name: value.item() for name, value in logs.items()}))
        return loss, logs

    distiller.step = watched
    return seen


# ---- drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "tau", "expected"),
    [
        ([1, 3], 1, [1 / 4, 3 / 4]),
        ([1, 3], 0, [1 / 2, 1 / 2]),
        ([1, 9], 0.5, [1 / 4, 3 / 4]),
        ([2, 3, 5], 2, [4 / 38, 9 / 38, 25 / 38]),
        ([1, 3], -1, [3 / 4, 1 / 4]),
        ([1, None], 1, None),
        ([None, None], 1, None),
    ],
)
def test_task_weights(sizes, tau, expected):
    found = task_weights(sizes, tau)
    assert found is None if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(("tau", "probability"), [(1, 1 / 4), (0, 1 / 2), (2, 1 / 10)])
def test_frequencies(tau, probability):
    """Within four standard deviations of the binomial distribution."""
    sources = {"a": LoaderBatches([1]), "b": LoaderBatches([1, 2, 3])}
    tasks = TaskBatches(sources, tau, lambda task, batch: task)
    count = 2000
    found = collections.Counter(tasks.next_forever() for _ in range(count))["a"]
    deviation = (count * probability * (1 - probability)) ** 0.5
    assert abs(found - count * probability) < 4 * deviation


@pytest.mark.parametrize("tau", [1, 0, 0.5])
def test_tasks_are_drawn_as_text_brewer_draws_them(tau, tmp_path):
    """One ``numpy.random.choice`` a micro-batch, in the order of the dict, with probability size ** tau."""
    distiller = make(tmp_path, training={"gradient_accumulation_steps": 2})
    seen = drawn_in(distiller)
    np.random.seed(3)
    train(distiller, {"a": make_loader(24), "b": make_loader(8)}, num_steps=6, tau=tau)
    np.random.seed(3)
    weights = [6**tau / (6**tau + 2**tau), 2**tau / (6**tau + 2**tau)]
    assert [task for task, _ in seen] == [str(np.random.choice(["a", "b"], p=weights)) for _ in range(12)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(batches(8))


def test_without_lengths_tasks_are_drawn_uniformly(tmp_path):
    distiller = make(tmp_path)
    seen = drawn_in(distiller)
    np.random.seed(3)
    train(distiller, {"a": DataLoader(Stream(), batch_size=None), "b": make_loader(24)}, num_steps=12)
    np.random.seed(3)
    assert [task for task, _ in seen] == [str(np.random.choice(["a", "b"])) for _ in range(12)]


def test_each_task_reads_its_own_data_in_order(tmp_path):
    read = {"a": [], "b": []}

    def note(task):
        return lambda batch: read[task].append(batch["input_ids"]) or batch

    data = {"a": batches(12), "b": batches(8, seed=5)}
    train(make(tmp_path), data, num_steps=12, batch_postprocessors={task: note(task) for task in data})
    assert len(read["a"]) + len(read["b"]) == 12
    for task, items in read.items():
        assert len(items) > 0
        for number, ids in enumerate(items):
            assert torch.equal(ids, data[task][number % len(data[task])]["input_ids"])


# ---- training ----------------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """One body, a head for each task."""

    def __init__(self):
        super().__init__()
        self.body = Encoder(layers=1, dropout=0.0, seed=2)
        self.head = nn.ModuleDict({"a": nn.Linear(32, 3), "b": nn.Linear(32, 3)})

    def forward(self, **batch):
        states = self.body(**batch)["hidden"][-1]
        return {task: head(states[:, 0]) for task, head in self.head.items()}


def reading(task):
    return lambda batch, outputs: {"logits": outputs[task]}


def test_a_task_trains_its_own_head(tmp_path):
    student = TwoHeads()
    before = {task: head.weight.detach().clone() for task, head in student.head.items()}
    distiller = make(tmp_path, adaptors_S={task: reading(task) for task in "ab"}, student=student)
    seen = drawn_in(distiller)
    moved = {}

    def callback(model, step):
        moved[step] = {task: not torch.equal(head.weight, before[task]) for task, head in model.head.items()}

    distiller.t_config.ckpt_steps = 1
    train(distiller, dict.fromkeys("ab", batches()), num_steps=6, callback=callback)
    for step, found in moved.items():
        assert found == {task: task in [drawn for drawn, _ in seen[:step]] for task in "ab"}


def test_each_task_has_its_teacher(tmp_path):
    """The loss of a step, by hand, from the teacher of its task."""
    teachers = {"a": make_teacher(1), "b": make_teacher(3)}
    distiller = make(tmp_path, teachers=teachers, temperature=1)
    seen = drawn_in(distiller)
    (batch,) = batches(4)
    distiller.train(torch.optim.SGD(distiller.model_S.parameters(), lr=1e-12), {task: [batch] for task in "ab"}, 8)
    with torch.no_grad():
        logits = distiller.model_S(**batch)["logits"]
        expected = {
            task: -(teacher.eval()(**batch)["logits"].softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().item()
            for task, teacher in teachers.items()
        }
    assert {task for task, _ in seen} == {"a", "b"}
    for task, logs in seen:
        assert logs["unweighted_kd_loss"] == pytest.approx(expected[task], rel=1e-4)


def test_losses_are_logged_by_task(tmp_path):
    """Each under TextBrewer's name and under its task's."""
    distiller = make(tmp_path, intermediate_matches=MATCHES, hard_label_weight=1)
    seen = drawn_in(distiller)
    train(distiller, dict.fromkeys("ab", batches()), num_steps=8)
    names = ["kd_loss", "hard_label_loss", "hidden_hidden_mse_1_2", "attention_attention_mse_0_1"]
    for task, logs in seen:
        assert set(logs) == {f"{prefix}unweighted_{name}" for name in names for prefix in ("", f"{task}/")}
        for name in names:
            assert logs[f"{task}/unweighted_{name}"] == logs[f"unweighted_{name}"]


def test_ready_made_adaptors_beside_others(tmp_path):
    """Only models behind ``"auto"`` are asked for hidden states; in whatever order the tasks come."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=3
    )
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}

    def own(batch, outputs):
        asked.append(outputs.hidden_states is not None)
        return {"logits": outputs.logits, "hidden": [outputs.logits] * 2}

    for tasks in ("ab", "ba"):
        asked = []
        models = {task: transformers.BertForSequenceClassification(config) for task in "abS"}
        student = models.pop("S")
        adaptors = {task: "auto" if task == "a" else own for task in tasks}
        distiller = MultiTaskDistiller(
            make_config(tmp_path / tasks),
            DistillationConfig(intermediate_matches=[match]),
            {task: models[task] for task in tasks},
            student,
            adaptors,
            adaptors,
        )
        train(distiller, {task: batches() for task in tasks}, num_steps=8)
        assert set(asked) == {False}


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_T", "adaptor_T", "adaptor_S"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda item: [item["a"]], TypeError, "must be a dict by task name, got list"),
        (lambda item: {}, TypeError, "must be a dict by task name"),
        (lambda item: {"a": item["a"]}, KeyError, r"must have the tasks of model_T"),
    ],
    ids=["list", "empty", "other tasks"],
)
def test_wrong_dicts(name, value, error, message, tmp_path):
    arguments = {
        "model_T": {"a": make_teacher(), "b": make_teacher()},
        "adaptor_T": dict.fromkeys("ab", adaptor),
        "adaptor_S": dict.fromkeys("ab", adaptor),
    }
    arguments[name] = value(arguments[name])
    who = "adaptor_T" if name == "model_T" and error is KeyError else name
    with pytest.raises(error, match=f"{who} {message}"):
        MultiTaskDistiller(make_config(tmp_path), DistillationConfig(), model_S=make_student(), **arguments)


@pytest.mark.parametrize(
    ("loaders", "arguments", "error", "message"),
    [
        (batches, {}, TypeError, "dataloaders must be a dict by task name, got list"),
        (
            lambda: {"a": batches()},
            {},
            KeyError,
            r"dataloaders must have the tasks of model_T, \['a', 'b'\], got \['a'\]",
        ),
        (lambda: dict.fromkeys("abc", batches()), {}, KeyError, r"got \['a', 'b', 'c'\]"),
        (lambda: {"a": batches(), "b": []}, {}, ValueError, "at least one batch"),
        (lambda: dict.fromkeys("ab", batches()), {"tau": "1"}, TypeError, "tau must be a number, got '1'"),
        (
            lambda: dict.fromkeys("ab", batches()),
            {"batch_postprocessors": {"c": dict}},
            KeyError,
            "batch_postprocessors: unknown key 'c'",
        ),
    ],
    ids=["list", "missing", "more", "empty", "tau", "postprocessor"],
)
def test_wrong_arguments(loaders, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(make(tmp_path), loaders(), **arguments)
