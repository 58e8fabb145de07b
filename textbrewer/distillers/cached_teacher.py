"""A teacher behind a cache: run for the rows that are not stored, and for the features that are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.distillers.needs import Needs
from textbrewer.teacher_cache import CacheError, Found, Space, layout
from textbrewer.teacher_cache.keys import entries_of, is_list_of_rows, row_count

Run = Callable[[Any, Needs | None], Views]
"""Runs the teacher on a batch on the device; with needs, no further than these ask."""


@dataclass(frozen=True)
class Prepared:
    """A batch with what the teacher cache has of it.

    Args:
        batch: the batch, as the loader and the post-processor gave it.
        found: for each teacher; ``None`` where nothing was looked up.
    """

    batch: Any
    found: list[Found | None] | None


class CachedTeacher:
    """One teacher with its rows in a cache.

    Args:
        space: the rows.
        run: runs the teacher; ``None``: it is not there.
        to_device: brings tensors to the device of the run.
    """

    def __init__(self, space: Space, run: Run | None, to_device: Callable[[Any], Any]) -> None:
        self.space, self.run, self.to_device = space, run, to_device

    def look_up(self, batch: Any, epoch: int) -> Found | None:
        """Return what the cache has of a batch, ``None`` if it is of no use for it; called from a thread."""
        settled = self.space.layout
        if self.space.aside or settled is None:
            return None
        found = self.space.lookup(batch, epoch)
        return found if settled.can_hold(found.rows) else None

    def views(self, batch: Any, found: Found | None) -> Views:
        """Return the teacher's views of a batch: stored, or computed and then stored.

        Args:
            batch: the teacher's batch, as the loader gave it.
            found: what the cache has of it.

        Raises:
            CacheError: if a row is missing and there is no teacher, or the rows are not as the first ones were.
        """
        self.space.tell()
        if found is None:
            return self._live(batch, None)
        recomputed = self._recomputed()
        live: Mapping[str, Tensor] = {}
        missing = found.missing
        if missing:
            live = self._fill(batch, found, missing, recomputed)
        elif recomputed:
            live = self.space.contents.tensors(self._live(batch, needs_for(recomputed)))
            live = {name: live[name] for name in recomputed}
        return self.space.views({**self.space.tensors(found, self.to_device), **live})

    def store(self, batch: Any, views: Views) -> None:
        """Store the views of a batch that was run already."""
        found = self.space.lookup(batch)
        if found.missing:
            tensors = self.space.contents.tensors(views)
            self.space.add(found, tensors, range(len(found.entries)), seconds=None)

    def _recomputed(self) -> Sequence[str]:
        return () if self.space.layout is None else self.space.layout.recomputed

    def _fill(
        self, batch: Any, found: Found, missing: Sequence[int], recomputed: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """Run the teacher on the missing rows and store them; return the tensors that are not stored.

        For those the teacher is run on the whole batch.
        """
        count = len(found.entries)
        numbers = list(range(count)) if recomputed else list(missing)
        started = time.perf_counter()
        views = self._live(batch if len(numbers) == count else rows_only(batch, numbers), None)
        live = self.space.contents.tensors(views)
        self._check_positions(live, found)
        if any(tensor.is_cuda for tensor in live.values()):
            torch.cuda.synchronize()
        self.space.add(found, live, numbers, time.perf_counter() - started)
        return {name: live[name] for name in recomputed}

    def _check_positions(self, live: Mapping[str, Tensor], found: Found) -> None:
        settled, contents = self.space.layout, self.space.contents
        if settled is None or settled.keep_padding or not layout.has_other_positions(live, found.rows, contents):
            return
        raise CacheError(
            f"the rows in the teacher cache {str(self.space.cache.path)!r} are stored without padding, as far as the "
            "mask of the batch goes, but the teacher's outputs have other positions than the mask; use "
            "TeacherCache(..., keep_padding=True)"
        )

    def _live(self, batch: Any, needs: Needs | None) -> Views:
        if self.run is None:
            raise CacheError(
                f"model_T=None, but the teacher cache {str(self.space.cache.path)!r} does not have all rows and "
                "features of this batch; run textbrewer.precompute on the same data (same tokenizer, same length "
                "limit), or give the teacher"
            )
        return self.run(self.to_device(batch), needs)


def rows_only(batch: Any, numbers: Sequence[int]) -> Any:
    """Return a batch of some of a batch's rows; what has no rows stays as it is."""
    count = row_count(entries_of(batch))
    index = torch.tensor(numbers)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
            return value.index_select(0, index.to(value.device))
        return type(value)(value[number] for number in numbers) if is_list_of_rows(value, count) else value

    if isinstance(batch, Mapping):
        return type(batch)({name: pick(value) for name, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(pick, batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(pick, batch))
    return pick(batch)


def needs_for(names: Sequence[str]) -> Needs:
    """Return how far a teacher has to run for some stored tensors."""
    layers: dict[str, set[int]] = {}
    for name in names:
        key, _, place = name.partition("/")
        if key == "form":
            _, key, place = place.split("/")
        if place:
            layers.setdefault(key, set()).update(int(layer) for layer in place.split(","))
    return Needs(False, {key: frozenset(numbers) for key, numbers in layers.items()})
