"""What several losses between features compute: directions, exact products, and one vector a row."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer.losses.forms import TeacherForm
from textbrewer.losses.masking import clear_masked, full_precision, one_tensor, position_weights

__all__ = ["POOLED", "above_zero", "both_pooled", "check_states", "pooled", "product", "row_weights", "unit"]

# Below this length a vector has no direction: it is left as it is, and its gradient stays of the order of 1.
_SHORTEST = 1e-12


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 along the last dimension; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > _SHORTEST, length, torch.ones_like(length))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product over the last two dimensions; autocast, which would round it, is off."""
    with torch.autocast(device_type=left.device.type, enabled=False):
        return left @ right


def above_zero(divisor: Tensor) -> Tensor:
    """Return what to divide by: the divisor, or 1 where it is 0 and so is what it divides."""
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def check_states(state: Tensor, side: str) -> None:
    """Raise unless a hidden state is a tensor ``(batch, length, width)`` or ``(batch, width)``.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has another number of dimensions.
    """
    one_tensor(state, f"hidden state of the {side}")
    if state.dim() not in (2, 3):
        raise ValueError(
            f"hidden state of the {side} must have the shape (batch, length, width) or (batch, width), "
            f"got {tuple(state.shape)}"
        )


def row_weights(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """Return 1 for each row with a kept position and 0 for the others, ``(batch,)``; None where there is no mask.

    Args:
        mask: ``(batch, ...)``.
        values: ``(batch, ...)``, whose dtype and device the weights get.

    Raises:
        ValueError: if the mask has other rows.
    """
    kept = None if mask is None else (mask != 0).reshape(mask.shape[0], -1).any(dim=1)
    return position_weights(kept, values, values.shape[:1])


def pooled(state: Tensor, mask: Tensor | None, side: str) -> Tensor:
    r"""Return one vector a row: the mean over its kept positions, :math:`\sum_n m_n s_n / \sum_n m_n`.

    Args:
        state: ``(batch, length, width)``; or ``(batch, width)``, which is returned as it is.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.
        side: ``"student"`` or ``"teacher"``, for messages.

    Returns:
        ``(batch, width)``, float32 or wider; zeros for a row without kept positions.

    Raises:
        TypeError: if the state is no tensor.
        ValueError: if its shape, or that of the mask, does not fit.
    """
    check_states(state, side)
    (state,) = full_precision(state)
    if state.dim() == 2:
        return state
    weight = position_weights(mask, state, state.shape[:2])
    if weight is None:
        return state.sum(dim=1) / max(state.shape[1], 1)
    total = (clear_masked(state, weight) * weight.unsqueeze(-1)).sum(dim=1)
    return total / above_zero(weight.sum(dim=1, keepdim=True))


def both_pooled(state_S: Tensor, state_T: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both sides' vectors, ``(batch, width)``, and the weights of the rows, ``(batch,)`` or None.

    A row without a kept position has the weight 0, and zeros.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.
    """
    for state, side in ((state_S, "student"), (state_T, "teacher")):
        check_states(state, side)
    if state_S.shape[0] != state_T.shape[0]:
        raise ValueError(
            "hidden states of student and teacher must have the same batch, "
            f"got {tuple(state_S.shape)} and {tuple(state_T.shape)}"
        )
    student, teacher = full_precision(pooled(state_S, mask, "student"), pooled(state_T, mask, "teacher"))
    rows = row_weights(mask, student)
    return clear_masked(student, rows), clear_masked(teacher, rows), rows


def _pooled_form(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's vectors, as losses between pooled states also take them."""
    return pooled(state, mask, "teacher")


POOLED = TeacherForm("mean_of_positions", _pooled_form, uses_mask=True)
"""The form of a teacher's state that losses between pooled states also take."""
