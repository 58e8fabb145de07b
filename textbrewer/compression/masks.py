"""Which units of a model stay: a boolean for each, by site; to be looked at, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from textbrewer import checks
from textbrewer.compression.sites import Layout
from textbrewer.files import replaced

__all__ = ["Masks", "check_masks"]

_FORMAT = "textbrewer-masks"


class Masks(Mapping[str, Tensor]):
    """Booleans ``(units,)`` by the name of a site, true for the units that stay.

    A site is the module that reads an attention's heads or a feed-forward part's units (with ``*`` for the layer where
    all layers keep the same), or a list of layers. Sites that are not named stay whole.

    >>> masks["bert.encoder.layer.0.attention.output.dense"]
    tensor([ True, False,  True,  True])

    Args:
        masks: the booleans by site.

    Raises:
        TypeError: if one is no tensor of booleans.
        ValueError: if one is not of one axis, or nothing of a site would stay.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        checks.is_a(masks, Mapping, "masks", "a dict of tensors of booleans by site")
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"the mask of {name!r} must be a tensor of booleans, true for what stays, got {kind}")
            if mask.dim() != 1:
                raise ValueError(f"the mask of {name!r} must be of one axis, one item a unit, got {tuple(mask.shape)}")
            if not mask.any():
                raise ValueError(
                    f"the mask of {name!r} must keep at least one of {len(mask)} units, got none; take the whole layer "
                    "out instead, by the mask of its list of layers"
                )
        self._masks = {name: mask.detach().cpu().clone() for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        lines = [f"  {name}: {int(mask.sum())} of {len(mask)}" for name, mask in self._masks.items()]
        return "\n".join(["Masks(", *lines, ")"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, under a temporary name until it is whole."""
        with replaced(Path(path)) as temporary:
            save_file(self._masks, temporary, metadata={"format": _FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Return the masks in a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no masks.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of masks at {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError("it does not say that it is one")
                return cls({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118  # no mapping
        except (SafetensorError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} must be a file that Masks.save wrote: {error}") from error


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
