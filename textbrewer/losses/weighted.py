"""A loss between logits whose positions weigh what there is still to learn from the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer.losses.masking import averaged_over
from textbrewer.losses.softened import log_distributions, mean_over_positions, soften, with_labels
from textbrewer.registry import KD_LOSS_MAP

__all__ = ["wsld_loss"]

_SMALLEST = 1e-7


def _sample_weights(logits_S: Tensor, logits_T: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
    """Return the weight of each position, from both sides' cross-entropy with the labels; without gradient."""
    with torch.no_grad():
        log_q, log_p = log_distributions(soften(logits_S, logits_T, 1.0, kept))
        target = labels.unsqueeze(-1)
        student, teacher = -log_q.gather(-1, target).squeeze(-1), -log_p.gather(-1, target).squeeze(-1)
        # The paper's authors add the same number: a teacher that is sure of the true class has a cross-entropy of 0.
        return -torch.expm1(-student / (teacher + _SMALLEST))


@KD_LOSS_MAP.add("wsld")
@averaged_over("positions")
def wsld_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Weighted soft labels: the soft cross-entropy, less where the student already knows the label better.

    .. math::
        L = -\frac1N \sum_n w_n \tau_n^2 \sum_c p_{nc} \log q_{nc}, \qquad
        w_n = 1 - \exp\left(-\frac{\log \mathrm{softmax}(s_n)_{y_n}}{\log \mathrm{softmax}(t_n)_{y_n}}\right)

    with :math:`p_n = \mathrm{softmax}(t_n / \tau_n)`, :math:`q_n = \mathrm{softmax}(s_n / \tau_n)` and the true class
    :math:`y_n`; no gradient flows through the weights. To be added to the cross-entropy with the labels: in the paper
    this loss has the weight 2.5 and the temperature 2.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        labels: the true classes, ``logits_S.shape[:-1]``, negative where a position does not count.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept. A class whose
        logit is :math:`-\infty` is handled as in ``"ce"``.

    Raises:
        TypeError: if the labels are not whole numbers.
        ValueError: if there are no labels, shapes do not fit or ``temperature`` is not positive.

    Reference:
        Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
        Tradeoff Perspective", 2021, arXiv:2102.00650, section 4.
    """
    labels, kept = with_labels(labels, logits_S, logits_T, mask, "wsld")
    soft = soften(logits_S, logits_T, temperature, kept)
    log_q, log_p = log_distributions(soft)
    cross_entropy = -(log_p.exp() * log_q).masked_fill(soft.absent, 0.0).sum(dim=-1)
    return mean_over_positions(_sample_weights(logits_S, logits_T, kept, labels) * cross_entropy, soft)
