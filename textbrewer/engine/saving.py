"""What a run puts into its checkpoints and takes out of them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from textbrewer import checks
from textbrewer.engine import checkpoint, rng
from textbrewer.engine.batches import Source
from textbrewer.engine.runtime import Runtime
from textbrewer.engine.step_plan import StepPlan

if TYPE_CHECKING:
    from textbrewer.engine.loop import Job

logger = logging.getLogger("textbrewer")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run goes on from."""

    path: Path
    state: dict[str, Any]

    @property
    def global_step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["global_step"])

    @property
    def records(self) -> int:
        """Micro-batches logged."""
        return int(self.state["records"])


class Saver:
    """Saves and restores one run, on all of its processes together.

    Args:
        folder: the output folder.
        keep: how many resume checkpoints to keep.
        runtime: the machine.
        run_id: names the run.
    """

    def __init__(self, folder: Path, keep: int | None, runtime: Runtime, run_id: str) -> None:
        self.folder, self.runtime = folder, runtime
        self.writer = checkpoint.Writer(folder, keep, run_id)
        self.current: Path | None = None

    def open(self, resume_from: str | os.PathLike[str] | None, module: nn.Module) -> Resumed | None:
        """Find and check the checkpoint to resume from, and load student and projections from it.

        Raises:
            ValueError: if it is missing, damaged, or of another run's shape.
        """
        if self.runtime.is_main:
            checkpoint.tidy(self.folder)
        self.runtime.wait()
        path = None if resume_from is None else checkpoint.find_checkpoint(resume_from, self.folder)
        if path is None:
            if resume_from is not None:
                logger.info("resume_from='latest': no checkpoint in %s yet, starting anew", self.folder)
            elif any(self.folder.glob("checkpoint-*")):
                checks.warn(
                    f"output_dir {str(self.folder)!r} has checkpoints of an earlier run; those with the same step "
                    "number will be replaced. To go on from them, use train(..., resume_from='latest')"
                )
            return None
        state = checkpoint.read_state(path)
        if state["world"] != self.runtime.world:
            raise ValueError(
                f"the checkpoint {str(path)!r} was written by {state['world']} processes and must be resumed with as "
                f"many, got {self.runtime.world}"
            )
        checkpoint.read_model(path, module)
        self.writer.run_id = state["run_id"]
        self.current = path
        return Resumed(path, state)

    def restore(self, resumed: Resumed, optimizer: Any, scheduler: Any, source: Source) -> bool:
        """Restore optimiser, schedule, scaler, place in the data and random numbers, in this order.

        Returns:
            Whether the checkpoint's callback was still to be called.

        Raises:
            ValueError: if the optimiser has other parameter groups, or a file is damaged.
        """
        training = checkpoint.read_tensors(resumed.path, checkpoint.TRAINING_FILE)
        written, own_class = training["optimizer_class"], _class_name(optimizer)
        if written != own_class:
            raise ValueError(
                f"the checkpoint {str(resumed.path)!r} is of another optimizer: {written}, not {own_class}"
            )
        try:
            optimizer.load_state_dict(training["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {str(resumed.path)!r} is of another optimizer (other parameter groups): {error}"
            ) from error
        if (scheduler is None) != (training["scheduler"] is None):
            has = "has no" if training["scheduler"] is None else "has a"
            raise ValueError(f"the checkpoint {str(resumed.path)!r} {has} learning-rate schedule; resume with the same")
        if scheduler is not None:
            scheduler.load_state_dict(training["scheduler"])
        if self.runtime.scaler is not None and training["scaler"] is not None:
            self.runtime.scaler.load_state_dict(training["scaler"])
        after = checkpoint.after_callback_file(self.runtime.rank)
        # If the end came while some of the processes had done the callback, all of them do it again.
        done = not self.runtime.any_rank(not (resumed.path / after).exists())
        own = checkpoint.read_tensors(resumed.path, after if done else checkpoint.rank_file(self.runtime.rank))
        source.load_state_dict(own["place"])
        rng.put(own["rng"])
        return bool(own["callback_due"])

    def save(self, step: int, records: int, job: Job, plan: StepPlan, callback_due: bool) -> None:
        """Write ``gs{step}.pkl`` and ``checkpoint-{step}/``."""
        logger.info("Saving at global step %d", step)
        if self.runtime.is_main:
            checkpoint.save_atomically(checkpoint.plain_state(job.student), self.folder / f"gs{step}.pkl")
            self.writer.begin(step)
        self.runtime.wait()
        content = {"rng": rng.take(), "place": job.source.state_dict(), "callback_due": callback_due}
        checkpoint.save_atomically(content, self.writer.temporary(step) / checkpoint.rank_file(self.runtime.rank))
        self.runtime.wait()
        if self.runtime.is_main:
            scaler = self.runtime.scaler
            training = {
                "optimizer": job.optimizer.state_dict(),
                "optimizer_class": _class_name(job.optimizer),
                "scheduler": None if job.scheduler is None else job.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            state = {
                "global_step": step,
                "records": records,
                "world": self.runtime.world,
                "accumulation": plan.accumulation,
                "total_steps": plan.total_steps,
                "precision": self.runtime.precision,
            }
            self.writer.finish(step, job.module, training, state)
        self.current = self.folder / f"checkpoint-{step}"
        self.runtime.wait()

    def callback_done(self, source: Source) -> None:
        """Note in the last checkpoint that the callback was called, and the random numbers as it left them."""
        if self.current is not None:
            content = {"rng": rng.take(), "place": source.state_dict(), "callback_due": False}
            checkpoint.save_atomically(content, self.current / checkpoint.after_callback_file(self.runtime.rank))


def _class_name(optimizer: Any) -> str:
    """Return the name of the class of an optimiser, or of the one inside accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__
