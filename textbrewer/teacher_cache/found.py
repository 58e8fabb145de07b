"""What a cache has of one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from textbrewer.teacher_cache.codec import Gathered
from textbrewer.teacher_cache.keys import Rows


@dataclass
class Found:
    """What a cache has of a batch.

    Args:
        rows: the batch's keys.
        entries: each row's bytes, ``None`` for those missing.
        gathered: where no row is missing, what is stored, side by side.
        length: positions of the batch.
    """

    rows: Rows
    entries: list[bytes | None]
    gathered: list[Gathered] | None = None
    length: int = 0

    @property
    def missing(self) -> list[int]:
        """Numbers of the rows that are not in the cache."""
        return [row for row, entry in enumerate(self.entries) if entry is None]

    def tensors(self, to_device: Callable[[Any], Any] = lambda tensors: tensors) -> dict[str, Tensor]:
        """Return the stored tensors by name, in the types they came in.

        Args:
            to_device: brings tensors to a device.
        """
        return {item.item.name: item.tensor(to_device) for item in self.gathered or []}
