"""What goes, given how important each unit or weight is: in each place alike, or the least important of all places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textbrewer.compression.sites import Site

__all__ = ["SCOPES", "choose_global", "choose_uniform", "choose_units", "count", "keep_largest", "kept_weights"]

SCOPES = ("uniform", "global")
"""The same share of each place, or the lowest scores of all together."""


def count(share: float, number: int) -> int:
    """Return a share of a number, rounded down; 0.7 of 10 is 7, though the product is a little less."""
    return math.floor(share * number * (1 + 1e-12) + 1e-9)


def choose_units(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    share: float,
    scope: str,
    minimum: int,
    maximum: float = 1.0,
) -> dict[str, Tensor]:
    """Return masks that leave out the least important units: see :func:`choose_uniform`, :func:`choose_global`.

    Args:
        sites: of one kind.
        scores: ``(units,)`` by site.
        share: how much goes.
        scope: one of :data:`SCOPES`.
        minimum: how many units of each must stay.
        maximum: the largest share of a site that may go, with ``"global"``.

    Raises:
        ValueError: if fewer would stay, or the limits protect more than may stay.
    """
    if scope == "uniform":
        return choose_uniform(sites, scores, share, minimum)
    return choose_global(sites, scores, share, minimum, maximum)


def choose_uniform(
    sites: Sequence[Site], scores: Mapping[str, Tensor], share: float, minimum: int
) -> dict[str, Tensor]:
    """Return masks that leave out the least important units of each site, the same share of all.

    Args:
        sites: of one kind.
        scores: ``(units,)`` by site; of equal ones the first stay.
        share: how many of each site's units go, rounded down.
        minimum: how many of each must stay.

    Raises:
        ValueError: if fewer would stay.
    """
    masks = {}
    for site in sites:
        stays = site.units - count(share, site.units)
        if stays < min(minimum, site.units):
            raise ValueError(
                f"minimum must be at most what stays, got {minimum}: {site.kind}={share} leaves {stays} of the "
                f"{site.units} units of {site.name!r}; lower either"
            )
        order = scores[site.name].argsort(descending=True, stable=True)
        masks[site.name] = torch.zeros(site.units, dtype=torch.bool)
        masks[site.name][order[:stays]] = True
    return masks


def choose_global(
    sites: Sequence[Site], scores: Mapping[str, Tensor], share: float, minimum: int, maximum: float
) -> dict[str, Tensor]:
    """Return masks that leave out the least important units of all sites together.

    Units are taken from the least important one up. One that a limit protects is passed over, and so is one that stands
    for more heads than are still to go.

    Args:
        sites: of one kind.
        scores: ``(units,)`` by site, compared as they are; of equal ones the last of the last site go first.
        share: how many of all units go, rounded down; one that several layers share counts once for each.
        minimum: how many of each site must stay.
        maximum: the largest share of a site that may go.

    Raises:
        ValueError: if the limits protect more than may stay.
    """
    masks = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}
    protected = {site.name: max(minimum, site.units - count(maximum, site.units)) for site in sites}
    left = budget = count(share, sum(site.units * site.cost for site in sites))
    ranked = [
        (score, -place, -unit)
        for place, site in enumerate(sites)
        for unit, score in enumerate(scores[site.name].tolist())
    ]
    for _, place, unit in sorted(ranked):
        site = sites[-place]
        if site.cost <= left and int(masks[site.name].sum()) > protected[site.name]:
            masks[site.name][-unit] = False
            left -= site.cost
    if left >= min(site.cost for site in sites):
        raise ValueError(
            f"{sites[0].kind} must be a share that minimum={minimum} and maximum={maximum} leave room for, "
            f"got {share}: only {budget - left} of {budget} can go; lower it, or loosen them"
        )
    return masks


def keep_largest(scores: Tensor, number: int) -> Tensor:
    """Return booleans, true for the ``number`` largest of some scores ``(n,)``; of equal ones the first stay."""
    gone = scores.numel() - number
    if gone <= 0 or number <= 0:
        return torch.full_like(scores, gone <= 0, dtype=torch.bool)
    limit = scores.kthvalue(gone).values  # the highest score of what goes
    keep, tied = scores > limit, scores == limit
    return keep | (tied & (tied.cumsum(0) <= number - keep.sum()))


def kept_weights(scores: Sequence[Tensor], share: float, scope: str, maximum: float = 1.0) -> list[Tensor]:
    """Return which weights, or blocks of one size, stay if those of the lowest scores go; of equal ones the first.

    Args:
        scores: ``(count,)`` of each parameter, below infinity.
        share: how many go, rounded down.
        scope: one of :data:`SCOPES`.
        maximum: the largest share of one parameter's that may go, with ``"global"``.

    Returns:
        Booleans ``(count,)`` for each, on the scores' devices.

    Raises:
        ValueError: if the limit protects more than may stay.
    """
    if scope == "uniform":
        return [keep_largest(score, score.numel() - count(share, score.numel())) for score in scores]
    free = []
    for score in scores:
        protected = keep_largest(score, score.numel() - count(maximum, score.numel()))
        free.append(score.masked_fill(protected & (maximum < 1), torch.inf).to(scores[0].device))
    joined = torch.cat(free)
    going = count(share, joined.numel())
    if going > int((joined < torch.inf).sum()):
        raise ValueError(
            f"amount must be a share that maximum={maximum} leaves room for, got {share}; lower it, or loosen the limit"
        )
    kept = torch.split(keep_largest(joined, joined.numel() - going), [score.numel() for score in scores])
    return [mask.to(score.device) for score, mask in zip(scores, kept, strict=True)]
