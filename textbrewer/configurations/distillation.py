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
from textbrewer.losses.transforms import LOGIT_TRANSFORMS
from textbrewer.registry import KD_LOSS_MAP, TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER, Registry, name_of


@dataclass(repr=False)
class DistillationConfig(Config):
    """What to learn from the teacher.

    The total loss is ``kd_loss_weight * KD + hard_label_weight * sum(losses) + sum(match.weight * match loss)``.

    Args:
        temperature: divides the logits of both sides in the KD loss; positive.
        temperature_scheduler: the temperature by row: ``"none"``, ``"constant"``, ``["flsw", beta, gamma]`` or
            ``["cwsm", beta]``, or another entry of ``TEMPERATURE_SCHEDULER``.
        hard_label_weight: factor of the sum of the adaptor's ``losses``; a first batch without them is warned of.
        hard_label_weight_scheduler: a further factor over the training: ``"none"``, a name of ``WEIGHT_SCHEDULER`` such
            as ``"linear_decay"``, or ``["warmup", fraction]``.
        kd_loss_type: a name of ``KD_LOSS_MAP``, or ``[name, {constant: value}]``.
        kd_loss_weight: factor of the KD loss on the logits.
        kd_loss_weight_scheduler: a further factor over the training, likewise.
        logit_transform: applied to both sides' logits before the KD loss: ``"none"`` or a name of
            ``LOGIT_TRANSFORMS`` such as ``"standardize"``.
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
    hard_label_weight_scheduler: str | list[Any] | None = "none"
    kd_loss_type: str | list[Any] = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str | list[Any] | None = "none"
    probability_shift: bool = False
    intermediate_matches: list[Any] = field(default_factory=list)
    is_caching_logits: bool = False
    teacher_cache: str | None = None
    logit_transform: str | None = "none"

    def __post_init__(self) -> None:
        checks.number(self.temperature, "temperature", above=0)
        self.kd_loss_type = list(self.kd_loss_type) if isinstance(self.kd_loss_type, tuple) else self.kd_loss_type
        checks.one_of(name_of(self.kd_loss_type), KD_LOSS_MAP, "kd_loss_type")
        KD_LOSS_MAP.bound(self.kd_loss_type)
        for name in ("hard_label_weight", "kd_loss_weight"):
            checks.number(getattr(self, name), name, minimum=0)
            self._check_weight_scheduler(f"{name}_scheduler")
        self.logit_transform = self.logit_transform or "none"
        if self.logit_transform != "none":
            checks.one_of(self.logit_transform, LOGIT_TRANSFORMS, "logit_transform")
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

    def _check_weight_scheduler(self, name: str) -> None:
        """Raise unless a weight scheduler is known and, where it needs constants, has them."""
        spec = getattr(self, name)
        spec = list(spec) if isinstance(spec, tuple) else spec or "none"
        setattr(self, name, spec)
        if spec == "none":
            return
        checks.one_of(name_of(spec), WEIGHT_SCHEDULER, name)
        if not callable(_made(WEIGHT_SCHEDULER, spec, name)):
            raise TypeError(f"{name} {spec!r} must give a function of the progress")

    def make_temperature_scheduler(self) -> Callable[..., Any] | None:
        """Return the scheduler's function, ``None`` for ``"none"``."""
        if self.temperature_scheduler == "none":
            return None
        spec = self.temperature_scheduler
        checks.one_of(name_of(spec), TEMPERATURE_SCHEDULER, "temperature_scheduler")
        scheduler = _made(TEMPERATURE_SCHEDULER, spec, "temperature_scheduler")
        if not callable(scheduler):
            raise TypeError(f"temperature_scheduler {spec!r} must give a function, got {scheduler!r}")
        return scheduler  # type: ignore[no-any-return]


def _made(registry: Registry, spec: Any, name: str) -> Any:
    """Return what a specification gives; an error says which setting it is of."""
    try:
        return registry.make(spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
