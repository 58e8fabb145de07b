"""Losses between statistics of each position's hidden state: its energy, mean, variance, and what these leave of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer.losses.algebra import above_zero
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
from textbrewer.losses.widths import student_width
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["at_loss", "layer_norm_mse_loss", "state_mean_loss", "state_variance_loss"]

# As small as in BERT: it only keeps a state without any variance finite.
_EPSILON = 1e-12


def _same_positions(state_S: Tensor, state_T: Tensor) -> None:
    """Raise unless both are tensors ``(*positions, width)`` of the same positions; the widths may differ."""
    one_tensor(state_S, "hidden state of the student")
    one_tensor(state_T, "hidden state of the teacher")
    if state_S.shape[:-1] != state_T.shape[:-1]:
        raise ValueError(
            "hidden states of student and teacher must have the same batch and length, "
            f"got {tuple(state_S.shape)} and {tuple(state_T.shape)}; both models must read the same tokens"
        )


def _energies(state: Tensor, mask: Tensor | None, side: str) -> Tensor:
    """Return ``(batch, length)``: the sum of the squares of each position's state, 0 where it is masked."""
    one_tensor(state, f"hidden state of the {side}")
    (state,) = full_precision(state)
    if state.dim() not in (2, 3):
        raise ValueError(
            f"hidden state of the {side} must have the shape (batch, length, width), got {tuple(state.shape)}"
        )
    if state.dim() == 3:
        weight = position_weights(mask, state, state.shape[:2])
        return clear_masked(state, weight).square().sum(dim=-1)
    weight = position_weights(mask, state, state.shape)
    return state if weight is None else state.masked_fill(weight == 0, 0.0)


def _energy_form(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's energies, as :func:`at_loss` also takes them."""
    return _energies(state, None, "teacher")


def _direction(energies: Tensor) -> Tensor:
    """Return rows of length 1; the largest energy is divided out first, as the square of a square overflows soon."""
    scaled = energies / above_zero(energies.detach().amax(dim=-1, keepdim=True))
    return scaled / above_zero(torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))


@MATCH_LOSS_MAP.add("at")
@averaged_over("positions")
@student_width("any")
@teacher_form(TeacherForm("energies", _energy_form, positions=(1,)))
def at_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between where the states have their energy (attention transfer).

    .. math::
        L = \frac1{\sum_{b,n} m_{bn}} \sum_{b,n} m_{bn} \left(
        \frac{E^S_{bn}}{\lVert E^S_b \rVert} - \frac{E^T_{bn}}{\lVert E^T_b \rVert} \right)^2, \qquad
        E_{bn} = \lVert f_{bn} \rVert^2

    with the norms over the kept positions of a row. This is the form of the authors' code, for which their weight of
    1000 is meant; the paper has the distance :math:`\lVert \cdot \rVert_2` of each row.

    Args:
        state_S: student states, ``(batch, length, width)``.
        state_T: teacher states; their width may differ, so no projection is needed. Or their energies :math:`E`,
            ``(batch, length)``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, from 0 to 2, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Zagoruyko, Komodakis, "Paying More Attention to Attention", 2017, arXiv:1612.03928, section 3.1 (p = 2).
    """
    energies_S, energies_T = _energies(state_S, mask, "student"), _energies(state_T, mask, "teacher")
    if energies_S.shape != energies_T.shape:
        raise ValueError(
            "hidden states of student and teacher must have the same batch and length, "
            f"got {tuple(state_S.shape)} and {tuple(state_T.shape)}; both models must read the same tokens"
        )
    student, teacher = full_precision(energies_S, energies_T)
    weight = position_weights(mask, student, student.shape)
    return weighted_mean((_direction(student) - _direction(teacher)).square(), weight)


@MATCH_LOSS_MAP.add("layer_norm_mse")
@averaged_over("positions")
def layer_norm_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between hidden states that were normalised to the mean 0 and the variance 1.

    .. math::
        L = \frac{\sum_n m_n \lVert \hat s_n - \hat t_n \rVert^2}{H \sum_n m_n}, \qquad
        \hat s_n = \frac{s_n - \mathrm{mean}(s_n)}{\sqrt{\mathrm{var}(s_n)}}

    Args:
        state_S: student states, ``(batch, length, hidden)``.
        state_T: teacher states, same shape; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions and the width, from 0 to 4, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Sun et al., "MobileBERT", 2020, arXiv:2004.02984, section 3.4 (feature map transfer, weight 100 over the number
        of layers in the authors' code).
    """
    same_states(state_S, state_T)
    student, teacher = full_precision(state_S, state_T)
    weight = position_weights(mask, student, student.shape[:-1])
    normal_S, normal_T = (
        F.layer_norm(clear_masked(state, weight), state.shape[-1:], eps=_EPSILON) for state in (student, teacher)
    )
    return weighted_mean((normal_S - normal_T).square().mean(dim=-1), weight, cleared=True)


@MATCH_LOSS_MAP.add("state_mean")
@averaged_over("positions")
@student_width("any")
def state_mean_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Squared difference between the means of the hidden states over their width.

    .. math:: L = \frac{\sum_n m_n \left(\mathrm{mean}(s_n) - \mathrm{mean}(t_n)\right)^2}{\sum_n m_n}

    Stands beside ``layer_norm_mse``, which takes these means away. The authors' code computes the teacher's mean from
    the list of all of its layers instead of the layer in question; this is the form that they describe.

    Args:
        state_S: student states, ``(batch, length, hidden)``.
        state_T: teacher states of the same positions; their width may differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Sun et al., "MobileBERT", 2020, arXiv:2004.02984, section 3.4; weight 5000 over the number of layers in the
        authors' code.
    """
    student, teacher, weight = _both_cleared(state_S, state_T, mask)
    return weighted_mean((student.mean(dim=-1) - teacher.mean(dim=-1)).square(), weight, cleared=True)


@MATCH_LOSS_MAP.add("state_variance")
@averaged_over("positions")
@student_width("any")
def state_variance_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Difference between the variances of the hidden states over their width.

    .. math:: L = \frac{\sum_n m_n \left| \mathrm{var}(s_n) - \mathrm{var}(t_n) \right|}{\sum_n m_n}

    with the variance as the mean of the squares (no correction). Stands beside ``layer_norm_mse``, which divides by
    these variances. The authors' code computes the teacher's variance from the list of all of its layers instead of the
    layer in question; this is the form that they describe.

    Args:
        state_S: student states, ``(batch, length, hidden)``.
        state_T: teacher states of the same positions; their width may differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Sun et al., "MobileBERT", 2020, arXiv:2004.02984, section 3.4; weight 5 over the number of layers in the
        authors' code.
    """
    student, teacher, weight = _both_cleared(state_S, state_T, mask)
    gap = student.var(dim=-1, correction=0) - teacher.var(dim=-1, correction=0)
    return weighted_mean(gap.abs(), weight, cleared=True)


def _both_cleared(state_S: Tensor, state_T: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both states in full precision with zeros where they are masked, and the weights of the positions."""
    _same_positions(state_S, state_T)
    student, teacher = full_precision(state_S, state_T)
    weight = position_weights(mask, student, student.shape[:-1])
    return clear_masked(student, weight), clear_masked(teacher, weight), weight
