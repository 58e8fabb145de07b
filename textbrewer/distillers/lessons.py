"""What a distiller learns in each task: the configuration, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.distillers.knowledge import KnowledgeLoss, make_knowledge
from textbrewer.matching import PlannedMatch, build_projection, plan_matches, width_of_model


@dataclass(frozen=True)
class Lesson:
    """What is learnt in one task.

    Args:
        config: what to learn.
        plan: its matches; their numbers are those of this task only, or of all tasks with the same configuration.
        knowledge: how logits are compared.
    """

    config: DistillationConfig
    plan: list[PlannedMatch]
    knowledge: KnowledgeLoss

    @property
    def first_number(self) -> int:
        """The least number of its matches."""
        return min((planned.number for planned in self.plan), default=0)

    def anew(self) -> Lesson:
        """Return the same for another run, with a temperature schedule at its start."""
        return dataclasses.replace(self, knowledge=make_knowledge(self.config))


def make_lessons(given: Any, tasks: Iterable[str]) -> dict[str, Lesson]:
    """Return what is learnt in each task.

    Args:
        given: one configuration for all tasks, or ``{task: configuration}``.
        tasks: the tasks; ``[""]`` where there are none.

    Raises:
        TypeError: if it is neither.
        KeyError: if its tasks are others.
        ValueError: if the tasks' configurations differ where one run can have only one setting.
    """
    tasks = list(tasks)
    if not isinstance(given, Mapping) or tasks == [""]:
        checks.is_a(given, DistillationConfig, "distill_config", "a DistillationConfig")
        lesson = _lesson(given, 0)
        return dict.fromkeys(tasks, lesson)
    if set(given) != set(tasks):
        raise KeyError(f"distill_config must have the tasks of model_T, {sorted(tasks)}, got {sorted(given)}")
    lessons: dict[str, Lesson] = {}
    count = 0
    for task in tasks:
        checks.is_a(given[task], DistillationConfig, f"distill_config[{task!r}]", "a DistillationConfig")
        lessons[task] = _lesson(given[task], count)
        count += len(lessons[task].plan)
    for name in ("is_caching_logits", "teacher_cache"):
        values = [getattr(lesson.config, name) for lesson in lessons.values()]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same in the distill_config of every task, got {values}")
    return lessons


def _lesson(config: DistillationConfig, first_number: int) -> Lesson:
    # A copy, checked again: what the caller changes afterwards does not reach a distiller half way.
    config = dataclasses.replace(config)
    plan = [
        dataclasses.replace(planned, number=planned.number + first_number)
        for planned in plan_matches(config.intermediate_matches)
    ]
    return Lesson(config, plan, make_knowledge(config))


def configured_widths(
    lessons: Mapping[str, Lesson], models_T: Mapping[str, Sequence[nn.Module | None]], model_S: nn.Module
) -> dict[int, tuple[int | None, int | None]]:
    """Return the widths that the models' configurations tell for each match, student's and teacher's, by its number.

    Raises:
        ValueError: if a match names a teacher that is not there.
    """
    widths: dict[int, tuple[int | None, int | None]] = {}
    for task, lesson in lessons.items():
        for planned in lesson.plan:
            if planned.number in widths:
                continue
            teachers, match = models_T[task], planned.match
            if match.teacher >= len(teachers):
                raise ValueError(
                    f"teacher of match {planned.name!r} must be less than the number of teachers, {len(teachers)}, "
                    f"got {match.teacher}"
                )
            teacher = teachers[match.teacher]
            width_T = None if teacher is None else width_of_model(teacher, match.feature)
            widths[planned.number] = (width_of_model(model_S, match.feature), width_T)
    return widths


def build_projections(
    plan: Sequence[PlannedMatch], widths: Mapping[int, tuple[int | None, int | None]]
) -> dict[int, nn.Module]:
    """Return the projections of matches whose widths are known, by the number of the match.

    Args:
        plan: the matches.
        widths: student's and teacher's, by the number of the match.
    """
    built: dict[int, nn.Module] = {}
    for planned in plan:
        projection = planned.match.projection
        if projection is not None and planned.number in widths:
            module = build_projection(projection, *widths[planned.number])
            if module is not None:
                built[planned.number] = module
    return built
