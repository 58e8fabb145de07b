"""Distillation of several teachers, one a task, into one student."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import running
from textbrewer.distillers.base import BaseDistiller
from textbrewer.distillers.batch_parts import TaskBatch
from textbrewer.engine import LoaderBatches, Source, TaskBatches
from textbrewer.teacher_cache import TeacherCache


class MultiTaskDistiller(BaseDistiller):
    """Distils one teacher a task into a single student with a head for each.

    Args:
        train_config: how to train.
        distill_config: what to learn, the same for all tasks.
        model_T: ``{task: teacher}``.
        model_S: the student.
        adaptor_T: ``{task: adaptor}``; ``"auto"`` for transformers models.
        adaptor_S: ``{task: adaptor}``, likewise.
        teacher_cache: where the teachers' outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, teachers may be ``None``.

    Raises:
        TypeError: if one of them is not a dict.
        KeyError: if their tasks differ.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Mapping[str, nn.Module | None],
        model_S: nn.Module,
        adaptor_T: Mapping[str, Adaptor | str],
        adaptor_S: Mapping[str, Adaptor | str],
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("model_T", model_T), ("adaptor_T", adaptor_T), ("adaptor_S", adaptor_S)):
            if not isinstance(value, (Mapping, nn.ModuleDict)) or len(value) == 0:
                raise TypeError(f"{name} must be a dict by task name, got {type(value).__name__}")
            _same_tasks(value.keys(), model_T.keys(), name)
        super().__init__(
            train_config,
            distill_config,
            {task: [model] for task, model in model_T.items()},
            model_S,
            {task: [adaptor] for task, adaptor in adaptor_T.items()},
            adaptor_S,
            teacher_cache=teacher_cache,
        )
        self.model_T, self.adaptor_T, self.adaptor_S = model_T, adaptor_T, adaptor_S

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        dataloaders: Mapping[str, Iterable[Any]],
        num_steps: int,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        max_grad_norm: float = -1.0,
        tau: float = 1,
        callback: Callable[..., Any] | None = None,
        batch_postprocessors: Mapping[str, Callable[[Any], Any]] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        **args: Any,
    ) -> None:
        """Train the student; see :meth:`GeneralDistiller.train` for what is not named here.

        Each micro-batch comes from a task drawn with probability proportional to ``len(dataloader) ** tau``
        (uniformly, if a loader has no length); in distributed training, from the same task on every process.

        Args:
            optimizer: over the student's parameters.
            dataloaders: ``{task: dataloader}``.
            num_steps: optimiser steps.
            scheduler_class: learning-rate schedule.
            scheduler_args: its arguments.
            scheduler: a schedule made beforehand.
            max_grad_norm: clips the gradients; not positive: no clipping.
            tau: exponent of the tasks' sizes: 1 draws by size, 0 uniformly.
            callback: called after each checkpoint.
            batch_postprocessors: ``{task: function}``; tasks may be missing.
            resume_from: a checkpoint's folder, or ``"latest"``.
            **args: further arguments of all models.

        Raises:
            TypeError, ValueError, KeyError: if an argument cannot work.
        """
        if not isinstance(dataloaders, Mapping):
            raise TypeError(f"dataloaders must be a dict by task name, got {type(dataloaders).__name__}")
        _same_tasks(dataloaders.keys(), self.teachers.models, "dataloaders")
        checks.number(tau, "tau")
        checks.known_keys(batch_postprocessors or {}, self.teachers.models, "batch_postprocessors")
        arguments = running.Arguments(
            optimizer,
            None,
            num_steps,
            scheduler_class,
            scheduler_args,
            scheduler,
            max_grad_norm,
            callback,
            resume_from,
            args,
        )

        def make_source(sources: Mapping[str, LoaderBatches]) -> Source:
            return TaskBatches(sources, tau, TaskBatch, self._task_picker())

        running.train(self, arguments, running.Data(dataloaders, dict(batch_postprocessors or {}), make_source))

    def _task_picker(self) -> np.random.RandomState | None:
        """Return a generator that draws rank 0's tasks on every process; alone, NumPy's global one (``None``)."""
        if self.runtime.world == 1:
            return None
        picker = np.random.RandomState()
        picker.set_state(self.runtime.share(np.random.get_state()))
        return picker

    def _log_names(self, logs: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        return {**logs, **{f"{task}/{name}": value for name, value in logs.items()}}


def _same_tasks(given: Iterable[str], wanted: Iterable[str], name: str) -> None:
    if set(given) != set(wanted):
        raise KeyError(f"{name} must have the tasks of model_T, {sorted(wanted)}, got {sorted(given)}")
