"""What to learn from the teacher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Losses, projections and schedules register themselves when their modules are loaded.
from textbrewer import checks, losses, projections  # noqa: F401
from textbrewer.configurations.config import Config
from textbrewer.configurations.match import IntermediateMatch
from textbrewer.registry import KD_LOSS_MAP, TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER
from textbrewer.schedulers import cwsm_temperature_scheduler_builder, flsw_temperature_scheduler_builder


@dataclass(repr=False)
class DistillationConfig(Config):
    """What to learn from the teacher.

    The total loss is ``kd_loss_weight * KD + hard_label_weight * sum(losses) + sum(match.weight * match loss)``.

    Args:
        temperature: divides the logits of both sides in the KD loss; positive.
        temperature_scheduler: the temperature by row: ``"none"``, ``"constant"``, ``["flsw", beta, gamma]`` or
            ``["cwsm", beta]``, or another entry of ``TEMPERATURE_SCHEDULER``.
        hard_label_weight: factor of the sum of the adaptor's ``losses``.
        hard_label_weight_scheduler: a further factor over the training, ``"none"`` or a name of ``WEIGHT_SCHEDULER``.
        kd_loss_type: a name of ``KD_LOSS_MAP``.
        kd_loss_weight: factor of the KD loss on the logits.
        kd_loss_weight_scheduler: a further factor over the training, ``"none"`` or a name of ``WEIGHT_SCHEDULER``.
        probability_shift: swap the teacher's logit of the true label with its largest one, so that the teacher is
            never wrong; needs ``labels`` from the student's adaptor.
        intermediate_matches: features to match, a list of :class:`IntermediateMatch` or of dicts with its fields.
        is_caching_logits: run the teacher once over the data before the training and keep what the losses need of
            its outputs, with the batches, in main memory; batches keep their rows, only their order is shuffled.
        teacher_cache: folder of a :class:`~textbrewer.TeacherCache` with its default settings: the teacher's outputs
            are stored there and found again. ``None``: the teacher is run in every step.

    Raises:
        TypeError, ValueError, KeyError: if a value is of another type, unknown or out of range; the message names it.
    """

    temperature: float = 4
    temperature_scheduler: str | list[Any] | None = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: str | None = "none"
    kd_loss_type: str = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str | None = "none"
    probability_shift: bool = False
    intermediate_matches: list[Any] = field(default_factory=list)
    is_caching_logits: bool = False
    teacher_cache: str | None = None

    def __post_init__(self) -> None:
        checks.number(self.temperature, "temperature", above=0)
        checks.one_of(self.kd_loss_type, KD_LOSS_MAP, "kd_loss_type")
        for name in ("hard_label_weight", "kd_loss_weight"):
            checks.number(getattr(self, name), name, minimum=0)
            scheduler = f"{name}_scheduler"
            if getattr(self, scheduler) is None:
                setattr(self, scheduler, "none")
            if getattr(self, scheduler) != "none":
                checks.one_of(getattr(self, scheduler), WEIGHT_SCHEDULER, scheduler)
        if isinstance(self.temperature_scheduler, tuple):
            self.temperature_scheduler = list(self.temperature_scheduler)
        self.temperature_scheduler = self.temperature_scheduler or "none"
        self.make_temperature_scheduler()
        for name in ("probability_shift", "is_caching_logits"):
            checks.is_a(getattr(self, name), bool, name, "True or False")
        if self.teacher_cache is not None:
            checks.is_a(self.teacher_cache, (str, os.PathLike), "teacher_cache", "a folder")
            self.teacher_cache = os.fspath(self.teacher_cache)
        matches = self.intermediate_matches or []
        checks.is_a(matches, (list, tuple), "intermediate_matches", "a list of matches")
        self.intermediate_matches = [
            match if isinstance(match, IntermediateMatch) else IntermediateMatch.from_dict(match)
            for match in matches
            if match is not None
        ]

    def make_temperature_scheduler(self) -> Callable[..., Any] | None:
        """Return the scheduler's function, ``None`` for ``"none"``."""
        if self.temperature_scheduler == "none":
            return None
        spec = self.temperature_scheduler
        name = spec[0] if isinstance(spec, list) and spec else spec
        checks.one_of(name, TEMPERATURE_SCHEDULER, "temperature_scheduler")
        scheduler = TEMPERATURE_SCHEDULER.make(spec)  # type: ignore[arg-type]
        if not callable(scheduler):
            raise TypeError(f"temperature_scheduler {spec!r} must give a function, got {scheduler!r}")
        if scheduler in (flsw_temperature_scheduler_builder, cwsm_temperature_scheduler_builder):
            raise ValueError(f"temperature_scheduler {name!r} needs its parameters: write [{name!r}, beta, ...]")
        return scheduler  # type: ignore[no-any-return]
