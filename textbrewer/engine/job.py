"""What a run is given: the module, its optimiser, the batches, and how a batch becomes a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.callbacks import StepCallback
from textbrewer.engine.batches import Source

Logs = dict[str, Tensor]
Step = Callable[[nn.Module, Any, float, Any], tuple[Tensor, Logs]]


@dataclass
class Job:
    """What to train, on what, and how a batch becomes a loss.

    Args:
        module: what is trained and checkpointed, the student with its projections.
        student: the part of it that ``gs{step}.pkl`` holds and the callback gets.
        optimizer: over the module's parameters.
        source: the batches.
        step: ``step(module, batch, progress, share) -> (loss, logs)``: one forward pass. ``progress`` runs from 0 to
            1; ``share`` is this batch's entry of ``shares``, or ``None``.
        scheduler: learning-rate schedule, stepped after each optimiser step.
        teachers: further models, for precisions that must know them.
        max_grad_norm: gradients are clipped to this norm over the whole module; not positive: not clipped.
        callback: ``callback(model=student, step=global_step)`` after each checkpoint.
        shares: for a window's batches, how much each counts for each kind of average; ``None``: all alike.
        settings: for trackers.
        step_callbacks: take part in every optimiser step; their state is checkpointed.
    """

    module: nn.Module
    student: nn.Module
    optimizer: torch.optim.Optimizer
    source: Source
    step: Step
    scheduler: Any = None
    teachers: Sequence[nn.Module] = ()
    max_grad_norm: float = -1.0
    callback: Callable[..., Any] | None = None
    shares: Callable[[list[Any]], Sequence[Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step_callbacks: Sequence[StepCallback] = ()
