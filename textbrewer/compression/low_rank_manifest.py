"""The shapes of low-rank pairs, by which a state dict of a factorised model loads into a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from textbrewer import checks
from textbrewer.compression.low_rank_layers import LowRankLinear, is_linear_map, matrix_of
from textbrewer.hooks.stacks import places_of

__all__ = ["low_rank_manifest", "restore_low_rank_"]

_FIELDS = ("inputs", "outputs", "rank", "bias")
Model = TypeVar("Model", bound=nn.Module)


def low_rank_manifest(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the shapes of a model's low-rank pairs.

    Returns:
        By dotted name ``{"inputs": n, "outputs": m, "rank": k, "bias": True}``, fit for JSON; empty without pairs.
    """
    return {
        name: {
            "inputs": module.in_features,
            "outputs": module.out_features,
            "rank": module.rank,
            "bias": module.bias is not None,
        }
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }


def restore_low_rank_(model: Model, manifest: Mapping[str, Mapping[str, Any]]) -> Model:
    """Put pairs of a manifest's shapes into a model, in place; their weights are NaN until a state dict is loaded.

    Args:
        model: as the factorised one was before, with the same shapes; nothing is changed if anything is raised.
        manifest: of :func:`low_rank_manifest`.

    Returns:
        The model.

    Raises:
        TypeError: if an entry is no mapping.
        KeyError: if it lacks a field, or has one that is not known.
        ValueError: if the model has no such linear map.
    """
    checks.is_a(manifest, Mapping, "manifest", "a dict of shapes by module name")
    modules = dict(model.named_modules())
    pairs = [(modules.get(name), _pair(name, modules.get(name), entry)) for name, entry in manifest.items()]
    places = [(pair, places_of(model, module)) for module, pair in pairs if module is not None]
    for pair, where in places:
        for children, key in where:
            children[key] = pair
    return model


def _pair(name: str, module: nn.Module | None, entry: Mapping[str, Any]) -> LowRankLinear:
    """Return an empty pair for a linear map."""
    what = f"manifest[{name!r}]"
    checks.is_a(entry, Mapping, what, f"a dict with {', '.join(_FIELDS)}")
    checks.known_keys(entry, _FIELDS, what)
    for field in _FIELDS:
        if field not in entry:
            raise KeyError(f"{what} must have {field!r}, got only {sorted(entry)}")
    checks.integer(entry["rank"], f"{what}['rank']", minimum=1)
    if module is None or not is_linear_map(module):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{what} must name a linear map of the model, which has {found} there")
    matrix = matrix_of(module)
    shape, wanted = tuple(matrix.shape), (entry["outputs"], entry["inputs"])
    if shape != wanted or (module.bias is None) == entry["bias"]:
        own, other = ("without" if missing else "with" for missing in (module.bias is None, not entry["bias"]))
        raise ValueError(
            f"{what} must fit the model's linear map of (outputs, inputs) {shape} {own} bias, got {wanted} {other} "
            "bias; the manifest is of another model"
        )
    rank, nan = int(entry["rank"]), float("nan")
    return LowRankLinear.of(module, matrix.new_full((shape[0], rank), nan), matrix.new_full((rank, shape[1]), nan))
