"""The training of a recipe's stages, one after the other, each by the distiller that it needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from textbrewer import engine
from textbrewer.adaptors import Adaptor
from textbrewer.configurations import TrainingConfig
from textbrewer.distillers import GeneralDistiller, MultiTeacherDistiller, MutualDistiller
from textbrewer.distillers.batch_parts import split
from textbrewer.distillers.frozen import untrained
from textbrewer.hooks import resolve
from textbrewer.recipes import Stage
from textbrewer.recipes.optimisation import WarmUpAndDecay
from textbrewer.teacher_cache import TeacherCache

__all__ = ["StageTraining"]


@dataclass
class StageTraining:
    """What all stages of one distillation share.

    Args:
        teachers: the run's teachers; the first one is who the recipe's matches are about.
        student: the run's student.
        adaptors_T: one of each teacher.
        adaptor_S: the student's.
        target: how several teachers become one KD loss.
        teacher_cache: where the teachers' outputs are stored.
        is_caching_logits: whether they are kept in main memory.
        optimizer: ``f(model, learning_rate) -> optimizer``.
        rate: of stages that do not set their own.
        arguments: further ones of ``train()``.
        callback: of ``train()``, for the stages of the run's student.
    """

    teachers: Sequence[nn.Module]
    student: nn.Module
    adaptors_T: Sequence[Adaptor | str]
    adaptor_S: Adaptor | str
    target: str | Sequence[Any]
    teacher_cache: TeacherCache | str | os.PathLike[str] | None
    is_caching_logits: bool
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float
    arguments: dict[str, Any]
    callback: Callable[..., Any] | None

    def train(self, stage: Stage, steps: int, config: TrainingConfig, began: float) -> None:
        """Train one stage; go on from its newest checkpoint, if that is not older than the distillation.

        Args:
            stage: the stage.
            steps: its number of optimiser steps.
            config: how to train, with the stage's own folder.
            began: when the distillation began, in seconds since the epoch.
        """
        found = engine.checkpoints_in(Path(config.output_dir))
        student = self.student if stage.student is None else stage.student
        distiller = self._distiller(stage, config, student)
        trained = distiller.cohort if isinstance(distiller, MutualDistiller) else student
        still = [parameter for name in stage.frozen for parameter in resolve(student, name).parameters()]
        with untrained(still), distiller:
            distiller.train(
                self.optimizer(trained, self.rate if stage.learning_rate is None else stage.learning_rate),
                num_steps=steps,
                scheduler_args={"lr_lambda": WarmUpAndDecay(steps)},
                callback=self.callback if student is self.student else None,
                resume_from="latest" if found and found[0][1]["saved_at"] >= began else None,
                batch_postprocessor=_for_all if stage.teacher or stage.student or stage.peers else None,
                **self.arguments,
            )

    def _distiller(
        self, stage: Stage, config: TrainingConfig, student: nn.Module
    ) -> GeneralDistiller | MultiTeacherDistiller | MutualDistiller:
        """Return what trains a stage; a teacher that was a student of an earlier stage has the student's adaptor."""
        first, first_adaptor = self.teachers[0], self.adaptors_T[0]
        if stage.peers:
            like_teacher = [type(peer) is type(first) for peer in stage.peers]
            adaptors = [self.adaptor_S, *(first_adaptor if like else self.adaptor_S for like in like_teacher)]
            return MutualDistiller(config, stage.config, [student, *stage.peers], adaptors)
        learn = dataclasses.replace(stage.config, is_caching_logits=self.is_caching_logits)
        teacher = first if stage.teacher is None else stage.teacher
        own = teacher is first
        # A stage without a KD loss reads layers alone, which are the first teacher's: the others need not run.
        if own and len(self.teachers) > 1 and learn.kd_loss_weight != 0:
            return MultiTeacherDistiller(
                config,
                learn,
                self.teachers,
                student,
                self.adaptors_T,
                self.adaptor_S,
                teacher_cache=self.teacher_cache,
                target=self.target,
            )
        return GeneralDistiller(
            config,
            learn,
            teacher,
            student,
            first_adaptor if own or type(teacher) is type(first) else self.adaptor_S,
            self.adaptor_S,
            teacher_cache=self.teacher_cache if own else None,
        )


def _for_all(batch: Any) -> Any:
    """Return a batch of a stage with further models; one with a part for each side does not tell which they read.

    Raises:
        ValueError: if it has parts.
    """
    if split(batch)[1] is not batch:
        raise ValueError(
            "dataloader must yield batches that all models read for a recipe with models between teacher and student, "
            "got parts for 'teacher' and 'student'; use a recipe of these two alone, such as 'kd'"
        )
    return batch
