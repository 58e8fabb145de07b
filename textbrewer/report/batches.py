"""The batches that a report's models are run on: how many rows they have, and pieces of a given number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

__all__ = ["describe", "first_batches", "pieces", "rows_of"]


def first_batches(data: Iterable[Any], most: int) -> list[Any]:
    """Return the first batches, at most so many.

    Raises:
        TypeError: if ``data`` cannot be gone through, or is one batch.
        ValueError: if there is none, or one has no rows.
    """
    if isinstance(data, (Mapping, Tensor)) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}; give one batch as [batch]")
    found = list(islice(data, most))
    if not found:
        raise ValueError("data must yield at least one batch, got none")
    for batch in found:
        if not rows_of(batch):
            raise ValueError(f"data must yield batches with at least one row, got {describe(batch)}")
    return found


def rows_of(batch: Any) -> int:
    """Return the number of rows: the length of the batch's first tensor that has dimensions.

    Raises:
        TypeError: if there is no such tensor.
    """
    sizes = [len(tensor) for tensor in _tensors(batch) if tensor.dim()]
    if not sizes:
        raise TypeError(f"data must yield batches with tensors of rows, got {describe(batch)}")
    return sizes[0]


def pieces(batches: Iterable[Any], rows: int, most: int) -> list[Any]:
    """Return consecutive pieces of ``rows`` rows of the batches, at most so many; rows keep their batch's padding.

    Raises:
        ValueError: if no batch has so many rows.
    """
    sizes = []
    found: list[Any] = []
    for batch in batches:
        sizes.append(rows_of(batch))
        starts = range(0, sizes[-1] - rows + 1, rows)
        found += [_rows(batch, start, start + rows, sizes[-1]) for start in islice(starts, most - len(found))]
    if not found:
        raise ValueError(f"batch_sizes must be at most the rows of the data's batches, {max(sizes)}, got {rows}")
    return found


def describe(batch: Any) -> str:
    """Return what a batch is, in one line: ``"input_ids 8 x 128, labels 8"``."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {describe(value)}" for name, value in batch.items())
    if isinstance(batch, Tensor):
        return " x ".join(map(str, batch.shape)) or "a number"
    if isinstance(batch, (tuple, list)):
        return ", ".join(describe(value) for value in batch)
    return type(batch).__name__


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _rows(value: Any, start: int, end: int, rows: int) -> Any:
    """Return the rows of every tensor that has as many rows as the batch; anything else as it is."""
    if isinstance(value, Tensor):
        return value[start:end] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _rows(part, start, end, rows) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_rows(part, start, end, rows) for part in value]
    return value
