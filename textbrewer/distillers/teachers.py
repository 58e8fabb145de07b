"""The teachers of a distiller: what they say of a batch, and what of it is worth remembering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from textbrewer import adaptors
from textbrewer.adaptors import Adaptor, Views
from textbrewer.distillers import first_step
from textbrewer.distillers.batch_parts import split
from textbrewer.distillers.caching import Remembered, needed
from textbrewer.distillers.student import call
from textbrewer.engine import Runtime
from textbrewer.matching import PlannedMatch
from textbrewer.matching.custom import recording


class Teachers:
    """Teachers by task, with their adaptors.

    Args:
        models: the teachers of each task (``""`` where there are no tasks).
        adaptors: an adaptor a teacher, by task.
        plan: the intermediate matches.
        custom_modules: modules of the first teacher whose outputs custom matches read.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[nn.Module]],
        adaptors: Mapping[str, Sequence[Adaptor]],
        plan: Sequence[PlannedMatch],
        custom_modules: Sequence[nn.Module],
    ) -> None:
        self.models = {task: list(items) for task, items in models.items()}
        self.adaptors = {task: list(items) for task, items in adaptors.items()}
        self.plan, self.custom_modules = list(plan), list(custom_modules)
        self.features = {planned.match.feature for planned in plan}

    def all(self) -> list[nn.Module]:
        """Return the teachers of all tasks."""
        return [model for models in self.models.values() for model in models]

    def views(
        self, runtime: Runtime, task: str, batch: Any, model_args: Mapping[str, Any], stored: Any = None
    ) -> list[Views]:
        """Return the views of a task's teachers.

        Args:
            runtime: the machine.
            task: the batch's task.
            batch: the teachers' part of the batch.
            model_args: further arguments of the models.
            stored: what the teacher (a list: what each of several teachers) would return; ``None``: they are run.
        """
        batch, models = runtime.to_device(batch), self.models[task]
        outputs = None
        if stored is not None:
            stored = runtime.to_device(stored)
            outputs = stored if len(models) > 1 else [stored]
        results = []
        with torch.no_grad(), first_step.explained(batch):
            for number, (model, adaptor) in enumerate(zip(models, self.adaptors[task], strict=True)):
                raw, captured = (
                    (outputs[number], {})
                    if outputs is not None
                    else self._run(runtime, model, adaptor, batch, model_args, first=number == 0)
                )
                results.append(Views(adaptors.normalise(adaptor(batch, raw), "adaptor_T"), captured=captured))
        return results

    def _run(
        self,
        runtime: Runtime,
        model: nn.Module,
        adaptor: Adaptor,
        batch: Any,
        model_args: Mapping[str, Any],
        first: bool,
    ) -> tuple[Any, dict[int, Any]]:
        arguments = {**adaptors.auto_arguments(adaptor, self.features), **model_args}
        if not (first and self.custom_modules):
            with runtime.autocast():
                return runtime.to_float32(call(model, batch, arguments)), {}
        with recording(self.custom_modules) as captured, runtime.autocast():
            raw = call(model, batch, arguments)
        missing = set(range(len(self.custom_modules))) - captured.keys()
        if missing:
            raise ValueError(f"module_T of custom match {min(missing)} did not run in the teacher's forward pass")
        return runtime.to_float32(raw), runtime.to_float32(dict(captured))

    def remember(
        self, runtime: Runtime, task: str, batch: Any, model_args: Mapping[str, Any], everything: bool
    ) -> Remembered:
        """Return a batch with what the losses read of the teachers' outputs, on the CPU.

        Args:
            runtime: the machine.
            task: the batch's task.
            batch: the whole batch.
            model_args: further arguments of the models.
            everything: keep all that the adaptors return.
        """
        teacher_batch, _, stored = split(batch)
        views = self.views(runtime, task, teacher_batch, model_args, stored)
        plans = [[item for item in self.plan if item.match.teacher == number] for number in range(len(views))]
        return Remembered(
            batch, [needed(results, plan, everything) for results, plan in zip(views, plans, strict=True)]
        )
