"""Rows of tensors as bytes: without padding, in float32, float16, bfloat16, or int8 with one scale a vector."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textbrewer.teacher_cache.items import DTYPES, Item, parts_of

# The checksum of what comes after it, and the row's length.
_HEAD, _LENGTH = struct.Struct("<II"), struct.Struct("<I")
_LARGEST_HALF = 65504.0
Array = np.ndarray[Any, Any]
Place = Any
"""The kept positions of a row: a slice, or their numbers."""


# ---- storing -------------------------------------------------------------------------------------------------------


def pack(items: Sequence[Item], tensors: Mapping[str, Tensor], dtype: str, places: Sequence[Place]) -> list[bytes]:
    """Return the bytes of each row.

    Args:
        items: what is stored.
        tensors: by name, rows first.
        dtype: the storage type of real numbers; one that cannot hold an item's numbers gives way to float32.
        places: the kept positions of each row.
    """
    columns: list[tuple[Item, list[Array]]] = []
    codes = shapes = b""
    for item in items:
        tensor = tensors[item.name].detach()
        if item.varies:
            item = item.of_shape(tensor.shape[1:])
            shapes += _shape_struct(item).pack(*item.shape)
        code, arrays = _encode(item, tensor, dtype, places)
        codes += bytes([DTYPES.index(code)])
        columns.append((item, arrays))
    rows = []
    for row, place in enumerate(places):
        length = place.stop if isinstance(place, slice) else len(place)
        pieces = [_LENGTH.pack(length or 0), codes, shapes]
        for item, arrays in columns:
            pieces += [_cut(array[row], item, place).tobytes() for array in arrays]
        body = b"".join(pieces)
        rows.append(_LENGTH.pack(zlib.crc32(body)) + body)
    return rows


def _shape_struct(item: Item) -> struct.Struct:
    return struct.Struct(f"<{len(item.shape)}I")


def _encode(item: Item, tensor: Tensor, dtype: str, places: Sequence[Place]) -> tuple[str, list[Array]]:
    """Return the storage type used, and the arrays of an item."""
    if item.top_k:
        values, classes, tail = top_logits(tensor, item.top_k, item.temperature)
        inner = Item(item.name, item.dtype, (*item.shape[:-1], item.top_k))
        code, arrays = _encode(inner, values, dtype, places)
        return code, [*arrays, classes.int().cpu().numpy(), tail.float().cpu().numpy()]
    if not item.is_float:
        kind = torch.uint8 if tensor.dtype == torch.bool else torch.int64
        return "float32", [tensor.to(kind).cpu().numpy()]
    fits = _fits(tensor, dtype)
    # What stands at the padding must change neither the type nor the scale of what is stored.
    if 0 in item.shape and (not fits or (dtype == "int8" and item.shape[-1] == 0)):
        tensor = _cleared(item, tensor, places)
        fits = fits or _fits(tensor, dtype)
    dtype = dtype if fits else "float32"
    if dtype == "int8":
        numbers, scale = quantise(tensor)
        return dtype, [numbers.cpu().numpy(), scale.cpu().numpy()]
    stored = tensor.to(getattr(torch, dtype)).cpu()
    return dtype, [(stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy()]


def _cleared(item: Item, tensor: Tensor, places: Sequence[Place]) -> Tensor:
    """Return a tensor with zeros at the padding."""
    kept = torch.zeros(len(places), tensor.shape[1 + item.shape.index(0)], dtype=torch.bool)
    for row, place in enumerate(places):
        kept[row, place] = True
    for number, size in enumerate(item.shape):
        if size == 0:
            mask = ~kept.reshape(len(places), *[1] * number, -1, *[1] * (len(item.shape) - number - 1))
            tensor = tensor.masked_fill(mask.to(tensor.device), 0.0)
    return tensor


def _fits(tensor: Tensor, dtype: str) -> bool:
    """Return whether a storage type can hold a tensor's numbers (waits for the device)."""
    if dtype in ("float32", "bfloat16") or tensor.numel() == 0:
        return True
    if dtype == "int8" and tensor.dim() < 2:
        return False
    low, high = (float(value) for value in torch.aminmax(tensor))
    if math.isfinite(low) and math.isfinite(high):
        return dtype == "int8" or max(-low, high) <= _LARGEST_HALF
    return dtype != "int8" and not bool(((tensor.abs() > _LARGEST_HALF) & tensor.isfinite()).any())


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers from -127 to 127 and the scale of each vector along the last dimension."""
    values = tensor.float()
    scale = values.abs().amax(dim=-1) / 127
    steps = values / torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    return steps.round_().to(torch.int8), scale


def top_logits(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the largest logits, their classes, and the level of the others.

    The others are taken as equal, at the level at which their probability in all is what it was:
    :math:`\tau (\log \sum_{c \notin \text{top}} e^{t_c / \tau} - \log (C - k))`.

    Args:
        logits: ``(..., classes)``.
        count: how many are kept, k.
        temperature: at which the probabilities are taken, tau.
    """
    values, places = logits.topk(count, dim=-1)
    others = logits.float().scatter(-1, places, -torch.inf)
    level = temperature * (torch.logsumexp(others / temperature, dim=-1) - math.log(logits.shape[-1] - count))
    return values, places, level


def _cut(row: Array, item: Item, place: Place) -> Array:
    """Return the kept positions of one row's array, which may lack the item's last dimension."""
    shape = item.shape[: row.ndim]
    if isinstance(place, slice):
        return row[tuple(place if size == 0 else slice(None) for size in shape)]
    for dimension, size in enumerate(shape):
        if size == 0:
            row = row.take(place, axis=dimension)
    return row


# ---- reading -------------------------------------------------------------------------------------------------------


