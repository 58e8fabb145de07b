"""A model's stack of blocks: where it hangs, and how other blocks take its place for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from textbrewer.hooks.forward import is_encoder_decoder

__all__ = ["Place", "Stack", "find_stack", "places_of"]

Place = tuple[dict[str, Any], str]
"""Where a module hangs: its parent's sub-modules, and its name there."""


def places_of(model: nn.Module, module: nn.Module) -> list[Place]:
    """Return where a module hangs in a model: in several places, if parts of it share the module."""
    parents = (parent._modules for parent in model.modules())
    return [(children, name) for children in parents for name, child in children.items() if child is module]


class Stack:
    """A model's stack of blocks, which can be shortened, or made of other blocks, for a while.

    Args:
        blocks: the list of blocks.
        places: where it hangs in the model.
    """

    def __init__(self, blocks: nn.ModuleList, places: Sequence[Place]) -> None:
        self.blocks, self.places = blocks, list(places)

    @contextmanager
    def shortened(self, depth: int) -> Iterator[None]:
        """Leave the model only its first ``depth`` blocks while the context is open."""
        with self.replaced(list(self.blocks)[:depth]):
            yield

    @contextmanager
    def replaced(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Let the model run these blocks instead of its own while the context is open."""
        # A copy of the list object alone: a subclass, and hooks, stay what they are.
        other = copy.copy(self.blocks)
        other.__dict__["_modules"] = {str(number): block for number, block in enumerate(blocks)}
        try:
            for children, name in self.places:
                children[name] = other
            yield
        finally:
            for children, name in self.places:
                children[name] = self.blocks


def find_stack(model: nn.Module) -> Stack | None:
    """Return the model's stack of blocks: its longest ``nn.ModuleList`` of modules of one class.

    Returns:
        ``None`` if there are several of that length, none of at least two, or the model has encoder and decoder.
    """
    if is_encoder_decoder(model):
        return None
    lists = [item for item in model.modules() if isinstance(item, nn.ModuleList) and len({type(x) for x in item}) == 1]
    longest = max((len(item) for item in lists), default=0)
    found = [item for item in lists if len(item) == longest]
    if longest < 2 or len(found) != 1:
        return None
    return Stack(found[0], places_of(model, found[0]))
