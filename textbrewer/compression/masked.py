"""A model that behaves as pruned, and becomes really smaller."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.gates import has_gates, open_gates, strip_gates
from textbrewer.compression.masks import Masks, check_masks
from textbrewer.compression.shrink import check_movable, shrink_
from textbrewer.compression.sites import HIDDEN, Layout, Site, find_layout, kept_positions

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
        self.masks = masks if isinstance(masks, Masks) else Masks(masks)
        layout = find_layout(model, hidden=HIDDEN in self.masks)
        check_masks(self.masks, layout, type(model).__name__)
        check_movable(model, layout, self.masks)
        self.model = model
        self._layout = layout
        open_gates(model, layout.sites, {name: mask.to(torch.float32) for name, mask in self.masks.items()})

    @classmethod
    def seen(cls, model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> Masked:
        """Return a view of a model of a layout that something else keeps under these masks; it puts none on it."""
        view = cls.__new__(cls)
        view.model, view.masks, view._layout = model, Masks(masks), layout
        return view

    def sparsity(self) -> dict[str, float]:
        """Return the share of what is switched off, by component.

        Returns:
            ``"heads"`` (of attention), ``"ffn"`` (units) and ``"layers"``, each as a share of how many there are, those
            of switched-off layers with them; ``"hidden"``, of the hidden features; ``"stack_parameters"`` and
            ``"parameters"``, what :meth:`shrink` takes away of the parameters inside the stacks of layers, and of all.
        """
        shares = {kind: _share(self._layout, self.masks, kind) for kind in ("heads", "ffn", "layers", HIDDEN)}
        paths = tuple(f"{stack.path}." for stack in self._layout.stacks)
        kept = kept_sizes(self.model, self._layout, self.masks)
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        gone = {name: size - kept.get(name, 0) for name, size in sizes.items()}
        inside, removed = (sum(n for name, n in of.items() if name.startswith(paths)) for of in (sizes, gone))
        return {
            **shares,
            "stack_parameters": removed / inside,
            "parameters": sum(gone.values()) / sum(sizes.values()),
        }

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
    """Return how many numbers stay of each parameter, by name; those of layers that go are left out."""
    parameters = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    for site in layout.sites:
        mask = masks.get(site.name)
        if site.inner is None or mask is None:
            continue
        for name, axis in site.inner.axes:
            if name in shapes:  # of tied ones the first name
                shapes[name][axis] = len(kept_positions(site.inner, parameters[name].shape[axis], mask))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    tables = tuple(f"{table}.weight" for site in layout.sites for table in site.tables)
    for stack in layout.stacks:
        mask = masks.get(stack.path, torch.ones(len(stack.blocks), dtype=torch.bool))
        for number, block in enumerate(stack.blocks):
            for inner, _ in block.named_parameters():
                if not mask[number] and not inner.endswith(tables):
                    sizes.pop(f"{stack.path}.{number}.{inner}", None)
    return sizes


def _share(layout: Layout, masks: Mapping[str, Tensor], kind: str) -> float:
    """Return the share of the units of one kind that is switched off, those of switched-off layers with them."""
    total = kept = 0
    if kind == HIDDEN and not layout.of(kind):  # which were not looked for, as none goes
        return 0.0
    for site in layout.of(kind):
        off = int((~masks[site.name]).sum()) if site.name in masks else 0
        layers = masks.get(site.stack)
        total += site.units * site.cost
        kept += (site.units - off) * site.per_unit * _layers_left(site, layers)
    return 1 - kept / total


def _layers_left(site: Site, layers: Tensor | None) -> int:
    """Return in how many layers a site stays; one that is in no layer counts as one."""
    if site.inner is None or site.kind == HIDDEN:
        return 1
    return len(site.layers) if layers is None else sum(bool(layers[number]) for number in site.layers)
