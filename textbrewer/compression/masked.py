"""A model that behaves as pruned, and becomes really smaller."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.gates import has_gates, open_gates, strip_gates
from textbrewer.compression.masks import Masks, check_masks
from textbrewer.compression.shrink import check_movable, shrink_
from textbrewer.compression.sites import Layout, Site, find_layout, kept_positions

__all__ = ["Masked"]


class Masked:
    """A model some of whose units are switched off by hooks.

    Its outputs, and the gradients of what stays, are those of the model that :meth:`shrink` returns; what was switched
    off gets gradients of zero, or none. It has all its parameters under their names and can be trained, moved and
    copied; weights that an optimiser changes without a gradient (weight decay) do not matter where they are off.

    >>> masked = Masked(model, Masks.load("masks.safetensors"))

    Args:
        model: put under masks in place.
        masks: which units stay.

    Raises:
        ValueError: if the masks are of another model, or the model is masked already.
        TypeError: if an argument is of the wrong kind.
    """

    def __init__(self, model: nn.Module, masks: Masks | Mapping[str, Tensor]) -> None:
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module")
        if has_gates(model):
            raise ValueError("model must not be masked already; shrink it first, and mask what comes out")
        layout = find_layout(model)
        self.masks = masks if isinstance(masks, Masks) else Masks(masks)
        check_masks(self.masks, layout, type(model).__name__)
        check_movable(model, layout, self.masks)
        self.model = model
        self._layout = layout
        open_gates(model, layout.sites, {name: mask.to(torch.float32) for name, mask in self.masks.items()})

    def sparsity(self) -> dict[str, float]:
        """Return the share of what is switched off, by component.

        Returns:
            ``"heads"`` (of attention), ``"ffn"`` (units) and ``"layers"``, each as a share of how many there are, those
            of switched-off layers with them; ``"stack_parameters"`` and ``"parameters"``, what :meth:`shrink` takes
            away of the parameters inside the stacks of layers, and of all.
        """
        shares = {kind: _share(self._layout, self.masks, kind) for kind in ("heads", "ffn", "layers")}
        paths = tuple(f"{stack.path}." for stack in self._layout.stacks)
        inside = {name: tensor.numel() for name, tensor in self.model.named_parameters() if name.startswith(paths)}
        removed = sum(inside.values()) - sum(kept_sizes(self.model, self._layout, self.masks).values())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return {**shares, "stack_parameters": removed / sum(inside.values()), "parameters": removed / total}

    def shrink(self) -> nn.Module:
        """Return a model of the same class without what is switched off.

        It computes what the masked one does with smaller matrices. Attributes that its modules keep about heads follow;
        so do its config's number of layers and width of the feed-forward parts, and its number of heads where the
        config can say how wide a head is (Llama, T5; elsewhere a width divided by it), of the widest where layers
        differ. Save it with :func:`textbrewer.compression.save`; ``save_pretrained`` cannot say what differs by layer.

        Returns:
            A copy; the masked model stays as it is.
        """
        small = copy.deepcopy(self.model)
        strip_gates(small)
        shrink_(small, self.masks)
        return small


def kept_sizes(model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many numbers stay of each parameter inside the stacks of layers, by name."""
    shares: dict[str, float] = {}
    parameters = dict(model.named_parameters())
    for site in layout.sites:
        mask = masks.get(site.name)
        if site.inner is None or mask is None:
            continue
        for name, axis in site.inner.axes:
            size = parameters[name].shape[axis]
            shares[name] = len(kept_positions(site.inner, size, mask)) / size
    sizes = {}
    tables = tuple(f"{table}.weight" for site in layout.sites for table in site.tables)
    for stack in layout.stacks:
        mask = masks.get(stack.path, torch.ones(len(stack.blocks), dtype=torch.bool))
        for number, block in enumerate(stack.blocks):
            for inner, parameter in block.named_parameters():
                name = f"{stack.path}.{number}.{inner}"
                if name in parameters and (mask[number] or inner.endswith(tables)):
                    sizes[name] = round(parameter.numel() * shares.get(name, 1.0))
    return sizes


def _share(layout: Layout, masks: Mapping[str, Tensor], kind: str) -> float:
    """Return the share of the units of one kind that is switched off, those of switched-off layers with them."""
    total = kept = 0
    for site in layout.of(kind):
        off = int((~masks[site.name]).sum()) if site.name in masks else 0
        layers = masks.get(site.stack)
        total += site.units * site.cost
        kept += (site.units - off) * site.per_unit * _layers_left(site, layers)
    return 1 - kept / total


def _layers_left(site: Site, layers: Tensor | None) -> int:
    """Return in how many layers a site stays; a list of layers counts as one."""
    if site.inner is None:
        return 1
    return len(site.layers) if layers is None else sum(bool(layers[number]) for number in site.layers)
