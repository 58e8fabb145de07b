"""Losses between relations: products of two layers of one model, compared with the same products in the other.

They take lists of two hidden states a side: a match names two layers, ``'layer_S': [0, 2], 'layer_T': [0, 6]``. The
same layer twice gives the products of that layer with itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textbrewer.losses.algebra import product
from textbrewer.losses.forms import TeacherForm, teacher_form
from textbrewer.losses.masking import (
    averaged_over,
    clear_masked,
    full_precision,
    pair_weights,
    position_weights,
    weighted_mean,
)
from textbrewer.losses.widths import student_width
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["fsp_loss", "mmd_loss"]


def _two_states(states: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return the two hidden states of one side, checked to be of the same batch and length."""
    remedy = f"name two layers in the match, 'layer_{side[0].upper()}': [i, j]"
    if not isinstance(states, (list, tuple)) or not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"states of the {side} must be a list of two tensors, got {type(states).__name__}; {remedy}")
    if len(states) != 2:
        raise ValueError(f"states of the {side} must be a list of two tensors, got {len(states)}; {remedy}")
    first, second = states
    if first.dim() != 3 or second.dim() != 3 or first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"states of the {side} must have the shapes (batch, length, hidden), with one batch and length, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second


def _layer_gram(states: tuple[Tensor, Tensor], weight: Tensor | None) -> Tensor:
    """Return ``(batch, hidden_0, hidden_1)``: the mean over the positions of the outer products of the two layers."""
    first, second = states
    if weight is None:
        return product(first.transpose(1, 2), second) / max(second.shape[1], 1)
    first = clear_masked(first, weight) * weight.unsqueeze(-1)
    second = clear_masked(second, weight) * weight.unsqueeze(-1)
    length = weight.sum(dim=1)[:, None, None]
    return product(first.transpose(1, 2), second) / torch.where(length > 0, length, torch.ones_like(length))


