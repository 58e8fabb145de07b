"""A cache of teacher outputs on the disk: what users make, and its figures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from textbrewer import checks
from textbrewer.teacher_cache.items import DTYPES
from textbrewer.teacher_cache.planning import bytes_on_disk
from textbrewer.teacher_cache.sizes import in_bytes, parse_bytes
from textbrewer.teacher_cache.store import Store

_SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}

# LMDB must not have one file open twice in a process.
_open_stores: dict[str, tuple[Store, int]] = {}
_opening = threading.RLock()


@dataclass(frozen=True)
class CacheInfo:
    """Figures of a cache.

    Args:
        path: its folder.
        entries: rows stored, of all teachers and choices of losses.
        bytes: size of the file.
        spaces: how many teachers or choices of losses have rows in it.
        rows_found: look-ups that found their row, since this ``TeacherCache`` was made.
        rows_missing: look-ups that did not.
        seconds_saved: what the rows found would have cost, less the waiting.
        seconds_waited: how long training steps waited for reading and writing.
    """

    path: str
    entries: int
    bytes: int
    spaces: int
    rows_found: int
    rows_missing: int
    seconds_saved: float
    seconds_waited: float

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that found their row, 0 to 1."""
        return self.rows_found / max(self.rows_found + self.rows_missing, 1)

    def __str__(self) -> str:
        return (
            f"Teacher cache {self.path!r}: {self.entries:,} rows, {in_bytes(self.bytes)}; found {self.hit_rate:.1%} of "
            f"{self.rows_found + self.rows_missing:,} look-ups, saved {self.seconds_saved:.0f} s, steps waited "
            f"{self.seconds_waited:.1f} s"
        )


