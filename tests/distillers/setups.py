"""Every distiller on the same tiny models: how each is made and trained."""

import dataclasses
import random

import torch
from torch import nn

import textbrewer
from tests.conftest import Encoder, adaptor, make_config, make_loader, seed_all
from textbrewer import DistillationConfig

DISTILLERS = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller"]
EVERY = [*DISTILLERS, "BasicTrainer"]
MATCHES = [
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 2, "proj": ["linear", 32, 48]},
    {"layer_T": 1, "layer_S": 0, "feature": "attention", "loss": "attention_mse", "weight": 0.5},
]


def make_teacher(seed=1, by_token=False):
    return Encoder(layers=2, width=48, by_token=by_token, seed=seed)


def make_student(dropout=0.1, by_token=False):
    return Encoder(layers=1, dropout=dropout, by_token=by_token, seed=2)


def batches(count=24, batch_size=4, **options):
    """A loader's batches as a list, which draws no random numbers when it is read."""
    return list(make_loader(count, batch_size, **options))


@dataclasses.dataclass
class Setup:
    """A distiller, by the name of its class or a subclass, with the models it is made of.

    ``config`` goes to DistillationConfig; but for Basic, which takes none, there are two matches.
    """

    folder: object
    kind: str | type = "GeneralDistiller"
    teachers: list[nn.Module] = None
    student: nn.Module = None
    adaptor_T: object = adaptor
    adaptor_S: object = adaptor
    training: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        seed_all(0)  # the first weights of the projections are drawn
        kind = getattr(textbrewer, self.kind) if isinstance(self.kind, str) else self.kind
        several = issubclass(kind, (textbrewer.MultiTeacherDistiller, textbrewer.MultiTaskDistiller))
        if self.teachers is None:
            self.teachers = [make_teacher(1), make_teacher(3)][: 2 if several else 1]
        self.student = make_student() if self.student is None else self.student
        self.tasks = ["a", "b"][: len(self.teachers)] if issubclass(kind, textbrewer.MultiTaskDistiller) else None
        train_config = make_config(self.folder, **self.training)
        if issubclass(kind, textbrewer.BasicTrainer):
            self.distiller = kind(train_config, self.student, self.adaptor_S)
            return
        matches = [] if issubclass(kind, textbrewer.BasicDistiller) else MATCHES
        settings = DistillationConfig(**{"hard_label_weight": 0.5, "intermediate_matches": matches, **self.config})
        teachers, adaptor_T, adaptor_S = self.teachers, self.adaptor_T, self.adaptor_S
        if self.tasks:
            teachers = dict(zip(self.tasks, self.teachers, strict=True))
            adaptor_T, adaptor_S = (self.by_task(item) for item in (adaptor_T, adaptor_S))
        elif not issubclass(kind, textbrewer.MultiTeacherDistiller):
            (teachers,) = teachers
        self.distiller = kind(train_config, settings, teachers, self.student, adaptor_T, adaptor_S)

    def by_task(self, item):
        """The same for every task, where there are tasks."""
        return dict.fromkeys(self.tasks, item) if self.tasks else item

    def train(self, data=None, optimizer=None, **arguments):
        """Train, as if a task's data were those of every task; return the optimiser."""
        optimizer = optimizer or torch.optim.AdamW(self.student.parameters(), lr=1e-2)
        data = batches() if data is None else data
        postprocess = arguments.pop("batch_postprocessor", None)
        if postprocess is not None:
            arguments["batch_postprocessors" if self.tasks else "batch_postprocessor"] = self.by_task(postprocess)
        self.distiller.train(optimizer, self.by_task(data), **{"num_steps": 6, **arguments})
        return optimizer

    def losses(self):
        """A list to which each step adds its loss terms, as numbers."""
        seen, compute = [], self.distiller.compute_loss

        def watched(results_S, results_T):
            total, parts = compute(results_S, results_T)
            seen.append({name: value.item() for name, value in {"total": total, **parts}.items()})
            return total, parts

        self.distiller.compute_loss = watched
        return seen


def weights(model):
    """All of a model's tensors in one vector, copied."""
    return torch.cat([value.detach().flatten() for value in model.state_dict().values()]).clone()


def keep_order(monkeypatch):
    """Remembered batches come in the loader's order."""
    monkeypatch.setattr(random, "shuffle", lambda items: None)
