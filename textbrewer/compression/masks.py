"""Which units of a model stay: a boolean for each, by site; to be looked at, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from textbrewer.compression.named_masks import NamedMasks
from textbrewer.compression.sites import Layout

__all__ = ["Masks", "check_masks"]


class Masks(NamedMasks):
    """Booleans ``(units,)`` by the name of a site, true for the units that stay.

    A site is the module that reads an attention's heads or a feed-forward part's units (with ``*`` for the layer where
    all layers keep the same), a list of layers, or ``"hidden"``: the hidden features of the whole model. Sites that are
    not named stay whole.

    >>> masks["bert.encoder.layer.0.attention.output.dense"]
    tensor([ True, False,  True,  True])

    Args:
        masks: the booleans by site.

    Raises:
        TypeError: if one is no tensor of booleans.
        ValueError: if one is not of one axis, or nothing of a site would stay.
    """

    file_format = "textbrewer-masks"
    by = "site"

    def _check_one(self, name: str, mask: Tensor) -> None:
        if mask.dim() != 1:
            raise ValueError(f"the mask of {name!r} must be of one axis, one item a unit, got {tuple(mask.shape)}")
        if not mask.any():
            raise ValueError(
                f"the mask of {name!r} must keep at least one of {len(mask)} units, got none; take the whole layer "
                "out instead, by the mask of its list of layers"
            )


def check_masks(masks: Mapping[str, Tensor], layout: Layout, kind: str) -> None:
    """Raise ValueError unless masks are of a model's sites and units.

    Args:
        masks: what is checked.
        layout: the model's.
        kind: the name of the model's class.
    """
    units = {site.name: site.units for site in layout.sites}
    for name, mask in masks.items():
        if name not in units:
            raise ValueError(
                f"masks must be of this {kind}, which has no {name!r}; it has {', '.join(list(units)[:3])} ... "
                "The masks are of another model"
            )
        if len(mask) != units[name]:
            raise ValueError(
                f"the mask of {name!r} must have one item for each of the {units[name]} units of this {kind}, got "
                f"{len(mask)}. The masks are of another model"
            )
