"""The optimiser and the schedule of learning rates that recipes are run with unless told otherwise."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["WarmUpAndDecay", "make_optimizer"]

_WARM_UP = 0.1


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay 0.01 on matrices and none on biases and norms.

    Args:
        model: whose parameters are trained, those that require a gradient.
        learning_rate: the rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in parameters if item.dim() > 1], "weight_decay": 0.01},
        {"params": [item for item in parameters if item.dim() < 2], "weight_decay": 0.0},
    ]
    # One pass over the parameters instead of one for each operation, where torch has that.
    fused = all(item.device.type in ("cpu", "cuda") and item.is_floating_point() for item in parameters)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=fused)


class WarmUpAndDecay:
    """The learning rate's factor: up over the first tenth of the steps, then down to zero."""

    def __init__(self, steps: int) -> None:
        self.steps, self.warm_up = steps, max(1, int(_WARM_UP * steps))

    def __call__(self, step: int) -> float:
        """Return the factor of a step, counted from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warm_up))
