"""Which groups of weights stay, by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textbrewer.compression.choosing import choose_units, keep_largest, kept_weights
from textbrewer.compression.trained.groups import Groups, UnitGroups

__all__ = ["above", "largest", "share_gone"]


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
        scope: one of :data:`~textbrewer.compression.choosing.SCOPES`.
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
            found = kept_weights(some, share, scope)
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


def _units(groups: Sequence[Groups], scores: Sequence[Tensor], share: float, scope: str, minimum: int) -> list[Tensor]:
    sites = [one.site for one in groups if isinstance(one, UnitGroups)]
    by_site = {one.name: score.double().cpu() for one, score in zip(groups, scores, strict=True)}
    found = choose_units(sites, by_site, share, scope, minimum)
    return [found[one.name] for one in groups]
