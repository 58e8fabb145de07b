"""What all pruning while training shares: when it is its turn, and how much is to be gone then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.compression.pruning_schedules import PruningSchedule, pruning_due, sparsity_at
from textbrewer.compression.trained.targets import check_settings

__all__ = ["OnSchedule"]


class OnSchedule(StepCallback):
    """Prunes at the steps of a schedule; what goes is for subclasses to say.

    Args:
        schedule: when, and how much.
        settings: plain values that a run must share with the one whose checkpoint it goes on from.
        needs_gradients: whether something can go only after a step.
    """

    def __init__(self, schedule: PruningSchedule, settings: dict[str, Any], needs_gradients: bool) -> None:
        self._schedule, self._needs_gradients = schedule, needs_gradients
        self._settings = {**settings, "schedule": {name: getattr(schedule, name) for name in vars(schedule)}}
        self._begin = self._end = 0
        self._last = -1

    def begin(self, run: TrainingRun) -> None:
        """Find the schedule's steps.

        Raises:
            ValueError: if they do not fit the run, or gradients are needed before there are any.
        """
        self._last = -1
        self._begin, self._end = self._schedule.steps(run.total_steps)
        if self._needs_gradients and self._begin == 0 and self.share(0, 1.0) > 0:
            raise ValueError(
                'begin must be at least 1 step for score="taylor" where something goes at once, as there are no '
                "gradients before; begin later, or take a score by weights"
            )

    def share(self, step: int, final: float) -> float:
        """Return the share that is to be gone after a step, of what ends at ``final``."""
        plan = self._schedule
        return sparsity_at(plan.name, step, self._begin, self._end, plan.initial, final, plan.power)

    def before_step(self, step: int) -> None:
        """Prune before the first step, if it is due then."""
        if step == 0:
            self.prune_if_due(0)

    def prune_if_due(self, step: int) -> None:
        """Prune if it is time; where a resumed run is shorter and its end has passed, at once."""
        passed = step > self._end > self._last
        if passed or pruning_due(step, self._begin, self._end, self._schedule.every):
            self.prune(step)
            self._last = step

    @abstractmethod
    def prune(self, step: int) -> None:
        """Let go what is to be gone when so many steps are done."""

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, and the step at which something went last."""
        return {"settings": self._settings, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where another run stopped.

        Raises:
            ValueError: if its settings were others.
        """
        check_settings(self._settings, state["settings"], type(self).__name__)
        self._last = int(state["last"])
