"""Units taken out of a model: weights sliced, layers dropped, and every number that a module keeps about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from textbrewer.compression.config_fields import Sizes, follow, sizes_of
from textbrewer.compression.hidden import narrowed
from textbrewer.compression.sites import HIDDEN, Layout, Site, Stack, find_layout, kept_positions, towers_of
from textbrewer.compression.structure import Structure
from textbrewer.layouts.residual import Residual, tensors_of

__all__ = ["check_movable", "shrink_"]


def check_movable(model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> None:
    """Raise ValueError if layers would get another place in a model whose layers compute by their place."""
    for stack in layout.stacks:
        mask = masks.get(stack.path)
        if mask is None or bool(mask[: int(mask.sum())].all()):
            continue
        for field in layout.structure.family.by_position:
            if getattr(getattr(model, "config", None), field, False):
                raise ValueError(
                    f"only the last layers can be taken out where config.{field} is set, as a layer computes otherwise "
                    f"at another place; got {[number for number, stays in enumerate(mask) if not stays]}"
                )


def shrink_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Take units out of a model, in place.

    Args:
        model: of a known structure, without masks on it.
        masks: by site, ``(units,)`` of booleans, true for what stays; checked before.
    """
    layout = find_layout(model, hidden=HIDDEN in masks)
    before = sizes_of(layout)
    with torch.no_grad():
        for site in layout.sites:
            mask = masks.get(site.name)
            if site.inner is not None and mask is not None:
                _slice(model, site, mask)
                _count_heads(model, layout.structure, site, int(mask.sum()))
            if isinstance(site.inner, Residual):
                narrowed(model, layout.structure, site.inner, towers_of(find_layout(model)))
    for stack in layout.stacks:
        if stack.path in masks:
            _drop_layers(layout.structure, stack, masks[stack.path])
    after: Sizes = sizes_of(find_layout(model))
    follow(model, layout, before, after, masks)


def _slice(model: nn.Module, site: Site, mask: Tensor) -> None:
    """Keep the units of one site, in every tensor that writes, reads or adds to them."""
    if site.inner is None or bool(mask.all()):
        return
    tensors, done = tensors_of(model), set()
    for name, axis in site.inner.axes:
        tensor = tensors[name]
        if (id(tensor), axis) not in done:  # tied ones have several names
            done.add((id(tensor), axis))
            kept = kept_positions(site.inner, tensor.shape[axis], mask)
            tensor.data = tensor.data.index_select(axis, kept.to(tensor.device))
            tensor.grad = None  # of the old shape
        if name.endswith(".weight") and tensor.dim() > 1:
            _note_shape(model.get_submodule(name.rpartition(".")[0]))


def _note_shape(module: nn.Module) -> None:
    """Make what a module says of its shape true again."""
    rows, columns, *_ = module.weight.shape  # type: ignore[misc]
    if isinstance(module, _ConvNd):
        module.out_channels, module.in_channels = int(rows), int(columns)
        return
    names = {
        "Linear": {"out_features": rows, "in_features": columns},
        "Conv1D": {"nx": rows, "nf": columns},
        "Embedding": {"num_embeddings": rows, "embedding_dim": columns},
    }
    for kind in type(module).__mro__:
        for name, value in names.get(kind.__name__, {}).items():
            setattr(module, name, value)


def _count_heads(model: nn.Module, structure: Structure, site: Site, groups: int) -> None:
    """Make what the attention modules of a site say of their heads true again."""
    if site.kind != "heads" or site.inner is None:
        return
    heads = groups * site.per_unit
    features = site.inner.features // site.units * groups
    owners = {name.rpartition(".")[0] for name in site.inner.writers}
    for owner in owners:
        module = model.get_submodule(owner)
        for names, value in (
            (structure.heads, heads),
            (structure.key_value_heads, groups),
            (structure.features, features),
        ):
            _set_where_there(module, names, value)


def _set_where_there(module: nn.Module, names: Iterable[str], value: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)


def _drop_layers(structure: Structure, stack: Stack, mask: Tensor) -> None:
    """Leave a stack the layers that stay, numbered anew; what only its first layer has goes to the new first one."""
    old = list(stack.blocks)
    kept = [block for block, stays in zip(old, mask.tolist(), strict=True) if stays]
    stack.blocks._modules = {str(number): block for number, block in enumerate(kept)}
    for number, block in enumerate(kept):
        for module in block.modules():
            for name in structure.layer_number:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    if kept[0] is old[0]:
        return
    for width in structure.family.attentions:
        for table in width.tables:
            owner, _, leaf = table.rpartition(".")
            if leaf not in old[0].get_submodule(owner)._modules:
                continue
            heir = kept[0].get_submodule(owner)
            heir.add_module(leaf, old[0].get_submodule(table))
            if structure.table_switch is not None:
                setattr(heir, structure.table_switch, True)
