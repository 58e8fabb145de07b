"""The training loop: windows of micro-batches, one optimiser step each, with checkpoints, resume and orderly stops."""

from __future__ import annotations

import math
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.configurations import TrainingConfig
from textbrewer.engine.interrupts import Interruption, caught
from textbrewer.engine.job import Job
from textbrewer.engine.runtime import Runtime
from textbrewer.engine.saving import Resumed, Saver
from textbrewer.engine.step_plan import StepPlan
from textbrewer.engine.taking_part import StepCallbacks
from textbrewer.engine.tracking import NonFiniteError, Tracker

# So many steps skipped in a row are no matter of the scale of fp16: it was halved each time.
MOST_SKIPPED = 50


def run(
    job: Job,
    config: TrainingConfig,
    runtime: Runtime,
    plan: StepPlan,
    resume_from: str | os.PathLike[str] | None = None,
) -> int:
    """Train, and return the number of optimiser steps done in all.

    Args:
        job: what to train.
        config: settings.
        runtime: the machine.
        plan: the run's length and checkpoints.
        resume_from: a checkpoint's folder, or ``"latest"``: the newest in the output folder, if there is one.

    Raises:
        ValueError: if the checkpoint cannot be resumed from, or the data ends too soon.
        NonFiniteError: if a loss or gradient is NaN or infinite (with fp16 scaling, gradients only skip a step).
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the step is finished and saved.
    """
    return _Loop(job, config, runtime, plan).run(resume_from)


