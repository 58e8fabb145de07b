"""A model's outputs as a flat list of named tensors, which is all that an exported file can return."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FlatModel", "named_outputs"]


class FlatModel(nn.Module):
    """A model that takes tensors by position and returns a tuple of tensors.

    Args:
        model: the model.
        names: of its inputs.
        positional: whether it is called by position.
        dtype: that it computes in, if that is not float32: its inputs and outputs are float32 all the same.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], positional: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.model, self.names, self.positional, self.dtype = model, list(names), positional, dtype
        takes = inspect.signature(model.forward).parameters
        # What decoders keep of the positions before is of no use without a loop that hands it back.
        self.settings = {"use_cache": False} if "use_cache" in takes and "use_cache" not in names else {}

    def outputs(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the model's outputs by name."""
        if self.dtype is not None:
            tensors = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        if self.positional:
            found = named_outputs(self.model(*tensors))
        else:
            found = named_outputs(self.model(**dict(zip(self.names, tensors, strict=True)), **self.settings))
        if self.dtype is None:
            return found
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs alone."""
        return tuple(self.outputs(tensors).values())


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of what a model returned, by name.

    A dict's have their keys, those of tuples inside it the number too (``hidden_states.0``); a tensor alone is
    ``output``, and of a tuple they are ``output.0`` and so on.

    Raises:
        TypeError: if there is something else than tensors, or none.
    """
    named = dict(_walk("", outputs))
    if not named:
        raise TypeError(f"model must return tensors, got {type(outputs).__name__} without any")
    return named


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _walk(f"{name or 'output'}.{number}", part)
    elif value is not None:
        raise TypeError(
            f"model must return tensors, or dicts and tuples of them, to be exported, got {type(value).__name__} for "
            f"{name or 'output'!r}"
        )
