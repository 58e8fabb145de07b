"""Whole training runs by name, small enough to repeat from every checkpoint: what the tests of resuming share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Sampler

from tests.conftest import CLASSES, Encoder, Rows, adaptor, make_config, make_loader, seed_all
from textbrewer import (
    BasicDistiller,
    BasicTrainer,
    DistillationConfig,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
)
from textbrewer.engine import rng

STUDENT_SEED, TEACHER_SEED = 1, 2
PROJECTED = [
    {"layer_T": 2, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": ["linear", 32, 48]},
    {
        "layer_T": 1,
        "layer_S": 1,
        "feature": "hidden",
        "loss": "cos",
        "weight": 0.5,
        "proj": ["tanh", 32, 48, {"lr": 0.02}],
    },
    {"layer_T": 0, "layer_S": 0, "feature": "attention", "loss": "attention_mse", "weight": 1},
]


@dataclass
class Scenario:
    """One way to train. All functions make new objects; ``{}`` where a default does.

    Args:
        kind: which distiller.
        loader: makes the loader.
        length: ``num_epochs`` or ``num_steps``.
        config: settings of the training, beside the checkpoints'.
        distill: settings of the distillation.
        train: further arguments of ``train()``; ``callback`` is one of this module's.
        distiller: further arguments of the distiller.
    """

    kind: str = "basic"
    loader: Callable[[], Any] = make_loader
    length: dict[str, int] = field(default_factory=lambda: {"num_epochs": 2})
    config: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    distiller: dict[str, Any] = field(default_factory=dict)


class TwoHeads(Encoder):
    """An encoder with a head for each of the tasks ``a`` and ``b``."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.other = nn.Linear(32, CLASSES)

    def forward(self, input_ids, attention_mask, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels)
        return {**outputs, "other": self.other(outputs["hidden"][-1].mean(dim=1))}


def other_head(batch, outputs):
    """The adaptor of task ``b``."""
    return {"logits": outputs["other"]}


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, count: int) -> None:
        self.rows = Rows(count)

    def __iter__(self):
        return (self.rows[number] for number in range(len(self.rows)))


class NumPyOrder:
    """A loader of one's own: no DataLoader, a new order from NumPy's generator every pass."""

    def __init__(self) -> None:
        self.batches = list(make_loader(20))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return (self.batches[number] for number in np.random.permutation(len(self.batches)))


