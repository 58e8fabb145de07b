"""Which modules an entry of NNI's config lists is about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.layouts.inner import is_transposed
from textbrewer.names import suggestion

__all__ = ["MODULE_KEYS", "selected"]

_NAMES = ("op_names", "op_names_re", "op_partial_names")
MODULE_KEYS = ("op_types", *_NAMES, "exclude_op_types", "exclude_op_names", "exclude_op_names_re")
"""The keys by which an entry chooses modules."""


def selected(entry: Mapping[str, Any], model: nn.Module, what: str) -> list[str]:
    """Return the dotted names of the linear maps and convolutions that an entry chooses, in the model's order.

    A module must be of one of the types, where types are given, and have one of the names, where names are given.
    ``"default"`` among the types means all linear maps and convolutions.

    Args:
        entry: with keys of :data:`MODULE_KEYS`; others are passed over.
        model: where to look.
        what: the entry, for messages.

    Raises:
        TypeError: if a value is no list of texts.
        KeyError: if the model has no module of a name, or of a type.
        ValueError: if nothing is chosen, or something that has no weights to prune is named.
    """
    values = {key: _texts(entry.get(key), f"{what}[{key!r}]") for key in MODULE_KEYS}
    modules = {name: module for name, module in model.named_modules() if name}
    maps = {name for name, module in modules.items() if _has_weights(module)}
    named = _named(values, modules, maps, what)
    if named is None and values["op_types"] is None:
        raise ValueError(f"{what} must choose modules, by op_types or op_names, got neither")
    found = maps if named is None else named
    if values["op_types"] is not None:
        found = found & _of_types(values["op_types"], modules, maps, f"{what}['op_types']")
    found = found - _of_types(values["exclude_op_types"] or [], modules, set(modules), f"{what}['exclude_op_types']")
    found = found - {
        _existing(name, modules, f"{what}['exclude_op_names']") for name in values["exclude_op_names"] or []
    }
    found = found - _matching(values["exclude_op_names_re"] or [], modules, f"{what}['exclude_op_names_re']")
    if not found:
        raise ValueError(f"{what} must choose linear maps or convolutions, got none with {dict(entry)!r}")
    return [name for name in modules if name in found]


def _named(
    values: Mapping[str, list[str] | None], modules: Mapping[str, nn.Module], maps: set[str], what: str
) -> set[str] | None:
    """Return what is chosen by name, ``None`` if no names are given."""
    if all(values[key] is None for key in _NAMES):
        return None
    found: set[str] = set()
    for name in values["op_names"] or []:
        if _existing(name, modules, f"{what}['op_names']") not in maps:
            raise ValueError(
                f"{what}['op_names'] must name linear maps or convolutions, got {name!r}, a "
                f"{type(modules[name]).__name__}; use op_names_re or op_partial_names for what is inside"
            )
        found.add(name)
    found |= _matching(values["op_names_re"] or [], modules, f"{what}['op_names_re']") & maps
    for part in values["op_partial_names"] or []:
        fits = {name for name in maps if part in name}
        if not fits:
            raise KeyError(f"{what}['op_partial_names']: no linear map or convolution has {part!r} in its name")
        found |= fits
    return found


def _of_types(types: list[str], modules: Mapping[str, nn.Module], among: set[str], what: str) -> set[str]:
    """Return the modules of some types, by the names of their classes."""
    found: set[str] = set()
    for kind in types:
        fits = {name for name, module in modules.items() if type(module).__name__ == kind}
        if kind == "default":
            fits = {name for name, module in modules.items() if _has_weights(module)}
        if not fits:
            known = sorted({type(modules[name]).__name__ for name in among})
            raise KeyError(f"{what}: the model has no module of type {kind!r}; {suggestion(kind, known)}")
        if fits.isdisjoint(among):
            raise ValueError(
                f"{what} must be linear maps or convolutions, got {kind!r}, whose numbers are not set to zero by "
                'themselves; for factors of a BatchNorm use prune_channels(score="slim")'
            )
        found |= fits & among
    return found


def _matching(patterns: list[str], modules: Mapping[str, nn.Module], what: str) -> set[str]:
    """Return the modules whose names match regular expressions, from their beginning."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            fits = {name for name in modules if re.match(pattern, name)}
        except re.error as error:
            raise ValueError(f"{what} must be regular expressions, got {pattern!r}: {error}") from error
        if not fits:
            raise KeyError(f"{what}: no module's name matches {pattern!r}")
        found |= fits
    return found


def _existing(name: str, modules: Mapping[str, nn.Module], what: str) -> str:
    if name not in modules:
        raise KeyError(f"{what}: the model has no module {name!r}; {suggestion(name, modules)}")
    return name


def _texts(value: Any, what: str) -> list[str] | None:
    if value is None:
        return None
    checks.is_a(value, (list, tuple), what, "a list of texts")
    for item in value:
        checks.is_a(item, str, f"an entry of {what}", "a text")
    return list(value)


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_transposed(module)
