"""Distillation of several teachers, one a task, into one student."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor, Views
from textbrewer.callbacks import StepCallback
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import running, training
from textbrewer.distillers.base import BaseDistiller
from textbrewer.distillers.batch_parts import TaskBatch
from textbrewer.distillers.targets.separate import LogVariances, by_uncertainty, learning_rate
from textbrewer.engine import Figures, LoaderBatches, Source, TaskBatches
from textbrewer.registry import Registry
from textbrewer.teacher_cache import TeacherCache


class MultiTaskDistiller(BaseDistiller):
    """Distils one teacher a task into a single student with a head for each.

    Args:
        train_config: how to train.
        distill_config: what to learn, the same for all tasks, or ``{task: configuration}``.
        model_T: ``{task: teacher}``.
        model_S: the student.
        adaptor_T: ``{task: adaptor}``; ``"auto"`` for transformers models.
        adaptor_S: ``{task: adaptor}``, likewise.
        teacher_cache: where the teachers' outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, teachers may be ``None``.
        task_weights: factors of the tasks' losses: ``None``: 1 each; ``{task: weight}``, where tasks may be missing;
            ``"uncertainty"``: learned, :math:`e^{-a} L + a / 2` with a log-variance :math:`a` for each task (0 at the
            start, logged as ``<task>/log_variance``; arXiv:1705.07115); ``["uncertainty", {"lr": 1e-2}]`` sets their
            learning rate (1e-3 without; ``None`` for the optimiser's).

    Raises:
        TypeError: if one of them is not a dict.
        KeyError: if their tasks differ.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig | Mapping[str, DistillationConfig],
        model_T: Mapping[str, nn.Module | None],
        model_S: nn.Module,
        adaptor_T: Mapping[str, Adaptor | str],
        adaptor_S: Mapping[str, Adaptor | str],
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
        task_weights: Mapping[str, float] | str | Sequence[Any] | None = None,
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
        self.task_weights: dict[str, float] = {}
        if isinstance(task_weights, Mapping):
            checks.known_keys(task_weights, model_T.keys(), "task_weights")
            for task, weight in task_weights.items():
                checks.number(weight, f"task_weights[{task!r}]", minimum=0)
            self.task_weights = dict(task_weights)
        elif task_weights is not None:
            self.learner_options = TASK_WEIGHTS.bound(task_weights)()
            self.learner = LogVariances(list(model_T.keys()))

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
        callback: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
        batch_postprocessors: Mapping[str, Callable[[Any], Any]] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        step_callbacks: Sequence[StepCallback] = (),
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
            callback: ``callback(model=student, step=global_step)``, called after each checkpoint; or
                ``{task: callback}``: what these return, a number (then named ``score``) or a dict of numbers, is logged
                as ``<task>/<name>``, and printed.
            batch_postprocessors: ``{task: function}``; tasks may be missing.
            resume_from: a checkpoint's folder, or ``"latest"``.
            step_callbacks: take part in every optimiser step.
            **args: further arguments of all models.

        Raises:
            TypeError, ValueError, KeyError: if an argument cannot work.
        """
        training.check_model_arguments(self.train, args, [*self.teachers.all(), self.model_S])
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
            self._callback(callback),
            resume_from,
            args,
            step_callbacks,
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

    def _callback(self, given: Any) -> Callable[..., Any] | None:
        """Return one callback of those of the tasks."""
        if not isinstance(given, Mapping):
            return given  # type: ignore[no-any-return]
        checks.known_keys(given, self.teachers.models, "callback")
        for task, function in given.items():
            if not callable(function):
                raise TypeError(f"callback[{task!r}] must be a function (model=..., step=...), got {function!r}")

        def evaluate(model: nn.Module, step: int) -> Figures:
            figures = Figures()
            for task, function in given.items():
                figures.update(_figures(task, function(model=model, step=step)))
            return figures

        return evaluate

    def _finish(
        self, loss: Tensor, logs: dict[str, Tensor], results_S: Views, task: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logs = {**logs, **{f"{task}/{name}": value for name, value in logs.items()}}
        if results_S.learned is not None:
            log_variance = results_S.learned.mean(dim=0)[list(self.teachers.models).index(task)]
            loss = by_uncertainty(loss, log_variance)
            logs[f"{task}/log_variance"] = log_variance.detach()
        elif task in self.task_weights:
            loss = loss * self.task_weights[task]
        return loss, logs


TASK_WEIGHTS = Registry("task_weights")
"""Ways to learn the tasks' weights: ``f(**options) -> options of the optimiser``."""


@TASK_WEIGHTS.add("uncertainty")
def _uncertainty(lr: float | None = 1e-3) -> dict[str, Any]:
    return learning_rate(lr, "task_weights 'uncertainty'")


def _figures(task: str, found: Any) -> dict[str, float]:
    """Return what a task's callback found, by the names in the log.

    Raises:
        TypeError: if it is neither a number nor a dict of numbers.
    """
    named = found if isinstance(found, Mapping) else {} if found is None else {"score": found}
    figures = {}
    for name, value in named.items():
        try:
            figures[f"{task}/{name}"] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"callback[{task!r}] must return a number, a dict of numbers, or None, got {value!r} for {name!r}"
            ) from error
    return figures


def _same_tasks(given: Iterable[str], wanted: Iterable[str], name: str) -> None:
    if set(given) != set(wanted):
        raise KeyError(f"{name} must have the tasks of model_T, {sorted(wanted)}, got {sorted(given)}")
