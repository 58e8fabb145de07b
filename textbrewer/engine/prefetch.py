"""Batches made ready on a thread while the step before is at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from textbrewer.engine import rng
from textbrewer.engine.batches import LoaderBatches, PostProcessor
from textbrewer.engine.loaders import generators_of


class PreparedBatches(LoaderBatches):
    """The batches of one loader, each made ready on a thread while the one before is used.

    The loader itself is read in the main thread, one batch ahead and never past the end of a pass, so the order that it
    draws is that of a plain ``for`` loop. A loader that draws random numbers for each batch in this process draws them
    one step earlier.

    Args:
        loader: any iterable of batches that can be iterated again and again.
        postprocess: applied to each batch in the main thread; may be ``None``.
        name: the loader's name, for messages.
        prepare: ``prepare(batch, passes)`` gives what is handed on; called in the thread. ``passes`` is how many passes
            were begun here before this one: a resumed run's rest of a pass is none.
        waited: told the seconds that a step waited for its batch's preparation.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        postprocess: PostProcessor | None,
        name: str,
        prepare: Callable[[Any, int], Any],
        waited: Callable[[float], None],
    ) -> None:
        super().__init__(loader, None, name)
        self._before, self._prepare, self._waited = postprocess, prepare, waited
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare-batch")
        self._passes, self._begun = 0, 0
        # The random numbers before the batch read last, which no step has had yet.
        self._before_ahead: rng.State | None = None

    def _begin(self, skipping: int = 0) -> Iterator[Any]:
        self._passes = self._begun
        self._begun += skipping == 0
        batches = super()._begin(skipping)
        if skipping and self._before_ahead is not None:
            rng.put(self._before_ahead, generators_of(self.loader))
        return self._ahead(batches, self._submit(batches))

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, with the random numbers that the batch read ahead was drawn with."""
        return {**super().state_dict(), "before_ahead": self._before_ahead if self.taken else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place, and read the next batch ahead as it was read then."""
        self._before_ahead = state.get("before_ahead")
        super().load_state_dict(state)

    def _ahead(self, batches: Iterator[Any], coming: Future[Any] | None) -> Iterator[Any]:
        while coming is not None:
            ready = coming
            coming = self._submit(batches)
            started = time.perf_counter()
            batch = ready.result()
            self._waited(time.perf_counter() - started)
            del ready
            yield batch

    def _submit(self, batches: Iterator[Any]) -> Future[Any] | None:
        """Read the next batch and hand it to the thread; ``None`` at the end of the pass."""
        self._before_ahead = rng.take(generators_of(self.loader))
        try:
            batch = next(batches)
        except StopIteration:
            return None
        if self._before is not None:
            batch = self._before(batch)
        return self._thread.submit(self._prepare, batch, self._passes)

    def close(self) -> None:
        """Finish the thread, and let go of the loader's workers."""
        self._thread.shutdown(cancel_futures=True)
        # It refers to this object: left to the garbage collection, a loader's workers are only ended after 5 seconds.
        self._iterator = None
