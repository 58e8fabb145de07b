"""Where batches come from, pass after pass, with a place that can be saved and found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from textbrewer import checks
from textbrewer.engine import rng
from textbrewer.engine.loaders import generators_of, iterate_from, size_of, start_workers, tell_epoch

PostProcessor = Callable[[Any], Any]


class Source(Protocol):
    """What the loop needs of the data."""

    @property
    def size(self) -> int | None:
        """Batches a pass, ``None`` if unknown."""

    @property
    def epoch(self) -> int:
        """Passes completed."""

    @property
    def taken(self) -> int:
        """Batches taken in the current pass."""

    def next_in_pass(self) -> Any:
        """Return the next batch of this pass, or raise StopIteration at its end (the next call starts a new pass)."""

    def next_forever(self) -> Any:
        """Return the next batch, starting a new pass when one ends."""

    def end_pass(self) -> None:
        """End the pass, as after its last batch; the next batch is the first of a new pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; changes the random-number state, which the caller puts back."""


class LoaderBatches:
    """The batches of one loader.

    The loader is iterated as the user made it (in distributed training, see :mod:`textbrewer.engine.sharding`), so
    random numbers are drawn as in a plain ``for`` loop. Samplers and datasets with ``set_epoch`` are told each pass.

    Args:
        loader: any iterable of batches that can be iterated again and again.
        postprocess: applied to each batch; may be ``None``.
        name: the loader's name, for messages.
    """

    def __init__(
        self, loader: Iterable[Any], postprocess: PostProcessor | None = None, name: str = "dataloader"
    ) -> None:
        self.loader, self.postprocess, self.name = loader, postprocess, name
        self.epoch, self.taken = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._pass_start: rng.State | None = None

    @property
    def size(self) -> int | None:
        """Batches a pass, ``None`` if unknown."""
        return size_of(self.loader)

    def next_in_pass(self) -> Any:
        """Return the next batch of this pass, or raise StopIteration at its end.

        Raises:
            ValueError: if a pass yields no batch at all.
        """
        if self._iterator is None:
            self._iterator = self._begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._iterator = None
            if self.taken == 0:
                raise ValueError(
                    f"{self.name} yielded no batch in pass {self.epoch + 1}; it must not be empty, and must be "
                    "iterable again for every pass (a generator is used up after one)"
                ) from None
            self.end_pass()
            raise
        self.taken += 1
        return batch if self.postprocess is None else self.postprocess(batch)

    def next_forever(self) -> Any:
        """Return the next batch, starting a new pass when one ends."""
        try:
            return self.next_in_pass()
        except StopIteration:
            return self.next_in_pass()

    def end_pass(self) -> None:
        """End the pass; the next batch is the first of a new one.

        A sampler may draw its last random numbers when it is asked for one batch too many, so it is, as by a ``for``.
        """
        if self._iterator is not None and next(self._iterator, None) is not None:
            checks.warn(f"{self.name} yields more than len({self.name}) = {self.size} batches; the others are left out")
        self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None

    def close(self) -> None:
        """Let go of what the source holds beside its loader: nothing."""

    def _begin(self, skipping: int = 0) -> Iterator[Any]:
        self._pass_start = rng.take(generators_of(self.loader))
        tell_epoch(self.loader, self.epoch)
        return iterate_from(self.loader, skipping, self.name, first_pass=self.epoch == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "pass_start": self._pass_start if self.taken else None,
            "generators": [generator.get_state() for generator in generators_of(self.loader)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place, drawing the same order as before and skipping what was taken.

        Batches of a map-style dataset are skipped by their row numbers alone; those of any other loader are read.
        """
        generators = generators_of(self.loader)
        self.epoch, self.taken, self._iterator = int(state["epoch"]), 0, None
        if self.epoch or state["taken"]:
            start_workers(self.loader)
        if state["taken"]:
            rng.put(state["pass_start"], generators)
            self.taken = int(state["taken"])
            self._iterator = self._begin(skipping=self.taken)
        for generator, value in zip(generators, state["generators"], strict=True):
            generator.set_state(value)


class TaskBatches:
    """The batches of several tasks, each drawn from a task picked at random; there are no passes.

    Args:
        sources: one source a task.
        tau: a task is picked with probability proportional to ``size ** tau``; uniformly if a size is unknown.
        wrap: makes the batch handed on of ``(task, batch)``.
        picker: draws the task; ``None``: NumPy's global generator.
    """

    epoch, taken = 0, 0

    def __init__(
        self,
        sources: Mapping[str, LoaderBatches],
        tau: float,
        wrap: Callable[[str, Any], Any],
        picker: np.random.RandomState | None = None,
    ) -> None:
        self.sources, self.wrap, self.picker = dict(sources), wrap, picker
        self.names = list(self.sources)
        self.weights = task_weights([source.size for source in self.sources.values()], tau)

    @property
    def size(self) -> int | None:
        """Always ``None``: there are no passes."""
        return None

    def next_in_pass(self) -> Any:
        """Return the next batch."""
        return self.next_forever()

    def next_forever(self) -> Any:
        """Return the next batch of a task picked at random."""
        choice = np.random.choice if self.picker is None else self.picker.choice
        name = str(choice(self.names, p=self.weights))
        return self.wrap(name, self.sources[name].next_forever())

    def end_pass(self) -> None:
        """Do nothing: there are no passes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place in each task's data, and the picker's state."""
        picker = None
        if self.picker is not None:
            name, keys, *rest = self.picker.get_state()
            picker = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
        return {"tasks": {name: source.state_dict() for name, source in self.sources.items()}, "picker": picker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place.

        Raises:
            ValueError: if it belongs to other tasks.
        """
        if set(state["tasks"]) != set(self.sources):
            raise ValueError(f"the checkpoint has the tasks {sorted(state['tasks'])}, this run {sorted(self.sources)}")
        for name, source in self.sources.items():
            source.load_state_dict(state["tasks"][name])
        if self.picker is not None and state["picker"] is not None:
            name, keys, *rest = state["picker"]
            self.picker.set_state((name, keys.numpy().astype(np.uint32), *rest))


def task_weights(sizes: list[int | None], tau: float) -> list[float] | None:
    """Return the probability of each task, ``size ** tau`` normalised; ``None`` (uniform) if a size is unknown."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    powers = [float(size) ** tau for size in known]
    return [power / sum(powers) for power in powers]
