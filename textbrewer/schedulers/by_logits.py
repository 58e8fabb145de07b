"""Temperature schedules that depend on the logits: one temperature for each position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.registry import TEMPERATURE_SCHEDULER, builder

__all__ = [
    "LOWEST_TEMPERATURE",
    "TemperatureScheduler",
    "constant_temperature_scheduler",
    "cwsm_temperature_scheduler_builder",
    "flsw_temperature_scheduler_builder",
]

LOWEST_TEMPERATURE = 0.1
"""No schedule goes below it: at zero the softened logits are infinite, and below zero their order is reversed."""

TemperatureScheduler = Callable[..., Tensor]
"""``f(logits_S, logits_T, base_temperature, mask=None) -> tensor of shape logits_S.shape[:-1]``."""


@TEMPERATURE_SCHEDULER.add("constant")
def constant_temperature_scheduler(
    logits_S: Tensor, logits_T: Tensor, base_temperature: float | Tensor, mask: Tensor | None = None
) -> float | Tensor:
    """Return the base temperature as it is."""
    return base_temperature


def _prepared(logits_S: Tensor, logits_T: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both logits, detached, in float32 or wider, 0 at masked positions; and which positions are kept."""
    checks.same_shape(logits_S, logits_T, "logits")
    dtype = torch.promote_types(torch.promote_types(logits_S.dtype, logits_T.dtype), torch.float32)
    student, teacher = logits_S.detach().to(dtype), logits_T.detach().to(dtype)
    if mask is None:
        return student, teacher, None
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask must have the shape {tuple(student.shape[:-1])}, one value a position, got {tuple(mask.shape)}"
        )
    kept = (mask != 0).to(student.device)
    dropped = ~kept.unsqueeze(-1)
    return student.masked_fill(dropped, 0.0), teacher.masked_fill(dropped, 0.0), kept


def _around_base(difficulty: Tensor, base: float | Tensor, beta: float, kept: Tensor | None) -> Tensor:
    r"""Return :math:`\tau_i = \tau_0 + \beta (\bar w - w_i)`, not below the lowest temperature.

    Args:
        difficulty: :math:`w`, one value a position.
        base: :math:`\tau_0`; it is the temperature of the positions that are not kept.
        beta: how far the temperatures spread.
        kept: the positions that the mean is over; None: all.
    """
    if kept is None:
        mean = difficulty.sum() / max(difficulty.numel(), 1)
        change = (mean - difficulty) * beta
    else:
        mean = difficulty.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)
        change = ((mean - difficulty) * beta).masked_fill(~kept, 0.0)
    # A base temperature that is lower still is the user's wish, and stays.
    floor = base.clamp(max=LOWEST_TEMPERATURE) if isinstance(base, Tensor) else min(base, LOWEST_TEMPERATURE)
    return torch.maximum(base + change, torch.zeros_like(change) + floor)


@TEMPERATURE_SCHEDULER.add("flsw")
@builder
def flsw_temperature_scheduler_builder(beta: float, gamma: float, eps: float = 1e-4) -> TemperatureScheduler:
    r"""Build the schedule that lowers the temperature where student and teacher disagree (focal loss style weight).

    .. math:: \tau_i = \tau_0 + \beta (\bar w - w_i), \qquad w_i = (1 - \cos(s_i, t_i))^\gamma

    Args:
        beta: how far the temperatures spread around the base.
        gamma: exponent, 0 or more; the higher, the more the hard positions stand out.
        eps: added to the lengths of the logits in the cosine.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None)``: a tensor of shape ``logits_S.shape[:-1]``, without
        gradient, never below :data:`LOWEST_TEMPERATURE` (or the base, if that is lower). With a mask,
        :math:`\bar w` is the mean over the kept positions, and the others have the base temperature. A class whose
        logit is :math:`-\infty` counts as 0 on both sides.

    Raises:
        ValueError: if ``gamma`` is negative, ``eps`` not positive, or a number not finite.

    Reference:
        Wen, Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019,
        arXiv:1911.07471, section 3.
    """
    checks.number(beta, "beta")
    checks.number(gamma, "gamma", minimum=0)
    checks.number(eps, "eps", above=0)

    def flsw_temperature_scheduler(
        logits_S: Tensor, logits_T: Tensor, base_temperature: float | Tensor, mask: Tensor | None = None
    ) -> Tensor:
        checks.positive_temperature(base_temperature)
        student, teacher, kept = _prepared(logits_S, logits_T, mask)
        absent = student.isneginf() | teacher.isneginf()
        student, teacher = student.masked_fill(absent, 0.0), teacher.masked_fill(absent, 0.0)
        student = student / (torch.linalg.vector_norm(student, dim=-1, keepdim=True) + eps)
        teacher = teacher / (torch.linalg.vector_norm(teacher, dim=-1, keepdim=True) + eps)
        # Rounding can bring the cosine above 1, and a negative number has no fractional power.
        distance = (1.0 - (student * teacher).sum(dim=-1)).clamp(min=0.0)
        return _around_base(distance**gamma, base_temperature, beta, kept)

    return flsw_temperature_scheduler


@TEMPERATURE_SCHEDULER.add("cwsm")
@builder
def cwsm_temperature_scheduler_builder(beta: float) -> TemperatureScheduler:
    r"""Build the schedule that lowers the temperature where the student is unsure (confidence weighted by its maximum).

    .. math:: \tau_i = \tau_0 + \beta (\bar w - w_i), \qquad w_i = \frac1{\max_c \mathrm{softmax}(s_i)_c + 0.001}

    Args:
        beta: how far the temperatures spread around the base.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None)``: a tensor of shape ``logits_S.shape[:-1]``, without
        gradient, never below :data:`LOWEST_TEMPERATURE` (or the base, if that is lower). With a mask,
        :math:`\bar w` is the mean over the kept positions, and the others have the base temperature.

    Raises:
        ValueError: if ``beta`` is not finite.

    Reference:
        Wen, Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019,
        arXiv:1911.07471, section 3.
    """
    checks.number(beta, "beta")

    def cwsm_temperature_scheduler(
        logits_S: Tensor, logits_T: Tensor, base_temperature: float | Tensor, mask: Tensor | None = None
    ) -> Tensor:
        checks.positive_temperature(base_temperature)
        student, _, kept = _prepared(logits_S, logits_T, mask)
        # A low number instead of -inf: the softmax over no class at all would be NaN.
        student = student.masked_fill(student.isneginf(), torch.finfo(student.dtype).min / 2)
        confidence = torch.softmax(student, dim=-1).amax(dim=-1)
        return _around_base(1.0 / (confidence + 1e-3), base_temperature, beta, kept)

    return cwsm_temperature_scheduler
