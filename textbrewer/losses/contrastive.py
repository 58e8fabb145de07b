"""Losses that tell a row's own teacher state from those of the other rows of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.algebra import POOLED, both_pooled, product, unit
from textbrewer.losses.forms import teacher_form
from textbrewer.losses.masking import averaged_over, same_states, weighted_mean
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["crd_loss"]


@MATCH_LOSS_MAP.add("crd")
@averaged_over("batch")
@teacher_form(POOLED)
def crd_loss(
    state_S: Tensor, state_T: Tensor, mask: Tensor | None = None, contrast_temperature: float = 0.07
) -> Tensor:
    r"""Contrast of a row's own teacher state with those of the other rows of the batch (InfoNCE, both ways).

    .. math::
        L = -\frac1{2B} \sum_b \left(
        \log \frac{e^{c_{bb} / \tau}}{\sum_j e^{c_{bj} / \tau}} +
        \log \frac{e^{c_{bb} / \tau}}{\sum_j e^{c_{jb} / \tau}} \right), \qquad
        c_{bj} = \frac{s_b \cdot t_j}{\lVert s_b \rVert \lVert t_j \rVert}

    where :math:`s_b` is the mean of the row's kept positions. The negatives are the other rows of the batch, where the
    paper keeps a bank of thousands: the larger the batch, the better. A batch of one row gives 0.

    Args:
        state_S: student states, ``(batch, length, width)``, or ``(batch, width)``: taken as they are.
        state_T: teacher states, likewise; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count. A row without any kept
            position does not count, neither as a negative.
        contrast_temperature: positive number :math:`\tau`.

    Returns:
        Scalar mean over the kept rows, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit or the temperature is not positive.

    Reference:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020, arXiv:1910.10699, section 3.2; with the
        negatives of the batch van den Oord et al., 2018, arXiv:1807.03748, equation 4.
    """
    checks.number(contrast_temperature, "contrast_temperature", above=0)
    student, teacher, rows = both_pooled(state_S, state_T, mask)
    same_states(student, teacher)
    scores = product(unit(student), unit(teacher).transpose(0, 1)) / contrast_temperature
    if rows is not None:
        # A low number instead of -inf: a batch without any kept row stays finite.
        scores = scores.masked_fill((rows == 0).unsqueeze(0) | (rows == 0).unsqueeze(1), torch.finfo(scores.dtype).min)
    both = [F.log_softmax(side, dim=-1).diagonal() for side in (scores, scores.transpose(0, 1))]
    return weighted_mean(-(both[0] + both[1]) / 2, rows)
