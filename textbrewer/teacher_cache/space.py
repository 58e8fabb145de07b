"""The rows of one teacher in a cache, stored for one choice of losses: looked up, added, and noticed if useless."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from torch import Tensor

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.teacher_cache import codec, layout
from textbrewer.teacher_cache.contents import Contents
from textbrewer.teacher_cache.errors import CacheError
from textbrewer.teacher_cache.found import Found
from textbrewer.teacher_cache.items import bytes_of
from textbrewer.teacher_cache.keys import rows_of
from textbrewer.teacher_cache.layout import Layout
from textbrewer.teacher_cache.planning import StoragePlan, plan_storage
from textbrewer.teacher_cache.sizes import in_bytes

if TYPE_CHECKING:
    from textbrewer.teacher_cache.cache import TeacherCache

# What a request has of the teacher itself: unknown where the teacher is not there.
_OF_TEACHER = ("teacher", "adaptor", "precision", "arguments")
# Rows of a second pass after which a cache that found none of them steps aside.
_ENOUGH_ROWS = 64
_ENOUGH_SHARE = 0.05
_HARDLY_ANY = 0.01


class Space:
    """One teacher's rows in a cache, stored for one choice of losses.

    Args:
        cache: the cache, open.
        request: what is asked for: teacher, adaptor, matches, precision, types; plain values.
        contents: what the losses read.
        role: which of several teachers it is, to tell their rows apart where the teachers are not there.
        keep_padding: whether rows must be stored with their padding, as those of an encoder and a decoder, which have
            positions of their own.
    """

    def __init__(
        self,
        cache: TeacherCache,
        request: dict[str, Any],
        contents: Contents,
        role: str = "",
        keep_padding: bool = False,
    ) -> None:
        self.cache, self.request, self.contents, self.role = cache, request, contents, role
        self.keep_padding = keep_padding
        self.layout: Layout | None = None
        self.name, self.plan_line = "", ""
        self.aside = False
        # Look-ups of the first pass; of later ones, and how many of these found their row.
        self._first = self._later = self._later_found = 0
        self._damaged = 0
        self._told: set[str] = set()
        self._computed, self._seconds, self._seconds_a_row = 0, 0.0, 0.0

    def open(self) -> bool:
        """Return whether rows of this request are there already; then they are used.

        Raises:
            CacheError: without a teacher, if there are none, or those of several teachers.
        """
        store = self.cache.store
        if self.request["teacher"] is None:
            self.name, only = self._only_match()
            self._adopt(only)
            return True
        name = _hash(self.request)
        limited = f"{name}-{self.cache.max_bytes}"
        self.name, found = name, store.describe(name)
        if found is None and self.cache.max_bytes is not None:
            found = store.describe(limited)
            self.name = limited if found is not None else name
        if found is not None:
            self._adopt(found)
        return found is not None

    def _only_match(self) -> tuple[str, dict[str, Any]]:
        """Return the one space that has what is asked for, of whatever teacher."""
        wanted = {key: value for key, value in self.request.items() if key not in _OF_TEACHER}
        having = {
            name: content
            for name, content in self.cache.store.spaces().items()
            if {key: content["request"].get(key) for key in wanted} == wanted
        }
        if len(having) > 1:
            having = {name: content for name, content in having.items() if content.get("role") == self.role}
        if len(having) == 1:
            return next(iter(having.items()))
        where = f"teacher cache {str(self.cache.path)!r}"
        if having:
            raise CacheError(
                f"model_T=None, but {where} has the outputs of {len(having)} teachers (or of one at several "
                "precisions) for these losses; store each in a folder of its own"
            )
        others = [layout.in_words(names) for names in self._stored_elsewhere()]
        raise CacheError(
            f"model_T=None, but {where} does not have what these losses read (stored: {' | '.join(others) or 'nothing'}"
            "); run textbrewer.precompute with this distill_config, and TeacherCache settings as here"
        )

    def _stored_elsewhere(self) -> list[list[str]]:
        return [[item["name"] for item in content["layout"]["items"]] for content in self.cache.store.spaces().values()]

    def _adopt(self, content: Mapping[str, Any]) -> None:
        try:
            self.layout = Layout.from_dict(content["layout"])
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"teacher cache {str(self.cache.path)!r} cannot be read, what it notes of its rows is damaged "
                f"({error!r}); delete the folder, and the teacher's outputs are stored anew"
            ) from error
        self.contents = Contents(self.contents.matches, self.contents.everything, self.layout.whole)
        self._seconds_a_row = float(content.get("seconds_a_row", 0.0))

    def settle(self, batch: Any, views_T: Views, views_S: Views | None, rows: int | None) -> None:
        """Decide how rows are stored, by the views of a first batch.

        Args:
            batch: the teacher's batch.
            views_T: the teacher's views of it.
            views_S: the student's; ``None``: losses are taken to leave out the padding.
            rows: rows of the data set, ``None`` if unknown.
        """
        contents = self.contents.settle(views_T, views_S is None or layout.same_mask(views_S, views_T))
        tensors = contents.tensors(views_T)
        batch_rows = rows_of(batch, self.cache.mask, keep_padding=False)
        padded = self.cache.keep_padding
        if padded is None and views_S is not None:
            padded = not layout.masks_cover_padding(views_S, views_T, batch_rows, contents)
        padded = bool(padded) or self.keep_padding or layout.depends_on_padding(tensors, batch_rows, contents)
        items = layout.items_of(tensors, padded, contents, self.cache.top_k, self.request["temperature"] or 1.0)
        length = 0.0 if batch_rows.kept is None else float(batch_rows.kept.sum()) / len(batch_rows.keys)
        sizes = {item.name: bytes_of(item, self.cache.dtype, length) for item in items}
        whole_rows = contents.everything or bool(views_T.captured)
        plan = plan_storage(sizes, rows, self.cache.room(), whole_rows)
        # Rows with their padding are as long as that of their batch.
        stored = tuple(item.varying() if padded else item for item in items if item.name in plan.stored)
        whole = tuple(sorted(contents.whole))
        found = Layout(stored, contents.counts(views_T), whole, padded, plan.recomputed, plan.share_of_rows)
        if plan.recomputed or plan.share_of_rows < 1:
            self.name = f"{self.name}-{self.cache.max_bytes}"
        note = {"request": self.request, "layout": found.to_dict(), "role": self.role}
        try:
            self._adopt(self.cache.store.describe(self.name, lambda: note) or note)
        except OSError as error:
            self.cache.stop(str(error))
            self._adopt(note)
        self.plan_line = self._in_words(plan)

    def _in_words(self, plan: StoragePlan) -> str:
        settled = self.layout
        if settled is None:
            return ""
        size = "" if plan.bytes is None else f", about {in_bytes(plan.bytes)} for {plan.rows:,} rows"
        line = f"Teacher cache {str(self.cache.path)!r}: stores {layout.in_words([i.name for i in settled.items])}"
        line += f" as {self.cache.dtype}{', with padding' if settled.keep_padding and self._has_mask() else ''}{size}"
        if settled.recomputed:
            line += f"; recomputes {layout.in_words(settled.recomputed)} (max_bytes)"
        if settled.share_of_rows < 1:
            line += f"; that is {settled.share_of_rows:.0%} of the rows (max_bytes), the others are recomputed"
        others = len(self.cache.store.spaces().keys() - {self.name})
        if others:
            # Said because a teacher that was not meant to change may have changed.
            line += f"; the folder also has rows of {others} other teachers, adaptors or choices of losses"
        return line

    def _has_mask(self) -> bool:
        return "inputs_mask" in [item.name for item in self.layout.items] if self.layout is not None else False

    # ---- rows ------------------------------------------------------------------------------------------------------

    def lookup(self, batch: Any, epoch: int = 0) -> Found:
        """Return what the cache has of a batch; may be called from a thread.

        Args:
            batch: the teacher's batch.
            epoch: passes completed before this one.
        """
        settled = self._settled()
        rows = rows_of(batch, self.cache.mask, settled.keep_padding)
        entries = self.cache.read(self.name, rows.keys)
        damaged = [row for row, entry in enumerate(entries) if entry is not None and not codec.is_intact(entry)]
        for row in damaged:
            entries[row] = None
        self._damaged += len(damaged)
        found = Found(rows, entries, length=0 if rows.kept is None else rows.kept.shape[1])
        missing = len(found.missing)
        if not missing:
            self._gather(found)
        hits = len(entries) - missing
        self.cache.count(hits, missing, hits * self._cost())
        self._watch(epoch, len(entries), hits)
        return found

    def _cost(self) -> float:
        """Return the teacher's seconds for a row, as far as they were measured."""
        return self._seconds / self._computed if self._computed else self._seconds_a_row

    def _watch(self, epoch: int, rows: int, found: int) -> None:
        """Step aside if hardly a row of the second pass was seen in the first."""
        if epoch == 0:
            self._first += rows
            return
        before = self._later
        self._later += rows
        self._later_found += found
        enough = max(_ENOUGH_ROWS, _ENOUGH_SHARE * self._first)
        if before < enough <= self._later and self.cache.stopped is None:
            self.aside = self._later_found < _HARDLY_ANY * self._later

    def _gather(self, found: Found) -> None:
        """Put a batch's rows side by side; the bytes that they were read from are let go."""
        entries = [entry for entry in found.entries if entry is not None]
        found.gathered = codec.gather(self._settled().items, entries, layout.places_of(found.rows), found.length)
        found.entries = [b""] * len(entries)

    def tensors(self, found: Found, to_device: Callable[[Any], Any]) -> dict[str, Tensor]:
        """Return the stored tensors of a batch of which no row is missing, by name, in the types they came in.

        Args:
            found: the batch.
            to_device: brings tensors to a device.
        """
        if found.gathered is None:
            self._gather(found)
        return {item.item.name: item.tensor(to_device) for item in found.gathered or []}

    def add(self, found: Found, tensors: Mapping[str, Tensor], numbers: Sequence[int], seconds: float | None) -> None:
        """Store rows that were missing, and complete what was found.

        The losses get the rows as they are stored, so that a later epoch sees the same numbers.

        Args:
            found: what was found.
            tensors: of the rows computed, by name.
            numbers: of all these rows.
            seconds: what they cost, ``None`` if that was not measured.
        """
        settled = self._settled()
        places = layout.places_of(found.rows)
        missing = set(found.missing)
        packed = codec.pack(settled.items, tensors, self.cache.dtype, [places[row] for row in numbers])
        fresh = {}
        for row, entry in zip(numbers, packed, strict=True):
            if row in missing:
                found.entries[row] = entry
                fresh[found.rows.keys[row]] = entry
        if seconds is not None:
            self._computed += len(numbers)
            self._seconds += seconds
        self.cache.write(self.name, fresh, quietly=settled.share_of_rows < 1)

    def views(self, tensors: Mapping[str, Tensor]) -> Views:
        """Return views of stored (and recomputed) tensors."""
        return self.contents.views(tensors, self._settled().counts)

    def tell(self) -> None:
        """Warn, once each, of damaged rows and of stepping aside; called from the main thread."""
        where = f"teacher cache {str(self.cache.path)!r}"
        if self._damaged and "damaged" not in self._told:
            self._told.add("damaged")
            checks.warn(f"{where} has damaged rows; they are left out. Check the disk; delete the folder to store anew")
        if self.aside and "aside" not in self._told:
            self._told.add("aside")
            checks.warn(
                f"{where}: no row of the second pass was seen in the first (rows change from pass to pass, as with "
                "augmentation or random masking); the cache steps aside, and the teacher is run in every step"
            )

    def finish(self) -> None:
        """Note what the teacher costs, for runs that find every row."""
        if self._computed and self.layout is not None:
            content = self.cache.store.describe(self.name)
            if content is None:
                # It could not be noted, and so no row was stored.
                return
            try:
                self.cache.store.note(self.name, {**content, "seconds_a_row": self._cost()})
            except OSError:
                # A full disk was told of already; this figure only serves a report.
                return

    def _settled(self) -> Layout:
        if self.layout is None:
            raise RuntimeError("a space of a teacher cache must be opened or settled before it is used")
        return self.layout


def _hash(request: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=12).hexdigest()
