"""Where a model can be pruned: heads of each attention, units of each feed-forward part, layers, hidden features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from textbrewer.compression.hidden import Tower, hidden_features
from textbrewer.compression.structure import STRUCTURES, Structure
from textbrewer.compression.structure.structure import structure_of
from textbrewer.layouts import InnerWidth, LayerStack
from textbrewer.layouts.inner import Inner, by_block, features_in, features_out, inner_features
from textbrewer.layouts.stacks import locate

__all__ = ["HIDDEN", "KINDS", "Layout", "Site", "Stack", "find_layout", "hidden_width", "kept_positions", "towers_of"]

HIDDEN = "hidden"
"""The kind, and the name, of the one site of a model's hidden features."""
KINDS = ("heads", "ffn", HIDDEN, "layers")
"""What can be pruned: attention heads, units of feed-forward parts, hidden features, whole layers."""


@dataclass(frozen=True)
class Stack:
    """A stack of layers in a model.

    Args:
        fields: what the family says of it.
        path: the dotted name of its list of layers.
        blocks: the layers.
    """

    fields: LayerStack
    path: str
    blocks: nn.ModuleList


@dataclass(frozen=True)
class Site:
    """A place in a model with units that can be pruned one by one.

    Args:
        kind: one of :data:`KINDS`.
        name: unique in the model: the module that reads the units, or the list of layers; :data:`HIDDEN`.
        stack: the dotted name of the list of layers; empty for hidden features, which all of them share.
        units: how many there are; of heads that share keys and values, how many groups.
        per_unit: how many heads (units, layers) one of them is, in one layer.
        inner: the features that the units are made of, of hidden ones a
            :class:`~textbrewer.layouts.residual.Residual`; ``None`` for layers.
        tables: names inside a layer of tensors with one column a head.
    """

    kind: str
    name: str
    stack: str
    units: int
    per_unit: int = 1
    inner: Inner | None = None
    tables: tuple[str, ...] = ()

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that the site lies in, all that keep the same units; none of hidden features."""
        readers = self.inner.readers if self.inner is not None and self.kind != HIDDEN else []
        return [int(name[len(self.stack) + 1 :].partition(".")[0]) for name in readers]

    @property
    def cost(self) -> int:
        """For how many heads (units, layers) of the model one unit stands."""
        return self.per_unit * max(1, len(self.layers))


@dataclass(frozen=True)
class Layout:
    """All that can be pruned of a model."""

    structure: Structure
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]

    def of(self, kind: str) -> list[Site]:
        """Return the sites of one kind."""
        return [site for site in self.sites if site.kind == kind]


def find_layout(model: nn.Module, hidden: bool = False) -> Layout:
    """Return where a model can be pruned.

    Args:
        model: of a known structure.
        hidden: whether its hidden features are looked for too, for which models of its class are made.

    Raises:
        ValueError: if its family is unknown, it is not built as the family says, its heads do not divide what they
            are to divide, or it cannot be told where its hidden features are.
    """
    structure = structure_of(model, STRUCTURES)
    family = structure.family
    stacks = tuple(
        Stack(fields, *found)
        for fields in family.stacks
        if (found := locate(model, fields)) is not None and len(found[1])
    )
    if not stacks:
        names = ", ".join(path for fields in family.stacks for path in fields.paths)
        raise ValueError(f"{type(model).__name__} must have its layers in a list named {names}, got none")
    sites: list[Site] = []
    for stack in stacks:
        heads = list(_head_sites(model, structure, stack))
        units = [
            Site("ffn", inner.name, stack.path, inner.features, inner=inner)
            for width in family.feed_forwards
            for inner in _inner(stack, width, shared=False)
        ]
        for some, widths in ((heads, family.attentions), (units, family.feed_forwards)):
            if not some:
                names = " or ".join(reader for width in widths for reader in width.readers)
                raise ValueError(f"the layers of {stack.path} must have modules named {names}, got none; see Family")
        sites += [*heads, *units, Site("layers", stack.path, stack.path, len(stack.blocks))]
    layout = Layout(structure, stacks, tuple(sites))
    return _with_hidden(model, layout) if hidden else layout


def towers_of(layout: Layout) -> list[Tower]:
    """Return a model's stacks of layers with the sizes of their widest layer."""
    towers = []
    for stack in layout.stacks:
        heads, units = ([site for site in layout.of(kind) if site.stack == stack.path] for kind in ("heads", "ffn"))
        number = max(site.units * site.per_unit for site in heads)
        features = heads[0].inner.features if heads[0].inner is not None else 0
        width = features // (heads[0].units * heads[0].per_unit)
        towers.append(Tower(stack.fields, number, width, max(site.units for site in units)))
    return towers


