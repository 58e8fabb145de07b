"""Which axes of a teacher's tensors belong together: features that are kept or left out in all of them at once.

A transformer has one space of hidden features, which the embeddings, norms and every layer share, and in each layer the
heads of each attention and the units of the feed-forward part. An axis of a tensor belongs to at most one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textbrewer.layouts.families import Family, InnerWidth
from textbrewer.layouts.inner import Axis, by_block, inner_features
from textbrewer.students.layers import Tower
from textbrewer.students.widths import Width, Widths

__all__ = ["Axis", "Space", "hidden_space", "inner_spaces"]


@dataclass
class Space:
    """Features that are kept or left out together, in blocks (a head with its queries, keys and values; a unit).

    Args:
        kind: ``"hidden"``, ``"heads"`` or ``"units"``.
        name: the module that reads them, or the stack; unique among those of a kind.
        features: how many there are where they are read.
        blocks: into how many blocks they fall, and how many of them the student keeps.
        axes: the axes along which they lie.
        readers: dotted names of the modules that read them; of the hidden features, of the layers that write them.
        kept: the numbers of the kept blocks, ascending; set once their importance is known.
    """

    kind: str
    name: str
    features: int
    blocks: Width
    axes: list[Axis] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def by_block(self, axis: Tensor) -> Tensor:
        """Return a tensor whose first axis is of this space as ``(parts, blocks, features of a block, ...)``."""
        return by_block(axis, self.features, self.blocks.teacher, f"{self.kind} of {self.name!r}")

    def positions(self, size: int) -> Tensor:
        """Return the kept positions along an axis of this space that has ``size`` of them."""
        return self.by_block(torch.arange(size))[:, self.kept].flatten()


def inner_spaces(family: Family, towers: Sequence[Tower], widths: Widths) -> list[Space]:
    """Return the heads and units of the layers that the student gets: one space each, or one for layers with a table.

    Raises:
        ValueError: if a layer has no attention or no feed-forward part of the family's names.
    """
    spaces: list[Space] = []
    for tower, inside in zip(towers, widths.towers, strict=True):
        kinds = (("heads", family.attentions, inside.key_value_heads), ("units", family.feed_forwards, inside.units))
        for kind, inners, blocks in kinds:
            shared = kind == "heads" and inside.heads.teacher != blocks.teacher
            found = [space for inner in inners for space in _spaces(tower, inner, kind, blocks, shared)]
            if not found:
                names = " or ".join(reader for inner in inners for reader in inner.readers)
                raise ValueError(f"the layers of {tower.path} must have modules named {names}, got none; see Family")
            spaces += found
    return spaces


def _spaces(tower: Tower, inner: InnerWidth, kind: str, blocks: Width, shared: bool) -> list[Space]:
    """Return the spaces of one kind of features in the layers of one stack."""
    found = inner_features(tower.path, list(tower.blocks), tower.picked, inner, shared=bool(inner.tables))
    for one in found:
        for name, axis in one.axes:
            size = tower.blocks.get_parameter(name[len(tower.path) + 1 :]).shape[axis]
            if shared and size > one.features:
                raise ValueError(
                    "query, key and value must be projections of their own where several heads share keys and "
                    f"values, got {name.rpartition('.')[0]!r} for all of them; build the narrower student yourself"
                )
    return [Space(kind, one.name, one.features, blocks, one.axes, one.readers) for one in found]


def hidden_space(
    width: Width, towers: Sequence[Tower], inner: Iterable[Space], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> Space:
    """Return the hidden features: every axis of the hidden width that is no inner one.

    They are told by their size, which is the teacher's hidden width in the teacher and the student's in the student; so
    heads of any kind need no names.

    Args:
        width: the hidden width.
        towers: the stacks.
        inner: the spaces inside the layers.
        pairs: by the teacher's name, the tensors of teacher and student.

    Raises:
        ValueError: if a tensor differs between the two along an axis that belongs to no space.
    """
    layers = [f"{tower.path}.{number}" for tower in towers for number in tower.picked]
    space = Space("hidden", "hidden", width.teacher, width, readers=layers)
    known = {axis for other in inner for axis in other.axes}
    for name, (mine, theirs) in pairs.items():
        for axis, sizes in enumerate(zip(mine.shape, theirs.shape, strict=True)):
            if Axis(name, axis) in known or sizes[0] == sizes[1]:
                continue
            if sizes != width:
                raise ValueError(
                    f"every width must be known to the Family: axis {axis} of {name!r} has {sizes[0]} features in the "
                    f"teacher and {sizes[1]} in the student; name the module among the writers or readers"
                )
            space.axes.append(Axis(name, axis))
    return space