class EpochOrder(Sampler):
    """A sampler that is told the epoch and has no other source of randomness."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(random.Random(self.epoch).sample(range(self.count), self.count))


def hide_tokens(rows):
    """A collate function that draws random numbers, as for masked language models."""
    batch = torch.utils.data.default_collate(rows)
    hidden = torch.rand(batch["input_ids"].shape) < 0.2
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 0)}


def draw_numbers(model, step):
    """A callback that leaves all global generators in another state."""
    random.random(), np.random.rand(3), torch.rand(step + 1)


def half_as_fast(step):
    """A learning-rate schedule with a warm-up."""
    return min(1.0, (step + 1) / 3) / (1 + 0.5 * step)


def shuffled(**options):
    return lambda: make_loader(22, shuffle=True, **options)


def own_generator():
    return make_loader(24, shuffle=True, generator=torch.Generator().manual_seed(int(torch.randint(9**9, ()))))


SCENARIOS: dict[str, Scenario] = {
    "basic, epochs, in order": Scenario(),
    "basic, epochs, shuffled": Scenario(loader=shuffled(), distill={"hard_label_weight": 1}),
    "basic, steps, shuffled": Scenario(loader=shuffled(), length={"num_steps": 11}),
    "general, projections, accumulation": Scenario(
        "general",
        shuffled(),
        config={"gradient_accumulation_steps": 4},
        distill={"intermediate_matches": PROJECTED},
        length={"num_epochs": 3},
        train={"max_grad_norm": 0.5, "scheduler_class": LambdaLR, "scheduler_args": {"lr_lambda": half_as_fast}},
    ),
    "general, steps, exact accumulation": Scenario(
        "general",
        shuffled(),
        config={"gradient_accumulation_steps": 4, "accumulation_weighting": "positions"},
        distill={"intermediate_matches": PROJECTED, "hard_label_weight": 1},
        length={"num_steps": 6},
    ),
    "general, cached": Scenario(
        "general",
        shuffled(),
        distill={"intermediate_matches": PROJECTED, "is_caching_logits": True},
        length={"num_epochs": 3},
        train={"callback": draw_numbers},
    ),
    "basic, cached, steps": Scenario(loader=shuffled(), distill={"is_caching_logits": True}, length={"num_steps": 14}),
    "multi-teacher": Scenario("multi_teacher", shuffled()),
    "multi-teacher, sample": Scenario(
        "multi_teacher",
        shuffled(),
        distill={"intermediate_matches": [{**PROJECTED[0], "teacher": 0}]},
        distiller={"target": ["sample", {"weights": [2, 1], "seed": 5}]},
        length={"num_steps": 13},
    ),
    "multi-teacher, gate": Scenario("multi_teacher", shuffled(), distiller={"target": ["gate", {"size": 8}]}),
    "multi-teacher, uncertainty": Scenario("multi_teacher", shuffled(), distiller={"target": "uncertainty"}),
    "multi-task, uncertainty": Scenario(
        "multi_task", length={"num_steps": 13}, distiller={"task_weights": "uncertainty"}
    ),
    "multi-task": Scenario("multi_task", length={"num_steps": 13}, train={"tau": 0.5}),
    "multi-task, cached": Scenario("multi_task", length={"num_steps": 13}, distill={"is_caching_logits": True}),
    "trainer": Scenario("trainer", shuffled(), train={"max_grad_norm": 1.0}),
    "own generator": Scenario(loader=own_generator, length={"num_epochs": 3}),
    "own generator, steps": Scenario(loader=own_generator, length={"num_steps": 14}),
    "workers": Scenario(loader=shuffled(num_workers=2)),
    "workers, own generator": Scenario(
        loader=lambda: make_loader(22, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(3))
    ),
    "without a length": Scenario(loader=lambda: DataLoader(Stream(22), batch_size=4)),
    "without a length, accumulation": Scenario(
        loader=lambda: DataLoader(Stream(22), batch_size=4), config={"gradient_accumulation_steps": 4}
    ),
    "without a length, steps": Scenario(loader=lambda: DataLoader(Stream(22), batch_size=4), length={"num_steps": 9}),
    "a list of batches": Scenario(loader=lambda: list(make_loader(20))),
    "a loader of one's own": Scenario(loader=NumPyOrder),
    "sampler with epochs": Scenario(loader=lambda: make_loader(20, sampler=EpochOrder(20))),
    "random collate": Scenario(loader=lambda: make_loader(20, shuffle=True, collate_fn=hide_tokens)),
    "random callback": Scenario(loader=shuffled(), train={"callback": draw_numbers}),
    "weight schedules": Scenario(
        loader=shuffled(),
        distill={
            "hard_label_weight": 1,
            "hard_label_weight_scheduler": "linear_growth",
            "kd_loss_weight_scheduler": "linear_decay",
            "temperature_scheduler": ["flsw", 1, 1],
        },
    ),
    "bf16": Scenario(loader=shuffled(), config={"precision": "bf16"}),
}


class Run:
    """One run of a scenario: its objects, made anew.

    Args:
        name: the scenario's name.
        folder: the output folder.
        seed: of the global generators and of the student; the teachers and the data are always the same. A run that
            is resumed is made with another seed: all that matters must come from the checkpoint.
        every_step: write a checkpoint after each step (or with ``num_epochs`` as often as the scenario allows).
        **settings: further training settings.
    """

    def __init__(self, name: str, folder: Path, seed: int = 0, every_step: bool = True, **settings: Any) -> None:
        scenario = self.scenario = SCENARIOS[name]
        seed_all(seed)
        self.loader = self._loaders() if scenario.kind == "multi_task" else scenario.loader()
        often: dict[str, Any] = {"save_total_limit": None}
        if every_step and "num_steps" in scenario.length:
            often["ckpt_steps"] = 1
        elif every_step and hasattr(self.loader, "__len__") and not isinstance(self.loader, dict):
            try:
                accumulation = scenario.config.get("gradient_accumulation_steps", 1)
                often["ckpt_frequency"] = -(-len(self.loader) // accumulation)
            except TypeError:
                pass
        self.config = make_config(folder, **{**often, **scenario.config, **settings})
        student = STUDENT_SEED + seed
        self.student: nn.Module = TwoHeads(student) if scenario.kind == "multi_task" else Encoder(seed=student)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.01)
        self.distiller = self._distiller()

    def _loaders(self) -> dict[str, Any]:
        return {"a": make_loader(20, shuffle=True), "b": make_loader(12, shuffle=True, seed=5)}

    def _distiller(self) -> Any:
        kind, config = self.scenario.kind, DistillationConfig(**self.scenario.distill)
        teacher = Encoder(width=48, seed=TEACHER_SEED)
        if kind == "trainer":
            return BasicTrainer(self.config, self.student, adaptor)
        if kind == "basic":
            return BasicDistiller(self.config, config, teacher, self.student, adaptor, adaptor)
        if kind == "general":
            return GeneralDistiller(self.config, config, teacher, self.student, adaptor, adaptor)
        if kind == "multi_teacher":
            teachers = [teacher, Encoder(width=16, seed=TEACHER_SEED + 1)]
            more = self.scenario.distiller
            return MultiTeacherDistiller(self.config, config, teachers, self.student, adaptor, adaptor, **more)
        teachers_by_task = {"a": teacher, "b": Encoder(seed=TEACHER_SEED + 1)}
        return MultiTaskDistiller(
            self.config,
            config,
            teachers_by_task,
            self.student,
            {"a": adaptor, "b": adaptor},
            {"a": adaptor, "b": other_head},
            **self.scenario.distiller,
        )

    def train(self, resume_from: Any = None, **arguments: Any) -> Run:
        """Train to the end."""
        more = {**self.scenario.length, **self.scenario.train, **arguments}
        self.distiller.train(self.optimizer, self.loader, resume_from=resume_from, **more)
        return self

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run must share with an uninterrupted one."""
        learner = getattr(self.distiller, "learner", None)
        return {
            "student": self.student.state_dict(),
            "projections": {
                str(number): module.state_dict()
                for number, module in getattr(self.distiller, "projections", {}).items()
            },
            **({} if learner is None else {"learned": learner.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "random": rng.take(),
        }


def distil(folder: Path, loader: Any, length: dict[str, int], **settings: Any) -> GeneralDistiller:
    """Distil a wider teacher into a small student without dropout by plain gradient descent, and return the distiller.

    Args:
        folder: the output folder.
        loader: the loader.
        length: ``num_epochs`` or ``num_steps``.
        **settings: ``student``, ``teacher``, ``adaptor_T``, ``adaptor_S``, ``lr``; ``distill`` and ``train``, dicts of
            settings of the distillation and arguments of ``train()``; all others are settings of the training.
    """
    seed_all(0)
    student = settings.pop("student", None) or Encoder(dropout=0.0, seed=STUDENT_SEED)
    teacher = settings.pop("teacher", None) or Encoder(width=48, seed=TEACHER_SEED)
    adaptor_T, adaptor_S = settings.pop("adaptor_T", adaptor), settings.pop("adaptor_S", adaptor)
    learning_rate = settings.pop("lr", 0.1)
    distill, train = settings.pop("distill", {}), settings.pop("train", {})
    distiller = GeneralDistiller(
        make_config(folder, **settings), DistillationConfig(**distill), teacher, student, adaptor_T, adaptor_S
    )
    distiller.train(torch.optim.SGD(student.parameters(), lr=learning_rate), loader, **length, **train)
    return distiller


def weights(distiller: Any) -> Tensor:
    """Return all weights of student and projections in one vector."""
    modules = [distiller.model_S, *distiller.projections.values()]
    return torch.cat([parameter.detach().flatten() for module in modules for parameter in module.parameters()])


def equal(first: Any, second: Any) -> bool:
    """Return whether two nests of tensors and plain values are equal bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def checkpoints(folder: Path) -> list[Path]:
    """Return the resume checkpoints of a folder by their step."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
