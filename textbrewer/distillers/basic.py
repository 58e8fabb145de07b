"""Distillation on logits, from one teacher."""

from __future__ import annotations

import os

from torch import nn

from textbrewer.adaptors import Adaptor
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers.single_task import SingleTaskDistiller
from textbrewer.teacher_cache import TeacherCache


class BasicDistiller(SingleTaskDistiller):
    """Distils one teacher's logits into a student.

    Args:
        train_config: how to train.
        distill_config: what to learn; without intermediate matches.
        model_T: the teacher.
        model_S: the student.
        adaptor_T: what the teacher's outputs mean, or ``"auto"`` for a transformers model.
        adaptor_S: what the student's outputs mean, likewise.
        teacher_cache: where the teacher's outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, ``model_T`` may be ``None``.

    Raises:
        ValueError: if the configuration has intermediate matches.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: nn.Module | None,
        model_S: nn.Module,
        adaptor_T: Adaptor | str,
        adaptor_S: Adaptor | str,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        if distill_config.intermediate_matches:
            raise ValueError(
                f"BasicDistiller takes no intermediate_matches, got {len(distill_config.intermediate_matches)}; "
                "use GeneralDistiller"
            )
        super().__init__(
            train_config,
            distill_config,
            {"": [model_T]},
            model_S,
            {"": [adaptor_T]},
            {"": adaptor_S},
            teacher_cache=teacher_cache,
        )
        self.model_T, self.adaptor_T, self.adaptor_S = model_T, adaptor_T, adaptor_S
