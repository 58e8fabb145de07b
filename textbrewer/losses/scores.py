"""Squared error between attention scores, before mask and softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer.losses.masking import (
    averaged_over,
    full_precision,
    pair_weights,
    position_weights,
    same_shape,
    weighted_mean,
)
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["scores_mse_loss"]


@MATCH_LOSS_MAP.add("scores_mse")
@averaged_over("pairs")
def scores_mse_loss(scores_S: Tensor, scores_T: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    r"""Mean squared error between attention scores, head by head.

    .. math:: L = \frac{\sum_{bij} m_{bi} m_{bj} \sum_a (s_{baij} - t_{baij})^2}{A \sum_b (\sum_i m_{bi})^2}

    With ``causal`` the sum runs over :math:`j \le i` only; the denominator stays, as if the other scores were 0 on both
    sides, so the loss of a row is about half as large as that of a bidirectional model.

    For the scores of queries and keys themselves (feature ``"scores"``), which are negative as often as positive.
    ``"attention_mse"``, as in TextBrewer, takes every score below -0.001 for a masked one.

    Args:
        scores_S: student scores, ``(batch, heads, length, length)``.
        scores_T: teacher scores, same shape.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.
        causal: leave out the keys after each query, as causal language models do after their scores.

    Returns:
        Scalar mean over the pairs of kept positions and the heads, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, section 3.1 (unnormalised attention).
    """
    remedy = "both models must have as many heads and positions"
    same_shape(scores_S, scores_T, "attention scores", remedy)
    if scores_S.dim() != 4:
        raise ValueError(f"attention scores must be (batch, heads, length, length), got {tuple(scores_S.shape)}")
    student, teacher = full_precision(scores_S, scores_T)
    if causal:
        later = torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device)
        later = later.triu(1 + student.shape[-1] - student.shape[-2])
        student, teacher = student.masked_fill(later, 0.0), teacher.masked_fill(later, 0.0)
    weight = position_weights(mask, student, (student.shape[0], student.shape[-1]))
    if weight is None:
        return weighted_mean((student - teacher).square(), None)
    pairs = pair_weights(weight).unsqueeze(1)
    # Cleared before the square: NaN times zero is NaN, in the gradient too.
    student, teacher = student.masked_fill(pairs == 0, 0.0), teacher.masked_fill(pairs == 0, 0.0)
    return weighted_mean((student - teacher).square(), pairs, cleared=True)
