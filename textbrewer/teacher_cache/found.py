"""What a cache has of one batch."""

from __future__ import annotations

from dataclasses import dataclass

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