class TeacherCache:
    """Teacher outputs stored on the disk, found again by the content of the teacher's inputs.

    Give it to a distiller: ``GeneralDistiller(..., teacher_cache=TeacherCache("cache"))``. What the losses read of the
    teacher's outputs is stored in the first epoch; from then on the teacher is run only for rows not seen before, so
    shuffling, other batch sizes, dynamic padding, several epochs, resumed runs and several processes all profit. Rows
    of a changed teacher, adaptor, precision or choice of losses are never mixed up.

    Args:
        path: a folder on a local disk; made if it is not there.
        dtype: how real numbers are stored: ``"float16"``, ``"bfloat16"``, ``"int8"`` (with one scale a vector) or
            ``"float32"``.
        max_bytes: the file grows no further: a number, or ``"20GB"``; ``None``: as far as the disk allows.
        top_k: store only so many of the largest logits, and the probability of the others together, spread evenly over
            them; for large vocabularies. ``None``: all logits.
        mask: the entry of the teacher's batch that is zero at the padding, of all entries that are as long: a dict's
            key, or a tuple's number. ``None``: ``"attention_mask"``, where there is one. Without a mask, rows are found
            only under the same padding.
        keep_padding: whether what the teacher says of padding is stored too, so that rows are found only under the same
            padding. ``None``: where the losses count padding, as the masks of a first batch tell.

    Raises:
        TypeError, ValueError: if an argument cannot work; the message names it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: str = "float16",
        max_bytes: int | str | None = None,
        top_k: int | None = None,
        mask: str | int | None = None,
        keep_padding: bool | None = None,
    ) -> None:
        checks.is_a(path, (str, os.PathLike), "path of a teacher cache", "a folder")
        checks.is_a(dtype, str, "dtype of a teacher cache", "a name")
        self.path = Path(path)
        self.dtype = _SHORT.get(dtype, dtype)
        checks.one_of(self.dtype, DTYPES, "dtype of a teacher cache")
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes)
        if top_k is not None:
            checks.integer(top_k, "top_k of a teacher cache", minimum=1)
        self.top_k = None if top_k is None else int(top_k)
        if mask is not None:
            checks.is_a(mask, (str, int), "mask of a teacher cache", "a key or number of the teacher's batch")
        self.mask = None if mask is None else str(mask)
        if keep_padding is not None:
            checks.is_a(keep_padding, bool, "keep_padding", "True, False or None")
        self.keep_padding = keep_padding
        self.stopped: str | None = None
        self._quiet = False
        self._store: Store | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        # The space and the rows that are on their way to the disk.
        self._pending: tuple[str, Mapping[bytes, bytes]] = "", {}
        self._found = self._missing = 0
        self._waited = self._saved = 0.0

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.path)!r}, dtype={self.dtype!r}, max_bytes={self.max_bytes})"

    @contextmanager
    def opened(self) -> Iterator[TeacherCache]:
        """Keep the file open while the context is.

        Raises:
            CacheError: if the folder holds something else, or a damaged file.
            ImportError: if lmdb is not installed.
        """
        if self._store is not None:
            yield self
            return
        key = os.path.realpath(self.path)
        with _opening:
            store, users = _open_stores.get(key, (None, 0))
            store = store or Store(self.path, self.max_bytes)
            _open_stores[key] = store, users + 1
        self._store, self.stopped = store, None
        try:
            yield self
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
            self._writer = self._writing = self._store = None
            with _opening:
                store, users = _open_stores.pop(key)
                if users > 1:
                    _open_stores[key] = store, users - 1
                else:
                    store.close()

    @property
    def store(self) -> Store:
        """The open file.

        Raises:
            RuntimeError: if it is not open.
        """
        if self._store is None:
            raise RuntimeError("a teacher cache must be opened first: with cache.opened(): ...")
        return self._store

    def room(self) -> int:
        """Return the bytes that can still be written."""
        room = self.store.room()
        return room if self.max_bytes is None else max(min(room, self.max_bytes - self.store.used()), 0)

    def info(self) -> CacheInfo:
        """Return the figures: rows, bytes, how many look-ups found their row, and seconds saved."""
        with self.opened():
            spaces = self.store.spaces()
            entries, size = sum(self.store.entries(name) for name in spaces), self.store.used()
        return CacheInfo(
            str(self.path),
            entries,
            size,
            len(spaces),
            self._found,
            self._missing,
            max(self._saved - self._waited, 0.0),
            self._waited,
        )

    # ---- used by spaces --------------------------------------------------------------------------------------------

    def read(self, space: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return each key's bytes, ``None`` where there are none."""
        # Noted before the file is read: what is not in it yet is among these.
        written_to, entries = self._pending
        values = self.store.get(space, keys)
        if written_to != space:
            return values
        return [entries.get(key) if value is None else value for key, value in zip(keys, values, strict=True)]

    def count(self, found: int, missing: int, saved: float) -> None:
        """Count look-ups, and the teacher's seconds that they saved."""
        self._found += found
        self._missing += missing
        self._saved += saved

    def waited(self, seconds: float) -> None:
        """Count the time that a step waited."""
        self._waited += seconds

    def write(self, space: str, entries: Mapping[bytes, bytes], quietly: bool = False) -> None:
        """Write rows on a thread, in one transaction; the one before is finished first.

        Args:
            space: the space's name.
            entries: bytes by key.
            quietly: that the limit is reached is no news.
        """
        self.flush()
        if self.stopped is not None or not entries:
            return
        if self.room() < sum(bytes_on_disk(len(value)) for value in entries.values()):
            limit = "max_bytes is reached" if self.max_bytes is not None else "the disk has less than 1 GB left"
            self.stop(limit, quietly)
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._quiet, self._pending = quietly, (space, dict(entries))
        self._writing = self._writer.submit(self.store.put, *self._pending)

    def flush(self) -> None:
        """Wait until what was handed over is on the disk; a failure stops the caching with a warning."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        started = time.perf_counter()
        try:
            writing.result()
        except OSError as error:
            self.stop(str(error), self._quiet)
        self._pending = "", {}
        self.waited(time.perf_counter() - started)

    def stop(self, reason: str, quietly: bool = False) -> None:
        """Write nothing more, and say why unless that is no news."""
        self.stopped = reason
        if not quietly:
            checks.warn(
                f"teacher cache {str(self.path)!r} cannot be written any more ({reason}); what is in it is used, the "
                "teacher is run for the other rows, and the training goes on"
            )
