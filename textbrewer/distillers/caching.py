"""``is_caching_logits``: the teacher's outputs kept in main memory with the batches they belong to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.engine import LoaderBatches, generators_of, rng
from textbrewer.teacher_cache import Contents


@dataclass(frozen=True)
class Remembered:
    """A batch with what the teachers said of it.

    Args:
        batch: the batch, as the loader and the post-processor gave it.
        results_T: the views of each teacher, on the CPU.
    """

    batch: Any
    results_T: list[Views]


class CachedBatches(LoaderBatches):
    """A loader read once; then its batches with the teachers' outputs, in a new order every pass.

    The order is Python's ``random.shuffle`` of the order before, as in TextBrewer.

    Args:
        loader: the user's loader.
        postprocess: applied to each batch once, when it is read.
        name: the loader's name, for messages.
        remember: runs the teachers on a batch.
        make_bar: makes a progress bar, given tqdm's options.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        postprocess: Callable[[Any], Any] | None,
        name: str,
        remember: Callable[[Any], Remembered],
        make_bar: Callable[..., Any],
    ) -> None:
        super().__init__(loader, None, name)
        self.prepare_batch, self.remember, self.make_bar = postprocess, remember, make_bar
        self.entries: list[Remembered] | None = None
        self.order: list[int] = []
        self._build_start: rng.State | None = None
        self._order_before: list[int] = []

    @property
    def size(self) -> int | None:
        """Batches a pass, ``None`` while that is unknown."""
        return super().size if self.entries is None else len(self.entries)

    def build(self) -> None:
        """Read the loader once and run the teachers on every batch.

        Raises:
            ValueError: if the loader is empty.
        """
        self._build_start = rng.take(generators_of(self.loader))
        entries = []
        # The bar gets no iterable: tqdm would start the loader twice, and with it draw random numbers twice.
        with self.make_bar(total=self.size, desc="Teacher outputs", unit="batch") as bar:
            for batch in self.loader:
                entries.append(self.remember(batch if self.prepare_batch is None else self.prepare_batch(batch)))
                bar.update(1)
        self.entries = entries
        self.order = list(range(len(self.entries)))

    def _begin(self, skipping: int = 0) -> Iterator[Any]:
        if self.entries is None:
            if self._build_start is None:
                self.build()
            else:
                self._build_again(self._build_start)
        entries = self.entries or []
        self._pass_start = rng.take(generators_of(self.loader))
        self._order_before = list(self.order)
        random.shuffle(self.order)
        return iter([entries[number] for number in self.order[skipping:]])

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, with the order of the batches and the random numbers they were read with."""
        state = super().state_dict()
        return {
            **state,
            "build_start": self._build_start,
            "order": self._order_before if state["taken"] else self.order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place; the loader is read again when the next batch is asked for, never if none is left to do."""
        if state["build_start"] is not None:
            self.entries, self._build_start, self.order = None, state["build_start"], list(state["order"])
        super().load_state_dict(state)

    def _build_again(self, start: rng.State) -> None:
        """Read the loader as it was read first, for the order found in a checkpoint; no random number is used up."""
        generators, order = generators_of(self.loader), self.order
        with rng.kept(generators):
            rng.put(start, generators)
            self.build()
        self.order = order


def kept(views: Views, contents: Contents) -> Views:
    """Return the part of a teacher's views that the losses read, on the CPU.

    Args:
        views: a teacher's views.
        contents: what the losses read of them.
    """
    if contents.everything:
        entries = {key: to_cpu(value) for key, value in views.items()}
        return Views(entries, captured={number: to_cpu(item) for number, item in views.captured.items()})
    return contents.views(to_cpu(contents.tensors(views)), contents.counts(views))


def to_cpu(value: Any) -> Any:
    """Return tensors, also within dicts and lists, detached on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu")
    if isinstance(value, dict):
        return {name: to_cpu(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(item) for item in value]
    return value
