"""What all targets of several teachers share: when a teacher is asked, and what becomes of its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.distillers.knowledge import KnowledgeLoss
from textbrewer.distillers.terms import Now, Term
from textbrewer.engine import Source
from textbrewer.registry import Registry

__all__ = ["TARGETS", "Blend", "Heard", "Moment", "Target", "checked_weights", "make_target"]

TARGETS = Registry("target")
"""How several teachers become one KD loss: ``f(count, **options) -> Target``, ``count`` being how many they are."""


@dataclass(frozen=True)
class Moment:
    """What a target knows of the step under way.

    Args:
        knowledge: how logits are compared.
        now: scheduled weights.
        results_S: the student's views; ``None`` where the target does not need them before the teachers are asked.
        choice: what the batch itself says of the teachers, see :meth:`Target.choice`.
        first: whether labels and masks are still to be checked, which waits for the device.
        sum_over_ranks: sums a tensor over all processes.
    """

    knowledge: KnowledgeLoss
    now: Now
    results_S: Views | None = None
    choice: Any = None
    first: bool = False
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value


class Blend(ABC):
    """The teachers of one step, taken in one after the other. ``figures`` are for the log."""

    def __init__(self) -> None:
        self.figures: dict[str, Tensor] = {}

    @abstractmethod
    def add(self, number: int, results_T: Views, rows: Sequence[int] | None = None) -> None:
        """Take in what a teacher says.

        Args:
            number: its number.
            results_T: its views.
            rows: the rows of the batch that it was asked of; ``None``: all.
        """

    @abstractmethod
    def terms(self, results_S: Views) -> list[Term]:
        """Return the terms of the loss, the first of which is the KD loss; none if neither side has logits."""


class Target(ABC):
    """How several teachers become one KD loss.

    Args:
        count: how many teachers there are.
    """

    learner: nn.Module | None = None
    """What is learnt beside the student, ``f(views_S, task)``; its result is ``results_S.learned``."""
    reads_labels = ""
    """What needs the student's labels, for messages; empty: nothing does."""
    reads_student = False
    """Whether the student's views are needed before the teachers are asked."""
    student_features: frozenset[str] = frozenset()
    """Features of the student that are read where a ready-made adaptor can give them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.learner_options: dict[str, Any] = {}  # of its parameters in the optimiser

    @abstractmethod
    def start(self, moment: Moment) -> Blend:
        """Return what takes in the teachers of a step."""

    def build_learner(self, results_S: Views | None) -> bool:
        """Build what is learnt, if its size depends on the student's views; return whether these are missing."""
        return False

    def choice(self, batch: Any) -> Any:
        """Return what a batch itself says of the teachers, as :meth:`numbers` and :meth:`rows` take it."""
        return None

    def numbers(self, choice: Any) -> Sequence[int]:
        """Return the numbers of the teachers to ask."""
        return range(self.count)

    def rows(self, number: int, choice: Any) -> Sequence[int] | None:
        """Return the rows of which a teacher's logits are read; ``None``: all."""
        return None

    def postprocessor(self, given: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        """Return what is applied to each batch, after what the user gave."""
        return given

    def source(self, batches: Source) -> Source:
        """Return where the batches come from."""
        return batches


class Heard(list[Views]):
    """The views of each teacher, without the logits, which a blend has taken in.

    The logits that are there have a shape, but no values.

    Args:
        views: the views of each teacher.
        blend: what took them in.
    """

    def __init__(self, views: Sequence[Views], blend: Blend) -> None:
        super().__init__(views)
        self.blend = blend


def make_target(spec: Any, count: int) -> Target:
    """Return a target.

    Args:
        spec: a name of :data:`TARGETS`, or ``[name, {option: value}]``.
        count: how many teachers there are.

    Raises:
        KeyError: if the name is unknown.
        TypeError, ValueError: if the specification has another form, or an option is unknown or out of range.
    """
    target: Target = TARGETS.bound(spec)(count)
    return target


def checked_weights(weights: Any, count: int, name: str) -> list[float]:
    """Return one weight a teacher, with the sum 1; ``None`` gives the same to all.

    Raises:
        TypeError, ValueError: if they are not as many numbers, none of them negative, some positive.
    """
    if weights is None:
        return [1.0 / count] * count
    checks.is_a(weights, (list, tuple), name, "a list of one number a teacher")
    if len(weights) != count:
        raise ValueError(f"{name} must have one number a teacher ({count}), got {len(weights)}")
    for item in weights:
        checks.number(item, name, minimum=0)
    if not sum(weights):
        raise ValueError(f"{name} must have a positive sum, got {weights!r}")
    return [float(item) / sum(weights) for item in weights]
