"""Small distillations with and without a teacher cache, that count what the teachers do: what these tests share."""

import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import textbrewer
from tests.conftest import CLASSES, VOCABULARY, Encoder, adaptor, make_config, make_loader, seed_all
from textbrewer import DistillationConfig, TeacherCache

KINDS = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller"]
MATCHES = [
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 2, "proj": ["linear", 32, 48]},
    {"layer_T": 1, "layer_S": 0, "feature": "attention", "loss": "attention_mse", "weight": 0.5},
]
# What a run on stored float32 may differ by, as a share of how far the student moved: sums in another order.
SAME = 1e-5


def watch(model):
    """A list to which each forward pass of a model adds how many rows it had."""
    rows = []

    def note(module, arguments, keywords):
        rows.append(len(next(iter([*arguments, *keywords.values()]))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def weights(*modules):
    """All weights of some modules in one vector, copied."""
    return torch.cat([value.detach().flatten() for module in modules for value in module.parameters()]).clone()


@dataclasses.dataclass
class Job:
    """A distiller with its models, by the name of its class or a subclass; ``cache`` is its ``teacher_cache``.

    ``calls[n]`` has the rows of each forward pass of teacher ``n``.
    """

    folder: object
    kind: str | type = "GeneralDistiller"
    cache: object = None
    teachers: list = None
    student: nn.Module = None
    adaptor_T: object = adaptor
    adaptor_S: object = adaptor
    training: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)
    custom: list = None

    def __post_init__(self):
        seed_all(0)  # the first weights of the projections are drawn
        kind = getattr(textbrewer, self.kind) if isinstance(self.kind, str) else self.kind
        several = issubclass(kind, (textbrewer.MultiTeacherDistiller, textbrewer.MultiTaskDistiller))
        if self.teachers is None:
            self.teachers = [Encoder(2, 48, seed=1), Encoder(2, 48, seed=3)][: 2 if several else 1]
        self.student = Encoder(1, 32, seed=2) if self.student is None else self.student
        self.calls = [watch(teacher) if teacher is not None else [] for teacher in self.teachers]
        self.tasks = ["a", "b"][: len(self.teachers)] if issubclass(kind, textbrewer.MultiTaskDistiller) else None
        matches = [] if issubclass(kind, textbrewer.BasicDistiller) else MATCHES
        settings = DistillationConfig(**{"hard_label_weight": 0.5, "intermediate_matches": matches, **self.config})
        teachers, adaptors = self.teachers, (self.adaptor_T, self.adaptor_S)
        if self.tasks:
            teachers = dict(zip(self.tasks, self.teachers, strict=True))
            adaptors = tuple(self.by_task(item) for item in adaptors)
        elif not issubclass(kind, textbrewer.MultiTeacherDistiller):
            (teachers,) = teachers
        more = {} if self.custom is None else {"custom_matches": self.custom}
        train_config = dataclasses.replace(make_config(self.folder), **self.training)
        self.distiller = kind(
            train_config, settings, teachers, self.student, *adaptors, **more, teacher_cache=self.cache
        )
        self.cache = self.distiller.teacher_cache
        self.start = weights(self.student)

    def by_task(self, item):
        """The same for every task, where there are tasks."""
        return dict.fromkeys(self.tasks, item) if self.tasks and not isinstance(item, dict) else item

    def train(self, data=None, **arguments):
        """Train with plain gradient descent, as if a task's data were those of every task; return the job."""
        seed_all(5)
        data = make_loader(24, 4, shuffle=True) if data is None else data
        length = {"num_steps": 18} if self.tasks else {"num_epochs": 3}
        if "num_steps" in arguments or "num_epochs" in arguments:
            length = {}
        optimizer = torch.optim.SGD(self.student.parameters(), lr=arguments.pop("lr", 0.1), momentum=0.5)
        data = self.by_task(data) if not isinstance(data, dict) else data
        self.distiller.train(optimizer, data, **length, **arguments)
        return self

    @property
    def end(self):
        """The weights of student and projections."""
        return weights(self.student, *self.distiller.projections.values())

    @property
    def rows(self):
        """Rows that all teachers were run on."""
        return sum(map(sum, self.calls))


def apart(one, other):
    """How far two students are from each other, as a share of how far the second one moved."""
    first, second = weights(one.student), weights(other.student)
    moved = (second - other.start).abs().max()
    assert moved > 1e-3
    return float((first - second).abs().max() / moved)


def cache_at(folder, dtype="float32", **options):
    return TeacherCache(folder / "cache", dtype, **options)


class Varied:
    """Rows of different lengths, padded to the longest of their batch, on the right or on the left."""

    def __init__(self, count=24, left=False, by_token=False, classes=CLASSES, spans=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 11, (count,), generator=generator).tolist()
        self.rows = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
        self.left, self.by_token, self.classes, self.spans = left, by_token, classes, spans

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]

    def pad(self, rows, fill=0):
        length = max(map(len, rows))
        whole = torch.full((len(rows), length), fill)
        for target, row in zip(whole, rows, strict=True):
            target[slice(length - len(row), None) if self.left else slice(0, len(row))] = row
        return whole

    def collate(self, rows):
        batch = {"input_ids": self.pad(rows), "attention_mask": self.pad([torch.ones_like(row) for row in rows])}
        if self.spans:
            first = torch.tensor([int(row[0]) % len(row) for row in rows])
            return {**batch, "start_positions": first, "end_positions": first}
        if self.by_token:
            labels = [(row % self.classes).masked_fill(row % 3 == 0, -100) for row in rows]
            return {**batch, "labels": self.pad(labels, -100)}
        return {**batch, "labels": torch.stack([row[0] % self.classes for row in rows])}

    def loader(self, batch_size=4, shuffle=True):
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=self.collate)


@pytest.fixture
def lines(caplog):
    """``lines()``: what the library said of its cache."""
    caplog.set_level(logging.INFO, logger="textbrewer")
    return lambda: [item.getMessage() for item in caplog.records if item.getMessage().startswith("Teacher cache")]
