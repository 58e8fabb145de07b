"""The teachers of a distiller: what they say of a batch, and what of it is worth remembering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from textbrewer import adaptors, checks
from textbrewer.adaptors import Adaptor, Views
from textbrewer.distillers import first_step
from textbrewer.distillers.batch_parts import split
from textbrewer.distillers.cached_teacher import CachedTeacher, Prepared, rows_only
from textbrewer.distillers.caching import Remembered, kept
from textbrewer.distillers.compiling import compiled, paused
from textbrewer.distillers.hearing import Said
from textbrewer.distillers.inner_features import asked_of_teachers, listening_inside
from textbrewer.distillers.needs import Needs
from textbrewer.distillers.placement import Placement, moved
from textbrewer.distillers.quantized import Int8Layers
from textbrewer.distillers.teacher_forward import TeacherForward
from textbrewer.engine import Runtime
from textbrewer.hooks.forward import call
from textbrewer.matching import PlannedMatch
from textbrewer.matching.custom import recording
from textbrewer.teacher_cache import Contents, Found

NO_TEACHER = "model_T must be a torch module, got None; only with a teacher_cache that has every row it can be left out"


class Teachers:
    """Teachers by task, with their adaptors.

    Args:
        models: the teachers of each task (``""`` where there are no tasks); ``None`` for one that is not there, as a
            teacher cache has all it would say.
        adaptors: an adaptor a teacher, by task.
        plans: the intermediate matches of each task.
        custom_modules: modules of the first teacher whose outputs custom matches read.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[nn.Module | None]],
        adaptors: Mapping[str, Sequence[Adaptor]],
        plans: Mapping[str, Sequence[PlannedMatch]],
        custom_modules: Sequence[nn.Module],
    ) -> None:
        self.models = {task: list(items) for task, items in models.items()}
        self.adaptors = {task: list(items) for task, items in adaptors.items()}
        self.plans, self.custom_modules = dict(plans), list(custom_modules)
        self.features = {planned.match.feature for plan in plans.values() for planned in plan}
        self.placement = Placement()
        self.cached: dict[str, list[CachedTeacher]] = {}
        self._contents: dict[str, list[Contents]] = {}
        self._forwards: dict[tuple[str, int], TeacherForward] = {}
        self._int8: dict[tuple[str, int], Int8Layers] = {}

    def all(self) -> list[nn.Module]:
        """Return the teachers of all tasks, those that are there."""
        return [model for models in self.models.values() for model in models if model is not None]

    def to_devices(self, runtime: Runtime) -> None:
        """Move each teacher to its device, the run's where it has none of its own."""
        self.placement.check(runtime)
        for models in self.models.values():
            for number, model in enumerate(models):
                if model is not None:
                    model.to(self.placement.device(runtime, number))

    @contextmanager
    def prepared(self, runtime: Runtime, student: nn.Module | None = None) -> Iterator[None]:
        """Have the teachers quantised or compiled, as the configuration wants them, while the context is open.

        Args:
            runtime: the machine; the teachers are on its device.
            student: layers that are shared with it are not quantised.

        Raises:
            ValueError: if a teacher cannot be quantised.
            RuntimeError: if one cannot be compiled.
        """
        distinct = list(dict.fromkeys(self.all()))
        self._forwards = {}
        try:
            shared = {id(parameter) for parameter in student.parameters()} if student is not None else set()
            self._int8 = {
                (task, number): Int8Layers(model, shared)
                for task, models in self.models.items()
                for number, model in enumerate(models)
                if model is not None and self.placement.precision(runtime, number) == "int8"
            }
            inner = asked_of_teachers(self.models, self.adaptors, self.plans)
            with (
                listening_inside(inner, "teacher", runtime.config),
                compiled(distinct if runtime.config.compiles("teacher") else [], "teacher"),
            ):
                yield
        finally:
            self._forwards, self._int8, self._contents = {}, {}, {}

    def narrow(self, task: str, number: int, needs: Needs | None) -> None:
        """Say what is needed of a teacher from now on: it then runs no further than for that.

        Args:
            task: its task.
            number: its number.
            needs: what is needed; ``None``: everything.
        """
        if self.models[task][number] is not None:
            self._forward(task, number).narrow(needs)

    def _model(self, task: str, number: int) -> nn.Module:
        """Return a teacher that is to run.

        Raises:
            ValueError: if it is not there.
        """
        model = self.models[task][number]
        if model is None:
            raise ValueError(NO_TEACHER)
        return model

    def _forward(self, task: str, number: int) -> TeacherForward:
        key = (task, number)
        if key not in self._forwards:
            model = self._model(task, number)
            captures = number == 0 and bool(self.custom_modules)
            self._forwards[key] = TeacherForward(model, partial(paused, model), captures)
        return self._forwards[key]

    def sides(self, runtime: Runtime, task: str, batch: Any, model_args: Mapping[str, Any]) -> tuple[Said, Any]:
        """Return what a task's teachers say of a batch, and the student's part of it.

        Args:
            runtime: the machine.
            task: the batch's task.
            batch: the batch, remembered, looked up in a cache, or as the loader gave it.
            model_args: further arguments of the models.
        """
        if isinstance(batch, Remembered):
            results_T = batch.results_T
            said = Said(len(results_T), lambda number: moved(results_T[number], runtime.to_device))
            return said, split(batch.batch)[1]
        batch, found = (batch.batch, batch.found) if isinstance(batch, Prepared) else (batch, None)
        teacher_batch, student_batch, stored = split(batch)
        return self.said(runtime, task, teacher_batch, model_args, stored, found), student_batch

    def said(
        self,
        runtime: Runtime,
        task: str,
        batch: Any,
        model_args: Mapping[str, Any],
        stored: Any = None,
        found: Sequence[Found | None] | None = None,
    ) -> Said:
        """Return what a task's teachers say of a batch.

        Args:
            runtime: the machine.
            task: the batch's task.
            batch: the teachers' part of the batch.
            model_args: further arguments of the models.
            stored: what the teacher (a list: what each of several teachers) would return; ``None``: they are run.
            found: with a teacher cache: what it has of the batch, for each teacher.
        """
        count = len(self.models[task])
        if stored is not None:
            outputs = stored if count > 1 else [stored]
            return Said(count, partial(self._stored, runtime, task, runtime.to_device(batch), outputs))
        if found is not None:
            return Said(count, lambda number: self.cached[task][number].views(batch, found[number]))
        here = runtime.to_device(batch)

        def part(number: int, rows: Sequence[int]) -> Views:
            return self.view(runtime, task, number, runtime.to_device(rows_only(batch, rows)), model_args)

        return Said(count, lambda number: self.view(runtime, task, number, here, model_args), part)

    def _stored(self, runtime: Runtime, task: str, batch: Any, outputs: Sequence[Any], number: int) -> Views:
        with torch.no_grad():
            return self._read(task, number, batch, runtime.to_device(outputs[number]), {})

    def view(self, runtime: Runtime, task: str, number: int, batch: Any, model_args: Mapping[str, Any]) -> Views:
        """Run one teacher on a batch that is on the run's device, and return its views there."""
        batch = self.placement.sent(runtime, number, batch)
        run = partial(self._run, runtime, task, number, batch, model_args)
        with torch.no_grad(), first_step.explained(batch):
            views = self._forward(task, number).views(run)
        return self.placement.returned(runtime, number, views)

    def _read(self, task: str, number: int, batch: Any, raw: Any, captured: Mapping[int, Any]) -> Views:
        views = adaptors.normalise(self.adaptors[task][number](batch, raw), "adaptor_T")
        return Views(views, captured=captured)

    def _run(
        self,
        runtime: Runtime,
        task: str,
        number: int,
        batch: Any,
        model_args: Mapping[str, Any],
    ) -> Views:
        """Return what one teacher says of a batch: one forward pass."""
        model = self._model(task, number)
        arguments = {**adaptors.auto_arguments(self.adaptors[task][number], self.features), **model_args}
        watched = self.custom_modules if number == 0 else []
        layers = self._int8.get((task, number))
        listening: AbstractContextManager[dict[int, Any]] = recording(watched) if watched else nullcontext({})
        autocast = self.placement.autocast(runtime, number)
        with layers.in_place() if layers else nullcontext(), listening as captured, autocast:
            raw = call(model, batch, arguments)
        missing = set(range(len(watched))) - captured.keys()
        if missing:
            raise ValueError(f"module_T of custom match {min(missing)} did not run in the teacher's forward pass")
        own = self.placement.precision(runtime, number)
        raw, captured = (runtime.teacher_to_float32(item, own) for item in (raw, dict(captured)))
        return self._read(task, number, batch, raw, captured)

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
        views = self.said(runtime, task, teacher_batch, model_args, stored).all()
        if task not in self._contents:
            self._contents[task] = [self._memory(task, *item, everything) for item in enumerate(views)]
        return Remembered(batch, [kept(*pair) for pair in zip(views, self._contents[task], strict=True)])

    def _memory(self, task: str, number: int, views: Views, everything: bool) -> Contents:
        """Return what to keep in memory of a teacher's views, by those of a first batch."""
        matches = [(item.number, item.match) for item in self.plans[task] if item.match.teacher == number]
        return Contents(matches, everything).settle(views, masks_agree=False)


def check_models(models_T: Mapping[str, Sequence[nn.Module | None]], model_S: nn.Module, may_be_missing: bool) -> None:
    """Raise unless all teachers are modules other than the student.

    Args:
        models_T: the teachers of each task.
        model_S: the student.
        may_be_missing: whether a teacher may be ``None``.
    """
    for teacher in (model for models in models_T.values() for model in models):
        if teacher is None and may_be_missing:
            continue
        if teacher is None:
            raise TypeError(NO_TEACHER)
        checks.is_a(teacher, nn.Module, "model_T", "a torch module")
        if teacher is model_S:
            raise ValueError("model_T and model_S must be two objects; deep-copy the model to distil it into itself")
