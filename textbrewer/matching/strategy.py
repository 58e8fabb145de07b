"""How several layers of the student meet several of the teacher: what matching strategies share, and their table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from textbrewer.registry import Registry

__all__ = ["STRATEGIES", "LayerStrategy", "make_strategy"]

STRATEGIES = Registry("matching strategy")
"""Strategies: ``f(loss, layers_S, layers_T, **options) -> LayerStrategy``."""


class LayerStrategy(nn.Module, ABC):
    """Compares the states of several layers of the student with those of several layers of the teacher.

    A module, so that what it remembers of the training (in buffers) goes into the checkpoints.

    Args:
        loss: a match loss, ``f(state_S, state_T, mask=None) -> scalar``.
        layers_S: number of the student's layers.
        layers_T: number of the teacher's layers.
    """

    has_parts = False
    """Whether the loss of a batch is the mean of those of its parts, each weighed by what ``loss`` averages over: not
    where layers are chosen by the whole batch."""

    def __init__(self, loss: Callable[..., Tensor], layers_S: int, layers_T: int) -> None:
        super().__init__()
        self.loss, self.layers_S, self.layers_T = loss, layers_S, layers_T
        self.epoch = 0
        """Passes over the data completed, set before each step."""

    @abstractmethod
    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar.

        Args:
            states_S: the student's (projected) states, one a layer.
            states_T: the teacher's.
            mask: ``(batch, length)``, zero where a position does not count.
        """


def make_strategy(
    spec: str | Sequence[Any], loss: Callable[..., Tensor], layers_S: int, layers_T: int
) -> LayerStrategy:
    """Return the strategy of a match.

    Args:
        spec: a name of :data:`STRATEGIES`, or ``[name, {option: value}]``.
        loss: the loss between two states.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's.

    Raises:
        KeyError: if the name is unknown.
        TypeError: if the specification has another form.
        ValueError: if an option is unknown or the numbers of layers do not fit the strategy.
    """
    strategy: LayerStrategy = STRATEGIES.bound(spec)(loss, layers_S=layers_S, layers_T=layers_T)
    return strategy
