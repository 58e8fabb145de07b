"""What the engine reads off a user's loader, and how it starts one in the middle of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from textbrewer.engine import rng


def size_of(loader: Any) -> int | None:
    """Return a loader's number of batches, ``None`` if it does not tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of the loader's dataset, sampler and batch sampler, where they have one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None), batch_sampler)
    told: list[Any] = []
    for part in (*parts, getattr(batch_sampler, "sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch) and not any(part is other for other in told):
            told.append(part)
            set_epoch(epoch)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the torch generators that a loader and its samplers own, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
            found.append(generator)
    return found


def has_row_numbers(loader: Any) -> bool:
    """Return whether a loader's batches are known by their row numbers before they are read."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and type(loader).__iter__ is DataLoader.__iter__
    )


def with_batch_sampler(loader: DataLoader[Any], batch_sampler: Iterable[Any]) -> DataLoader[Any]:
    """Return a loader that reads the same dataset in the same way, in another order."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class RestOfPass:
    """The row numbers of a pass after its first ``count`` batches; can be iterated once.

    Args:
        batch_sampler: the row numbers of a whole pass.
        count: batches to leave out.
        name: the loader's name, for messages.
    """

    def __init__(self, batch_sampler: Iterable[Any], count: int, name: str) -> None:
        self.batch_sampler, self.count, self.name = batch_sampler, count, name
        self._iterator: Iterator[Any] | None = None

    def start(self) -> Iterator[Any]:
        """Draw the order and leave out the first batches, unless that is done; return what is left."""
        if self._iterator is None:
            self._iterator = iter(self.batch_sampler)
            _skip(self._iterator, self.count, self.name)
        return self._iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.start())


def iterate_from(loader: Iterable[Any], count: int, name: str = "dataloader", first_pass: bool = True) -> Iterator[Any]:
    """Return an iterator that stands after the first ``count`` batches, by row numbers alone where possible.

    Args:
        loader: the user's loader.
        count: batches to leave out.
        name: the loader's name, for messages.
        first_pass: whether this is the loader's first pass.

    Raises:
        ValueError: if there are not as many batches.
    """
    if count == 0 or not isinstance(loader, DataLoader) or not has_row_numbers(loader):
        iterator = iter(loader)
        _skip(iterator, count, name)
        return iterator
    rest = RestOfPass(cast("Iterable[Any]", loader.batch_sampler), count, name)
    if loader.persistent_workers and not first_pass:
        rest.start()
    iterator = iter(with_batch_sampler(loader, rest))
    # Not before: a loader draws its workers' seed first (unless they have one), and then its sampler the order. And
    # not later: the caller is about to put back the random numbers of the place.
    rest.start()
    return iterator


def start_workers(loader: Any) -> None:
    """Start workers that stay, which draw their seed only then, so that later passes draw none."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        with rng.kept(generators_of(loader)):
            iter(loader)


def _skip(iterator: Iterator[Any], count: int, name: str) -> None:
    for number in range(count):
        try:
            next(iterator)
        except StopIteration:
            raise ValueError(
                f"{name} must yield what it did when the checkpoint was written, at least {count} batches a pass, "
                f"got {number}; resume with the same data and batch size"
            ) from None


def first_batch(loader: Iterable[Any], postprocess: Callable[[Any], Any] | None = None) -> Any:
    """Return a loader's first batch, leaving the random-number state as it was.

    Raises:
        ValueError: if the loader can be iterated only once, or is empty.
    """
    if isinstance(loader, Iterator):
        raise ValueError("dataloader is an iterator that can be read only once; pass an iterable such as a DataLoader")
    with rng.kept(generators_of(loader)):
        for batch in loader:
            return batch if postprocess is None else postprocess(batch)
    raise ValueError("dataloader must yield at least one batch, it is empty")
