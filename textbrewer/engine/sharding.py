"""Sharing one loader's batches among the processes of distributed training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from textbrewer import checks
from textbrewer.engine import rng
from textbrewer.engine.loaders import has_row_numbers, size_of, with_batch_sampler
from textbrewer.engine.runtime import Runtime

Agree = Callable[[int], int]
"""Returns rank 0's number on every rank."""


class SharedOrder:
    """A batch sampler of which each process takes every ``world``-th batch.

    The order of a pass is drawn from one seed on all processes, so the batches of one round are rows that one process
    could have taken with a batch ``world`` times as large (without shuffling: those that it would have). A last,
    incomplete round is filled up from the first batches (dropped, if the sampler has ``drop_last``), so that all
    processes take as many steps.

    Args:
        batch_sampler: the user's batch sampler, with a length.
        rank: this process's number.
        world: number of processes.
        agree: returns rank 0's number on every rank.
    """

    def __init__(self, batch_sampler: Any, rank: int, world: int, agree: Agree) -> None:
        self.batch_sampler, self.rank, self.world, self.agree = batch_sampler, rank, world, agree
        self.sampler = getattr(batch_sampler, "sampler", None)
        self.generator = getattr(batch_sampler, "generator", None)
        self.batch_size = getattr(batch_sampler, "batch_size", None)
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))

    def set_epoch(self, epoch: int) -> None:
        """Tell the user's batch sampler the pass."""
        if callable(getattr(self.batch_sampler, "set_epoch", None)):
            self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        rounds = len(self.batch_sampler) / self.world
        return math.floor(rounds) if self.drop_last else math.ceil(rounds)

    def __iter__(self) -> Iterator[Any]:
        shared_seed = self.agree(int(torch.empty((), dtype=torch.int64).random_().item()))
        with rng.kept():
            rng.seed(shared_seed)
            batches = list(self.batch_sampler)
        missing = -len(batches) % self.world
        if missing and not self.drop_last:
            batches += [batches[number % len(batches)] for number in range(missing)]
        whole = len(batches) - len(batches) % self.world
        yield from batches[self.rank : whole : self.world]


def shard(loader: Iterable[Any], runtime: Runtime) -> Iterable[Any]:
    """Return the loader of this process's share.

    A loader with a ``DistributedSampler`` is the user's own sharding and returned as it is; so is one without row
    numbers (an iterable dataset), for which a warning says that it must differ by process.

    Args:
        loader: the user's loader.
        runtime: the processes.
    """
    if runtime.world == 1:
        return loader
    if not isinstance(loader, DataLoader) or not has_row_numbers(loader) or size_of(loader.batch_sampler) is None:
        checks.warn(
            "distributed training: this dataloader has no finite list of row numbers to share among the processes, so "
            "it is used as it is on each; it must yield other rows, and as many batches, in every process"
        )
        return loader
    inner = getattr(loader.batch_sampler, "sampler", None)
    if any(isinstance(part, DistributedSampler) for part in (loader.sampler, loader.batch_sampler, inner)):
        return loader
    return with_batch_sampler(loader, SharedOrder(loader.batch_sampler, runtime.rank, runtime.world, runtime.agree))
