"""What a pruning while training leaves: masks of whole units, to shrink by, and masks of single weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.masks import Masks
from textbrewer.compression.sites import Layout, find_layout
from textbrewer.compression.trained.groups import Groups, UnitGroups
from textbrewer.compression.trained.targets import UNITS

__all__ = ["checked", "masks_left", "masks_of_units", "masks_of_zeros", "weight_masks"]


def checked(student: nn.Module | None) -> nn.Module:
    """Return the model that was trained.

    Raises:
        ValueError: if none was.
    """
    if student is None:
        raise ValueError("there must be a training first: train(..., step_callbacks=[...]) with this callback")
    return student


def masks_of_units(groups: Sequence[Groups], stays: Sequence[Tensor]) -> Masks:
    """Return the masks of sites."""
    return Masks({one.name: stay for one, stay in zip(groups, stays, strict=True)})


def masks_left(model: nn.Module, structure: str, groups: Sequence[Groups], stays: Sequence[Tensor]) -> Masks:
    """Return the masks of sites that a pruning leaves: of its own units, or of those that all weights are gone of.

    Raises:
        ValueError: if the model's family is unknown, or nothing whole has gone.
    """
    if structure == "units":
        return masks_of_units(groups, stays)
    return masks_of_zeros(model, find_layout(model), weight_masks(groups, stays))


def masks_of_zeros(model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> Masks:
    """Return masks of the heads and units whose readers' weights are all masked; one of each site stays.

    Args:
        model: whose weights are masked.
        layout: its sites.
        masks: which weights stay, shaped as the parameters, by name.

    Raises:
        ValueError: if there is no such head or unit.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for site in layout.sites:
        if site.inner is None or site.kind not in UNITS:
            continue
        groups = UnitGroups(site, parameters, readers=True)
        if not all(name in masks for name in groups.parameters):
            continue
        left = groups.sums([masks[name].to(torch.float32) for name in groups.parameters])
        stays = left > 0
        if not stays.any():
            stays[0] = True  # nothing reads it, so it does no harm
        if not stays.all():
            found[site.name] = stays
    if not found:
        raise ValueError(
            "there must be a head or unit all of whose readers' weights have gone, got none: nothing can be shrunk; "
            'prune more, or use structure="units"'
        )
    return Masks(found)


def weight_masks(groups: Sequence[Groups], stays: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return which weights stay, shaped as the parameters, by name."""
    found = {}
    for one, stay in zip(groups, stays, strict=True):
        for (name, parameter), mask in zip(one.parameters.items(), one.spread(stay), strict=True):
            found[name] = mask.expand_as(parameter).clone().cpu()
    return found
