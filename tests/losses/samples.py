"""Inputs of the loss tests, from a formula: the same in every version of torch, and so in the original too."""

import math

import torch


def wave(*shape: int, phase: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values between -2 and 2 without a pattern that a loss could miss."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(index * index * 0.37 + index + phase)).reshape(shape).to(dtype)


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
"""Rows of 3, 2 and 4 kept positions."""

SHAPE = (3, 4)
"""Batch and length of :data:`MASK`."""
