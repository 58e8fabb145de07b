"""What the compression experiments compare: ways to make the fine-tuned MiniLM smaller, in the same number of steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from recipe_cells import KD, Method, Work, supervise
from recipe_methods import METHODS
from torch import nn

import textbrewer
from textbrewer import compression

TASK = "sst2"
SIX = tuple(range(6))
HEADS_AND_UNITS = {50: (0.5, 0.5), 70: (8 / 12, 0.72)}
"""Shares of the heads and feed-forward units that make up so many percent of the encoder's parameters."""
MOVEMENT: dict[str, Any] = {"score_optimizer": "sgd"}
"""A student that begins as its teacher has next to no gradients at first, which Adam would make large."""
SAME_LAYERS = [{"layer_T": n, "layer_S": n, "feature": "hidden", "loss": "hidden_mse", "weight": 3} for n in range(7)]
TO_CHOOSE, TO_CALIBRATE = 32, 32
"""Batches of the training rows that scores, and the inputs of linear maps, are taken from."""


@dataclass(frozen=True)
class Compressed(Method):
    """A model made out of the fine-tuned one, all of whose layers it begins with.

    Args:
        percent: of the encoder's parameters that go.
    """

    layers: tuple[int, ...] = SIX
    percent: int = 50

    def applies(self, task: Any) -> bool:
        """Return whether the method is used on a task."""
        return bool(task.name == TASK)

    @property
    def shape(self) -> str:
        """Of the model: the latency's key."""
        return f"{self.percent}% pruned"

    def example(self, model: nn.Module) -> nn.Module:
        """Return a copy of a whole model in this one's shape, for its latency."""
        heads, ffn = HEADS_AND_UNITS[self.percent]
        return compression.Prune(heads=heads, ffn=ffn, score="random").apply(model).shrink()


@dataclass(frozen=True)
class Pruned(Compressed):
    """Heads and feed-forward units pruned, before or during the training.

    Args:
        how: ``"l2"``, ``"taylor"``: scores; ``"movement"``, ``"cofi"``: trained masks.
        gradual: during the training instead of before.
        distilled: the training is by the teacher, else by the labels.
    """

    how: str = "l2"
    gradual: bool = True
    distilled: bool = True

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        heads, ffn = HEADS_AND_UNITS[self.percent]
        amounts: dict[str, Any] = {"heads": heads, "ffn": ffn}
        if self.how == "cofi":
            amounts = {"target": self.percent / 100}
        if self.how == "movement":
            amounts |= MOVEMENT
        return {**super().settings(), **amounts, "how": self.how, "gradual": self.gradual, "distilled": self.distilled}

    def fit(self, work: Work) -> Any:
        """Prune, train, and return the smaller model."""
        student, callbacks = work.student(self), []
        if self.gradual:
            callbacks = [self.pruning()]
        else:
            chosen = list(work.loader())[:TO_CHOOSE] if self.how == "taylor" else None
            student = self.plan().apply(student, chosen).shrink()
        if self.distilled:
            learn = textbrewer.DistillationConfig.from_dict(copy.deepcopy(self.lesson()))
            with textbrewer.GeneralDistiller(work.config(), learn, work.teacher, student, "auto", "auto") as distiller:
                distiller.train(**work.arguments(student), step_callbacks=callbacks)
        else:
            supervise(work, student)
        return small(student, callbacks[0]) if callbacks else student

    def plan(self) -> compression.Prune:
        """Return what goes, by a score."""
        heads, ffn = HEADS_AND_UNITS[self.percent]
        return compression.Prune(heads=heads, ffn=ffn, score=self.how)

    def pruning(self) -> Any:
        """Return the callback that prunes while the student learns."""
        heads, ffn = HEADS_AND_UNITS[self.percent]
        if self.how == "movement":
            return compression.MovementPruning({"heads": heads, "ffn": ffn}, structure="units", end=0.6, **MOVEMENT)
        if self.how == "cofi":
            return compression.HardConcretePruning(self.percent / 100, lr=0.05)
        return compression.GradualPruning(self.plan(), end=0.6)

    def lesson(self) -> dict[str, Any]:
        """Return the settings of the distillation: with CoFi its dynamic matching, else each layer with its own."""
        if self.how != "cofi":
            return {**KD, "intermediate_matches": SAME_LAYERS}
        match = {"feature": "hidden", "loss": "hidden_mse", "strategy": "ordered", "proj": "identity"}
        match |= {"layer_T": [1, 3, 4, 6], "layer_S": [1, 2, 3, 4, 5, 6], "weight": 3}
        return {**KD, "intermediate_matches": [match]}


