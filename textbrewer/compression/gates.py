"""Factors on the units of a model, put on by hooks: the model's parameters and their names stay what they are.

A head's or unit's factor multiplies what it gives to the module that reads it, a layer's what it changes of the hidden
states, a hidden feature's all that is written or read of it: at 0 the unit might as well not be there, and no gradient
reaches its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from textbrewer.compression.hidden_gates import Gate, open_features
from textbrewer.compression.sites import Site
from textbrewer.layouts.residual import Residual

__all__ = ["close", "has_gates", "open_gates", "strip_gates"]


class _UnitGate(Gate):
    """Multiplies the units that a module reads."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *rest = inputs
        factors = self.now(module).to(device=states.device, dtype=states.dtype)
        return (states * factors.repeat_interleave(states.shape[-1] // len(factors)), *rest)


class _LayerGate(Gate):
    """Multiplies what a layer changes of the hidden states."""

    def __init__(self, factors: Tensor, number: int, resting: Tensor | None = None) -> None:
        super().__init__(factors, resting)
        self.number = number

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        before = layer_input(inputs, named)
        after, *rest = output if isinstance(output, tuple) else (output,)
        factors = self.now(module)
        if not factors.requires_grad:
            states = after if factors[self.number] else before
        else:
            factor = factors[self.number].to(device=before.device, dtype=before.dtype)
            states = before + factor * (after - before)
        return (states, *rest) if isinstance(output, tuple) else states


def layer_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that a layer was called with."""
    states: Tensor = inputs[0] if inputs else named["hidden_states"]
    return states


def open_gates(
    model: nn.Module,
    sites: Iterable[Site],
    factors: Mapping[str, Tensor],
    resting: Mapping[str, Tensor] | None = None,
) -> list[RemovableHandle]:
    """Put factors on a model's units.

    Args:
        model: whose modules are hooked.
        sites: where its units are.
        factors: by site, ``(units,)``; sites without any are left alone. Of layers 0 or 1, unless they have a gradient.
        resting: others that count while a module is in eval mode, without gradients.

    Returns:
        Handles that remove them.
    """
    handles: list[RemovableHandle] = []
    for site in sites:
        given = factors.get(site.name)
        if given is None:
            continue
        still = None if resting is None else resting[site.name]
        if isinstance(site.inner, Residual):
            handles += open_features(model, site.inner, given, still)
            continue
        if site.inner is not None:
            gates = [(name, _UnitGate(given, still)) for name in site.inner.readers]
            handles += [model.get_submodule(name).register_forward_pre_hook(gate) for name, gate in gates]
            continue
        for number in range(site.units):
            layer = model.get_submodule(f"{site.stack}.{number}")
            handles.append(layer.register_forward_hook(_LayerGate(given, number, still), with_kwargs=True))
    return handles


def close(handles: Iterable[RemovableHandle]) -> None:
    """Take factors off."""
    for handle in handles:
        handle.remove()


def has_gates(model: nn.Module) -> bool:
    """Return whether any of a model's units have factors."""
    return any(_gates(hooks) for module in model.modules() for hooks, _ in _hooks(module))


def strip_gates(model: nn.Module) -> None:
    """Take all factors off a model, a copy's too, whose hooks have no handles."""
    for module in model.modules():
        for hooks, others in _hooks(module):
            for key in _gates(hooks):
                del hooks[key]
                for other in others:
                    other.pop(key, None)


def _gates(hooks: Mapping[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, Gate)]


def _hooks(module: nn.Module) -> list[tuple[dict[int, Any], list[dict[int, Any]]]]:
    """Return a module's hooks, with what torch notes of them."""
    before = [module._forward_pre_hooks_with_kwargs]
    after = [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]
    return [(module._forward_pre_hooks, before), (module._forward_hooks, after)]
