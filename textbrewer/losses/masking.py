"""What all losses share: the mask, the precision, the shape errors, and the one mean that each of them ends in.

A mask has one value for each position, ``(batch, length)``, of any dtype; zero means the position does not exist.
Its content never matters then, NaN included (but for the gradient of ``hidden_mse``, which asks for finite states), and
no loss selects by it: shapes stay static and nothing is read back from the device. The value of a fractional mask
weighs its position, except in the losses between logits and in ``cos``, where TextBrewer selects positions and so any
value but zero counts as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from textbrewer import checks

__all__ = [
    "Unit",
    "averaged_over",
    "clear_masked",
    "denominator_of",
    "full_precision",
    "one_tensor",
    "pair_weights",
    "position_weights",
    "same_shape",
    "same_states",
    "weighted_mean",
]

F = TypeVar("F", bound=Callable[..., Any])
Unit = Literal["rows", "positions", "pairs", "batch"]
_ATTRIBUTE = "averaged_over"


def averaged_over(unit: Unit) -> Callable[[F], F]:
    """Return a decorator that notes on a loss what its denominator counts.

    Args:
        unit: with a mask of ``n_b`` kept positions in row ``b``: ``"positions"`` counts ``sum_b n_b``, ``"pairs"``
            counts ``sum_b n_b ** 2``, ``"rows"`` counts the rows with ``n_b > 0``. A factor that does not depend on
            the mask (heads, width) is left out. ``"batch"``: the loss compares the rows of a batch with each other,
            so those of parts of a batch do not add up to that of the whole, whatever their weights.

    Raises:
        ValueError: if the unit is unknown.
    """
    checks.one_of(unit, get_args(Unit), "unit")

    def mark(function: F) -> F:
        setattr(function, _ATTRIBUTE, unit)
        return function

    return mark


def denominator_of(function: Callable[..., Any]) -> str | None:
    """Return what :func:`averaged_over` noted on a loss (or on the function of a partial), None where nothing is."""
    unit = getattr(function, _ATTRIBUTE, None)
    if unit is None and isinstance(function, functools.partial):
        return denominator_of(function.func)
    return unit


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype: float32, or wider if one of them is.

    The square of a hidden state overflows float16 at 256, and a mean over thousands of bfloat16 values is lost to
    rounding: the losses are therefore computed and returned in at least float32.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def one_tensor(value: object, name: str) -> None:
    """Raise TypeError unless ``value`` is a tensor: a match of two layers hands over a list of two."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be one tensor, got {type(value).__name__}; the losses on two layers are 'fsp' and 'nst'"
        )


def same_shape(student: Tensor, teacher: Tensor, name: str, remedy: str = "") -> None:
    """Raise unless student and teacher are two tensors of one shape; ``remedy`` ends the message.

    Raises:
        TypeError: if one of them is not a tensor.
        ValueError: if the shapes differ.
    """
    one_tensor(student, f"{name} of the student")
    one_tensor(teacher, f"{name} of the teacher")
    try:
        checks.same_shape(student, teacher, name)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}" if remedy else str(error)) from None


def same_states(student: Tensor, teacher: Tensor) -> None:
    """Raise unless two hidden states have one shape, naming the projection to use where only their widths differ."""
    remedy = ""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.shape[:-1] == teacher.shape[:-1]:
        widths = f"{student.shape[-1]}, {teacher.shape[-1]}"
        remedy = f"name a projection in the match: 'proj': ['linear', {widths}]"
    same_shape(student, teacher, "hidden states", remedy)


def position_weights(mask: Tensor | None, values: Tensor, positions: Sequence[int]) -> Tensor | None:
    """Return the mask as weights in the dtype and on the device of ``values``, None where there is no mask.

    Args:
        mask: any dtype, zero where the position does not exist.
        values: the tensor that the weights will meet.
        positions: the shape that the mask must have.

    Raises:
        ValueError: if the shape of the mask is another.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(positions):
        raise ValueError(f"mask must have the shape {tuple(positions)}, one value a position, got {tuple(mask.shape)}")
    return mask.to(device=values.device, dtype=values.dtype)


def clear_masked(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return ``values`` with zeros at the positions of weight zero.

    Multiplying by the mask is not enough: NaN times zero is NaN, in the value and again in the gradient. So this
    comes before whatever is not linear.

    Args:
        values: ``(*positions, width)``.
        weight: ``positions``, or None: nothing is masked.
    """
    return values if weight is None else values.masked_fill((weight == 0).unsqueeze(-1), 0.0)


def pair_weights(weight: Tensor) -> Tensor:
    """Return the weights of all pairs of positions, ``(..., length)`` to ``(..., length, length)``."""
    return weight.unsqueeze(-1) * weight.unsqueeze(-2)


def weighted_mean(values: Tensor, weight: Tensor | None, cleared: bool = False) -> Tensor:
    r"""Mean of the values under their weights; zero, with a gradient of zero, where all weights are zero.

    .. math:: \frac{\sum_i w_i v_i}{\sum_i w_i}

    Args:
        values: any shape.
        weight: a shape that broadcasts to that of ``values`` and is counted as often as it is repeated; or None: all
            values weigh the same.
        cleared: whether the values are known to be zero where the weight is, :func:`clear_masked` having come before.

    Returns:
        Scalar, in the dtype of ``values``.
    """
    if weight is None:
        return values.sum() / max(values.numel(), 1)
    total = weight.expand_as(values).sum()
    weighted = (values if cleared else values.masked_fill(weight == 0, 0.0)) * weight
    # The lowest positive number instead of zero: 0 divided by it is 0.
    return weighted.sum() / total.clamp(min=torch.finfo(total.dtype).tiny)
