"""Temperature schedules that depend on the progress of training alone: one temperature for the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from textbrewer import checks
from textbrewer.registry import TEMPERATURE_SCHEDULER, builder

__all__ = [
    "cosine_temperature_scheduler_builder",
    "linear_temperature_scheduler_builder",
    "warmup_temperature_scheduler_builder",
]

ProgressTemperature = Callable[..., float | Tensor]
"""``f(logits_S, logits_T, base_temperature, mask=None, progress=0.0) -> temperature``, number or tensor as the base."""


def _by_progress(temperature: Callable[[float | Tensor, float], float | Tensor]) -> ProgressTemperature:
    """Return the schedule of a function of the base temperature and the progress."""

    def progress_temperature_scheduler(
        logits_S: Tensor,
        logits_T: Tensor,
        base_temperature: float | Tensor,
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> float | Tensor:
        checks.positive_temperature(base_temperature)
        return temperature(base_temperature, progress)

    return progress_temperature_scheduler


@TEMPERATURE_SCHEDULER.add("linear")
@builder
def linear_temperature_scheduler_builder(end: float) -> ProgressTemperature:
    r"""Build the schedule from the base temperature to another, :math:`\tau_0 + x (\tau_1 - \tau_0)`.

    Args:
        end: temperature :math:`\tau_1` at the end of the training, positive.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None, progress=0.0)``: number or tensor, as the base is.

    Raises:
        ValueError: if ``end`` is not positive.
    """
    checks.number(end, "end", above=0)
    return _by_progress(lambda base, progress: base + progress * (end - base))


@TEMPERATURE_SCHEDULER.add("cosine")
@builder
def cosine_temperature_scheduler_builder(end: float) -> ProgressTemperature:
    r"""Build the schedule from the base temperature to another, slow at both ends.

    .. math:: \tau = \tau_0 + \frac{1 - \cos \pi x}2 (\tau_1 - \tau_0)

    Args:
        end: temperature :math:`\tau_1` at the end of the training, positive.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None, progress=0.0)``: number or tensor, as the base is.

    Raises:
        ValueError: if ``end`` is not positive.
    """
    checks.number(end, "end", above=0)
    return _by_progress(lambda base, progress: base + (1 - math.cos(math.pi * progress)) / 2 * (end - base))


@TEMPERATURE_SCHEDULER.add("warmup")
@builder
def warmup_temperature_scheduler_builder(fraction: float, start: float = 1.0) -> ProgressTemperature:
    """Build the schedule that goes linearly from a first temperature to the base, and then stays there.

    Args:
        fraction: how long it takes, as a part of the training: above 0, up to 1.
        start: temperature at the beginning of the training, positive.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None, progress=0.0)``: number or tensor, as the base is.

    Raises:
        ValueError: if ``fraction`` is not above 0 and up to 1, or ``start`` not positive.
    """
    checks.number(fraction, "fraction", above=0)
    checks.number(start, "start", above=0)
    if fraction > 1:
        raise ValueError(f"fraction must be at most 1, a part of the training, got {fraction!r}")
    return _by_progress(lambda base, progress: start + min(progress / fraction, 1.0) * (base - start))
