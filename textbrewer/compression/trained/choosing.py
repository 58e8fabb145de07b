"""Which groups of weights stay, by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textbrewer.compression.choosing import choose_global, choose_uniform
from textbrewer.compression.trained.groups import Groups, UnitGroups

__all__ = ["SCOPES", "above", "keep_largest", "largest", "share_gone"]

SCOPES = ("uniform", "global")
"""The same share of each place, or the lowest scores of all together."""

# A share such as 0.7 of 10 is 7, though the product is a little less.
_TOLERANCE = 1e-9


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Return booleans, true for the ``count`` largest of some scores ``(n,)``; of equal ones the first stay."""
    gone = scores.numel() - count
    if gone <= 0 or count <= 0:
        return torch.full_like(scores, gone <= 0, dtype=torch.bool)
    limit = scores.kthvalue(gone).values  # the highest score of what goes
    keep, tied = scores > limit, scores == limit
    return keep | (tied & (tied.cumsum(0) <= count - keep.sum()))


def largest(
    groups: Sequence[Groups],
    scores: Sequence[Tensor],
    shares: Mapping[str, float],
    scope: str = "uniform",
    minimum: int = 1,
) -> list[Tensor]:
    """Return which groups stay if those of the lowest scores go.

    Args:
        groups: of any kinds.
        scores: of each, ``(count,)``.
        shares: how much of each kind goes, rounded down; kinds that are not there stay whole.
        scope: one of :data:`SCOPES`.
        minimum: how many heads or units of each site must stay.

    Returns:
        Booleans ``(count,)`` for each, on the scores' devices.

    Raises:
        ValueError: if fewer than the minimum would stay.
    """
    masks = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    for kind, share in shares.items():
        places = [number for number, one in enumerate(groups) if one.kind == kind]
        if not places:
            continue
        some = [scores[number] for number in places]
        if kind == "weights":
            found = _weights(some, share, scope)
        else:
            found = _units([groups[number] for number in places], some, share, scope, minimum)
        for number, mask in zip(places, found, strict=True):
            masks[number] = mask.to(scores[number].device)
    return masks


def above(
    groups: Sequence[Groups], scores: Sequence[Tensor], limits: Mapping[str, float], minimum: int
) -> list[Tensor]:
    r"""Return which groups stay if those with :math:`\sigma(S)` below a limit go.

    Args:
        groups: of any kinds.
        scores: of each, ``(count,)``.
        limits: by kind.
        minimum: how many heads or units of each site stay in any case, those of the highest scores.
    """
    masks = []
    for one, score in zip(groups, scores, strict=True):
        mask = score.sigmoid() >= limits[one.kind]
        if one.kind != "weights":
            mask = mask | keep_largest(score, min(minimum, one.count))
        masks.append(mask)
    return masks


def share_gone(groups: Sequence[Groups], masks: Sequence[Tensor]) -> Tensor:
    """Return the share of all weights that is in groups that go, a scalar on the first one's device."""
    device = groups[0].device
    gone = [(~mask).sum().to(device) * (one.size / one.count) for one, mask in zip(groups, masks, strict=True)]
    return torch.stack(gone).sum() / sum(one.size for one in groups)


def _weights(scores: Sequence[Tensor], share: float, scope: str) -> list[Tensor]:
    if scope == "uniform":
        return [keep_largest(score, score.numel() - int(share * score.numel() + _TOLERANCE)) for score in scores]
    joined = torch.cat([score.to(scores[0].device) for score in scores])
    kept = keep_largest(joined, joined.numel() - int(share * joined.numel() + _TOLERANCE))
    return list(torch.split(kept, [score.numel() for score in scores]))


def _units(groups: Sequence[Groups], scores: Sequence[Tensor], share: float, scope: str, minimum: int) -> list[Tensor]:
    sites = [one.site for one in groups if isinstance(one, UnitGroups)]
    by_site = {one.name: score.double().cpu() for one, score in zip(groups, scores, strict=True)}
    if scope == "uniform":
        found = choose_uniform(sites, by_site, share, minimum)
    else:
        found = choose_global(sites, by_site, share, minimum, 1.0)
    return [found[one.name] for one in groups]
