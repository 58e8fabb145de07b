"""What a run says while it works, to progress bar, tensorboard and trackers; the device is read once each time."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from textbrewer.configurations import TrainingConfig
from textbrewer.engine.runtime import Runtime

logger = logging.getLogger("textbrewer")


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message says in which step and which term."""


class Tracker:
    """Collects the losses of every micro-batch on the device and reads them all at once at each :meth:`flush`.

    Args:
        config: log folder, trackers, progress bar.
        runtime: the run's machine; only its first process writes.
        total_steps: for the bar; ``None`` if unknown.
        first_step: where the bar starts, after a resume.
        records: micro-batches logged before, after a resume: the next tensorboard step.
        settings: the run's settings, for trackers.
    """

    def __init__(
        self,
        config: TrainingConfig,
        runtime: Runtime,
        total_steps: int | None,
        first_step: int,
        records: int,
        settings: dict[str, Any],
    ) -> None:
        self.runtime, self.records = runtime, records
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._writer: Any = None
        if config.log_dir is not None and runtime.is_main:
            from tensorboardX import SummaryWriter

            # What a run logged after the checkpoint that it is resumed from is logged again, in a file of its own.
            again = {"purge_step": records, "filename_suffix": f".from-{records}"} if records else {}
            self._writer = SummaryWriter(log_dir=config.log_dir, **again)
        self._trackers = bool(config.log_with)
        if self._trackers:
            runtime.accelerator.init_trackers("textbrewer", config=settings)
        self.bar = progress_bar(config, runtime, total=total_steps, initial=first_step, unit="step")

    def record(self, step: int, logs: Mapping[str, Tensor | float]) -> None:
        """Keep a micro-batch's losses; nothing is read from the device.

        Args:
            step: the number of the optimiser step under way, from 1.
            logs: ``total_loss`` and the unweighted terms, scalars on the device.
        """
        self._pending.append((step, {name: self._detached(value) for name, value in logs.items()}))

    def _detached(self, value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(float(value), device=self.runtime.device)
        return value.detach()

    def flush(self, show: dict[str, float] | None = None) -> None:
        """Read what was kept, write it, and check that it is finite.

        Args:
            show: further figures for the bar, such as the learning rate.

        Raises:
            NonFiniteError: if a loss is NaN or infinite.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        device = self.runtime.device
        values = [value for _, logs in pending for value in logs.values()]
        if any(value.dim() or value.dtype != torch.float32 or value.device != device for value in values):
            values = [value.float().reshape(()).to(device) for value in values]
        numbers = iter(torch.stack(values).tolist())
        rows = [(step, {name: next(numbers) for name in logs}) for step, logs in pending]
        for _, row in rows:
            self._write(row)
        if self.runtime.scaler is None:
            # Under fp16 scaling a step that overflows is skipped, and the loop counts how often that happens.
            for step, row in rows:
                check_finite(step, row)
        shown = {name.removeprefix("unweighted_"): f"{value:.4g}" for name, value in rows[-1][1].items()}
        self.bar.set_postfix({**shown, **{name: f"{value:.3g}" for name, value in (show or {}).items()}}, refresh=False)

    def _write(self, row: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(f"scalar/{name}", value, self.records)
        if self._trackers:
            self.runtime.accelerator.log(row, step=self.records)
        self.records += 1

    def report(self, step: int, found: Any) -> None:
        """Write and say what a callback returned, if it is :class:`Figures`; anything else is left alone.

        Args:
            step: the optimiser steps done.
            found: what it returned.
        """
        if not isinstance(found, Figures) or not found:
            return
        if self._writer is not None:
            for name, value in found.items():
                self._writer.add_scalar(f"scalar/{name}", value, self.records)
        if self._trackers:
            self.runtime.accelerator.log(found, step=self.records)
        self.say(f"Step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def say(self, message: str, urgent: bool = False) -> None:
        """Log a line, and print it above the bar if there is one; an urgent one is seen without a bar too."""
        shown = not self.bar.disable
        logger.log(logging.WARNING if urgent and self.runtime.is_main and not shown else logging.INFO, message)
        if shown:
            self.bar.write(message)

    def close(self) -> None:
        """Finish bar and logs."""
        self.bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._trackers:
            self.runtime.accelerator.end_training()


class Figures(dict[str, float]):
    """What a callback found, by its name in the log."""


def progress_bar(config: TrainingConfig, runtime: Runtime, **options: Any) -> Any:
    """Return a tqdm bar, silent where the configuration wants none or another process shows it.

    Where a bar is wanted, tqdm decides (the variable ``TQDM_DISABLE`` turns it off).

    Args:
        config: whether to show bars.
        runtime: whether this is the process that does.
        **options: of tqdm.
    """
    silent = {} if config.progress_bar and runtime.is_main else {"disable": True}
    return tqdm(dynamic_ncols=True, **options, **silent)


def say(config: TrainingConfig, runtime: Runtime, message: str) -> None:
    """Log a line, and print it where a progress bar would be shown."""
    logger.info(message)
    if config.progress_bar and runtime.is_main:
        tqdm.write(message)


def check_finite(step: int, losses: dict[str, float]) -> None:
    """Raise if a loss is NaN or infinite.

    Args:
        step: the optimiser step, for the message.
        losses: ``total_loss`` and its terms.

    Raises:
        NonFiniteError: naming the step and the terms.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return
    terms = [name for name in bad if name != "total_loss"] or bad
    raise NonFiniteError(
        f"step {step}: {', '.join(terms)} is {losses[terms[0]]}. The training stopped; the last checkpoint is "
        "good. Check the batch (labels, masks), lower the learning rate, or clip with max_grad_norm"
    )
