r"""Losses that take the true class apart from the others: how sure of it, and how the others share what remains.

Positions whose label is negative are left out, as those that the mask leaves out. A class whose logit is
:math:`-\infty` is handled as in ``"kl"``, the true class included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.masking import averaged_over, weighted_mean
from textbrewer.losses.softened import (
    Softened,
    log_distributions,
    lowest,
    mean_over_positions,
    relative_entropy,
    soften,
    with_labels,
)
from textbrewer.registry import KD_LOSS_MAP

__all__ = ["dkd_loss", "nkd_loss"]


class _Parts(NamedTuple):
    """Logarithms of both sides' distributions, taken apart.

    ``whole_*``: the true class and all others together, ``(*positions, 2)``; ``others_*``: the other classes among
    themselves, ``(*positions, classes)``, with no meaning at the true class.
    """

    whole_S: Tensor
    whole_T: Tensor
    others_S: Tensor
    others_T: Tensor
    whole_absent: Tensor
    others_absent: Tensor


def _one_side(logits: Tensor, absent: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of one side's two distributions.

    The other classes come together by their log-sum-exp: the logarithm of 1 - p would be that of 0 where p rounds to 1.
    """
    low = lowest(logits)
    logits = logits.masked_fill(absent, low)
    others = logits.masked_fill(is_target, low)
    whole = torch.cat([logits.gather(-1, target), others.logsumexp(dim=-1, keepdim=True)], dim=-1)
    return F.log_softmax(whole, dim=-1), F.log_softmax(others, dim=-1)


def _take_apart(soft: Softened, labels: Tensor) -> _Parts:
    """Return the distributions over (true class, others), and among the others."""
    target = labels.unsqueeze(-1)
    is_target = target == torch.arange(soft.student.shape[-1], device=labels.device)
    whole_S, others_S = _one_side(soft.student, soft.student_absent, target, is_target)
    whole_T, others_T = _one_side(soft.teacher, soft.absent, target, is_target)
    others_absent = soft.absent | is_target
    whole_absent = torch.cat([soft.absent.gather(-1, target), others_absent.all(dim=-1, keepdim=True)], dim=-1)
    return _Parts(whole_S, whole_T, others_S, others_T, whole_absent, others_absent)


@KD_LOSS_MAP.add("dkd")
@averaged_over("positions")
def dkd_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    r"""Decoupled distillation: how sure of the true class, and how the others compare, each with its own weight.

    .. math::
        L = \frac1N \sum_n \tau_n^2 \left[\alpha\, \mathrm{KL}\big((p_y, 1 - p_y) \Vert (q_y, 1 - q_y)\big)
        + \beta \sum_{c \ne y} \hat p_c \left(\log \hat p_c - \log \hat q_c\right)\right], \qquad
        \hat p_c = \frac{p_c}{1 - p_y}, \quad \hat q_c = \frac{q_c}{1 - q_y}

    with :math:`p = \mathrm{softmax}(t_n / \tau_n)`, :math:`q = \mathrm{softmax}(s_n / \tau_n)` and the true class
    :math:`y_n`. ``"kl"`` is the case of :math:`\alpha = 1` and :math:`\beta = 1 - p_y`: there the second part is lost
    where the teacher is sure. With two classes the second part is 0.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``; 4 in the paper.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        labels: the true classes, ``logits_S.shape[:-1]``, negative where a position does not count.
        alpha: weight of the first part, 0 or more.
        beta: weight of the second part, 0 or more; the paper takes 1 to 8, more where the teacher is surer.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if the labels are not whole numbers.
        ValueError: if there are no labels, shapes do not fit, ``temperature`` is not positive or a weight negative.

    Reference:
        Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022, arXiv:2203.08679, section 3.
    """
    checks.number(alpha, "alpha", minimum=0)
    checks.number(beta, "beta", minimum=0)
    labels, kept = with_labels(labels, logits_S, logits_T, mask, "dkd")
    soft = soften(logits_S, logits_T, temperature, kept)
    parts = _take_apart(soft, labels)
    whole = relative_entropy(parts.whole_T, parts.whole_S, parts.whole_absent)
    others = relative_entropy(parts.others_T, parts.others_S, parts.others_absent)
    return mean_over_positions(alpha * whole + beta * others, soft)


@KD_LOSS_MAP.add("nkd")
@averaged_over("positions")
def nkd_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    gamma: float = 1.5,
) -> Tensor:
    r"""Normalised distillation: the true class weighed by the teacher, and the others renormalised on both sides.

    .. math::
        L = -\frac1N \sum_n \left[p_y \log q_y
        + \gamma \tau_n^2 \sum_{c \ne y} \hat p_c^{(\tau)} \log \hat q_c^{(\tau)}\right]

    where :math:`p = \mathrm{softmax}(t_n)` and :math:`q = \mathrm{softmax}(s_n)` have the temperature 1, and
    :math:`\hat p^{(\tau)}`, :math:`\hat q^{(\tau)}` are the softmax over the other classes only, at :math:`\tau_n`.
    To be added to the cross-entropy with the labels, ``hard_label_weight=1``. The first part pulls the student's
    probability of the true class to 1, not to the teacher's; with two classes it is all there is.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: of the other classes: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``;
            1 in the paper.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        labels: the true classes, ``logits_S.shape[:-1]``, negative where a position does not count.
        gamma: weight of the second part, 0 or more.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if the labels are not whole numbers.
        ValueError: if there are no labels, shapes do not fit, ``temperature`` is not positive or ``gamma`` negative.

    Reference:
        Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
        Approach with Normalized Loss and Customized Soft Labels", 2023, arXiv:2303.13005, section 3.
    """
    checks.number(gamma, "gamma", minimum=0)
    labels, kept = with_labels(labels, logits_S, logits_T, mask, "nkd")
    plain, soft = soften(logits_S, logits_T, 1.0, kept), soften(logits_S, logits_T, temperature, kept)
    log_q, log_p = log_distributions(plain)
    target = labels.unsqueeze(-1)
    sure = (log_p.exp() * log_q).masked_fill(plain.absent, 0.0).gather(-1, target).squeeze(-1)
    parts = _take_apart(soft, labels)
    others = (parts.others_T.exp() * parts.others_S).masked_fill(parts.others_absent, 0.0).sum(dim=-1)
    return -weighted_mean(sure, plain.weight) - gamma * mean_over_positions(others, soft)
