"""Matches chosen anew in every step: each layer meets the one that is nearest to it now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy

__all__ = ["Nearest", "Ordered", "costs_of_pairs", "nearest_pairs", "ordered_pairs", "summed_over"]

Loss = Callable[..., Tensor]
Pair = tuple[int, int]
"""A layer of the student and one of the teacher: places in the lists of the match, from 0."""


def costs_of_pairs(loss: Loss, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the loss of each layer of the student with each of the teacher, without gradient.

    The losses that count are computed again with gradient, few of many: to keep the graph of all of them until the
    choice is made would hold their intermediate results in memory.

    Args:
        loss: ``f(state_S, state_T, mask=None) -> scalar``.
        states_S: the student's states.
        states_T: the teacher's.
        mask: ``(batch, length)`` or ``None``.

    Returns:
        ``(layers of the student, layers of the teacher)``.
    """
    with torch.no_grad():
        rows = [torch.stack([loss(state_S, state_T, mask=mask) for state_T in states_T]) for state_S in states_S]
        return torch.stack(rows)


def summed_over(
    pairs: Iterable[Pair],
    loss: Loss,
    states_S: Sequence[Tensor],
    states_T: Sequence[Tensor],
    mask: Tensor | None,
) -> Tensor:
    """Return the sum of the losses of some pairs of layers, at least one; arguments as :func:`costs_of_pairs`."""
    losses = [loss(states_S[layer_S], states_T[layer_T], mask=mask) for layer_S, layer_T in pairs]
    return sum(losses[1:], losses[0])


def ordered_pairs(costs: Sequence[Sequence[float]]) -> list[Pair]:
    """Return for each layer of the teacher, from the top down, the nearest student layer below the last one chosen.

    Where the lowest layer of the student is taken, the teacher's remaining layers get it as well.

    Args:
        costs: the student's layers by the teacher's, at least one of each.
    """
    pairs: list[Pair] = []
    chosen = len(costs)
    for layer_T in reversed(range(len(costs[0]))):
        if chosen > 0:
            chosen = min(range(chosen), key=lambda layer_S: costs[layer_S][layer_T])
        pairs.append((chosen, layer_T))
    return pairs


def nearest_pairs(costs: Sequence[Sequence[float]], each: str = "teacher") -> list[Pair]:
    """Return for each layer of one side the nearest of the other; several may have the same.

    Args:
        costs: the student's layers by the teacher's, at least one of each.
        each: the side whose layers each get one, ``"teacher"`` or ``"student"``.
    """
    layers_S, layers_T = range(len(costs)), range(len(costs[0]))
    if each == "student":
        return [(layer_S, min(layers_T, key=lambda layer_T: costs[layer_S][layer_T])) for layer_S in layers_S]
    return [(min(layers_S, key=lambda layer_S: costs[layer_S][layer_T]), layer_T) for layer_T in layers_T]


@STRATEGIES.add("ordered")
class Ordered(LayerStrategy):
    r"""Each layer of the teacher teaches the student's nearest one, in order: from the top down, always a lower one.

    .. math::
        L = \sum_j \ell(s_{m(j)}, t_j), \quad m(j) = \arg\min_{i < m(j + 1)} \ell(s_i, t_j)

    Where the student's lowest layer is taken, the teacher's remaining layers teach it as well, as in the authors' code.
    The choice has no gradient. The order is that of the lists ``layer_S`` and ``layer_T``, from low to high. Usually
    the teacher's layers are a few and the student's all: 3, 6, 9, 12 of the teacher in the paper. The costs are read
    from the device once a step.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's.

    Reference:
        Xia, Zhong, Chen, "Structured Pruning Learns Compact and Accurate Models" (CoFi), 2022, arXiv:2204.00408,
        section 3.2; the order is that of the authors' code (``layer_distill_version`` 4).
    """

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the sum of the losses of the pairs chosen; arguments as in :class:`LayerStrategy`."""
        costs = costs_of_pairs(self.loss, states_S, states_T, mask).tolist()
        return summed_over(ordered_pairs(costs), self.loss, states_S, states_T, mask)


@STRATEGIES.add("nearest")
class Nearest(LayerStrategy):
    r"""Each layer of one side meets the nearest of the other, in no order.

    .. math:: L = \sum_j \ell(s_{m(j)}, t_j), \quad m(j) = \arg\min_i \ell(s_i, t_j)

    The choice has no gradient. The costs are read from the device once a step.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's.
        each: the side whose layers each get one: ``"teacher"`` (CoFi) or ``"student"`` (NNI: each layer of the
            student learns from the teacher's layer nearest to it, and some layers of the teacher may teach none).

    Raises:
        ValueError: if ``each`` is neither.

    Reference:
        Xia, Zhong, Chen, "Structured Pruning Learns Compact and Accurate Models" (CoFi), 2022, arXiv:2204.00408,
        section 3.2 (``layer_distill_version`` 3 of the authors' code); NNI's ``DynamicLayerwiseDistiller``.
    """

    def __init__(self, loss: Loss, layers_S: int, layers_T: int, each: str = "teacher") -> None:
        super().__init__(loss, layers_S, layers_T)
        checks.one_of(each, ("teacher", "student"), "each of strategy 'nearest'")
        self.each = each

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the sum of the losses of the pairs chosen; arguments as in :class:`LayerStrategy`."""
        costs = costs_of_pairs(self.loss, states_S, states_T, mask).tolist()
        return summed_over(nearest_pairs(costs, self.each), self.loss, states_S, states_T, mask)
