"""Module replacement: which blocks make a group, how often a successor stands in for it, and what was drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.hooks.stacks import Stack
from textbrewer.layouts.spacing import evenly_spaced

__all__ = ["SCHEDULES", "Mixture", "PerBlock", "Rate", "draw", "grouped"]

SCHEDULES = ("linear", "constant")

Choice = Sequence[bool]
"""For each module: whether the successor's block runs, or the predecessor's group that it stands for."""


def grouped(total: int, count: int) -> list[range]:
    """Divide ``total`` blocks into ``count`` groups, of equal size where that is possible, else they differ by one.

    Each ends with a layer of :func:`~textbrewer.layouts.spacing.evenly_spaced`, the one that a successor's block begins
    as. Of 6 blocks in 3 groups: 0-1, 2-3, 4-5; of 5 in 2: 0-2, 3-4.
    """
    return [range(start, end) for start, end in itertools.pairwise([0, *evenly_spaced(count, total)])]


@dataclass(frozen=True)
class Rate:
    r"""The replacing rate: with which probability a successor's block runs.

    .. math:: p_t = \min(1, k t + b) \quad\text{(linear)}, \qquad p_t = b \quad\text{(constant)}

    with :math:`t` optimiser steps done before.

    Args:
        schedule: ``"linear"`` or ``"constant"``.
        base: the rate at the start, :math:`b`; ``None``: 0.3, constant 0.5.
        step: what each step adds to it, :math:`k`.
        full_at: instead of ``step``: the share of the run after which the rate is 1; ``None``: 0.7.

    Raises:
        TypeError, ValueError: if a number is out of range, or two of them contradict each other.

    Reference:
        Xu et al., "BERT-of-Theseus", 2020, arXiv:2002.02925, sections 3.2 to 3.4; b = 0.3 and k = 0.0006 are those of
        the authors' scripts for MRPC.
    """

    schedule: str = "linear"
    base: float | None = None
    step: float | None = None
    full_at: float | None = None

    def __post_init__(self) -> None:
        checks.one_of(self.schedule, SCHEDULES, "schedule")
        constant = self.schedule == "constant"
        if self.base is None:
            object.__setattr__(self, "base", 0.5 if constant else 0.3)
        checks.number(self.base, "base_rate", minimum=0, maximum=1)
        if constant and self.base == 0:
            raise ValueError("base_rate must be greater than 0 where it is constant: no block would ever be trained")
        for name, value in (("rate_step", self.step), ("full_at", self.full_at)):
            if value is not None and constant:
                raise ValueError(f"{name} must be None with schedule='constant', got {value!r}; use schedule='linear'")
        if self.step is not None and self.full_at is not None:
            raise ValueError("rate_step and full_at exclude each other: both say how fast the rate rises; give one")
        if self.step is not None:
            checks.number(self.step, "rate_step", above=0)
        elif not constant:
            object.__setattr__(self, "full_at", 0.7 if self.full_at is None else self.full_at)
            checks.number(self.full_at, "full_at", above=0, maximum=1)

    def at(self, step: int, total_steps: int) -> float:
        """Return the rate of the step that follows ``step`` others, in a run of ``total_steps``."""
        base = float(self.base or 0.0)
        if self.schedule == "constant":
            return base
        if self.step is not None:
            return min(1.0, self.step * step + base)
        done = step / ((self.full_at or 1.0) * total_steps)
        return 1.0 if done >= 1 else min(1.0, base + (1 - base) * done)


def draw(seed: int, step: int, micro_batch: int, rate: float, count: int) -> tuple[bool, ...]:
    """Return for each of ``count`` modules whether its successor runs: independent, each with probability ``rate``.

    What is drawn follows from the arguments alone: it is the same on all processes and after a resume, and no
    generator of Python, NumPy or torch is read.

    Args:
        seed: of the run.
        step: optimiser steps done before.
        micro_batch: the number of the micro-batch in the step under way.
        rate: the replacing rate.
        count: how many modules.
    """
    numbers = random.Random(f"theseus {seed} {step} {micro_batch}")
    return tuple(numbers.random() < rate for _ in range(count))


@dataclass(frozen=True)
class PerBlock:
    """A config that says something of the blocks, which must be true of those that run.

    Args:
        config: the successor's.
        count: its field of the number of blocks.
        lists: its fields with an item a block, with the successor's items and those of the predecessor.
    """

    config: Any
    count: str
    lists: dict[str, tuple[list[Any], list[Any]]]


class Mixture:
    """A successor's stack in which, for a forward pass, groups of the predecessor's blocks stand for its own.

    Args:
        stack: the successor's stack.
        predecessor: all blocks of the predecessor.
        configs: those that say something of the blocks.
        quiet: all configs of the successor, in which caches and the collecting of inner outputs are off meanwhile:
            caches count a block's place in the stack, which changes.
    """

    def __init__(
        self, stack: Stack, predecessor: Sequence[nn.Module], configs: Sequence[PerBlock], quiet: Sequence[Any]
    ) -> None:
        self.stack, self.predecessor, self.configs, self.quiet = stack, list(predecessor), list(configs), list(quiet)
        self.groups = grouped(len(self.predecessor), len(stack.blocks))

    def items(self, choice: Choice, own: Sequence[Any], of_predecessor: Sequence[Any]) -> list[Any]:
        """Return what is to stand in the stack: an item of the successor's, or those of the predecessor's group."""
        chosen: list[Any] = []
        for replaced, item, group in zip(choice, own, self.groups, strict=True):
            chosen += [item] if replaced else [of_predecessor[number] for number in group]
        return chosen

    def blocks(self, choice: Choice) -> list[nn.Module]:
        """Return the blocks that run."""
        return self.items(choice, list(self.stack.blocks), self.predecessor)

    @contextmanager
    def drawn(self, choice: Choice) -> Iterator[None]:
        """Let the successor run the chosen blocks while the context is open."""
        blocks = self.blocks(choice)
        values: list[tuple[Any, str, Any]] = []
        for config in self.quiet:
            for field in ("use_cache", "output_hidden_states", "output_attentions"):
                if getattr(config, field, False):
                    values.append((config, field, False))
        for item in self.configs:
            values.append((item.config, item.count, len(blocks)))
            values += [(item.config, field, self.items(choice, *both)) for field, both in item.lists.items()]
        before = [(config, field, getattr(config, field)) for config, field, _ in values]
        try:
            for config, field, value in values:
                setattr(config, field, value)
            with self.stack.replaced(blocks):
                yield
        finally:
            for config, field, value in before:
                setattr(config, field, value)
