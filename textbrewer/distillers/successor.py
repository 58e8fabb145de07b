"""A successor made of its predecessor: the same model with a shorter stack of blocks, and how the two are mixed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.distillers.replacement import Mixture, PerBlock
from textbrewer.hooks.modules import resolve
from textbrewer.hooks.stacks import Stack, find_stack, places_of
from textbrewer.students import init_student_from_teacher, uniform_layers
from textbrewer.students.families import family_of
from textbrewer.students.layers import Tower, chosen_layers, find_towers

__all__ = ["make_successor"]

INITS = ("uniform", "first")


def make_successor(
    predecessor: nn.Module, layers: int, blocks: str | None, init: str | Sequence[int]
) -> tuple[nn.Module, Mixture]:
    """Return a model like the predecessor with a shorter stack, and how blocks of both are mixed in it.

    All of the new model can be trained, whatever of the predecessor is frozen.

    Args:
        predecessor: left as it is.
        layers: how many blocks the successor has.
        blocks: the dotted name of the predecessor's ``nn.ModuleList``; ``None``: found.
        init: the predecessor's blocks that the successor's start as: ``"uniform"`` (the last of each group),
            ``"first"``, or a list of numbers.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work.
    """
    path = _path_of_stack(predecessor, blocks)
    old: Any = predecessor.get_submodule(path)
    checks.integer(layers, "successor_layers", minimum=1)
    if layers > len(old):
        raise ValueError(f"successor_layers must be at most the predecessor's {len(old)} blocks, got {layers}")
    picked = _picked(init, int(layers), len(old))
    name = _transformers_model(predecessor, path)
    if name is None:
        successor = copy.deepcopy(predecessor)
        new: Any = successor.get_submodule(path)
        new._modules = {str(place): new[number] for place, number in enumerate(picked)}
        configs: list[PerBlock] = []
    else:
        model = predecessor.get_submodule(name)
        inner = path[len(name) + 1 :] if name else path
        towers, number = _towers(model, inner)
        each: Any = tuple(picked if place == number else None for place in range(len(towers)))
        shorter = init_student_from_teacher(model, each if len(towers) > 1 else picked)
        # What is around the transformers model is copied, with the shorter one in its place.
        successor = copy.deepcopy(predecessor, {id(model): shorter})
        configs = _configs(model, shorter, inner, towers[number], picked)
    for parameter in successor.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    stack: Any = successor.get_submodule(path)
    mixture = Mixture(Stack(stack, places_of(successor, stack)), list(old), configs, list(_configs_in(successor)))
    return successor.train(), mixture


def _path_of_stack(predecessor: nn.Module, blocks: str | None) -> str:
    """Return the dotted name of the stack, given or found.

    Raises:
        ValueError: if none is found.
        KeyError, TypeError: if there is none of the given name.
    """
    kind = type(predecessor).__name__
    if blocks is not None:
        checks.is_a(blocks, str, "blocks", "the dotted name of an nn.ModuleList, or None")
        found = resolve(predecessor, blocks)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise TypeError(
                f"blocks must name an nn.ModuleList with blocks in it, got {blocks!r}, "
                f"a {type(found).__name__} of {len(list(found.children()))}"
            )
        return blocks
    stack = find_stack(predecessor)
    if stack is None:
        lists = [f"{name} ({len(item)})" for name, item in predecessor.named_modules() if type(item) is nn.ModuleList]
        raise ValueError(
            f"blocks must name the nn.ModuleList whose blocks are replaced, as {kind} has encoder and decoder, or no "
            f"single longest list of blocks of one class; its lists: {', '.join(lists) or 'none'}"
        )
    names: list[str] = [name for name, module in predecessor.named_modules() if module is stack.blocks]
    return names[0]


def _picked(init: str | Sequence[int], layers: int, total: int) -> list[int]:
    """Return the numbers of the blocks that the successor's start as."""
    if isinstance(init, str):
        checks.one_of(init, INITS, "init")
        return uniform_layers(layers, total) if init == "uniform" else list(range(layers))
    checks.is_a(init, (list, tuple, range), "init", "'uniform', 'first', or a list of block numbers")
    if len(init) != layers:
        raise ValueError(f"init must have as many numbers as the successor has layers, {layers}, got {list(init)}")
    return chosen_layers(list(init), total)


def _parents(path: str) -> list[str]:
    """Return the dotted names of a module's parents, the outermost (``""``) first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]


def _transformers_model(model: nn.Module, path: str) -> str | None:
    """Return the name of the outermost transformers model around a stack; ``None`` if there is none."""
    for name in _parents(path):
        if getattr(getattr(model.get_submodule(name), "config", None), "model_type", None) is not None:
            return name
    return None


def _towers(model: Any, path: str) -> tuple[list[Tower], int]:
    """Return the stacks of a transformers model, and the number of the one with that name."""
    towers = find_towers(model, family_of(model.config.model_type), None)
    paths = [tower.path for tower in towers]
    if path not in paths:
        raise ValueError(
            f"blocks must be the layers of a {type(model).__name__} that its config counts ({', '.join(paths)}), "
            f"got {path!r}"
        )
    return towers, paths.index(path)


def _configs(model: Any, successor: Any, path: str, tower: Tower, picked: list[int]) -> list[PerBlock]:
    """Return the configs of a successor that say something of its blocks."""
    family, total = family_of(model.config.model_type), len(tower.blocks)
    around = {}
    for name in _parents(path):
        config = getattr(successor.get_submodule(name), "config", None)
        if getattr(config, tower.stack.layers, None) == len(picked):
            around[id(config)] = config
    lists = {
        field: values
        for field in family.per_layer
        if isinstance(values := getattr(model.config, field, None), (list, tuple)) and len(values) == total
    }
    return [
        PerBlock(
            config,
            tower.stack.layers,
            {field: ([values[number] for number in picked], list(values)) for field, values in lists.items()},
        )
        for config in around.values()
    ]


def _configs_in(model: nn.Module) -> Iterator[Any]:
    """Yield every config object in a model once."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "model_type") and id(config) not in seen:
            seen.add(id(config))
            yield config
