"""How many directions each linear map keeps: by its own size or energy, or under one budget for all."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Spectrum", "largest_rank", "ranks_by_energy", "ranks_by_ratio", "ranks_under_budget"]

_ROUNDING = 1e-12


class Spectrum(NamedTuple):
    """A linear map's shape, and the energy of each direction of its outputs, largest first."""

    outputs: int
    inputs: int
    energies: Tensor

    @property
    def weights(self) -> int:
        """Weights of the map as it is."""
        return self.outputs * self.inputs

    @property
    def per_direction(self) -> int:
        """Weights that a direction takes in the pair."""
        return self.outputs + self.inputs

    def shares(self) -> list[float]:
        """Return each direction's share of all energy; of a map without energy, all of it is in the first."""
        total = float(self.energies.sum())
        if total <= 0:
            return [1.0] + [0.0] * (len(self.energies) - 1)
        return [float(value) for value in (self.energies / total).tolist()]


def largest_rank(outputs: int, inputs: int) -> int:
    r"""Return the largest rank at which a pair is smaller than the map, :math:`k < mn / (m + n)`; 0: none is."""
    return (outputs * inputs - 1) // (outputs + inputs)


def ranks_by_ratio(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int]:
    r"""Return the rank of each map at which at least a share of its weights is removed.

    .. math::
        k = \lfloor (1 - \mathrm{ratio}) \, mn / (m + n) \rfloor

    Returns:
        Ranks by name; 0 where not even one direction fits.
    """
    return {
        name: min(
            math.floor((1 - ratio) * item.weights / item.per_direction + _ROUNDING),
            largest_rank(item.outputs, item.inputs),
        )
        for name, item in spectra.items()
    }


def ranks_by_energy(spectra: Mapping[str, Spectrum], energy: float) -> dict[str, int]:
    """Return the smallest rank of each map that keeps a share of its energy, however large the pair becomes."""
    ranks = {}
    for name, item in spectra.items():
        kept, rank = 0.0, 0
        for share in item.shares():
            if rank and kept >= energy - _ROUNDING:
                break
            kept, rank = kept + share, rank + 1
        ranks[name] = rank
    return ranks


def ranks_under_budget(
    spectra: Mapping[str, Spectrum], ratio: float | None = None, energy: float | None = None
) -> dict[str, int | None]:
    r"""Return the ranks under one budget for all maps, chosen greedily by energy per weight.

    Each map counts alike: the worth of a direction is its share of the energy of its own map. Every map first gets one
    direction. Then, again and again, the direction with the largest worth per weight,

    .. math::
        \frac{\lambda_{l,i}}{\sum_j \lambda_{l,j}} \cdot \frac1{m_l + n_l},

    is added, of those that still fit; until none does (``ratio``), or the mean share kept is reached (``energy``). A
    map whose next direction would make the pair as large as itself is instead left whole, for the rest of its weights
    (never more than a direction takes) and with all the rest of its energy.

    Shares fall within a map and cost the same there, so that what is kept is the best that this number of weights can
    keep up to the worth of one direction; exactly the best if all :math:`m_l + n_l` are equal. That a map may be left
    whole is not foreseen: only maps that come this far are.

    Args:
        spectra: the maps.
        ratio: share of all weights to remove.
        energy: share of the energy to keep, on average over the maps.

    Returns:
        Ranks by name; ``None`` for a map left whole.

    Raises:
        ValueError: if not even one direction of each map fits.
    """
    total = sum(item.weights for item in spectra.values())
    budget = total if ratio is None else math.floor((1 - ratio) * total + _ROUNDING * total)
    spent = sum(item.per_direction for item in spectra.values())
    if spent > budget:
        raise ValueError(
            f"ratio must leave a direction to each of the {len(spectra)} maps, which takes {spent} of their {total} "
            f"weights, got {ratio}; the largest possible is {1 - spent / total:.4f}"
        )
    shares = {name: item.shares() for name, item in spectra.items()}
    ranks: dict[str, int | None] = dict.fromkeys(spectra, 1)
    kept, wanted = math.fsum(values[0] for values in shares.values()), None if energy is None else energy * len(spectra)
    queue = [_step(number, name, spectra[name], shares[name], 1) for number, name in enumerate(spectra)]
    heapq.heapify(queue)
    while queue and (wanted is None or kept < wanted - _ROUNDING):
        step = heapq.heappop(queue)
        # One that does not fit is not asked again: the map's next ones are not cheaper.
        if spent + step.cost > budget:
            continue
        spent, kept = spent + step.cost, kept + step.share
        ranks[step.name] = step.rank
        if step.rank is not None:
            heapq.heappush(queue, _step(step.number, step.name, spectra[step.name], shares[step.name], step.rank))
    return ranks


class _Step(NamedTuple):
    """What a map could get next; steps compare by worth per weight, then by the order of the maps."""

    priority: float
    number: int
    name: str
    cost: int
    share: float
    rank: int | None


def _step(number: int, name: str, item: Spectrum, shares: list[float], rank: int) -> _Step:
    """Return what a map at some rank could get next."""
    if rank < largest_rank(item.outputs, item.inputs):
        cost, share, following = item.per_direction, shares[rank], rank + 1
    else:
        cost, share, following = item.weights - rank * item.per_direction, math.fsum(shares[rank:]), None
    return _Step(-share / cost, number, name, cost, share, following)
