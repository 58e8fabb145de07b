"""The only training loop of the library; it knows batches, losses and checkpoints, and nothing of distillation."""

from textbrewer.engine.batches import LoaderBatches, Source, TaskBatches
from textbrewer.engine.checkpoint import checkpoints_in, find_checkpoint
from textbrewer.engine.job import Job, Step
from textbrewer.engine.loaders import first_batch, generators_of, size_of
from textbrewer.engine.loop import run
from textbrewer.engine.precision import warn_of_emulation
from textbrewer.engine.prefetch import PreparedBatches
from textbrewer.engine.rng import kept as rng_kept
from textbrewer.engine.runtime import Runtime
from textbrewer.engine.sharding import shard
from textbrewer.engine.step_plan import StepPlan, plan_steps
from textbrewer.engine.tracking import Figures, NonFiniteError, progress_bar, say

__all__ = [
    "Figures",
    "Job",
    "LoaderBatches",
    "NonFiniteError",
    "PreparedBatches",
    "Runtime",
    "Source",
    "Step",
    "StepPlan",
    "TaskBatches",
    "checkpoints_in",
    "find_checkpoint",
    "first_batch",
    "generators_of",
    "plan_steps",
    "progress_bar",
    "rng_kept",
    "run",
    "say",
    "shard",
    "size_of",
    "warn_of_emulation",
]
