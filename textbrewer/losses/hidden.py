"""Losses between two hidden states: all positions (hidden_mse, cos), or the first one (pkd)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)

from textbrewer.losses.algebra import row_weights, unit
from textbrewer.losses.forms import TeacherForm, teacher_form
from textbrewer.losses.masking import (
    averaged_over,
    clear_masked,
    full_precision,
    one_tensor,
    position_weights,
    same_states,
    weighted_mean,
)
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["cos_loss", "hid_mse_loss", "pkd_loss"]


@MATCH_LOSS_MAP.add("hidden_mse")
@averaged_over("positions")
def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between hidden states.

    .. math:: L = \frac{\sum_n m_n \lVert s_n - t_n \rVert^2}{H \sum_n m_n}

    Args:
        state_S: student states, ``(batch, length, hidden)``.
        state_T: teacher states, same shape; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions and the width, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, arXiv:1412.6550, section 2.2; for transformers Jiao et
        al., "TinyBERT", 2020, arXiv:1909.10351, section 3.
    """
    same_states(state_S, state_T)
    student, teacher = full_precision(state_S, state_T)
    weight = position_weights(mask, student, student.shape[:-1])
    # By position first: clearing whole states, as the other losses do, takes three times as long, and most recipes have
    # this loss at every layer. Its gradient is therefore finite only if the masked states are.
    error = F.mse_loss(student, teacher, reduction="none").mean(dim=-1)
    return weighted_mean(error, weight)


@MATCH_LOSS_MAP.add("cos")
@averaged_over("positions")
def cos_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""One minus the cosine between hidden states.

    .. math::
        L = \frac1{\sum_n m_n} \sum_n m_n \left(1 - \frac{s_n \cdot t_n}{\lVert s_n \rVert \lVert t_n \rVert}\right)

    The cosine with a zero vector is taken as 0.

    Args:
        state_S: student states, ``(batch, length, hidden)``.
        state_T: teacher states, same shape; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, from 0 to 2, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Sanh et al., "DistilBERT", 2019, arXiv:1910.01108, section 2.
    """
    same_states(state_S, state_T)
    student, teacher = full_precision(state_S, state_T)
    weight = position_weights(None if mask is None else mask != 0, student, student.shape[:-1])
    student, teacher = clear_masked(student, weight), clear_masked(teacher, weight)
    return weighted_mean(1.0 - (unit(student) * unit(teacher)).sum(dim=-1), weight)


def _first_position(state: Tensor, side: str) -> Tensor:
    """Return ``(batch, hidden)``: the state at position 0, or the state itself where it has no positions."""
    one_tensor(state, f"hidden state of the {side}")
    if state.dim() not in (2, 3):
        raise ValueError(
            f"hidden state of the {side} must have the shape (batch, length, hidden) or (batch, hidden), "
            f"got {tuple(state.shape)}"
        )
    return state[:, 0] if state.dim() == 3 else state


def _first_form(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's state at position 0, as :func:`pkd_loss` also takes it."""
    return _first_position(state, "teacher")


@MATCH_LOSS_MAP.add("pkd")
@averaged_over("rows")
@teacher_form(TeacherForm("first_position", _first_form))
def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Squared distance between the directions of the hidden states at position 0.

    .. math::
        L = \frac1B \sum_b \left\lVert
        \frac{s_{b0}}{\lVert s_{b0} \rVert} - \frac{t_{b0}}{\lVert t_{b0} \rVert} \right\rVert^2

    A zero vector has no direction and stays zero.

    Args:
        state_S: student states, ``(batch, length, hidden)``, or ``(batch, hidden)``: taken as it is.
        state_T: teacher states, either shape; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, ...)``: a row without any kept position does not count. Whether position 0 itself is masked is
            not asked, as in TextBrewer.

    Returns:
        Scalar mean over the rows, from 0 to 4, float32 or wider; 0 where no row is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv:1908.09355, section 3.2
        (there the sum over rows and layers).
    """
    first_S, first_T = _first_position(state_S, "student"), _first_position(state_T, "teacher")
    same_states(first_S, first_T)
    student, teacher = full_precision(first_S, first_T)
    weight = row_weights(mask, student)
    student, teacher = clear_masked(student, weight), clear_masked(teacher, weight)
    return weighted_mean((unit(student) - unit(teacher)).square().sum(dim=-1), weight)