def _layer_form(states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the teacher's product of two layers, as :func:`fsp_loss` also takes it."""
    first, second = full_precision(*_two_states(states, "teacher"))
    return _layer_gram((first, second), position_weights(mask, first, first.shape[:2]))


@MATCH_LOSS_MAP.add("fsp", "gram")
@averaged_over("rows")
@teacher_form(TeacherForm("layer_product", _layer_form, uses_mask=True))
def fsp_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between the products of two layers over the positions (flow of solution procedure).

    .. math::
        L = \frac1{B H^2} \sum_b \left\lVert
        \frac{S_{b0}^\top S_{b1}}{n_b} - \frac{T_{b0}^\top T_{b1}}{n_b} \right\rVert_F^2,
        \qquad n_b = \text{number of kept positions}

    Args:
        state_S: two student states, ``(batch, length, hidden)``; the two may be of different widths.
        state_T: two teacher states, each as wide as the student's; where they are not, the match names ``'proj'``. Or
            their product :math:`T_{b0}^\top T_{b1} / n_b`, ``(batch, hidden, hidden)``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the rows that have a kept position, float32 or wider; 0 where no row has.

    Raises:
        TypeError: if a side is not a list of tensors.
        ValueError: if a list has not two tensors, or shapes do not fit.

    Reference:
        Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, section 3.2.
    """
    pair_S = _two_states(state_S, "student")
    if not isinstance(state_T, Tensor):
        _same_layers(pair_S, _two_states(state_T, "teacher"), mask)
    student_0, student_1 = full_precision(*pair_S)
    weight = position_weights(mask, student_0, student_0.shape[:2])
    product_S = _layer_gram((student_0, student_1), weight)
    if isinstance(state_T, Tensor):
        product_T = _same_product(product_S, state_T)
    else:
        teacher_0, teacher_1 = full_precision(*state_T)
        product_T = _layer_gram((teacher_0, teacher_1), weight)
    rows = None if weight is None else (weight.sum(dim=1) > 0).to(product_S.dtype)
    return weighted_mean((product_S - product_T).square().mean(dim=(1, 2)), rows)


def _same_layers(pair_S: Sequence[Tensor], pair_T: Sequence[Tensor], mask: Tensor | None) -> None:
    """Raise ValueError unless the states of both sides can be compared by ``fsp``."""
    for student, teacher in zip(pair_S, pair_T, strict=True):
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                "hidden states of student and teacher must have the same width for 'fsp', "
                f"got {student.shape[-1]} and {teacher.shape[-1]}; name a projection in the match: "
                f"'proj': ['linear', {student.shape[-1]}, {teacher.shape[-1]}]"
            )
        if student.shape[0] != teacher.shape[0] or (mask is not None and student.shape[1] != teacher.shape[1]):
            raise ValueError(
                "hidden states of student and teacher must have one batch, and with a mask one length, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )


def _same_product(product_S: Tensor, product_T: Tensor) -> Tensor:
    """Return the teacher's product in full precision, checked to have the shape of the student's."""
    if product_S.shape != product_T.shape:
        raise ValueError(
            f"products of student and teacher must have the same shape, got {tuple(product_S.shape)} and "
            f"{tuple(product_T.shape)}; both models must read the same tokens"
        )
    return full_precision(product_T)[0]


def _position_gram(states: tuple[Tensor, Tensor], weight: Tensor | None) -> Tensor:
    """Return ``(batch, length, length)``: the products of positions of the two layers, divided by their width."""
    first, second = (clear_masked(state, weight) for state in states)
    return product(first, second.transpose(1, 2)) / max(second.shape[2], 1)


def _position_form(states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the teacher's products of positions, as :func:`mmd_loss` also takes them."""
    first, second = full_precision(*_checked_pair(states, "teacher"))
    return _position_gram((first, second), position_weights(mask, first, first.shape[:2]))


def _checked_pair(states: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return the two states of one side, checked to be of one width."""
    first, second = _two_states(states, side)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"both states of the {side} must have the same width for 'nst', "
            f"got {first.shape[-1]} and {second.shape[-1]}; name two layers of one width"
        )
    return first, second


@MATCH_LOSS_MAP.add("nst", "mmd")
@averaged_over("pairs")
@student_width("any")
@teacher_form(TeacherForm("position_product", _position_form, positions=(1, 2)))
def mmd_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between the products of positions of two layers (neuron selectivity transfer).

    .. math::
        L = \frac{\sum_{b,i,j} m_{bi} m_{bj} \left(
        \frac{S_{b0i} \cdot S_{b1j}}{H_S} - \frac{T_{b0i} \cdot T_{b1j}}{H_T} \right)^2}{\sum_b (\sum_i m_{bi})^2}

    Args:
        state_S: two student states, ``(batch, length, hidden_S)``.
        state_T: two teacher states, ``(batch, length, hidden_T)``; the widths may differ, so no projection is needed.
            Or their products :math:`T_{b0i} \cdot T_{b1j} / H_T`, ``(batch, length, length)``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept pairs of positions, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is not a list of tensors.
        ValueError: if a list has not two tensors, or shapes do not fit.

    Reference:
        Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219,
        section 4 (TextBrewer's variant: the polynomial kernel's products, position by position).
    """
    pair_S = _checked_pair(state_S, "student")
    if not isinstance(state_T, Tensor):
        pair_T = _checked_pair(state_T, "teacher")
        if pair_S[0].shape[:2] != pair_T[0].shape[:2]:
            raise ValueError(
                "hidden states of student and teacher must have the same batch and length, "
                f"got {tuple(pair_S[0].shape)} and {tuple(pair_T[0].shape)}; both models must read the same tokens"
            )
    student_0, student_1 = full_precision(*pair_S)
    weight = position_weights(mask, student_0, student_0.shape[:2])
    products_S = _position_gram((student_0, student_1), weight)
    if isinstance(state_T, Tensor):
        products_T = _same_product(products_S, state_T)
    else:
        teacher_0, teacher_1 = full_precision(*pair_T)
        products_T = _position_gram((teacher_0, teacher_1), weight)
    return weighted_mean((products_S - products_T).square(), None if weight is None else pair_weights(weight))
