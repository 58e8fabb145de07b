"""Which axes of a model's tensors hold the features inside its layers: those between two linear modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from textbrewer.layouts.families import InnerWidth

__all__ = [
    "Axis",
    "Inner",
    "by_block",
    "features_in",
    "features_out",
    "inner_features",
    "is_transposed",
    "module_of",
]


class Axis(NamedTuple):
    """One axis of one of a model's tensors."""

    tensor: str
    axis: int


@dataclass
class Inner:
    """Features inside a layer that are kept or left out together, or inside several layers that share a table.

    Args:
        name: the module that reads them, with ``*`` for its layer where several layers share them.
        features: how many there are where they are read.
        axes: the axes along which they lie.
        writers: dotted names of the modules that write them.
        readers: dotted names of the modules that read them.
    """

    name: str
    features: int
    axes: list[Axis] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def module_of(block: nn.Module, path: str) -> nn.Module | None:
    """Return a module inside a layer, ``None`` where the layer has none of that name."""
    return dict(block.named_modules()).get(path)


def is_transposed(module: nn.Module | None) -> bool:
    """Return whether a module is transformers' ``Conv1D``, a linear map with its weight as ``(inputs, outputs)``."""
    # By name, as transformers is not imported for it.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def features_in(module: nn.Module) -> int:
    """Return the number of inputs of a linear module."""
    return int(module.weight.shape[0 if is_transposed(module) else 1])  # type: ignore[index]


def features_out(module: nn.Module) -> int:
    """Return the number of outputs of a linear module."""
    return int(module.weight.shape[1 if is_transposed(module) else 0])  # type: ignore[index]


def _outputs(name: str, module: nn.Module) -> list[Axis]:
    """Return the axes of a linear module's outputs."""
    bias = [] if getattr(module, "bias", None) is None else [Axis(f"{name}.bias", 0)]
    return [Axis(f"{name}.weight", 1 if is_transposed(module) else 0), *bias]


def inner_features(
    path: str, blocks: Sequence[nn.Module], numbers: Iterable[int], inner: InnerWidth, shared: bool
) -> list[Inner]:
    """Return the features of one kind in the layers of a stack: one item a layer, or one for all of them.

    Args:
        path: the dotted name of the list of layers.
        blocks: the layers.
        numbers: which of them count.
        inner: what the family says of the features; layers without its readers are passed over.
        shared: whether all layers keep the same features.
    """
    found: dict[str, Inner] = {}
    for number in numbers:
        prefix, modules = f"{path}.{number}.", dict(blocks[number].named_modules())
        readers = [name for name in inner.readers if name in modules]
        if not readers:
            continue
        writers = [name for name in inner.writers if name in modules]
        place = f"{path}.*.{readers[0]}" if shared else prefix + readers[0]
        one = found.setdefault(place, Inner(place, features_in(modules[readers[0]])))
        for name in writers:
            one.axes += _outputs(prefix + name, modules[name])
            one.writers.append(prefix + name)
        for name in readers:
            one.axes.append(Axis(f"{prefix}{name}.weight", 0 if is_transposed(modules[name]) else 1))
            one.readers.append(prefix + name)
    first = dict(blocks[0].named_modules())
    for one in found.values():
        one.axes += [Axis(f"{path}.0.{name}.weight", 1) for name in inner.tables if name in first]
    return list(found.values())


def by_block(axis: Tensor, features: int, blocks: int, name: str) -> Tensor:
    """Return a tensor whose first axis holds inner features as ``(parts, blocks, features of a block, ...)``.

    An axis of twice or three times the features is of several parts: query, key and value in one projection. One of
    fewer has narrower blocks: keys and values that several heads share, or a table with one column a head.

    Args:
        axis: the tensor.
        features: how many features there are where they are read.
        blocks: into how many heads, groups of heads or units they fall.
        name: what they are, for the message.

    Raises:
        ValueError: if the blocks do not divide the axis.
    """
    size = axis.shape[0]
    parts = max(1, size // features)
    if size % blocks or (parts > 1 and size % features):
        raise ValueError(f"the {name} must divide {size} features, got {blocks}")
    return axis.reshape(parts, blocks, -1, *axis.shape[1:])
