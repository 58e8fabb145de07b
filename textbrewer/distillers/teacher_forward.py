"""How far a teacher runs: to its end, or only to the last block that a loss reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.adaptors import FEATURES, Views
from textbrewer.distillers.needs import Needs
from textbrewer.engine import rng_kept
from textbrewer.hooks.stacks import find_stack
from textbrewer.teacher_cache.contents import resolved

__all__ = ["TeacherForward"]

logger = logging.getLogger("textbrewer")

# A feature of layer n may come from block n (hidden states that begin with the embedding), from block n + 1 (attention
# maps, hidden states without the embedding), and, where the model ends with a normalisation, from one block before.
_MORE_BLOCKS = 3


class TeacherForward:
    """Runs one teacher: to its end, or no further than what is needed of it.

    A teacher of which no logits are needed runs without its last blocks, once it has been shown on a batch that this
    changes nothing: the first batch runs to the end; on the second, the teacher runs with as few blocks as may do, then
    with one more, and to the end, and what is needed of them is compared. Where no shortened run agrees, the teacher
    goes on running to its end. So nothing has to be known of the model or of the adaptor.

    The first run is always one to the end: a model may prepare itself then, as those of transformers do, and would
    prepare only the blocks that it has.

    Args:
        model: the teacher.
        quietly: the context for the comparison, such as one without compilation.
        captures: whether a run also captures what modules return, which is always needed.
    """

    def __init__(
        self,
        model: nn.Module,
        quietly: Callable[[], AbstractContextManager[Any]] = nullcontext,
        captures: bool = False,
    ) -> None:
        self.captures = captures
        self.stack = find_stack(model)
        self.name, self.quietly = type(model).__name__, quietly
        self.needs: Needs | None = None
        self.counts: dict[str, int] = {}
        self._depths: dict[Needs, int | None] = {}
        self._ran = False

    def narrow(self, needs: Needs | None) -> None:
        """Say what is needed from now on; ``None``: everything. What was found out of the same needs still holds."""
        self.needs = needs

    @property
    def depth(self) -> int | None:
        """How many blocks run for the present needs; ``None``: all of them (or it is not known yet)."""
        return None if self.needs is None else self._depths.get(self.needs)

    def views(self, run: Callable[[], Views]) -> Views:
        """Return the teacher's views, of what is needed.

        Args:
            run: one forward pass on the batch.
        """
        needs = self.needs
        if needs is not None and not needs.logits:
            if not needs.layers and not self.captures and self._ran:
                return Views({})
            if needs not in self._depths and self._countable(needs):
                return self._compare(needs, run)
            depth = self._depths.get(needs)
            if depth is not None and self.stack is not None:
                with self.stack.shortened(depth):
                    return needs.keep(run(), self.counts)
        views = self._to_the_end(run)
        return views if needs is None else needs.keep(views, self.counts)

    def _to_the_end(self, run: Callable[[], Views]) -> Views:
        views = run()
        self.counts = {key: len(value) for key, value in views.items() if key in FEATURES}
        self._ran = True
        return views

    def _countable(self, needs: Needs) -> bool:
        return self.stack is not None and self._ran and needs.layers.keys() <= self.counts.keys()

    def _compare(self, needs: Needs, run: Callable[[], Views]) -> Views:
        """Find out how many blocks do, and return the views of the run to the end."""
        blocks = len(self.stack.blocks) if self.stack is not None else 0
        deepest = max(
            (number for key, layers in needs.layers.items() for number in resolved(layers, self.counts[key])), default=0
        )
        with self.quietly():
            # The shortened runs come first: an adaptor that reads what an earlier pass left in the model would
            # otherwise find there just what it is compared with.
            with rng_kept():
                depths = range(deepest, min(deepest + _MORE_BLOCKS, blocks))
                tried = {depth: self._try(depth, needs, run) for depth in depths}
            full = needs.keep(self._to_the_end(run), self.counts)
        agreeing = [depth for depth, views in tried.items() if views is not None and _agree(views, full)]
        self._depths[needs] = min(agreeing, default=None)
        if agreeing:
            logger.info("teacher %s: stops after %d of %d blocks", self.name, agreeing[0], blocks)
        return full

    def _try(self, depth: int, needs: Needs, run: Callable[[], Views]) -> Views | None:
        if self.stack is None:
            return None
        try:
            with self.stack.shortened(depth):
                return needs.keep(run(), self.counts)
        except Exception as error:
            # A model or an adaptor that cannot do with fewer blocks may say so in any way. A fault of the batch's is
            # raised again, by the run to the end that follows.
            logger.debug("teacher %s does not run with %d blocks: %s", self.name, depth, error)
            return None


def _agree(short: Views, full: Views) -> bool:
    """Return whether two runs gave the same, and not the very same tensors, left over from one of them."""
    if short.keys() != full.keys() or short.captured.keys() != full.captured.keys():
        return False
    outputs = [pair for key in full if key in FEATURES for pair in zip(short[key], full[key], strict=True)]
    outputs += [(short.captured[number], full.captured[number]) for number in full.captured]
    if any(one is not None and one is other for one, other in outputs):
        return False
    return all(_same(*pair) for pair in [*outputs, *((short[key], full[key]) for key in full if key not in FEATURES)])


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is None and other is None
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
