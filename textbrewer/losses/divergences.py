r"""Divergences between the two distributions of each position, beside ``"kl"``, which is also named ``"forward_kl"``.

The teacher's is :math:`p = \mathrm{softmax}(t / \tau)`, the student's :math:`q = \mathrm{softmax}(s / \tau)`. Each is a
sum over the classes, position by position, and then the mean over the kept positions, times the power of :math:`\tau`
that keeps the size of the gradient about the same at every temperature (published at :math:`\tau = 1`, where that
makes no difference).

The forward divergence makes the student cover all that the teacher finds likely, the reverse one makes it settle on
what it finds most likely; the others lie between them, and stay bounded or have bounded gradients.

A class whose logit is :math:`-\infty` is left out of both distributions where the student lacks it. Where only the
teacher lacks it, its probability there is 0; the reverse and the symmetric divergence, which would be infinite, leave
it out of the student's distribution too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.logits import kd_kl_loss
from textbrewer.losses.masking import averaged_over
from textbrewer.losses.softened import Softened, log_distributions, mean_over_positions, relative_entropy, soften
from textbrewer.registry import KD_LOSS_MAP

__all__ = [
    "jsd_loss",
    "reverse_kl_loss",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
    "symmetric_kl_loss",
    "total_variation_loss",
]


def _share(value: float, name: str, *, ends: bool, remedy: str = "") -> None:
    """Raise unless ``value`` is a number between 0 and 1; without ``ends``, neither of the two."""
    checks.number(value, name)
    if not (0 <= value <= 1 if ends else 0 < value < 1):
        rule = "from 0 to 1" if ends else "between 0 and 1"
        raise ValueError(f"{name} must be {rule}, got {value!r}{remedy}")


def _left_out(soft: Softened) -> Tensor:
    """Return the classes that the student lacks, and all of a position without a class that both models have."""
    return soft.student_absent | soft.absent.all(dim=-1, keepdim=True)


def _log_mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """Return the logarithm of ``share`` of the first distribution and the rest of the second."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


@KD_LOSS_MAP.add("reverse_kl")
@averaged_over("positions")
def reverse_kl_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""KL divergence of the teacher from the student, times the squared temperature.

    .. math:: L = \frac1N \sum_n \tau_n^2 \sum_c q_{nc} \left(\log q_{nc} - \log p_{nc}\right)

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit or ``temperature`` is a number that is not positive.

    Reference:
        Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2023, arXiv:2306.08543,
        section 2, here at each position rather than over whole sequences.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft, shared=True)
    return mean_over_positions(relative_entropy(log_q, log_p, soft.absent), soft)


@KD_LOSS_MAP.add("symmetric_kl")
@averaged_over("positions")
def symmetric_kl_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ratio: float = 0.5,
) -> Tensor:
    r"""Weighted sum of the forward and the reverse KL divergence, times the squared temperature.

    .. math::
        L = \frac1N \sum_n \tau_n^2 \left[r\, \mathrm{KL}(p_n \Vert q_n) + (1 - r)\, \mathrm{KL}(q_n \Vert p_n)\right]

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        ratio: weight :math:`r` of the forward divergence, from 0 to 1.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive or ``ratio`` not from 0 to 1.

    Reference:
        Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", 1946, section 1 (both weigh 1);
        with a ratio as in torchtune.
    """
    _share(ratio, "ratio", ends=True)
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft, shared=True)
    forward = relative_entropy(log_p, log_q, soft.absent)
    reverse = relative_entropy(log_q, log_p, soft.absent)
    return mean_over_positions(ratio * forward + (1 - ratio) * reverse, soft)