def hidden_width(model: nn.Module, layout: Layout) -> int:
    """Return how many hidden features a model has: as its config says, else as its first attention reads."""
    width = getattr(getattr(model, "config", None), layout.structure.family.hidden, None)
    if isinstance(width, int):
        return width
    inner = layout.of("heads")[0].inner
    return features_in(model.get_submodule(inner.writers[0])) if inner is not None else 0


def _with_hidden(model: nn.Module, layout: Layout) -> Layout:
    """Return a model's layout with the site of its hidden features."""
    inside = [site.inner for site in layout.sites if site.inner is not None]
    attentions = [site.inner for site in layout.of("heads") if site.inner is not None]
    owners = {name.rpartition(".")[0] for inner in attentions for name in inner.writers}
    axes = {axis for inner in inside for axis in inner.axes}
    residual = hidden_features(model, layout.structure, towers_of(layout), axes, owners)
    residual.layers = [f"{stack.path}.{number}" for stack in layout.stacks for number in range(len(stack.blocks))]
    site = Site(HIDDEN, HIDDEN, "", residual.features, inner=residual)
    return Layout(layout.structure, layout.stacks, (*layout.sites, site))


def kept_positions(inner: Inner, size: int, kept: Tensor) -> Tensor:
    """Return the positions along an axis of inner features that belong to the kept units.

    Args:
        inner: the features.
        size: how long the axis is.
        kept: which units stay, ``(units,)`` of booleans.
    """
    blocks = by_block(torch.arange(size), inner.features, len(kept), f"units of {inner.name!r}")
    return blocks[:, kept].flatten()


def _inner(stack: Stack, width: InnerWidth, shared: bool) -> list[Inner]:
    return inner_features(stack.path, list(stack.blocks), range(len(stack.blocks)), width, shared)


def _head_sites(model: nn.Module, structure: Structure, stack: Stack) -> Iterator[Site]:
    """Yield the attentions of a stack."""
    modules = dict(model.named_modules())
    for width in structure.family.attentions:
        for inner in _inner(stack, width, shared=structure.same_heads or bool(width.tables)):
            if not inner.writers:
                raise ValueError(f"{inner.name!r} must have one of {', '.join(width.writers)} beside it, got none")
            owner = modules[inner.writers[0].rpartition(".")[0]]
            head_width = next((int(getattr(owner, name)) for name in structure.head_width if hasattr(owner, name)), 0)
            if not head_width:
                raise ValueError(
                    f"{type(owner).__name__} ({inner.name!r}) must have an attribute named "
                    f"{' or '.join(structure.head_width)}, the width of a head; see Structure.head_width"
                )
            narrowest = min(inner.features, *(features_out(modules[name]) for name in inner.writers))
            groups, heads = narrowest // head_width, inner.features // head_width
            if narrowest % head_width or inner.features % head_width or not groups or heads % groups:
                raise ValueError(
                    f"heads must divide the features of {inner.name!r}: {inner.features} of queries and {narrowest} of "
                    f"keys and values are no whole number of groups of heads of width {head_width}"
                )
            yield Site("heads", inner.name, stack.path, groups, heads // groups, inner, width.tables)
