"""Inputs of the loss tests, from a formula: the same in every version of torch, and so in the original too."""

import math

import torch

from textbrewer.losses.widths import width_rule_of
from textbrewer.registry import MATCH_LOSS_MAP

PAIRS = ("fsp", "gram", "nst", "mmd")
"""Losses on two layers a side."""


def wave(*shape: int, phase: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values between -2 and 2 without a pattern that a loss could miss."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(index * index * 0.37 + index + phase)).reshape(shape).to(dtype)


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
"""Rows of 3, 2 and 4 kept positions."""


def feature_of(loss: str) -> str:
    """The feature that a match loss is for, by its name."""
    features = {"attention": "attention", "scores": "scores", "relation": "value"}
    return next((feature for start, feature in features.items() if loss.startswith(start)), "hidden")


def projection_of(loss: str) -> str | None:
    """The projection that a match with this loss needs, if any."""
    if feature_of(loss) != "hidden":
        return None
    return {"same": "linear", "any": None, "twice": "gaussian"}[width_rule_of(MATCH_LOSS_MAP[loss])]


SHAPE = (3, 4)
"""Batch and length of :data:`MASK`."""
