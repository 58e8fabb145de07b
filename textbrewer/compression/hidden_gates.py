"""Factors on a model's hidden features, put on by hooks wherever the features are written, read or normalised."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from textbrewer.layouts.residual import Residual

__all__ = ["Gate", "open_features", "open_reading"]


class Gate:
    """Does something with the factors of a model's units, as a hook; a copy of the module gets a copy of it.

    Args:
        factors: ``(units,)``, 0 for what is left out.
        resting: others that count while the module is in eval mode.
    """

    def __init__(self, factors: Tensor, resting: Tensor | None = None) -> None:
        self.factors, self.resting = factors, resting

    def now(self, module: nn.Module) -> Tensor:
        """Return the factors in a module's mode."""
        return self.factors if module.training or self.resting is None else self.resting


class _FeatureGate(Gate):
    """A gate of hidden features."""

    def scaled(self, module: nn.Module, states: Tensor) -> Tensor:
        """Return states times the factors, along the axis of the features: the last one, but of images the first."""
        factors = self.now(module).to(device=states.device, dtype=states.dtype)
        behind = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
        if states.shape[-1 - behind] != len(factors):
            raise ValueError(
                f"{type(module).__name__} must read or return {len(factors)} hidden features along axis {-1 - behind}, "
                f"got {tuple(states.shape)}; they cannot be pruned in this model"
            )
        return states * factors.reshape(-1, *[1] * behind)


class _Reading(_FeatureGate):
    """Multiplies the features that a module reads."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *rest = inputs
        return (self.scaled(module, states), *rest)


class _Writing(_FeatureGate):
    """Multiplies the features that a module writes."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.scaled(module, output[0]), *output[1:])
        return self.scaled(module, output)


class _Normalising(Gate):
    """Lets a norm see the features that are left, and no others: their mean, their variance, their number."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        states, factors = inputs[0], self.now(module)
        kept = factors.detach().nonzero().flatten().to(states.device)
        narrow = copy.copy(module)
        tensors = {name: value for name, value in module._parameters.items() if value is not None}
        narrow.__dict__["_parameters"] = {
            **module._parameters,
            **{name: value.index_select(0, kept) for name, value in tensors.items()},
        }
        if hasattr(module, "normalized_shape"):
            narrow.__dict__["normalized_shape"] = (len(kept),)
        normed: Tensor = type(module).forward(narrow, states.index_select(-1, kept))
        normed = normed * factors.to(device=normed.device, dtype=normed.dtype).index_select(0, kept)
        return normed.new_zeros(states.shape).index_copy(-1, kept, normed)


class _Counting(Gate):
    """Makes the numbers that a module keeps about the features true while it computes, and puts them back after it."""

    def __init__(self, factors: Tensor, resting: Tensor | None, names: Sequence[str], roots: Sequence[str]) -> None:
        super().__init__(factors, resting)
        self.names, self.roots = list(names), list(roots)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.note(module, int(torch.count_nonzero(self.now(module).detach())))

    def note(self, module: nn.Module, width: int) -> None:
        """Write a width, and its root, into a module's attributes."""
        for name in self.names:
            setattr(module, name, width)
        for name in self.roots:
            setattr(module, name, math.sqrt(width))


class _Restoring(_Counting):
    """Puts the numbers back."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.note(module, len(self.factors))


def open_features(
    model: nn.Module, residual: Residual, factors: Tensor, resting: Tensor | None = None
) -> list[RemovableHandle]:
    """Put factors on all hidden features of a model.

    What writes them, what reads them and what normalises over them is multiplied, and norms take their statistics over
    the features whose factor is not 0. So do scales that a module works out from the hidden width.

    Args:
        model: whose modules are hooked.
        residual: its hidden features.
        factors: ``(features,)``.
        resting: others that count while a module is in eval mode.

    Returns:
        Handles that remove them.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022, arXiv:2204.00408, section 3.1 (one
        mask for the hidden dimensions of all layers).
    """
    module, handles = model.get_submodule, open_reading(model, residual, factors, resting)
    for path in dict.fromkeys([*residual.writers, *residual.owners]):
        handles.append(module(path).register_forward_hook(_Writing(factors, resting)))
    for path in residual.norms:
        handles.append(module(path).register_forward_hook(_Normalising(factors, resting)))
    for path in dict.fromkeys(path for path, _ in [*residual.attributes, *residual.roots]):
        names, roots = ([name for at, name in some if at == path] for some in (residual.attributes, residual.roots))
        handles.append(module(path).register_forward_pre_hook(_Counting(factors, resting, names, roots)))
        restoring = _Restoring(factors, resting, names, roots)
        handles.append(module(path).register_forward_hook(restoring, always_call=True))
    return handles


def open_reading(
    model: nn.Module, residual: Residual, factors: Tensor, resting: Tensor | None = None
) -> list[RemovableHandle]:
    """Put factors on the hidden features that a model's linear maps read, and leave its norms as they are."""
    gates = [(path, _Reading(factors, resting)) for path in residual.readers]
    return [model.get_submodule(path).register_forward_pre_hook(gate) for path, gate in gates]
