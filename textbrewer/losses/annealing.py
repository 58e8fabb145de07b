"""A loss between logits whose target grows from a flattened teacher's to the teacher's own over the training."""

from __future__ import annotations

import math

from torch import Tensor

from textbrewer import checks
from textbrewer.losses.masking import averaged_over, weighted_mean
from textbrewer.losses.softened import mean_over_present, soften
from textbrewer.registry import KD_LOSS_MAP

__all__ = ["annealing_loss"]


def _annealing_factor(progress: float, max_temperature: int) -> float:
    """Return the share of the teacher's logits: T / max, in ``max_temperature`` equal steps from 1 / max to 1."""
    steps = int(max_temperature)
    return min(math.floor(progress * steps) + 1, steps) / steps


@KD_LOSS_MAP.add("annealing")
@averaged_over("positions")
def annealing_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    progress: float = 0.0,
    max_temperature: int = 10,
) -> Tensor:
    r"""Mean squared error between the student's logits and a growing share of the teacher's: phase 1 of Annealing-KD.

    .. math::
        L = \frac1{N C} \sum_n \sum_c \left(\frac{s_{nc} - \Phi(T)\, t_{nc}}{\tau_n}\right)^2, \qquad
        \Phi(T) = 1 - \frac{T - 1}{T_\mathrm{max}}

    The annealing temperature :math:`T` falls from :math:`T_\mathrm{max}` to 1 in whole numbers, each for an equal part
    of the training, so that the share grows from :math:`1 / T_\mathrm{max}` to 1, where the loss is ``"mse"``. Phase 2,
    the cross-entropy with the labels alone, is a second run, or ``["piecewise", ...]`` as the schedule of both weights.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: divides both sides: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``; 1
            in the paper.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        progress: how much of the training is done, from 0 to 1.
        max_temperature: :math:`T_\mathrm{max}`, a whole number of 1 or more; how many steps the growth has.

    Returns:
        Scalar mean over the kept positions and the classes that both models have, float32 or wider; 0 where no
        position is kept.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive, ``progress`` is not a number of 0 or more or
            ``max_temperature`` not a whole number of 1 or more.

    Reference:
        Jafari, Rezagholizadeh, Sharma, Ghodsi, "Annealing Knowledge Distillation", 2021, arXiv:2104.07163, section 3.
    """
    checks.number(progress, "progress", minimum=0)
    checks.integer(max_temperature, "max_temperature", minimum=1)
    soft = soften(logits_S, logits_T, temperature, mask)
    gaps = soft.student - _annealing_factor(progress, max_temperature) * soft.teacher
    return weighted_mean(mean_over_present(gaps.square(), soft), soft.weight)
