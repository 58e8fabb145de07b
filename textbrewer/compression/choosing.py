"""Which units go, given how important each is: in each layer alike, or those least important in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textbrewer.compression.sites import Site

__all__ = ["choose_global", "choose_uniform"]

# A share such as 0.7 of 10 units is 7, though the product is a little less.
_TOLERANCE = 1e-9


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
        stays = site.units - int(share * site.units + _TOLERANCE)
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
    protected = {site.name: max(minimum, site.units - int(maximum * site.units + _TOLERANCE)) for site in sites}
    left = budget = int(share * sum(site.units * site.cost for site in sites) + _TOLERANCE)
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
