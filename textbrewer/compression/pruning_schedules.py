"""How much is pruned at each step of a training: at once, in a straight line, or fast first and slowly at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from textbrewer import checks

__all__ = ["SCHEDULES", "PruningSchedule", "pruning_due", "sparsity_at", "step_of"]

SCHEDULES = ("one_shot", "linear", "cubic")
"""All schedules by name."""


def sparsity_at(
    schedule: str, step: float, begin: float, end: float, initial: float, final: float, power: float = 3
) -> float:
    r"""Return the share that is pruned when so many steps are done.

    .. math::
        s(t) = s_f + (s_i - s_f) \Big( 1 - \frac{t - t_0}{t_1 - t_0} \Big)^{p}, \qquad t_0 \le t \le t_1

    with :math:`p = 1` for ``"linear"`` and ``power`` for ``"cubic"``; 0 before :math:`t_0`, exactly :math:`s_f` from
    :math:`t_1` on. ``"one_shot"`` is :math:`s_f` from :math:`t_0` on.

    Args:
        schedule: one of :data:`SCHEDULES`.
        step: :math:`t`, in the unit of ``begin`` and ``end``: steps, or the share of the run that is done.
        begin: :math:`t_0`.
        end: :math:`t_1`, at least ``begin``.
        initial: :math:`s_i`, what is pruned at ``begin``.
        final: :math:`s_f`.
        power: :math:`p` of ``"cubic"``; with other values it is what TF-MOT calls a polynomial decay.

    Raises:
        ValueError: if the schedule is unknown.

    Reference:
        Zhu and Gupta, "To Prune, or Not to Prune", 2017, arXiv:1710.01878, equation 1 (power 3).
    """
    checks.one_of(schedule, SCHEDULES, "schedule")
    if step < begin:
        return 0.0
    if schedule == "one_shot" or step >= end:
        return final
    left = 1 - (step - begin) / (end - begin)
    return final + (initial - final) * math.pow(left, 1 if schedule == "linear" else power)


def pruning_due(step: int, begin: int, end: int, every: int) -> bool:
    """Return whether masks are made anew after a step: each ``every`` steps from ``begin`` to ``end``, and at ``end``.

    Args:
        step: how many are done.
        begin: the first step that counts.
        end: the last one.
        every: steps between two prunings.
    """
    return step == end or (begin <= step < end and (step - begin) % every == 0)


def step_of(moment: float, total_steps: int | None, name: str) -> int:
    """Return a moment of a run as a number of steps.

    Args:
        moment: a whole number (``int``) of steps, or a share of the run (``float`` from 0 to 1), rounded to a step.
        total_steps: of the run, ``None`` if unknown.
        name: what it is, for the message.

    Raises:
        ValueError: if a share is not from 0 to 1, the run's length is needed and not known, or the moment lies after
            the end of the run.
    """
    if isinstance(moment, float):
        checks.number(moment, name, minimum=0, maximum=1)
        if moment == 0:
            return 0
        if total_steps is None:
            raise ValueError(
                f"{name} must be a number of steps (an int) where the dataloader has no length, got share {moment}; "
                "or train with num_steps"
            )
        return round(moment * total_steps)
    if total_steps is not None and moment > total_steps:
        raise ValueError(f"{name} must be at most the {total_steps} steps of the run, got {moment}")
    return moment


@dataclass(frozen=True)
class PruningSchedule:
    """A schedule with its moments, checked.

    Args:
        name: one of :data:`SCHEDULES`.
        begin: when something goes first: an ``int`` counts optimiser steps, a ``float`` is a share of the run.
        end: when all has gone; the rest of the run trains what is left. ``"one_shot"`` does not look at it.
        every: optimiser steps between two prunings.
        initial: the share that goes at ``begin``.
        power: of ``"cubic"``.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.
    """

    name: str = "cubic"
    begin: float = 0.0
    end: float = 0.6
    every: int = 20
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        checks.is_a(self.name, str, "schedule", "a name")
        checks.one_of(self.name, SCHEDULES, "schedule")
        for moment, name in ((self.begin, "begin"), (self.end, "end")):
            checks.number(moment, name, minimum=0)
            if isinstance(moment, float) and moment > 1:
                raise ValueError(
                    f"{name} must be a share of the run from 0.0 to 1.0, or an int for a number of steps, got {moment}"
                )
        if type(self.begin) is type(self.end) and self.begin > self.end and self.name != "one_shot":
            raise ValueError(f"end must be at least begin={self.begin}, got {self.end}")
        checks.is_a(self.every, int, "every", "a whole number of steps")
        checks.integer(self.every, "every", minimum=1)
        checks.number(self.initial, "initial", minimum=0, below=1)
        checks.number(self.power, "power", above=0)
        for value, usual, name in ((self.initial, 0, "initial"), (self.power, 3, "power")):
            if value != usual and (self.name == "one_shot" or (name == "power" and self.name != "cubic")):
                raise ValueError(f"{name} must be left at {usual} for schedule={self.name!r}, got {value}")

    def steps(self, total_steps: int | None) -> tuple[int, int]:
        """Return ``begin`` and ``end`` in steps of a run; with ``"one_shot"`` both are ``begin``.

        Args:
            total_steps: of the run, ``None`` if unknown.

        Raises:
            ValueError: if they do not fit the run.
        """
        begin = step_of(self.begin, total_steps, "begin")
        if self.name == "one_shot":
            return begin, begin
        end = step_of(self.end, total_steps, "end")
        if end < begin:
            raise ValueError(f"end must be at least begin, got {self.end} and {self.begin}: steps {end} and {begin}")
        return begin, end
