"""Matches one to one: all layers in order, or a random subset of the teacher's in every epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor

from textbrewer import checks
from textbrewer.matching.dynamic import summed_over
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy

__all__ = ["Pairwise", "RandomSubset", "random_subset"]

Loss = Callable[..., Tensor]


def random_subset(layers: int, size: int, seed: int, epoch: int) -> list[int]:
    """Return some of the numbers from 0 to ``layers - 1``, sorted; the same for the same arguments, on any machine.

    Args:
        layers: how many numbers there are.
        size: how many to return.
        seed: draws another sequence of subsets.
        epoch: the place in it.
    """
    return sorted(random.Random(f"{seed}/{epoch}").sample(range(layers), size))


@STRATEGIES.add("pairwise")
class Pairwise(LayerStrategy):
    r"""The i-th layer of the student meets the i-th of the teacher, each named in the match.

    .. math:: L = \sum_i \ell(s_i, t_i)

    The sum of what as many matches without a strategy give, but with one projection shared by all layers.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's; the same.

    Raises:
        ValueError: if the numbers differ.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, section 3.1 (one matrix for all layers in the authors' code).
    """

    has_parts = True

    def __init__(self, loss: Loss, layers_S: int, layers_T: int) -> None:
        super().__init__(loss, layers_S, layers_T)
        if layers_S != layers_T:
            raise ValueError(
                f"layer_S and layer_T must name as many layers for strategy 'pairwise', got {layers_S} and {layers_T}; "
                "see textbrewer.matching.layer_map"
            )

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the sum of the losses; arguments as in :class:`LayerStrategy`."""
        pairs = [(layer, layer) for layer in range(self.layers_S)]
        return summed_over(pairs, self.loss, states_S, states_T, mask)


@STRATEGIES.add("random")
class RandomSubset(LayerStrategy):
    r"""As many layers of the teacher as the student has, drawn anew for every epoch, meet the student's in order.

    .. math:: L = \sum_i \ell(s_i, t_{r(i)}), \quad r(1) < r(2) < \ldots

    The draw depends on ``seed`` and the epoch alone: it is the same on all processes, and after a resume, and matches
    with as many layers and the same seed (hidden states and attention, say) draw the same layers. Nothing is read from
    the device.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's; at least as many.
        seed: draws other subsets.

    Raises:
        ValueError: if the student has more layers, or the seed is no whole number.
        TypeError: if the seed is no number.

    Reference:
        Haidar et al., "RAIL-KD", 2022, arXiv:2109.10164, section 3 (there on the mean of the positions of each layer).
    """

    has_parts = True

    def __init__(self, loss: Loss, layers_S: int, layers_T: int, seed: int = 0) -> None:
        super().__init__(loss, layers_S, layers_T)
        checks.integer(seed, "seed of strategy 'random'")
        if layers_S > layers_T:
            raise ValueError(
                f"layer_T must name at least as many layers as layer_S for strategy 'random', got {layers_T} and "
                f"{layers_S}; name more of the teacher's or fewer of the student's"
            )
        self.seed = int(seed)

    def chosen(self) -> list[int]:
        """Return the places of this epoch's layers in ``layer_T``, from 0."""
        return random_subset(self.layers_T, self.layers_S, self.seed, self.epoch)

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the sum of the losses; arguments as in :class:`LayerStrategy`."""
        return summed_over(enumerate(self.chosen()), self.loss, states_S, states_T, mask)
