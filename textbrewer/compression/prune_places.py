"""Which places a plan of pruning may take something from, and scores that its user gave for them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import Site
from textbrewer.layouts.residual import Residual

__all__ = ["check_whole", "chosen_modules", "given_scores", "stays", "touches"]


def chosen_modules(model: nn.Module, patterns: Sequence[str], name: str) -> set[str]:
    """Return the modules that patterns name, and those inside them.

    Args:
        model: whose modules they are.
        patterns: dotted names, or patterns of them.
        name: of the argument, for messages.

    Raises:
        KeyError: if a pattern fits none.
    """
    names = [one for one, _ in model.named_modules(remove_duplicate=False) if one]
    found: set[str] = set()
    for pattern in patterns:
        fits = {one for one in names if fnmatch.fnmatchcase(one, pattern)}
        if not fits:
            raise KeyError(f"{name}: the model ({type(model).__name__}) has no module {pattern!r}")
        found |= {one for one in names if any(one == fit or one.startswith(f"{fit}.") for fit in fits)}
    return found


def touches(site: Site, excluded: set[str]) -> bool:
    """Return whether something of a site is excluded; of layers each is looked at by itself."""
    if isinstance(site.inner, Residual):
        return not excluded.isdisjoint(site.inner.modules)
    return site.inner is not None and not excluded.isdisjoint([*site.inner.readers, *site.inner.writers])


def stays(site: Site, masks: Mapping[str, Tensor]) -> bool:
    """Return whether a layer of the site stays."""
    mask = masks.get(site.stack)
    return mask is None or any(bool(mask[number]) for number in site.layers)


def given_scores(given: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return scores that the user worked out.

    Raises:
        ValueError: if a site has none, or not one a unit.
    """
    scores = {}
    for site in sites:
        score = given.get(site.name)
        shape = None if score is None else tuple(torch.as_tensor(score).shape)
        if shape != (site.units,):
            raise ValueError(f"score must have {site.units} numbers for {site.name!r}, got {shape or 'none'}")
        scores[site.name] = torch.as_tensor(score).detach().double().cpu()
    return scores


def check_whole(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ValueError if weights that would be sliced are no parameters, as in pairs of low rank."""
    # Of torch's own class: a quantised weight, of another, cannot be sliced.
    parameters = {name for name, one in model.named_parameters(remove_duplicate=False) if type(one) is nn.Parameter}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for site in sites:
        for name, _ in site.inner.axes if site.inner is not None else ():
            if name not in parameters and name not in buffers:
                raise ValueError(
                    f"{name!r} must be a parameter of the model to be pruned, and is none: prune first, and factorise, "
                    "quantise or wrap the layers of what comes out"
                )
