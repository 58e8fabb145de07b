"""The arithmetic of a run: how many optimiser steps, and after which of them a checkpoint is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textbrewer import checks
from textbrewer.configurations import TrainingConfig


@dataclass(frozen=True)
class StepPlan:
    """How long a run is and where its checkpoints lie.

    Args:
        accumulation: micro-batches a step.
        num_epochs: passes over the data, ``None`` when steps count.
        total_steps: optimiser steps in all; ``None`` if the loader has no length and epochs count.
        steps_per_epoch: optimiser steps a pass, ``None`` if unknown or when steps count.
        in_epoch: with epochs: steps within an epoch (0: its end) after which a checkpoint is due.
        epoch_frequency: with epochs: every how many epochs.
        every_steps: with steps: every how many steps, ``None``: at the end only.
    """

    accumulation: int
    num_epochs: int | None
    total_steps: int | None
    steps_per_epoch: int | None
    in_epoch: frozenset[int]
    epoch_frequency: int
    every_steps: int | None

    def progress(self, global_step: int) -> float:
        """Return how much of the run is done before the next step, 0 to 1 (0 if its length is unknown)."""
        return global_step / self.total_steps if self.total_steps else 0.0

    def checkpoint_due(self, global_step: int, epoch: int, epoch_ended: bool, ended: bool) -> bool:
        """Return whether a checkpoint belongs after this step.

        Args:
            global_step: optimiser steps done, this one included.
            epoch: passes completed before the current one.
            epoch_ended: whether this step ended a pass (known for every loader, also those without a length).
            ended: whether this step ended the run.
        """
        if ended:
            return True
        if self.num_epochs is None:
            return self.every_steps is not None and global_step % self.every_steps == 0
        wanted_epoch = (epoch + 1) % self.epoch_frequency == 0 or epoch + 1 == self.num_epochs
        if not wanted_epoch:
            return False
        if self.steps_per_epoch is None:
            return epoch_ended
        return global_step % self.steps_per_epoch in self.in_epoch


def plan_steps(
    config: TrainingConfig, num_epochs: int | None, num_steps: int | None, sizes: Sequence[int | None]
) -> StepPlan:
    """Return the plan of a run.

    Steps an epoch are ``len(dataloader) / gradient_accumulation_steps`` rounded up; with ``ckpt_frequency`` f,
    checkpoints lie after the steps ``int(steps * i / f)`` of an epoch, i = 1..f.

    Args:
        config: accumulation and checkpoint settings.
        num_epochs: passes over the data.
        num_steps: optimiser steps; counts before ``num_epochs``.
        sizes: batches a pass, of each loader; ``None`` where unknown.

    Raises:
        ValueError: if neither is given, one is not a whole number of at least 1, or a loader is empty.
    """
    if any(size == 0 for size in sizes):
        raise ValueError("dataloader must yield at least one batch, its length is 0 (dataset empty, or drop_last?)")
    accumulation = config.gradient_accumulation_steps
    if num_steps is not None:
        checks.integer(num_steps, "num_steps", minimum=1)
        if num_epochs is not None:
            checks.warn(f"num_steps={num_steps} and num_epochs={num_epochs} are both given: num_steps counts")
        return StepPlan(accumulation, None, int(num_steps), None, frozenset(), 1, config.ckpt_steps)
    if num_epochs is None:
        raise ValueError("num_epochs or num_steps must be given to train()")
    checks.integer(num_epochs, "num_epochs", minimum=1)
    epochs, size = int(num_epochs), sizes[0]
    if size is None:
        if config.ckpt_frequency > 1:
            raise ValueError(
                f"ckpt_frequency={config.ckpt_frequency} needs a dataloader with a length; "
                "use num_steps with ckpt_steps, or ckpt_frequency=1"
            )
        return StepPlan(accumulation, epochs, None, None, frozenset({0}), config.ckpt_epoch_frequency, None)
    steps = math.ceil(size / accumulation)
    in_epoch = frozenset(int(steps * part / config.ckpt_frequency) for part in range(config.ckpt_frequency))
    return StepPlan(accumulation, epochs, steps * epochs, steps, in_epoch, config.ckpt_epoch_frequency, None)
