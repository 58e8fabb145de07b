"""How long models take for a batch, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

__all__ = ["Timing", "limited_threads", "quartiles", "time_in_turns"]

Runs = Mapping[str, tuple[Callable[[Any], Any], Sequence[Any]]]


@dataclass(frozen=True)
class Timing:
    """How long a model takes for batches of one size.

    Args:
        batch_size: the rows asked for, ``None``: the data's batches as they are.
        rows: of a batch, on average.
        rounds: how often it was timed.
        ms: milliseconds of a batch: first quartile, median, third quartile.
        rows_per_second: likewise.
    """

    batch_size: int | None
    rows: float
    rounds: int
    ms: tuple[float, float, float]
    rows_per_second: tuple[float, float, float]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile, between the nearest values where none is there."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextmanager
def limited_threads(threads: int | None) -> Iterator[int]:
    """Set torch's threads while the context is open, ``None``: leave them; yields how many there are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def time_in_turns(
    runs: Runs,
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time several models on the same batches, in turns, so that whatever else the machine does hits all alike.

    In each round every model runs one batch, the same for all, and the next model begins the round.

    Args:
        runs: by name the function that runs a batch until it is done, and its batches, as many for all; they are used
            again when there are fewer than rounds.
        rounds: that are timed.
        warmup: rounds before, that are not.
        clock: seconds.
        done: called after each round.

    Returns:
        By name the seconds of each round.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for number in range(-warmup, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                run, batches = runs[name]
                batch = batches[number % len(batches)]
                start = clock()
                run(batch)
                if number >= 0:
                    seconds[name].append(clock() - start)
            done()
    return seconds
