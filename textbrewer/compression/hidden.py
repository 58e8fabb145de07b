"""How wide a model's hidden states are, where its hidden features appear, and by which sizes it can be made anew."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from textbrewer.compression.structure import Structure
from textbrewer.layouts import LayerStack
from textbrewer.layouts.inner import Axis
from textbrewer.layouts.residual import Residual, Twins, find_residual, fits, tensors_of

__all__ = ["Tower", "building_fields", "hidden_features", "narrowed"]


class Tower(NamedTuple):
    """A stack of a model's layers: what the family says of it, and its widest layer's sizes."""

    fields: LayerStack
    heads: int
    head_width: int
    units: int


def hidden_features(
    model: nn.Module, structure: Structure, towers: Sequence[Tower], inner: Collection[Axis], heads: Iterable[str]
) -> Residual:
    """Return the hidden features of a model.

    Args:
        model: of the structure.
        structure: how it is built.
        towers: its stacks.
        inner: the axes of the features inside its layers.
        heads: names of its attention modules, whose ``structure.features`` are no hidden ones.

    Raises:
        ValueError: if they cannot be told.
    """
    fields, twins = _twins(model, structure, towers)
    residual = find_residual(model, twins, inner)
    residual.fields = fields
    owners = set(heads)
    for path, module in model.named_modules():
        for name in structure.hidden:
            features = path in owners and name in structure.features
            if getattr(module, name, None) == residual.features and not features:
                residual.attributes.append((path, name))
        for name in structure.roots:
            value = getattr(module, name, None)
            if isinstance(value, float) and math.isclose(value, math.sqrt(residual.features)):
                residual.roots.append((path, name))
    return residual


def building_fields(model: nn.Module, structure: Structure, towers: Sequence[Tower]) -> dict[str, int]:
    """Return what a model's config must say for the model to be made from it with heads as wide as they are.

    A class that divides the hidden width by the number of heads must be made as wide as it was before hidden features
    went; one that knows the width of a head may ask for a multiple of the number of heads.

    Returns:
        Values by field; none where the config can say what it says.
    """
    config, family = getattr(model, "config", None), structure.family
    width = getattr(config, family.hidden, None)
    if config is None or not isinstance(width, int):
        return {}
    step = _step(config, towers)
    if family.head_width is not None:
        heads = math.lcm(*(int(getattr(config, tower.fields.heads)) for tower in towers))
        step = -(-width // heads) * heads
    if step <= width:
        return {}
    return dict.fromkeys(_fields(model, structure, towers), step)


def narrowed(model: nn.Module, structure: Structure, residual: Residual, towers: Sequence[Tower]) -> None:
    """Make what a model's modules and configs say of its hidden width true again, after features went.

    Args:
        model: sliced already.
        structure: how it is built.
        residual: its hidden features as they were before.
        towers: its stacks.
    """
    (width,) = {tensors_of(model)[name].shape[axis] for name, axis in residual.axes}
    for path, name in residual.attributes:
        setattr(model.get_submodule(path), name, width)
    for path, name in residual.roots:
        setattr(model.get_submodule(path), name, math.sqrt(width))
    for path in residual.norms:
        if hasattr(model.get_submodule(path), "normalized_shape"):
            model.get_submodule(path).normalized_shape = (width,)  # type: ignore[assignment]
    family = structure.family
    for config in _configs(model):
        if getattr(config, family.hidden, None) != residual.features:
            continue
        for field in residual.fields:
            setattr(config, field, width)
        for tower in towers:  # of what the config would work out from the hidden width
            if getattr(config, tower.fields.intermediate, tower.units) is None:
                setattr(config, tower.fields.intermediate, tower.units)
            if family.head_width is not None and getattr(config, family.head_width, None) is None:
                setattr(config, family.head_width, tower.head_width)


def _configs(model: nn.Module) -> list[Any]:
    """Return a model's config and the copies that its modules may have, each once."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return list(found.values())


def _twins(model: nn.Module, structure: Structure, towers: Sequence[Tower]) -> tuple[tuple[str, ...], Twins]:
    """Return two models that differ from a model in the hidden width, and the config's fields that hold it."""
    config = getattr(model, "config", None)
    fields = _fields(model, structure, towers)
    step = _step(config, towers)
    taken = set() if config is None else {value for value in vars(config).values() if isinstance(value, int)}
    # Of no size that something else has: a class may build what is as wide as the hidden states in another way.
    free = (step * factor for factor in range(2, 2 * len(taken) + 5) if step * factor not in taken)
    widths = (next(free), next(free))
    first, second = (_built(model, structure, towers, width, fields) for width in widths)
    return fields, Twins((first, second), widths)


def _fields(model: nn.Module, structure: Structure, towers: Sequence[Tower]) -> tuple[str, ...]:
    """Return the config's fields that hold the hidden width.

    Fields that may follow it and are equal to it do so, unless a model made like that would lack one of the tensors.
    """
    config, family = getattr(model, "config", None), structure.family
    if config is None or structure.resized is not None:
        return (family.hidden,)
    width = getattr(config, family.hidden, None)
    if not isinstance(width, int):
        raise ValueError(
            f"the config of {type(model).__name__} must have a field {family.hidden!r} with the hidden width, got "
            f"{width!r}; name the field in Family(hidden=...), or give Structure(resized=...)"
        )
    following = tuple(field for field in family.follows if getattr(config, field, None) == width)
    if following:
        all_fields = (family.hidden, *following)
        twin = _built(model, structure, towers, 3 * _step(config, towers), all_fields)
        if fits(model, twin) is None:
            return all_fields
    return (family.hidden,)


def _step(config: Any, towers: Sequence[Tower]) -> int:
    """Return a hidden width that all stacks can divide among their heads."""
    return math.lcm(*(int(getattr(config, tower.fields.heads, tower.heads)) * tower.head_width for tower in towers))


def _built(
    model: nn.Module, structure: Structure, towers: Sequence[Tower], width: int, fields: Sequence[str]
) -> nn.Module:
    """Return a model of a model's class with another hidden width, without memory for weights where that can be."""
    kind, config = type(model), getattr(model, "config", None)
    if structure.resized is None and config is None:
        raise ValueError(
            f"the hidden features of {kind.__name__} cannot be told without a config: give its Structure resized=, a "
            "function of a model and a hidden width that returns another model of the class with that width"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            if structure.resized is not None:
                return structure.resized(model, width)
            config = copy.deepcopy(config)
            for field in fields:
                setattr(config, field, width)
            name = structure.family.head_width
            if name is not None and getattr(config, name, None) is None:
                setattr(config, name, towers[0].head_width)
            with torch.device("meta"):
                return kind(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{kind.__name__} must be able to be made {width} wide for its hidden features to be told, and cannot "
            f"({type(error).__name__}: {error}); pass the model inside if it wraps one, or give its Structure resized="
        ) from error
