"""Which layers of a teacher a student gets, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from textbrewer import checks
from textbrewer.layouts.families import Family, LayerStack
from textbrewer.layouts.spacing import evenly_spaced
from textbrewer.layouts.stacks import locate

__all__ = ["Layers", "Tower", "chosen_layers", "find_towers", "is_dropped", "source_name", "uniform_layers"]

Layers = int | Sequence[int] | None
"""How many layers, or which, counted from 0; ``None``: all."""


@dataclass(frozen=True)
class Tower:
    """A stack of a teacher's layers, and those that the student gets.

    Args:
        stack: what the family says of it.
        path: the dotted name of its list of layers.
        blocks: the teacher's layers.
        picked: the numbers of the student's layers, in its order.
        tables: names inside a layer of what only the first layer of a stack has, for all of them.
    """

    stack: LayerStack
    path: str
    blocks: nn.ModuleList
    picked: tuple[int, ...]
    tables: tuple[str, ...] = ()


def uniform_layers(count: int, total: int) -> list[int]:
    """Return ``count`` of ``total`` layers at equal distances, counted from 0, the last one always among them.

    Of 6 layers 3 are 1, 3, 5; of 12 layers 5 are 1, 4, 6, 9, 11. The layer map ``"uniform"`` has the same (counted from
    1), so that a student's layer learns from the one that it began as.

    Raises:
        ValueError: unless ``1 <= count <= total``.
        TypeError: if ``count`` is no whole number.
    """
    checks.integer(count, "layers", minimum=1)
    if count > total:
        raise ValueError(f"layers must be at most the teacher's {total}, got {count}")
    return [number - 1 for number in evenly_spaced(int(count), total)]


def chosen_layers(layers: Layers, total: int) -> list[int]:
    """Return the numbers of the chosen layers, in the student's order.

    Args:
        layers: how many (picked as :func:`uniform_layers` does), or which ones; ``None``: all.
        total: how many the teacher has.

    Raises:
        ValueError: if there is no such layer, none, or one is named twice.
        TypeError: if ``layers`` is neither a number nor a list of numbers.
    """
    if layers is None:
        return list(range(total))
    if not isinstance(layers, (list, tuple, range)):
        checks.is_a(layers, (int, float), "layers", "a number of layers, a list of layer numbers, or None")
        return uniform_layers(layers, total)  # type: ignore[arg-type]
    for number in layers:
        checks.integer(number, "a layer number", minimum=0)
        if number >= total:
            raise ValueError(f"a layer number must be at most {total - 1}, counted from 0, got {number}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers must name at least one layer and none twice, got {list(layers)}")
    return [int(number) for number in layers]


def find_towers(teacher: nn.Module, family: Family, layers: Layers | tuple[Layers, Layers]) -> list[Tower]:
    """Return the teacher's stacks with the layers that the student gets.

    Args:
        teacher: the model.
        family: how it is built.
        layers: as :func:`chosen_layers`, for every stack; a tuple of two for encoder and decoder.

    Raises:
        ValueError: if no stack is where the family says, or a tuple does not fit the number of stacks.
    """
    found = [(stack, place) for stack in family.stacks if (place := locate(teacher, stack)) is not None]
    if not found:
        names = ", ".join(path for stack in family.stacks for path in stack.paths)
        raise ValueError(f"{type(teacher).__name__} must have its layers in a list named {names}, got none")
    each = list(layers) if isinstance(layers, tuple) else [layers] * len(found)
    if len(each) != len(found):
        raise ValueError(
            f"layers must have one item for each of the {len(found)} stacks of {type(teacher).__name__} where it is a "
            f"tuple, got {layers!r}; name layers in a list"
        )
    tables = tuple(table for inner in family.attentions for table in inner.tables)
    return [
        Tower(stack, path, blocks, tuple(chosen_layers(choice, len(blocks))), tables)
        for (stack, (path, blocks)), choice in zip(found, each, strict=True)
    ]


def source_name(name: str, towers: Sequence[Tower]) -> str:
    """Return the name that a student's tensor has in the teacher."""
    for tower in towers:
        if name.startswith(tower.path + "."):
            number, _, inner = name[len(tower.path) + 1 :].partition(".")
            if inner.startswith(tuple(table + "." for table in tower.tables)):
                return name
            return f"{tower.path}.{tower.picked[int(number)]}.{inner}"
    return name


def is_dropped(name: str, towers: Sequence[Tower]) -> bool:
    """Return whether a teacher's tensor belongs to a layer that the student does not get."""
    for tower in towers:
        if name.startswith(tower.path + "."):
            return int(name[len(tower.path) + 1 :].partition(".")[0]) not in tower.picked
    return False
