"""The callbacks that take part in every optimiser step, called at their times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.engine.job import Job
from textbrewer.engine.runtime import Runtime


class StepCallbacks:
    """Those of one run.

    Args:
        callbacks: in the order in which they are called.
    """

    def __init__(self, callbacks: Sequence[StepCallback]) -> None:
        self.callbacks = list(callbacks)
        self.figures: dict[str, Tensor | float] = {}
        """What they last gave for the log."""
        self._runtime: Runtime | None = None
        self._share = 1.0  # of a step's micro-batches, in one that an epoch's end cuts short
        self._optimizer: Any = None

    @contextmanager
    def taking_part(self, job: Job, runtime: Runtime, optimizer: Any, total_steps: int | None) -> Iterator[None]:
        """Begin them, and end those that have begun when the context closes.

        Args:
            job: what is trained, on its device.
            runtime: the machine.
            optimizer: the job's, as the runtime prepared it.
            total_steps: of the run, if known.

        Raises:
            ValueError: if they cannot work with the run's precision.
        """
        if self.callbacks and runtime.precision == "apex":
            raise ValueError(
                "step_callbacks need gradients in float32, which precision='apex' keeps to itself; use 'fp16' or 'bf16'"
            )
        self._runtime, self._optimizer = runtime, optimizer
        scale = (lambda: 1.0) if runtime.scaler is None else runtime.scaler.get_scale
        run = TrainingRun(job.student, job.optimizer, total_steps, runtime.average, lambda: scale() * self._share)
        with ExitStack() as begun:
            for callback in self.callbacks:
                begun.callback(callback.end)
                callback.begin(run)
            yield

    def before_step(self, step: int) -> None:
        """Call them before the first forward pass of a step."""
        for callback in self.callbacks:
            callback.before_step(step)

    def after_backward(self, step: int, parameters: Sequence[nn.Parameter], share: float = 1.0) -> None:
        """Call them with all gradients there; with fp16 these are unscaled now, and looked at.

        Args:
            step: how many are done, without this one.
            parameters: that have the gradients.
            share: of the micro-batches of a whole step, how many this one had.
        """
        self._share = share
        if not self.callbacks or self._runtime is None:
            return
        if self._runtime.scaler is not None:
            self._runtime.unscale(self._optimizer)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if not math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
                return
        for callback in self.callbacks:
            callback.after_backward(step)

    def after_step(self, step: int) -> None:
        """Call them after the optimiser's step, and keep their figures for the log."""
        for callback in self.callbacks:
            self.figures.update(callback.after_step(step) or {})