def small(student: nn.Module, pruning: Any) -> nn.Module:
    """Return the smaller model that a callback leaves."""
    if isinstance(pruning, compression.GradualPruning):
        return pruning.shrink()
    return compression.Masked(copy.deepcopy(student), pruning.masks()).shrink()


@dataclass(frozen=True)
class Theseus(Compressed):
    """Three layers that take the place of six, at random and ever more often; then they learn on alone.

    Args:
        alone: the share of the steps in which they do.
    """

    alone: float = 0.3

    @property
    def shape(self) -> str:
        """Of the model: the latency's key."""
        return "3 layers"

    def example(self, model: nn.Module) -> nn.Module:
        """Return an untrained model of this shape."""
        return textbrewer.init_student_from_teacher(model, layers=[1, 3, 5])

    def fit(self, work: Work) -> Any:
        """Train, and return the successor."""
        predecessor = work.student(self)
        distiller = textbrewer.TheseusDistiller(work.config(), predecessor, 3, freeze=False)
        arguments = work.arguments(predecessor)
        last = round(self.alone * work.steps)
        phases = [(distiller.train, work.steps - last), (distiller.finetune, last)]
        with distiller:
            for train, steps in phases:
                parameters = distiller.trainable_parameters()
                arguments["optimizer"] = textbrewer.recipes.make_optimizer(nn.ParameterList(parameters), work.rate)
                arguments["scheduler_args"] = {"num_warmup_steps": steps // 10, "num_training_steps": steps}
                train(**{**arguments, "num_epochs": None, "num_steps": steps})
        return distiller.successor


@dataclass(frozen=True)
class LowRank(Compressed):
    """The encoder's linear maps as pairs of smaller ones.

    Args:
        by: ``"whitened"`` or ``"svd"``.
        trained: whether the pairs are distilled afterwards.
    """

    by: str = "whitened"
    trained: bool = False

    @property
    def shape(self) -> str:
        """Of the model: the latency's key."""
        return f"{self.percent}% by low rank"

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        return {**super().settings(), "ratio": self.percent / 100, "method": self.by, "trained": self.trained}

    def epochs(self, task: Any) -> int:
        """Return the number of epochs."""
        return int(task.epochs) if self.trained else 0

    def example(self, model: nn.Module) -> nn.Module:
        """Return an untrained model of this shape."""
        model = copy.deepcopy(model)
        compression.factorize_(model, ratio=self.percent / 100, method="svd", include="*.encoder")
        return model

    def fit(self, work: Work) -> Any:
        """Factorise, train if asked for, and return the model."""
        student = work.student(self)
        rows = list(work.loader())[:TO_CALIBRATE] if self.by == "whitened" else None
        compression.factorize_(student, rows, ratio=self.percent / 100, method=self.by, include="*.encoder")
        if self.trained:
            learn = textbrewer.DistillationConfig.from_dict({**KD, "intermediate_matches": copy.deepcopy(SAME_LAYERS)})
            with textbrewer.GeneralDistiller(work.config(), learn, work.teacher, student, "auto", "auto") as distiller:
                distiller.train(**work.arguments(student))
        return student.eval()


def pruned() -> dict[str, Method]:
    """Return the pruning methods, for each share."""
    found: dict[str, Method] = {}
    for percent in HEADS_AND_UNITS:
        for title, name, settings in (
            ("magnitude, at once, labels only", "magnitude", {"gradual": False, "distilled": False}),
            ("magnitude, at once, distilled", "magnitude-distil", {"gradual": False}),
            ("magnitude, gradual, distilled", "gradual-distil", {}),
            ("Taylor, gradual, distilled", "taylor-distil", {"how": "taylor"}),
            ("movement, distilled", "movement-distil", {"how": "movement"}),
            ("CoFi: hard concrete, dynamic matching", "cofi-distil", {"how": "cofi"}),
        ):
            found[f"prune-{name}-{percent}"] = Pruned(f"{percent}% pruned: {title}", percent=percent, **settings)
    return found


COMPRESSED: dict[str, Method] = {
    **pruned(),
    "theseus": Theseus("Theseus, 6 to 3 layers", rates=(1e-4, 2e-4), swept=True),
    "svd-50": LowRank("50% by low rank: plain SVD, not trained", by="svd"),
    "whitened-50": LowRank("50% by low rank: whitened, not trained"),
    "svd-distil-50": LowRank("50% by low rank: plain SVD, distilled", by="svd", trained=True),
    "whitened-distil-50": LowRank("50% by low rank: whitened, distilled", trained=True),
}
BESIDE = ("teacher", "pretrained", "finetuned", "kd", "hidden")
"""Methods of the recipes' experiments that these are compared with."""


def register() -> None:
    """Add these methods to those that the grid knows."""
    METHODS.update(COMPRESSED)
