"""Losses in which the student tells how sure it is of the teacher's states."""

from __future__ import annotations

from torch import Tensor

from textbrewer.losses.masking import (
    averaged_over,
    clear_masked,
    full_precision,
    one_tensor,
    position_weights,
    weighted_mean,
)
from textbrewer.losses.widths import student_width
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["vid_loss"]


@MATCH_LOSS_MAP.add("vid")
@averaged_over("positions")
@student_width("twice")
def vid_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Negative log-likelihood of the teacher's states under the student's Gaussian (variational information).

    .. math::
        L = \frac1{2 H \sum_n m_n} \sum_n m_n \sum_c \left(
        \frac{(\mu_{nc} - t_{nc})^2}{\sigma_{nc}^2} + \log \sigma_{nc}^2 \right)

    without the constant :math:`\tfrac12 \log 2\pi`; it can be negative.

    Args:
        state_S: what the projection ``gaussian`` makes of the student's states: the means :math:`\mu`, then the
            positive variances :math:`\sigma^2`, ``(batch, length, 2 * hidden)``, or ``(batch, 2 * hidden)``.
        state_T: teacher states, ``(batch, length, hidden)``, or ``(batch, hidden)``.
        mask: the shape of the states without their width, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions and the width, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, arXiv:1904.05835, section 2.1,
        equation 4.
    """
    one_tensor(state_S, "hidden state of the student")
    one_tensor(state_T, "hidden state of the teacher")
    width = state_T.shape[-1]
    if state_S.shape[:-1] != state_T.shape[:-1] or state_S.shape[-1] != 2 * width:
        raise ValueError(
            "hidden states of student and teacher must have the same batch and length, and the student's twice the "
            f"teacher's width, got {tuple(state_S.shape)} and {tuple(state_T.shape)}; name the projection "
            "'gaussian' in the match"
        )
    student, teacher = full_precision(state_S, state_T)
    weight = position_weights(mask, student, student.shape[:-1])
    mean, variance = clear_masked(student[..., :width], weight), student[..., width:]
    if weight is not None:
        variance = variance.masked_fill((weight == 0).unsqueeze(-1), 1.0)
    gap = mean - clear_masked(teacher, weight)
    return weighted_mean((gap.square() / variance + variance.log()).mean(dim=-1) / 2, weight, cleared=True)
