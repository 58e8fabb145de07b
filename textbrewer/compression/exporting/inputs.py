"""The inputs of an exported model: which of a batch they are, and which of their axes may have any size."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks

__all__ = ["Axes", "Inputs", "another_shape", "first_row", "read_inputs"]

Axes = dict[str, dict[int, str]]
"""By input, the axes that may have any size, each with a name; axes of one name go together."""

BATCH = "batch"
_LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label", "sentence_order_label", "mc_labels")
"""What models of transformers only compute their own loss from."""


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Args:
        batches: real ones, each a dict of tensors by name, on the CPU.
        candidates: axes that may be of any size, as far as the data can tell: the boldest guess first, what is certain
            last.
        must: axes that the user asked for, which are in all of them.
        ignored: what the batches held that is no input: labels.
        positional: whether the model is called by position, in the order of the names.
    """

    batches: list[dict[str, Tensor]]
    candidates: list[Axes]
    must: Axes
    ignored: tuple[str, ...]
    positional: bool

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in order."""
        return list(self.batches[0])


def read_inputs(model: nn.Module, data: Any, most: int, dynamic_axes: Mapping[str, Mapping[int, str]] | None) -> Inputs:
    """Return what a model is called with, of some of its data.

    Args:
        model: says by its signature what a positional input is called, and whether it cannot do without labels.
        data: batches; or one, if it is a dict, a tuple or a tensor.
        most: how many batches are read.
        dynamic_axes: axes that must be of any size, beside the rows, those that differ between batches, and the second
            one of whole numbers (the length).

    Raises:
        TypeError: if the data is of another kind.
        ValueError: without a batch, or if the batches do not go together.
        KeyError: if ``dynamic_axes`` names no input.
    """
    single = isinstance(data, (Mapping, Tensor, tuple))
    if not single and not isinstance(data, Iterable):
        raise TypeError(f"data must be a batch or an iterable of batches, got {type(data).__name__}")
    given = [data] if single else list(islice(data, most))
    if not given:
        raise ValueError("data must yield at least one batch, got none")
    signature = inspect.signature(model.forward)
    positional = any(item.kind is item.VAR_POSITIONAL for item in signature.parameters.values()) and not isinstance(
        given[0], Mapping
    )
    batches, ignored = [], []
    for batch in given:
        named, left = _named(batch, signature)
        batches.append(named)
        ignored += [name for name in left if name not in ignored]
        if named.keys() != batches[0].keys():
            raise ValueError(f"all batches of data must have the same inputs, got {list(batches[0])} and {list(named)}")
    if not batches[0]:
        raise ValueError(f"data must yield batches with inputs beside {ignored}, got none")
    must = {name: dict(labels) for name, labels in (dynamic_axes or {}).items()}
    return Inputs(batches, _candidates(batches, must), must, tuple(ignored), positional)


def another_shape(batch: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """Return a batch of another shape along some axes: a row more, each length one less (or more, below 3).

    A model traced on it and run on the batch itself cannot pass if a size of the trace is fixed inside it. Sizes of 1
    would be taken for constants by ``torch.export``. First and last tokens stay, which may be special ones.
    """
    changed = dict(batch)
    for name, tensor in batch.items():
        for axis, label in axes.get(name, {}).items():
            size = tensor.shape[axis]
            if label != BATCH and size > 2:
                first, rest = tensor.narrow(axis, 0, 1), tensor.narrow(axis, 2, size - 2)
                tensor = torch.cat([first, rest], axis)
            else:
                tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        changed[name] = tensor.clone()  # no view: torch.export would record what it is a view of
    return changed


def first_row(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of the first row alone."""
    rows = _rows(batch)
    return {name: tensor[:1] if tensor.dim() and len(tensor) == rows else tensor for name, tensor in batch.items()}


def _named(batch: Any, signature: inspect.Signature) -> tuple[dict[str, Tensor], list[str]]:
    """Return a batch's inputs by name, and what is none."""
    parameters = signature.parameters
    if isinstance(batch, Mapping):
        named = dict(batch)
    else:
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        known = [
            item.name for item in parameters.values() if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
        ]
        names = [*known, *(f"input_{number}" for number in range(len(known), len(values)))]
        named = dict(zip(names, values, strict=False))
    left = [
        name
        for name in named
        if name in _LABELS and (name not in parameters or parameters[name].default is not inspect.Parameter.empty)
    ]
    inputs = {name: value for name, value in named.items() if name not in left and value is not None}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"data must yield batches of tensors, got {type(value).__name__} for {name!r}")
    return {str(name): value.detach().cpu() for name, value in inputs.items()}, left


def _candidates(batches: Sequence[Mapping[str, Tensor]], must: Axes) -> list[Axes]:
    """Return which axes may be of any size: guesses, from bold to none."""
    first = batches[0]
    for name in first:
        if any(batch[name].dim() != first[name].dim() for batch in batches):
            raise ValueError(f"all batches must have {first[name].dim()} axes in {name!r}, as the first one has")
    certain = _certain(batches, must)
    lengths = {
        name: _length(name) for name, tensor in first.items() if tensor.dim() > 1 and not tensor.is_floating_point()
    }
    # Numbers beside the tokens, one or a vector for each.
    sizes = {tuple(batch[name].shape[1] for batch in batches): label for name, label in reversed(lengths.items())}
    beside = {
        name: sizes[tuple(batch[name].shape[1] for batch in batches)]
        for name, tensor in first.items()
        if tensor.dim() > 1 and tuple(batch[name].shape[1] for batch in batches) in sizes
    }
    found = []
    for guess in ({**beside, **lengths}, lengths, {}):
        axes = {
            name: {**labels, **({1: guess[name]} if name in guess else {}), **must.get(name, {})}
            for name, labels in certain.items()
        }
        if axes not in found:
            found.append(axes)
    return found


def _certain(batches: Sequence[Mapping[str, Tensor]], must: Axes) -> Axes:
    """Return the rows, the axes that differ between batches, and those that the user asked for.

    Raises:
        ValueError, KeyError: if there are no rows, or the user's axes are none.
    """
    first, rows = batches[0], _rows(batches[0])
    if not rows:
        raise ValueError("data must yield batches of tensors with at least one row, got none")
    checks.known_keys(must, first, "dynamic_axes")
    for name, labels in must.items():
        for axis, label in labels.items():
            if axis not in range(first[name].dim()) or not isinstance(label, str) or not label:
                raise ValueError(
                    f"dynamic_axes must be as {{name: {{axis: label}}}} with axes of {name!r} from 0 to "
                    f"{first[name].dim() - 1}, got {{{axis!r}: {label!r}}}"
                )
    axes: Axes = {name: {} for name in first}
    for name, tensor in first.items():
        for axis, size in enumerate(tensor.shape):
            if axis == 0 and size == rows:
                axes[name][axis] = BATCH
            elif any(batch[name].shape[axis] != size for batch in batches):
                axes[name][axis] = _length(name) if axis == 1 and not tensor.is_floating_point() else f"{name}_{axis}"
        axes[name] |= must.get(name, {})
    return axes


def _length(name: str) -> str:
    return "decoder_length" if name.startswith("decoder_") else "length"


def _rows(batch: Mapping[str, Tensor]) -> int:
    """Return the number of rows of a batch, 0 if it has none."""
    return next((len(tensor) for tensor in batch.values() if tensor.dim()), 0)
