"""A model's config made true again after pruning, as far as it has words for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbrewer.compression.sites import Layout, Stack, towers_of

__all__ = ["Sizes", "follow", "sizes_of"]


@dataclass(frozen=True)
class StackSizes:
    """The sizes of a stack of layers: those of its widest, where layers differ."""

    layers: int
    heads: int
    key_value_heads: int
    units: int
    head_width: int


Sizes = dict[str, StackSizes]
"""By the dotted name of a stack."""


def sizes_of(layout: Layout) -> Sizes:
    """Return the sizes of a model's stacks."""
    sizes = {}
    for stack, tower in zip(layout.stacks, towers_of(layout), strict=True):
        groups = max(site.units for site in layout.of("heads") if site.stack == stack.path)
        sizes[stack.path] = StackSizes(len(stack.blocks), tower.heads, groups, tower.units, tower.head_width)
    return sizes


def follow(model: nn.Module, layout: Layout, before: Sizes, after: Sizes, masks: Mapping[str, Tensor]) -> None:
    """Write the new sizes into a model's config, and into the copies that its stacks may have.

    Only what changed is written. A number of heads is written where the config has a field of its own for the width of
    a head; elsewhere the width is the hidden width divided by that number, which must stay.

    Args:
        model: pruned; nothing is done to one without a config.
        layout: as it was before.
        before: the sizes before.
        after: the sizes now.
        masks: which layers stay, by stack.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    main = {stack.path: stack for stack in layout.stacks}
    widest = {path: _shared(layout, stack, after) for path, stack in main.items()}
    for path, stack in main.items():
        _write(config, layout, stack, before[path], widest[path], masks.get(path))
        own = getattr(model.get_submodule(path.rpartition(".")[0]), "config", None)
        if own is not None and own is not config:
            _write(own, layout, stack, before[path], after[path], masks.get(path))
            for other in main.values():  # a decoder's copy has its number of layers in the encoder's field
                if getattr(own, other.fields.layers, None) == before[path].layers:
                    setattr(own, other.fields.layers, after[path].layers)


def _shared(layout: Layout, stack: Stack, after: Sizes) -> StackSizes:
    """Return the sizes of a stack for the config of the whole model, in which several stacks may share fields."""

    def largest(field: str, value: str) -> int:
        mine = getattr(stack.fields, field)
        sharing = [other.path for other in layout.stacks if getattr(other.fields, field) == mine]
        return max(int(getattr(after[path], value)) for path in sharing)

    return StackSizes(
        after[stack.path].layers,
        largest("heads", "heads"),
        largest("heads", "key_value_heads"),
        largest("intermediate", "units"),
        after[stack.path].head_width,
    )


def _write(
    config: Any, layout: Layout, stack: Stack, before: StackSizes, after: StackSizes, mask: Tensor | None
) -> None:
    family, fields = layout.structure.family, stack.fields
    if after.layers != before.layers and mask is not None:
        for field in family.per_layer:
            values = getattr(config, field, None)
            if isinstance(values, (list, tuple)) and len(values) == len(mask):
                kept = [value for value, stays in zip(values, mask.tolist(), strict=True) if stays]
                setattr(config, field, kept)
        setattr(config, fields.layers, after.layers)
    if after.units != before.units:
        setattr(config, fields.intermediate, after.units)
    # Configs of grouped attention refuse a number of heads that does not divide the hidden width.
    fits = fields.key_value_heads is None or getattr(config, family.hidden, 0) % after.heads == 0
    if after.heads != before.heads and family.head_width is not None and fits:
        setattr(config, family.head_width, after.head_width)
        setattr(config, fields.heads, after.heads)
        if fields.key_value_heads is not None and getattr(config, fields.key_value_heads, None) is not None:
            setattr(config, fields.key_value_heads, after.key_value_heads)
