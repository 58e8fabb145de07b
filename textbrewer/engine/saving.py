"""What a run puts into its checkpoints and takes out of them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textbrewer import checks
from textbrewer.engine import checkpoint, fitting, rng
from textbrewer.engine.batches import Source
from textbrewer.engine.runtime import Runtime
from textbrewer.engine.step_plan import StepPlan

if TYPE_CHECKING:
    from textbrewer.engine.job import Job

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
        # What open() reads for restore(): optimiser, schedule and scaler; this process's random numbers and place.
        self._read: tuple[dict[str, Any], dict[str, Any]] | None = None

    def open(self, resume_from: str | os.PathLike[str] | None, job: Job) -> Resumed | None:
        """Find the checkpoint to resume from, read and check all of it, and then load student and projections.

        Raises:
            ValueError: if it is missing, damaged, or of another run's shape.
        """
        main_folder = self.runtime.share(str(self.folder.resolve()))
        if str(self.folder.resolve()) != main_folder:
            raise ValueError(
                f"output_dir must be the same on every process, got {str(self.folder)!r} on rank "
                f"{self.runtime.rank} and {main_folder!r} on rank 0"
            )
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
        fitting.check_model(path, job.module)
        fitting.check_layers(path, state, job.module)
        training = checkpoint.read_tensors(path, checkpoint.TRAINING_FILE)
        fitting.check_training(path, training, job)
        after = checkpoint.after_callback_file(self.runtime.rank)
        # If the end came while some of the processes had done the callback, all of them do it again.
        done = not self.runtime.any_rank(not (path / after).exists())
        own = checkpoint.read_tensors(path, after if done else checkpoint.rank_file(self.runtime.rank))
        checkpoint.read_model(path, job.module)
        self.writer.run_id = state["run_id"]
        self.current = path
        self._read = training, own
        return Resumed(path, state)

    def restore(self, optimizer: Any, job: Job) -> bool:
        """Restore optimiser, schedule, scaler, step callbacks, place in the data and random numbers, in this order.

        Args:
            optimizer: the job's, as the runtime prepared it.
            job: what is trained.

        Returns:
            Whether the checkpoint's callback was still to be called.

        Raises:
            RuntimeError: if no checkpoint was opened.
        """
        if self._read is None:
            raise RuntimeError("restore() needs a checkpoint, opened before")
        (training, own), self._read = self._read, None
        optimizer.load_state_dict(training["optimizer"])
        if job.scheduler is not None:
            job.scheduler.load_state_dict(training["scheduler"])
        if self.runtime.scaler is not None and training["scaler"] is not None:
            self.runtime.scaler.load_state_dict(training["scaler"])
        for callback, state in zip(job.step_callbacks, training.get(fitting.STEP_CALLBACKS, []), strict=True):
            callback.load_state_dict(state["state"])
        job.source.load_state_dict(own["place"])
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
                "optimizer_class": fitting.class_name(job.optimizer),
                "scheduler": None if job.scheduler is None else job.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                fitting.STEP_CALLBACKS: [
                    {"class": fitting.class_name(callback), "state": callback.state_dict()}
                    for callback in job.step_callbacks
                ],
            }
            state = {
                "global_step": step,
                "records": records,
                "world": self.runtime.world,
                "accumulation": plan.accumulation,
                "total_steps": plan.total_steps,
                "precision": self.runtime.precision,
                fitting.LAYERS: fitting.layer_classes(job.module),
            }
            self.writer.finish(step, job.module, training, state)
        self.current = self.folder / f"checkpoint-{step}"
        self.runtime.wait()

    def callback_done(self, source: Source) -> None:
        """Note in the last checkpoint that the callback was called, and the random numbers as it left them."""
        if self.current is not None:
            content = {"rng": rng.take(), "place": source.state_dict(), "callback_due": False}
            checkpoint.save_atomically(content, self.current / checkpoint.after_callback_file(self.runtime.rank))