def is_intact(entry: bytes) -> bool:
    """Return whether an entry is as it was written."""
    return len(entry) > _HEAD.size and zlib.crc32(memoryview(entry)[_LENGTH.size :]) == _HEAD.unpack_from(entry)[0]


@dataclass(frozen=True)
class Gathered:
    """An item of some rows as it was stored, not yet in the type it came in.

    Args:
        item: the item.
        by_code: for each storage type in use: the numbers of its rows, and their arrays, rows first.
        shape: the item's shape with all rows.
    """

    item: Item
    by_code: Mapping[str, tuple[Sequence[int], Sequence[Tensor]]]
    shape: tuple[int, ...]

    def tensor(self, to_device: Callable[[Any], Any] = lambda tensors: tensors) -> Tensor:
        """Return the item's tensor.

        Args:
            to_device: brings tensors to a device: what is stored, since it is shorter than what it stands for.
        """
        values = {code: _decode(self.item, code, to_device(list(arrays))) for code, (_, arrays) in self.by_code.items()}
        if len(values) == 1:
            return next(iter(values.values()))
        whole = torch.zeros(
            self.shape, dtype=getattr(torch, self.item.dtype), device=next(iter(values.values())).device
        )
        for code, value in values.items():
            whole[list(self.by_code[code][0])] = value
        return whole


def unpack(items: Sequence[Item], entries: Sequence[bytes], places: Sequence[Place], length: int) -> dict[str, Tensor]:
    """Return the tensors of the rows, by name, zero at the padding; see :func:`gather`."""
    return {gathered.item.name: gathered.tensor() for gathered in gather(items, entries, places, length)}


def gather(items: Sequence[Item], entries: Sequence[bytes], places: Sequence[Place], length: int) -> list[Gathered]:
    """Return the items of some rows side by side, zero at the padding.

    Done by NumPy: torch starts threads of its own for each thread that computes with it, and as soon as there are more
    of them than cores, those of the training step no longer wait for work but sleep, which makes that step longer.

    Args:
        items: what is stored.
        entries: the bytes of each row.
        places: the positions of each row.
        length: positions of the batch.

    Raises:
        ValueError: if an entry does not have the size that its items need.
    """
    kinds, start = _of_rows(items, entries)
    offsets = [start] * len(entries)
    lengths = [_HEAD.unpack_from(entry)[1] for entry in entries]
    gathered = []
    for number, item in enumerate(kinds):
        codes = [DTYPES[entry[_HEAD.size + number]] for entry in entries]
        by_code: dict[str, tuple[Sequence[int], Sequence[Tensor]]] = {}
        for code in dict.fromkeys(codes):
            rows = [row for row, own in enumerate(codes) if own == code]
            by_code[code] = rows, _read(item, code, rows, entries, offsets, lengths, places, length)
        gathered.append(Gathered(item, by_code, (len(entries), *item.row_shape(length))))
    if any(offset != len(entry) for offset, entry in zip(offsets, entries, strict=True)):
        raise ValueError("an entry does not have the size that its items need")
    return gathered


def _of_rows(items: Sequence[Item], entries: Sequence[bytes]) -> tuple[list[Item], int]:
    """Return the items in the shapes that the rows note, and where the rows' arrays begin."""
    first = end = _HEAD.size + len(items)
    kinds = []
    for item in items:
        if item.varies:
            form = _shape_struct(item)
            item, end = item.of_shape(form.unpack_from(entries[0], end)), end + form.size
        kinds.append(item)
    if any(entry[first:end] != entries[0][first:end] for entry in entries):
        raise ValueError("the rows of a batch must be of one shape")
    return kinds, end


def _read(
    item: Item,
    code: str,
    rows: Sequence[int],
    entries: Sequence[bytes],
    offsets: list[int],
    lengths: Sequence[int],
    places: Sequence[Place],
    length: int,
) -> list[Tensor]:
    """Return the arrays of one item of some rows, and move on the rows' offsets."""
    full = all(lengths[row] == length for row in rows) or 0 not in item.shape
    arrays: list[Tensor] = []
    for part in parts_of(item, code):
        leading = item.shape[:-1] if item.shape else ()
        shape = (*leading, *([] if part.last is None else [part.last]))
        padded = [length if size == 0 else size for size in shape]
        target: Array = (np.empty if full else np.zeros)((len(rows), *padded), dtype=part.numpy)
        for index, row in enumerate(rows):
            own = [lengths[row] if size == 0 else size for size in shape]
            count = math.prod(own)
            values = np.frombuffer(entries[row], part.numpy, count, offsets[row]).reshape(own)
            offsets[row] += values.nbytes
            _put(target[index, ...], values, shape, places[row])
        arrays.append(torch.from_numpy(target).view(part.torch))
    return arrays


def _put(target: Array, values: Array, shape: Sequence[int], place: Place) -> None:
    if 0 not in shape:
        target[...] = values
    elif isinstance(place, slice):
        target[tuple(place if size == 0 else slice(None) for size in shape)] = values
    else:
        target[np.ix_(*(place if size == 0 else np.arange(size) for size in shape))] = values


def _decode(item: Item, code: str, arrays: Sequence[Tensor]) -> Tensor:
    """Return an item of its arrays, in the type it came in."""
    dtype = getattr(torch, item.dtype)
    if item.top_k:
        *inner, places, level = arrays
        values = _decode(Item(item.name, item.dtype, (item.top_k,)), code, inner)
        logits = level.to(dtype).unsqueeze(-1).expand(*level.shape, item.shape[-1])
        return logits.scatter(-1, places.long(), values)
    if item.is_float and code == "int8":
        return (arrays[0].float() * arrays[1].unsqueeze(-1)).to(dtype)
    return arrays[0].to(dtype)
