"""Batches, each with the number of the teacher that is drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from textbrewer.distillers.batch_parts import TaskBatch
from textbrewer.engine import Source


class DrawnBatches:
    """A source of batches, with a teacher drawn for each; the draws' state is a part of the place in the data.

    Args:
        source: the batches.
        weights: the probability of each teacher.
        seed: of the draws, the same on all processes.
    """

    def __init__(self, source: Source, weights: Sequence[float], seed: int) -> None:
        self.inner = source
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def size(self) -> int | None:
        """Batches a pass, ``None`` if unknown."""
        return self.inner.size

    @property
    def epoch(self) -> int:
        """Passes completed."""
        return self.inner.epoch

    @property
    def taken(self) -> int:
        """Batches taken in the current pass."""
        return self.inner.taken

    def next_in_pass(self) -> TaskBatch:
        """Return the next batch of this pass, or raise StopIteration at its end."""
        return self._drawn(self.inner.next_in_pass())

    def next_forever(self) -> TaskBatch:
        """Return the next batch, starting a new pass when one ends."""
        return self._drawn(self.inner.next_forever())

    def end_pass(self) -> None:
        """End the pass."""
        self.inner.end_pass()

    def _drawn(self, batch: Any) -> TaskBatch:
        number = int(torch.multinomial(self.weights, 1, generator=self.generator))
        return TaskBatch("", batch, number)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, and the state of the draws."""
        return {**self.inner.state_dict(), "draws": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place.

        Raises:
            ValueError: if it belongs to a run that drew no teachers.
        """
        if "draws" not in state:
            raise ValueError("the checkpoint is of a run without target='sample'; resume it with the target it had")
        self.inner.load_state_dict({name: value for name, value in state.items() if name != "draws"})
        self.generator.set_state(state["draws"])
