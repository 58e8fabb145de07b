"""Weight schedules: factors of a loss weight, as functions of the progress of training from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from textbrewer import checks
from textbrewer.registry import WEIGHT_SCHEDULER, builder

__all__ = [
    "WeightScheduler",
    "cosine_decay_weight_scheduler",
    "cosine_growth_weight_scheduler",
    "linear_decay_weight_scheduler",
    "linear_growth_weight_scheduler",
    "piecewise_weight_scheduler_builder",
    "warmup_weight_scheduler_builder",
]

WeightScheduler = Callable[[float], float]
"""``f(progress) -> factor``."""


@WEIGHT_SCHEDULER.add("linear_growth")
def linear_growth_weight_scheduler(x: float) -> float:
    r"""Return the factor that grows from 0 to 1 as the progress ``x`` does.

    Teacher annealing is this schedule for ``hard_label_weight`` and ``"linear_decay"`` for ``kd_loss_weight``, both
    weights 1, with ``kd_loss_type="ce"`` at the temperature 1: the sum of both losses is the cross-entropy with the
    target :math:`x\, \mathrm{onehot}(y) + (1 - x)\, p`, which passes from the teacher's distribution to the labels.

    Reference:
        Clark, Luong, Khandelwal, Manning, Le, "BAM! Born-Again Multi-Task Networks for Natural Language
        Understanding", 2019, arXiv:1907.04829, section 3.
    """
    return x


@WEIGHT_SCHEDULER.add("linear_decay")
def linear_decay_weight_scheduler(x: float) -> float:
    """Return the factor that decays from 1 to 0 as the progress ``x`` grows from 0 to 1."""
    return 1 - x


@WEIGHT_SCHEDULER.add("cosine_growth")
def cosine_growth_weight_scheduler(x: float) -> float:
    r"""Return the factor :math:`(1 - \cos \pi x) / 2`, from 0 to 1, slow at both ends."""
    return (1 - math.cos(math.pi * x)) / 2


@WEIGHT_SCHEDULER.add("cosine_decay")
def cosine_decay_weight_scheduler(x: float) -> float:
    r"""Return the factor :math:`(1 + \cos \pi x) / 2`, from 1 to 0, slow at both ends."""
    return (1 + math.cos(math.pi * x)) / 2


@WEIGHT_SCHEDULER.add("warmup")
@builder
def warmup_weight_scheduler_builder(fraction: float) -> WeightScheduler:
    """Build the schedule that grows from 0 to 1 over the first part of the training, and then stays 1.

    Args:
        fraction: how long it grows, as a part of the training: above 0, up to 1.

    Raises:
        ValueError: if ``fraction`` is not above 0 and up to 1.
    """
    checks.number(fraction, "fraction", above=0)
    if fraction > 1:
        raise ValueError(f"fraction must be at most 1, a part of the training, got {fraction!r}")

    def warmup_weight_scheduler(x: float) -> float:
        return min(x / fraction, 1.0)

    return warmup_weight_scheduler


@WEIGHT_SCHEDULER.add("piecewise")
@builder
def piecewise_weight_scheduler_builder(points: Sequence[Sequence[float]]) -> WeightScheduler:
    """Build the schedule through given points, linear between them.

    Before the first point the factor is the first one, after the last point the last one. Two points at one progress
    make a jump, to the later one. ``["piecewise", [[0, 1], [0.8, 1], [0.8, 0]]]`` is a first phase of 80 %.

    Args:
        points: pairs ``[progress, factor]``, at least one, by progress from 0 to 1; factors 0 or more.

    Raises:
        TypeError: if a point is no pair of numbers.
        ValueError: if there is no point, they are not in order, or a progress or factor is out of range.
    """
    if isinstance(points, str) or not isinstance(points, Sequence) or not points:
        raise ValueError(f"points must be a list of pairs [progress, factor], at least one, got {points!r}")
    for point in points:
        if isinstance(point, str) or not isinstance(point, Sequence) or len(point) != 2:
            raise TypeError(f"a point must be a pair [progress, factor], got {point!r}")
        checks.number(point[0], "progress of a point", minimum=0)
        checks.number(point[1], "factor of a point", minimum=0)
    places = [float(point[0]) for point in points]
    if places[-1] > 1 or places != sorted(places):
        raise ValueError(f"points must be in order of their progress, from 0 to 1, got {places}")
    factors = [float(point[1]) for point in points]

    def piecewise_weight_scheduler(x: float) -> float:
        after = sum(place <= x for place in places)
        if after in (0, len(places)):
            return factors[min(after, len(places) - 1)]
        share = (x - places[after - 1]) / (places[after] - places[after - 1])
        return factors[after - 1] + share * (factors[after] - factors[after - 1])

    return piecewise_weight_scheduler
