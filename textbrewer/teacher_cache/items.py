"""What is stored of a row: tensors with a shape and a type, and the arrays that they are kept as."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Item:
    """One stored tensor of a row.

    Args:
        name: its name.
        dtype: the type it comes back in, such as ``"float32"``.
        shape: its shape in one row; 0 where it is as long as the row, -1 where each row notes its own.
        top_k: of logits: how many are kept; 0: all.
        temperature: of logits with ``top_k``: at which the mass of the others is kept.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    top_k: int = 0
    temperature: float = 1.0

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Item:
        """Construct an item of what :meth:`to_dict` returned."""
        return cls(**{**content, "shape": tuple(content["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @property
    def is_float(self) -> bool:
        """Whether it holds real numbers, which may be stored in a shorter type."""
        return bool(getattr(torch, self.dtype).is_floating_point)

    @property
    def varies(self) -> bool:
        """Whether each row notes its own shape."""
        return -1 in self.shape

    def varying(self) -> Item:
        """Return the item for rows that note their own shape, as they do where padding is stored."""
        return replace(self, shape=(-1,) * len(self.shape))

    def of_shape(self, shape: Sequence[int]) -> Item:
        """Return the item as it is stored in rows of a shape."""
        return replace(self, shape=tuple(shape), top_k=self.top_k if shape and shape[-1] > self.top_k + 1 else 0)

    def row_shape(self, length: int) -> tuple[int, ...]:
        """Return the shape in a row of so many positions."""
        return tuple(length if size == 0 else size for size in self.shape)


@dataclass(frozen=True)
class Part:
    """One array of an item's bytes: its type in NumPy and torch, and whether it has the item's last dimension."""

    numpy: str
    torch: torch.dtype
    last: int | None


def parts_of(item: Item, code: str) -> list[Part]:
    """Return the arrays that an item is stored as, under a storage type."""
    if item.top_k:
        inner = parts_of(Item(item.name, item.dtype, (item.top_k,)), code)
        return [*inner, Part("i4", torch.int32, item.top_k), Part("f4", torch.float32, None)]
    last = item.shape[-1] if item.shape else None
    if not item.is_float:
        dtype = getattr(torch, item.dtype)
        return [Part("u1", torch.uint8, last) if dtype == torch.bool else Part("i8", torch.int64, last)]
    if code == "int8":
        return [Part("i1", torch.int8, last), Part("f4", torch.float32, None)]
    numpy, kind = {
        "float32": ("f4", torch.float32),
        "float16": ("f2", torch.float16),
        "bfloat16": ("i2", torch.bfloat16),
    }[code]
    return [Part(numpy, kind, last)]


def bytes_of(item: Item, dtype: str, length: float) -> float:
    """Return the bytes of an item in a row of so many positions."""
    total = 0.0
    for part in parts_of(item, dtype):
        shape = (*(item.shape[:-1] if item.shape else ()), *([] if part.last is None else [part.last]))
        total += math.prod(length if size == 0 else size for size in shape) * np.dtype(part.numpy).itemsize
    return total
