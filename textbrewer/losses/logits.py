r"""Losses between logits, for classes that exclude each other (ce, kl), that do not (sigmoid), or for regression (mse).

A logit of :math:`-\infty` says that the model does not have the class. Such a class adds nothing: a class that the
student does not have is taken out of the teacher's softmax too, and means over classes count the classes that both
models have. A class that only the teacher lacks has the target 0 in ce and kl, as the formula says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer.losses.masking import averaged_over, weighted_mean
from textbrewer.losses.softened import (
    log_distributions,
    mean_over_positions,
    mean_over_present,
    relative_entropy,
    soften,
)
from textbrewer.registry import KD_LOSS_MAP

__all__ = ["kd_ce_loss", "kd_kl_loss", "kd_mse_loss", "kd_sigmoid_loss"]


@KD_LOSS_MAP.add("mse")
@averaged_over("positions")
def kd_mse_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Mean squared error between softened logits.

    .. math:: L = \frac1{N C} \sum_n \sum_c \left(\frac{s_{nc} - t_{nc}}{\tau_n}\right)^2

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions and their classes, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit or ``temperature`` is a number that is not positive.

    Reference:
        Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014, arXiv:1312.6184, section 2.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    return weighted_mean(mean_over_present((soft.student - soft.teacher).square(), soft), soft.weight)


@KD_LOSS_MAP.add("ce")
@averaged_over("positions")
def kd_ce_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy of the student under the teacher's softened distribution.

    .. math::
        L = -\frac1N \sum_n \sum_c p_{nc} \log q_{nc}, \qquad
        p_n = \mathrm{softmax}(t_n / \tau_n), \quad q_n = \mathrm{softmax}(s_n / \tau_n)

    The KL divergence plus the teacher's entropy, so its gradient is that of the KL divergence. Not multiplied by
    :math:`\tau^2`, as in TextBrewer; ``"kl"`` is.

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
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    terms = (log_p.exp() * log_q).masked_fill(soft.absent, 0.0)
    return weighted_mean(-terms.sum(dim=-1), soft.weight)


@KD_LOSS_MAP.add("kl", "forward_kl")
@averaged_over("positions")
def kd_kl_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""KL divergence of the student from the teacher, times the squared temperature.

    .. math::
        L = \frac1N \sum_n \tau_n^2 \sum_c p_{nc} \left(\log p_{nc} - \log q_{nc}\right), \qquad
        p_n = \mathrm{softmax}(t_n / \tau_n), \quad q_n = \mathrm{softmax}(s_n / \tau_n)

    Zero where the student agrees with the teacher. The factor keeps the size of the gradient, which is
    :math:`\tau (q - p) / N`, about the same at every temperature.

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
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    return mean_over_positions(relative_entropy(log_p, log_q, soft.absent), soft)


@KD_LOSS_MAP.add("sigmoid")
@averaged_over("positions")
def kd_sigmoid_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Binary cross-entropy under the teacher's softened probabilities, for labels that do not exclude each other.

    .. math::
        L = -\frac1{N C} \sum_n \tau_n^2 \sum_c \left[p_{nc} \log q_{nc} + (1 - p_{nc}) \log (1 - q_{nc})\right],
        \qquad p = \sigma(t / \tau), \quad q = \sigma(s / \tau)

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions and their classes, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit or ``temperature`` is a number that is not positive.

    Reference:
        Hinton, Vinyals, Dean, 2015, arXiv:1503.02531, section 2, with each label a distribution over yes and no.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    target = torch.sigmoid(soft.teacher)
    terms = F.binary_cross_entropy_with_logits(soft.student, target, reduction="none") * soft.temperature**2
    return weighted_mean(mean_over_present(terms, soft), soft.weight)
