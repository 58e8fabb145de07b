"""What a batch is made of: its task, and the part of each side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textbrewer.distillers.cached_teacher import Prepared
from textbrewer.distillers.caching import Remembered


@dataclass(frozen=True)
class TaskBatch:
    """A batch of one of several tasks, or for one of several teachers.

    Args:
        task: the task, ``""`` where there are none.
        batch: the batch.
        teacher: the number of the teacher that was drawn for it; ``None``: none was.
    """

    task: str
    batch: Any
    teacher: int | None = None


def inner(batch: Any) -> Any:
    """Return a batch as the loader and the post-processor gave it."""
    while isinstance(batch, (TaskBatch, Remembered, Prepared)):
        batch = batch.batch
    return batch


def split(batch: Any) -> tuple[Any, Any, Any]:
    """Return a batch's teacher part, student part, and stored teacher outputs (``None`` without).

    A dict with the keys ``'teacher'`` and ``'student'`` feeds each side its own part, and ``'teacher_cache'``, if it is
    there, holds what the teacher would return; the teacher's part may then be left out. Any other batch feeds both.
    """
    if isinstance(batch, Mapping) and "student" in batch and ("teacher" in batch or "teacher_cache" in batch):
        return batch.get("teacher"), batch["student"], batch.get("teacher_cache")
    return batch, batch, None
