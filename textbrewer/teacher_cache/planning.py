"""What to store where not everything fits: the features that let the teacher stop soonest, or as many rows as fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textbrewer.teacher_cache.contents import depth_of

# Of LMDB's pages, about this share is filled; long rows take whole pages.
_FILLED = 0.7
_PAGE = 4096
_ENTRY = 40


@dataclass(frozen=True)
class StoragePlan:
    """What is stored of a data set.

    Args:
        stored: names of the tensors to store.
        recomputed: names of those that the teacher computes anew in every epoch.
        bytes: estimated size on the disk; ``None`` if the number of rows is unknown.
        rows: rows of the data set; ``None`` if unknown.
        share_of_rows: below 1: only so many rows fit.
    """

    stored: tuple[str, ...]
    recomputed: tuple[str, ...]
    bytes: float | None
    rows: int | None
    share_of_rows: float = 1.0


def bytes_on_disk(row_bytes: float) -> float:
    """Return the estimated bytes that a row takes in the file."""
    if row_bytes < _PAGE / 2:
        return (row_bytes + _ENTRY) / _FILLED
    return -(-(row_bytes + 16) // _PAGE) * _PAGE + _ENTRY / _FILLED


def plan_storage(row_bytes: Mapping[str, float], rows: int | None, room: int, whole_rows: bool = False) -> StoragePlan:
    """Return what to store.

    The teacher has to run as far as the deepest tensor that is not stored, so storing goes from the logits down, the
    smaller first. What that saves is compared with storing all tensors of as many rows as fit, and the better is taken.

    Args:
        row_bytes: the bytes of each tensor in an average row, by name.
        rows: rows of the data set, ``None`` if unknown: everything is stored, until the cache is full.
        room: bytes that can be written.
        whole_rows: a teacher that stops early is of no use.
    """
    order = sorted(row_bytes, key=lambda name: (-depth_of(name), row_bytes[name], name))
    if rows is None:
        return StoragePlan(tuple(order), (), None, None)
    total = rows * bytes_on_disk(sum(row_bytes.values()))
    if total <= room:
        return StoragePlan(tuple(order), (), total, rows)
    stored: list[str] = []
    for name in order:
        if rows * bytes_on_disk(sum(row_bytes[item] for item in [*stored, name])) > room:
            break
        stored.append(name)
    left = [name for name in order if name not in stored]
    deepest = max((depth_of(name) for name in left), default=0.0)
    finite = [depth_of(name) for name in order if depth_of(name) != float("inf")]
    whole = max([*finite, 1.0])
    saved_by_depth = 0.0 if deepest == float("inf") else 1.0 - deepest / whole
    if stored and not whole_rows and saved_by_depth >= room / total:
        size = rows * bytes_on_disk(sum(row_bytes[name] for name in stored))
        return StoragePlan(tuple(stored), tuple(left), size, rows)
    return StoragePlan(tuple(order), (), float(room), rows, room / total)
