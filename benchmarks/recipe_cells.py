"""What a cell of the experiments trains: kinds of methods, their settings, and one training from start to score.

The methods are listed in recipe_methods.py.
"""

from __future__ import annotations

import copy
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from recipe_models import LAYERS, anew, shorten
from recipe_pairs import fit_classifier
from recipe_tasks import Data, Task, evaluate
from torch.utils.data import DataLoader

import textbrewer

RATES = (2e-4, 4e-4)
BASELINE_RATES = (1e-4, 2e-4, 4e-4)
TEACHER_RATES = (1e-4,)  # as tuned in the quickstart
MODEL_DROPOUT = 0.1
KD = {"temperature": 4, "kd_loss_type": "kl", "hard_label_weight": 0, "is_caching_logits": True}


def precision() -> str:
    """Return the precision of all trainings on this machine: bf16 where its processor has products of that kind.

    Elsewhere they are emulated, 70 times slower than float32.
    """
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


@dataclass
class Work:
    """What a method's training is given.

    Args:
        task, data: what to learn.
        seed: of the new weights and of the batches' order.
        rate, dropout: as swept.
        epochs: of the training.
        base: the pretrained model with a new classifier.
        teachers: the fine-tuned ones, the own one first; empty where the method has none.
        folder: for checkpoints; gone afterwards.
        note: the callback of each epoch's end.
    """

    task: Task
    data: Data
    seed: int
    rate: float
    dropout: float
    epochs: int
    base: Any
    teachers: list[Any]
    folder: Path
    note: Callable[..., None]
    max_steps: int | None = None

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.epochs * len(self.data.train) if self.max_steps is None else self.max_steps

    @property
    def teacher(self) -> Any:
        """The own teacher."""
        return self.teachers[0]

    def loader(self) -> DataLoader[Any]:
        """Return the training batches in random order; seeds the order."""
        torch.manual_seed(self.seed)
        random.seed(self.seed)  # orders the batches whose teacher outputs are kept
        return DataLoader(self.data.train, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    def config(self) -> textbrewer.TrainingConfig:
        """Return how to train."""
        return textbrewer.TrainingConfig(
            output_dir=str(self.folder), precision=precision(), device="cpu", save_total_limit=1, progress_bar=False
        )

    def arguments(self, model: Any) -> dict[str, Any]:
        """Return the arguments of ``train()``."""
        return {
            "optimizer": textbrewer.recipes.make_optimizer(model, self.rate),
            "dataloader": self.loader(),
            "num_epochs": self.epochs,
            "scheduler_class": transformers.get_linear_schedule_with_warmup,
            "scheduler_args": {"num_warmup_steps": self.steps // 10, "num_training_steps": self.steps},
            "max_grad_norm": 1.0,
            "callback": self.note,
        }

    def student(self, method: Method) -> Any:
        """Return the layers of the pretrained or the fine-tuned model that a method begins with."""
        start = self.base if method.start == "pretrained" else self.teacher
        if method.start == "random":
            torch.manual_seed(self.seed)
            student = anew(self.base, self.dropout, method.layers)
        elif method.width is not None:
            student = narrowed(start, method, self.dropout)
        else:
            student = shorten(start, self.dropout, method.layers)
        return fit_classifier(student, self.data.train)


@dataclass(frozen=True)
class Method:
    """A way to train a model.

    Args:
        title: in the report.
        start: what the model is before: ``"pretrained"`` or ``"finetuned"`` layers, or ``"random"``.
        rates: learning rates that its sweep tries first, with ``dropouts[0]``.
        dropouts: the best rate is tried again with each further one.
        layers: those layers, counted from 0.
        swept: whether it has a sweep of its own; otherwise it takes what was found for ``hidden``.
        width: of the hidden states, the most important ones of the teacher's; ``None``: all.
        teachers: how many it learns from: the own one, and those of the other seeds of three.
        headline: whether the headline tasks have it.
    """

    title: str
    start: str = "finetuned"
    rates: tuple[float, ...] = RATES
    dropouts: tuple[float, ...] = (0.0,)
    swept: bool = False
    layers: tuple[int, ...] = LAYERS
    width: int | None = None
    teachers: int = 1
    headline: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a fine-tuned teacher must be there."""
        return self.start != "pretrained"

    def teacher_seeds(self, seed: int) -> list[int]:
        """Return the seeds of the teachers of a student of this seed."""
        if not self.needs_teacher:
            return []
        others = [other for other in range(3) if other != seed]
        return [seed, *others[: self.teachers - 1]]

    def seeds(self, task: Task) -> range:
        """Return the seeds of its final cells."""
        return range(task.seeds)

    def applies(self, task: Task) -> bool:
        """Return whether the method is used on a task."""
        return self.headline or not task.headline

    @property
    def shape(self) -> str:
        """Of the trained model: the latency's key."""
        return f"{len(self.layers)} layers" + ("" if self.width is None else f" of width {self.width}")

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        return {"start": self.start, "layers": list(self.layers)}

    def epochs(self, task: Task) -> int:
        """Return the number of epochs."""
        return task.epochs

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        raise NotImplementedError


@dataclass(frozen=True)
class Supervised(Method):
    """Without a teacher in the training."""

    rates: tuple[float, ...] = BASELINE_RATES
    dropouts: tuple[float, ...] = (MODEL_DROPOUT,)
    swept: bool = True

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        model = work.student(self)
        return supervise(work, model)


@dataclass(frozen=True)
class Teacher(Method):
    """The whole pretrained model, fine-tuned."""

    start: str = "pretrained"
    rates: tuple[float, ...] = TEACHER_RATES
    dropouts: tuple[float, ...] = (MODEL_DROPOUT,)
    swept: bool = True
    layers: tuple[int, ...] = tuple(range(6))

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        return supervise(work, fit_classifier(work.base, work.data.train))


@dataclass(frozen=True)
class Distilled(Method):
    """With the library's distiller.

    Args:
        learn: settings of :class:`textbrewer.DistillationConfig`.
    """

    learn: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        return {**super().settings(), "distillation": self.learn}

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        student = work.student(self)
        learn = textbrewer.DistillationConfig.from_dict(copy.deepcopy(self.learn))
        with textbrewer.GeneralDistiller(work.config(), learn, work.teacher, student, "auto", "auto") as distiller:
            distiller.train(**work.arguments(student))
        return student


@dataclass(frozen=True)
class Recipe(Method):
    """With a named recipe of the library.

    Args:
        recipe: its name.
        options: further arguments of :func:`textbrewer.distill`.
    """

    recipe: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        return {**super().settings(), "recipe": self.recipe, "options": self.options, "teachers": self.teachers}

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        student = work.student(self)
        return textbrewer.distill(
            work.teachers if self.teachers > 1 else work.teacher,
            student,
            recipe=self.recipe,
            dataloader=work.loader(),
            num_steps=work.steps,
            learning_rate=work.rate,
            output_dir=str(work.folder),
            callback=work.note,
            train_config=work.config(),
            **{"is_caching_logits": True, **copy.deepcopy(self.options)},
        )


def narrowed(model: Any, method: Method, dropout: float) -> Any:
    """Return the student of a method with a width: the model's most important features, of its layers."""
    assert method.width is not None
    width = min(method.width, model.config.hidden_size // 2)  # the model that only tries the script is narrower
    return textbrewer.init_student_from_teacher(model, layers=list(method.layers), hidden=width, dropout=dropout)


def supervise(work: Work, model: Any) -> Any:
    """Train a model on the labels, and return it."""
    with textbrewer.BasicTrainer(work.config(), model, adaptor="auto") as trainer:
        trainer.train(**work.arguments(model))
    return model


def count(model: Any) -> int | None:
    """Return how many parameters a model has, ``None`` if it is none."""
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


class Curve:
    """The callback: scores the model at each epoch's end, and keeps the time that this takes.

    Args:
        task, data: to be scored on.
    """

    def __init__(self, task: Task, data: Data) -> None:
        self.task, self.data = task, data
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self._before = self._last = 0  # steps of the stages before, and the last step that was told

    def __call__(self, model: Any, step: int) -> None:
        """Add a point; a step smaller than the last begins a recipe's next stage."""
        start = time.perf_counter()
        if step < self._last:
            self._before += self._last
        self._last = step
        found = evaluate(self.task, model, self.data.held_out)
        point = {name: round(value, 4) for name, value in sorted(found.items())}
        self.points.append({"step": self._before + step, **point})
        self.seconds += time.perf_counter() - start


def train(method: Method, work: Work) -> tuple[Any, dict[str, Any]]:
    """Train and score; return the model, and the score, learning curve, seconds and sizes."""
    curve = Curve(work.task, work.data)
    work.note = curve
    work.folder.mkdir(parents=True, exist_ok=True)
    work.folder = Path(tempfile.mkdtemp(dir=work.folder))
    start = time.perf_counter()
    try:
        model = method.fit(work)
        wall = time.perf_counter() - start
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
    trained = wall - curve.seconds
    last = {name: round(value, 4) for name, value in sorted(evaluate(work.task, model, work.data.held_out).items())}
    if not math.isfinite(last["loss"]):
        raise ValueError(f"the loss on the held-out rows must be finite, got {last['loss']}")
    return model, {
        **last,
        "curve": curve.points,
        "seconds": round(trained, 2),
        "wall_seconds": round(wall, 2),
        "steps": work.steps,
        "parameters": count(model),
        "encoder_parameters": count(getattr(getattr(model, "bert", None), "encoder", None)),
    }
