"""The whole numbers that modules keep about their shapes: what a model without a known structure is made again by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.low_rank_layers import LowRankLinear, is_linear_map, matrix_of
from textbrewer.layouts.inner import is_transposed

__all__ = ["module_numbers", "restore_numbers_", "set_shapes_"]

Numbers = dict[str, dict[str, Any]]


def module_numbers(model: nn.Module) -> Numbers:
    """Return the attributes of a model's modules that are whole numbers, or tuples or lists of them.

    Channels, groups and kernels of convolutions, widths of linear maps, heads of attentions and the like, by the dotted
    name of the module; fit for JSON. The halves of low-rank pairs are left out, which have a manifest of their own.
    """
    pairs = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    found = {
        name: {
            key: list(value) if isinstance(value, (tuple, list)) else value
            for key, value in vars(module).items()
            if _is_number(value)
        }
        for name, module in model.named_modules()
        if not name.startswith(pairs)
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def restore_numbers_(model: nn.Module, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write such numbers into a model of the same modules, in place.

    Raises:
        ValueError: if it lacks a module or an attribute, or one is of another kind.
    """
    modules = dict(model.named_modules())
    for name, entry in numbers.items():
        if name not in modules:
            raise ValueError(f"only the manifest has a module {name!r}")
        checks.is_a(entry, Mapping, f"the numbers of {name!r}", "a dict")
        for key, value in entry.items():
            old = vars(modules[name]).get(key)
            if not _is_number(value) or not _is_number(old) or isinstance(old, int) != isinstance(value, int):
                raise ValueError(f"{name!r} must have a number {key!r} as {value!r}, got {old!r}")
            setattr(modules[name], key, tuple(value) if isinstance(old, tuple) else value)


def set_shapes_(model: nn.Module, tensors: Mapping[str, Tensor], low_rank: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a model's parameters and buffers the shapes of saved tensors, without their values, in place.

    Args:
        model: its own tensors.
        tensors: the saved ones, by name; those that the model lacks are passed over.
        low_rank: entries of linear maps that became pairs, see
            :func:`~textbrewer.compression.low_rank.low_rank_manifest`.
    """
    for name, module in model.named_modules():
        entry = low_rank.get(name)
        if entry is not None and is_linear_map(module):
            shape = (int(entry["outputs"]), int(entry["inputs"]))
            empty = matrix_of(module).new_empty(shape[::-1] if is_transposed(module) else shape)
            module.weight = nn.Parameter(empty)
            if module.bias is not None:
                module.bias = nn.Parameter(empty.new_empty(shape[0]))
        for kind in (module._parameters, module._buffers):
            for leaf, tensor in kind.items():
                saved = tensors.get(f"{name}.{leaf}" if name else leaf)
                if tensor is None or saved is None or saved.shape == tensor.shape:
                    continue
                empty = tensor.detach().new_empty(saved.shape)
                kind[leaf] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _is_number(value: Any) -> bool:
    """Return whether a value is a whole number, or a tuple or list of some; booleans are not."""
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(type(item) is int for item in value)
    return type(value) is int
