"""What a batch is made of: its task, and the part of each side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskBatch:
    """A batch of one of several tasks."""

    task: str
    batch: Any


def split(batch: Any) -> tuple[Any, Any, Any]:
    """Return a batch's teacher part, student part, and stored teacher outputs (``None`` without).

    A dict with the keys ``'teacher'`` and ``'student'`` feeds each side its own part, and ``'teacher_cache'``, if it is
    there, holds what the teacher would return; the teacher's part may then be left out. Any other batch feeds both.
    """
    if isinstance(batch, Mapping) and "student" in batch and ("teacher" in batch or "teacher_cache" in batch):
        return batch.get("teacher"), batch["student"], batch.get("teacher_cache")
    return batch, batch, None