class _Loop:
    def __init__(self, job: Job, config: TrainingConfig, runtime: Runtime, plan: StepPlan) -> None:
        self.job, self.config, self.runtime, self.plan = job, config, runtime, plan
        self.global_step = 0
        self.saved_step: int | None = None
        self.skipped = 0
        self.saver = Saver(Path(config.output_dir), config.save_total_limit, runtime, uuid.uuid4().hex)
        self.wants_norm = job.max_grad_norm > 0 or runtime.reads_are_free
        self.module: nn.Module = job.module
        self.optimizer: Any = job.optimizer
        self.parameters: list[nn.Parameter] = []
        self.not_held: list[nn.Parameter] = []
        self.step_callbacks = StepCallbacks(job.step_callbacks)
        self.tracker: Tracker

    def run(self, resume_from: str | os.PathLike[str] | None) -> int:
        resumed = self.saver.open(resume_from, self.job)
        self.module, self.optimizer = self.runtime.prepare(self.job.module, self.job.optimizer, self.job.teachers)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        self.not_held = [parameter for parameter in self.parameters if id(parameter) not in held]
        self._clear_gradients()
        with self.step_callbacks.taking_part(self.job, self.runtime, self.optimizer, self.plan.total_steps):
            self._train(resumed)
        return self.global_step

    def _train(self, resumed: Resumed | None) -> None:
        callback_due = False
        if resumed is not None:
            self.global_step = self.saved_step = resumed.global_step
            callback_due = self.saver.restore(self.optimizer, self.job)
        records = resumed.records if resumed else 0
        self.tracker = Tracker(
            self.config, self.runtime, self.plan.total_steps, self.global_step, records, self.job.settings
        )
        try:
            if resumed is not None:
                self.tracker.say(f"Resumed from {resumed.path} at step {self.global_step}")
            if callback_due:
                self._callback()
            with caught() as interruption:
                while not self._done():
                    self._window()
                    self._stop_if_asked(interruption)
                self.tracker.flush()
        finally:
            self.tracker.close()

    def _done(self) -> bool:
        if self.plan.num_epochs is not None:
            return self.job.source.epoch >= self.plan.num_epochs
        return self.global_step >= (self.plan.total_steps or 0)

    def _next(self) -> tuple[Any, bool] | None:
        """Return the next batch and whether it ends the pass; ``None`` when the pass ended before it."""
        source = self.job.source
        if self.plan.num_epochs is None:
            return source.next_forever(), False
        try:
            batch = source.next_in_pass()
        except StopIteration:
            return None
        if source.taken != source.size:
            return batch, False
        source.end_pass()
        return batch, True

    def _window(self) -> None:
        """Do one optimiser step, over as many micro-batches as the window has."""
        epoch, ended, synced = self.job.source.epoch, False, True
        batches: list[Any] = []
        if self.job.shares is None:
            while len(batches) < self.plan.accumulation and not ended:
                item = self._next()
                if item is None:
                    # Unforeseen: the last micro-batch did not know that it was the window's last.
                    ended, synced = True, False
                    break
                batch, ended = item
                if not batches:
                    self.step_callbacks.before_step(self.global_step)
                batches.append(batch)
                self._micro_batch(batch, ended or len(batches) == self.plan.accumulation, None)
        else:
            batches, ended = self._collect()
            if batches:
                self.step_callbacks.before_step(self.global_step)
            for number, (batch, share) in enumerate(zip(batches, self.job.shares(batches), strict=True)):
                self._micro_batch(batch, number + 1 == len(batches), share)
        if not batches:
            self._pass_ended_late(epoch)
            return
        self._update(batches, synced)
        if self.plan.checkpoint_due(self.global_step, epoch, ended, self._done()):
            self._checkpoint()

    def _collect(self) -> tuple[list[Any], bool]:
        """Return all batches of a window, and whether the pass ended with it."""
        batches: list[Any] = []
        while len(batches) < self.plan.accumulation:
            item = self._next()
            if item is None:
                return batches, True
            batches.append(item[0])
            if item[1]:
                return batches, True
        return batches, False

    def _pass_ended_late(self, epoch: int) -> None:
        """Write the checkpoint of a pass whose end showed only when no batch came (a loader without a length)."""
        if self.saved_step != self.global_step and self.plan.checkpoint_due(
            self.global_step, epoch, True, self._done()
        ):
            self._checkpoint()

    def _micro_batch(self, batch: Any, last: bool, share: Any) -> None:
        runtime = self.runtime
        with runtime.micro_batch(self.module, last):
            loss, logs = self.job.step(self.module, batch, self.plan.progress(self.global_step), share)
            self.tracker.record(self.global_step + 1, {"total_loss": loss, **logs, **self.step_callbacks.figures})
            if runtime.reads_are_free and runtime.scaler is None and not math.isfinite(loss.item()):
                self.tracker.flush()
            runtime.backward(loss if self.plan.accumulation == 1 else loss / self.plan.accumulation, self.optimizer)

    def _update(self, batches: list[Any], synced: bool) -> None:
        """Clip, check, and step optimiser and schedule."""
        if not synced:
            self.runtime.average_gradients(self.parameters)
        if len(batches) < self.plan.accumulation:
            factor = self.plan.accumulation / len(batches)
            torch._foreach_mul_([item.grad for item in self.parameters if item.grad is not None], factor)
        share = len(batches) / self.plan.accumulation
        self.step_callbacks.after_backward(self.global_step, self.parameters, share)
        if self.wants_norm:
            norm = self.runtime.gradient_norm(self.parameters, self.optimizer, self.job.max_grad_norm)
            if self.runtime.scaler is None and self.runtime.reads_are_free and not math.isfinite(norm.item()):
                self._blame(batches)
        updated = self.runtime.step(self.optimizer)
        self.global_step += 1
        self.skipped = 0 if updated else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            self._blame(batches)
        if not updated:
            warnings.warn(
                f"step {self.global_step}: gradients overflowed fp16; step skipped, scale lowered", stacklevel=2
            )
        elif self.job.scheduler is not None:
            self.job.scheduler.step()
        self.step_callbacks.after_step(self.global_step)
        self._clear_gradients()
        self.tracker.bar.update(1)
        if self.global_step % self.config.logging_steps == 0:
            self.tracker.flush({"lr": self.optimizer.param_groups[0]["lr"]})

    def _clear_gradients(self) -> None:
        """Forget all gradients; those that the optimiser does not hold would add up in the norm, step after step."""
        self.optimizer.zero_grad()
        for parameter in self.not_held:
            parameter.grad = None

    def _blame(self, batches: list[Any]) -> None:
        """Raise for a gradient that is not finite, naming the terms that gave it."""
        culprits: dict[str, None] = {}
        for batch in batches:
            _, logs = self.job.step(self.module, batch, self.plan.progress(self.global_step), None)
            for name, term in logs.items():
                if isinstance(term, Tensor) and term.requires_grad:
                    grads = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
                    if not all(bool(grad.isfinite().all()) for grad in grads if grad is not None):
                        culprits[name] = None
        terms = ", ".join(culprits) or "the total loss"
        raise NonFiniteError(
            f"step {self.global_step + 1}: the gradient of {terms} is not finite. The training stopped before the "
            "update; the last checkpoint is good. Check the batch, lower the learning rate, or clip with max_grad_norm"
        )

    def _checkpoint(self) -> None:
        """Save, then call back."""
        self._save(callback_due=self.job.callback is not None)
        if self.job.callback is not None:
            self._callback()

    def _save(self, callback_due: bool) -> None:
        """Save; a student with losses or weights that are not finite is never saved."""
        self.tracker.flush()
        if not self.runtime.reads_are_free:
            # Elsewhere every gradient was checked before it was used.
            norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters])
            if not math.isfinite(norm.item()):
                raise NonFiniteError(
                    f"step {self.global_step}: the student's weights are not finite, a gradient was not in one of the "
                    "last steps. The training stopped; the last checkpoint is good. Lower the learning rate, or clip "
                    "with max_grad_norm"
                )
        self.saver.save(self.global_step, self.tracker.records, self.job, self.plan, callback_due)
        self.saved_step = self.global_step

    def _callback(self) -> None:
        """Evaluate; random numbers that the callback draws are part of the run, and kept for a resume."""
        if self.job.callback is not None:
            found = self.job.callback(model=self.job.student, step=self.global_step)
            self.tracker.report(self.global_step, found)
            self.job.student.train()
        self.saver.callback_done(self.job.source)

    def _stop_if_asked(self, interruption: Interruption) -> None:
        """After a signal: save what is done, say so, and end."""
        alone = self.runtime.world == 1
        if not alone and self.global_step % self.config.logging_steps != 0:
            return
        if not self.runtime.any_rank(bool(interruption)):
            return
        if self.saved_step != self.global_step:
            self._save(callback_due=False)
        message = (
            f"Training interrupted at step {self.global_step} and saved; go on with resume_from='latest' "
            f"(output_dir {self.config.output_dir!r})"
        )
        self.tracker.say(message, urgent=True)
        interruption.stop(message)
