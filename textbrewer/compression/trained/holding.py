"""Weights that were taken out and stay out while the rest is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.trained.groups import Groups

__all__ = ["Held"]


class Held:
    """Weights that are to be zero.

    Args:
        pairs: parameters, each with booleans that can be broadcast to it, true for the weights that stay.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self._pairs = [(parameter, ~stays.to(parameter.device)) for parameter, stays in pairs]

    @classmethod
    def by_name(cls, model: nn.Module, masks: Mapping[str, Tensor]) -> Held:
        """Hold a model's weights by masks of its parameters' names."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls((parameters[name], mask) for name, mask in masks.items())

    @classmethod
    def of_groups(cls, groups: Sequence[Groups], stays: Sequence[Tensor]) -> Held:
        """Hold groups of weights by which of each stay, ``(count,)`` of booleans."""
        return cls(
            pair
            for one, stay in zip(groups, stays, strict=True)
            for pair in zip(one.parameters.values(), one.spread(stay), strict=True)
        )

    def gradients_to_zero(self) -> None:
        """Take their gradients away, so that they do not count when gradients are clipped."""
        for parameter, off in self._pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(off, 0)

    def weights_to_zero(self) -> None:
        """Set them to zero."""
        with torch.no_grad():
            for parameter, off in self._pairs:
                parameter.masked_fill_(off, 0)
