"""What may take part in every optimiser step of a run: pruning while training, for instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepCallback", "TrainingRun"]


@dataclass(frozen=True)
class TrainingRun:
    """What a callback is told of the run that it takes part in.

    Args:
        student: the model that is trained, on its device.
        optimizer: over its parameters.
        total_steps: optimiser steps of the whole run; ``None`` if the dataloader has no length.
        average: averages tensors over the run's processes, in place; nothing where there is one.
        loss_scale: by how much the loss of a step is scaled: 1, but for fp16 and a step that the end of an epoch cuts
            short. Gradients of the optimiser's parameters are unscaled when :meth:`StepCallback.after_backward` sees
            them; those of other tensors are not.
    """

    student: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int | None
    average: Callable[[Sequence[Tensor]], None]
    loss_scale: Callable[[], float]


class StepCallback:
    """Base class of what takes part in every optimiser step; each method does nothing until it is overridden.

    It is passed to ``train(..., step_callbacks=[...])`` of any distiller. The methods run on every process, and must do
    the same on all of them. Its state is kept in the run's checkpoints.
    """

    def begin(self, run: TrainingRun) -> None:
        """Start: the model is ready, no step is done; before :meth:`load_state_dict` where a run is resumed.

        Raises:
            ValueError: if the callback cannot serve the run.
        """

    def before_step(self, step: int) -> None:
        """Be called before the forward passes of an optimiser step.

        Args:
            step: how many are done.
        """

    def after_backward(self, step: int) -> None:
        """Be called when all gradients of a step are there, averaged over the processes and not clipped yet.

        It is left out in steps of fp16 whose gradients overflowed, which are skipped.

        Args:
            step: how many are done, without this one.
        """

    def after_step(self, step: int) -> Mapping[str, Tensor | float] | None:
        """Be called after the optimiser's step.

        Args:
            step: how many are done, with this one.

        Returns:
            Scalars for the log, or ``None``.
        """
        return None

    def end(self) -> None:
        """Be called when the run ends, after an error too."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept for a resume: tensors, numbers, texts, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another callback's settings.
        """
