"""What goes or stays as one: single weights, blocks of a matrix, or the weights of a head or unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import Site
from textbrewer.layouts.inner import Axis, by_block

__all__ = ["Block", "BlockGroups", "Groups", "UnitGroups"]

Block = tuple[int | None, int | None]
"""Outputs and inputs of a block of a weight matrix; ``None``: all of them."""


class Groups(ABC):
    """Weights in groups, of one matrix or of one site.

    Args:
        name: of the parameter, or of the site.
        kind: ``"weights"``, ``"heads"`` or ``"ffn"``.
        count: how many groups there are.
        parameters: what the weights are in, by name.
    """

    def __init__(self, name: str, kind: str, count: int, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name, self.kind, self.count = name, kind, count
        self.parameters = dict(parameters)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(iter(self.parameters.values())).device

    @property
    def size(self) -> int:
        """How many weights there are in all groups together."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @abstractmethod
    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum over each group, ``(count,)``, of values that are shaped as the parameters are."""

    @abstractmethod
    def spread(self, values: Tensor) -> list[Tensor]:
        """Return for each parameter what its weights have of ``values``, ``(count,)``, shaped to be broadcast to it."""


class BlockGroups(Groups):
    """Blocks of one weight.

    Args:
        name: the parameter's.
        parameter: a matrix, or with blocks of 1 by 1 a tensor of any shape.
        block: outputs and inputs of a block.
        transposed: whether the matrix is ``(inputs, outputs)``.

    Raises:
        ValueError: if the blocks do not divide the weight.
    """

    def __init__(self, name: str, parameter: nn.Parameter, block: Block = (1, 1), transposed: bool = False) -> None:
        sides = block[::-1] if transposed else block
        if sides == (1, 1):
            self.sides: tuple[int, ...] = ()
            count = parameter.numel()
        else:
            if parameter.dim() != 2:
                raise ValueError(f"block must be (1, 1) for {name!r}, which is no matrix, got {block}; leave it out")
            self.sides = tuple(side or size for side, size in zip(sides, parameter.shape, strict=True))
            if any(size % side for side, size in zip(self.sides, parameter.shape, strict=True)):
                shape = tuple(parameter.shape)[::-1] if transposed else tuple(parameter.shape)
                raise ValueError(
                    f"block must divide {name!r}, of {shape[0]} outputs and {shape[1]} inputs, got {block}; use one "
                    "that does, or leave that module out"
                )
            count = parameter.numel() // (self.sides[0] * self.sides[1])
        super().__init__(name, "weights", count, {name: parameter})

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum over each block, row by row."""
        (value,) = values
        if not self.sides:
            return value.flatten()
        rows, columns = self.sides
        return value.reshape(value.shape[0] // rows, rows, -1, columns).sum((1, 3)).flatten()

    def spread(self, values: Tensor) -> list[Tensor]:
        """Return each weight's block's value."""
        (parameter,) = self.parameters.values()
        if not self.sides:
            return [values.reshape(parameter.shape)]
        rows, columns = self.sides
        blocks = values.reshape(parameter.shape[0] // rows, 1, -1, 1)
        return [blocks.expand(-1, rows, -1, columns).reshape(parameter.shape)]


class UnitGroups(Groups):
    """The weights of each head (group of heads) or unit of a site.

    Args:
        site: where the units are; no list of layers.
        parameters: a model's, by name.
        readers: whether only the weights that read the units count, and not those that write them as well.
    """

    def __init__(self, site: Site, parameters: Mapping[str, nn.Parameter], readers: bool) -> None:
        if site.inner is None:
            raise ValueError(f"a site must be of heads or units, got the layers of {site.name!r}")
        self.site, self.features = site, site.inner.features
        tables = tuple(f"{table}.weight" for table in site.tables)
        reading = {f"{name}.weight" for name in site.inner.readers}
        self.axes = [
            axis
            for axis in site.inner.axes
            if axis.tensor.endswith(".weight")
            and not axis.tensor.endswith(tables)
            and (axis.tensor in reading or not readers)
        ]
        super().__init__(site.name, site.kind, site.units, {axis.tensor: parameters[axis.tensor] for axis in self.axes})
        self._owners: dict[Axis, Tensor] = {}

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum over each unit's weights."""
        parts = [
            self._blocks(value.movedim(axis.axis, 0)).transpose(0, 1).flatten(1).sum(1)
            for value, axis in zip(values, self.axes, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def spread(self, values: Tensor) -> list[Tensor]:
        """Return each position's unit's value, along the axis where the units lie."""
        spread = []
        for axis, parameter in zip(self.axes, self.parameters.values(), strict=True):
            shape = [1] * parameter.dim()
            shape[axis.axis] = -1
            spread.append(values[self._owner(axis, parameter)].reshape(shape))
        return spread

    def _owner(self, axis: Axis, parameter: Tensor) -> Tensor:
        """Return the number of the unit of each position along an axis."""
        if axis not in self._owners:
            size = parameter.shape[axis.axis]
            positions = self._blocks(torch.arange(size))
            owner = torch.empty(size, dtype=torch.long)
            owner[positions] = torch.arange(self.count)[:, None].expand_as(positions)
            self._owners[axis] = owner.to(parameter.device)
        return self._owners[axis]

    def _blocks(self, axis: Tensor) -> Tensor:
        return by_block(axis, self.features, self.count, f"units of {self.name!r}")