@KD_LOSS_MAP.add("jsd")
@averaged_over("positions")
def jsd_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    beta: float = 0.5,
    normalize: bool = False,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, times the squared temperature.

    .. math::
        L = \frac1N \sum_n \tau_n^2 \left[\beta\, \mathrm{KL}(p_n \Vert m_n) + (1 - \beta)\, \mathrm{KL}(q_n \Vert m_n)
        \right], \qquad m = \beta p + (1 - \beta) q

    At :math:`\beta` = 0 and 1 that is 0, and its limit after division by :math:`\beta (1 - \beta)` is the forward and
    the reverse KL divergence: these two are what is computed there. ``normalize`` divides everywhere, so that the loss
    passes from one to the other without a jump.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        beta: the teacher's share :math:`\beta` in the mixture, from 0 (``"kl"``) to 1 (``"reverse_kl"``).
        normalize: whether to divide by :math:`\beta (1 - \beta)`.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive or ``beta`` not from 0 to 1.

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2023,
        arXiv:2306.13649, section 2.
    """
    _share(beta, "beta", ends=True)
    if beta in (0, 1):
        end = reverse_kl_loss if beta else kd_kl_loss
        return end(logits_S, logits_T, temperature, mask)
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    log_m, left_out = _log_mixture(log_p, log_q, beta), _left_out(soft)
    teacher, student = relative_entropy(log_p, log_m, left_out), relative_entropy(log_q, log_m, left_out)
    values = teacher / (1 - beta) + student / beta if normalize else beta * teacher + (1 - beta) * student
    return mean_over_positions(values, soft)


@KD_LOSS_MAP.add("skew_kl")
@averaged_over("positions")
def skew_kl_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    alpha: float = 0.1,
) -> Tensor:
    r"""KL divergence of a mixture with the student from the teacher, times the squared temperature.

    .. math:: L = \frac1N \sum_n \tau_n^2\, \mathrm{KL}(p_n \Vert \alpha p_n + (1 - \alpha) q_n)

    At each position at most :math:`-\tau^2 \log \alpha`, however wrong the student is.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        alpha: the teacher's share :math:`\alpha` in the mixture, between 0 and 1.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive or ``alpha`` not between 0 and 1.

    Reference:
        Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024,
        arXiv:2402.03898, section 3.1.
    """
    _share(alpha, "alpha", ends=False, remedy="; the loss without a mixture is 'kl'")
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    values = relative_entropy(log_p, _log_mixture(log_p, log_q, alpha), _left_out(soft))
    return mean_over_positions(values, soft)


@KD_LOSS_MAP.add("skew_reverse_kl")
@averaged_over("positions")
def skew_reverse_kl_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    alpha: float = 0.1,
) -> Tensor:
    r"""KL divergence of a mixture with the teacher from the student, times the squared temperature.

    .. math:: L = \frac1N \sum_n \tau_n^2\, \mathrm{KL}(q_n \Vert (1 - \alpha) p_n + \alpha q_n)

    At each position at most :math:`-\tau^2 \log \alpha`, however wrong the student is.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        alpha: the student's share :math:`\alpha` in the mixture, between 0 and 1.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive or ``alpha`` not between 0 and 1.

    Reference:
        Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024,
        arXiv:2402.03898, section 3.1.
    """
    _share(alpha, "alpha", ends=False, remedy="; the loss without a mixture is 'reverse_kl'")
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    values = relative_entropy(log_q, _log_mixture(log_q, log_p, alpha), _left_out(soft))
    return mean_over_positions(values, soft)


@KD_LOSS_MAP.add("total_variation")
@averaged_over("positions")
def total_variation_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Total variation distance, times the temperature.

    .. math:: L = \frac1N \sum_n \tau_n \frac12 \sum_c \left|p_{nc} - q_{nc}\right|

    At each position at most :math:`\tau`. Times the temperature itself: a distance is of first order in the gap
    between the logits, where a divergence is of second order.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit or ``temperature`` is a number that is not positive.

    Reference:
        Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023,
        arXiv:2307.15190, section 3.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    gaps = (log_p.exp() - log_q.exp()).abs().masked_fill(_left_out(soft), 0.0)
    return mean_over_positions(gaps.sum(dim=-1) / 2, soft, power=1)
