"""Distillation on logits and intermediate features, from one teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from textbrewer.adaptors import Adaptor
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers.single_task import SingleTaskDistiller
from textbrewer.matching import CustomMatch
from textbrewer.teacher_cache import TeacherCache


class GeneralDistiller(SingleTaskDistiller):
    """Distils one teacher's logits and intermediate features into a student: the one to start with.

    Args:
        train_config: how to train.
        distill_config: what to learn.
        model_T: the teacher.
        model_S: the student.
        adaptor_T: what the teacher's outputs mean, or ``"auto"`` for a transformers model.
        adaptor_S: what the student's outputs mean, likewise.
        custom_matches: matches between the outputs of any two modules, as ``CustomMatch`` or dicts with its fields.
        teacher_cache: where the teacher's outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, ``model_T`` may be ``None``.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: nn.Module | None,
        model_S: nn.Module,
        adaptor_T: Adaptor | str,
        adaptor_S: Adaptor | str,
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] | None = None,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            train_config,
            distill_config,
            {"": [model_T]},
            model_S,
            {"": [adaptor_T]},
            {"": adaptor_S},
            custom_matches,
            teacher_cache,
        )
        self.model_T, self.adaptor_T, self.adaptor_S = model_T, adaptor_T, adaptor_S
