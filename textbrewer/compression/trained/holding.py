"""Weights that were taken out and stay out while the rest is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textbrewer.compression.trained.groups import Groups

__all__ = ["keep_out", "keep_out_gradients"]


@torch.no_grad()
def keep_out(groups: Sequence[Groups], stays: Sequence[Tensor]) -> None:
    """Set weights to zero, in place.

    Args:
        groups: of weights.
        stays: which of each stay, ``(count,)`` of booleans.
    """
    for one, stay in zip(groups, stays, strict=True):
        for parameter, mask in zip(one.parameters.values(), one.spread(stay), strict=True):
            parameter.masked_fill_(~mask, 0)


@torch.no_grad()
def keep_out_gradients(groups: Sequence[Groups], stays: Sequence[Tensor]) -> None:
    """Set the gradients of such weights to zero, so that they do not count when gradients are clipped."""
    for one, stay in zip(groups, stays, strict=True):
        for parameter, mask in zip(one.parameters.values(), one.spread(stay), strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)
