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
from textbrewer.distillers.cached_teacher import CachedTeacher
from textbrewer.distillers.caching import Remembered, kept
from textbrewer.distillers.compiling import compiled, paused
from textbrewer.distillers.quantized import Int8Layers
from textbrewer.distillers.student import call
from textbrewer.distillers.teacher_forward import Needs, TeacherForward
from textbrewer.engine import Runtime
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
        plan: the intermediate matches.
        custom_modules: modules of the first teacher whose outputs custom matches read.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[nn.Module | None]],
        adaptors: Mapping[str, Sequence[Adaptor]],
        plan: Sequence[PlannedMatch],
        custom_modules: Sequence[nn.Module],
    ) -> None:
        self.models = {task: list(items) for task, items in models.items()}
        self.adaptors = {task: list(items) for task, items in adaptors.items()}
        self.plan, self.custom_modules = list(plan), list(custom_modules)
        self.features = {planned.match.feature for planned in plan}
        self.cached: dict[str, list[CachedTeacher]] = {}
        self._contents: dict[str, list[Contents]] = {}
        self._forwards: dict[tuple[str, int], TeacherForward] = {}
        self._int8: dict[int, Int8Layers] = {}

    def all(self) -> list[nn.Module]:
        """Return the teachers of all tasks, those that are there."""
        return [model for models in self.models.values() for model in models if model is not None]

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
            if runtime.teacher_precision == "int8":
                shared = {id(parameter) for parameter in student.parameters()} if student is not None else set()
                self._int8 = {id(model): Int8Layers(model, shared) for model in distinct}
            with compiled(distinct if runtime.config.compiles("teacher") else [], "teacher"):
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

    def views(
        self,
        runtime: Runtime,
        task: str,
        batch: Any,
        model_args: Mapping[str, Any],
        stored: Any = None,
        found: Sequence[Found | None] | None = None,
    ) -> list[Views]:
        """Return the views of a task's teachers.

        Args:
            runtime: the machine.
            task: the batch's task.
            batch: the teachers' part of the batch.
            model_args: further arguments of the models.
            stored: what the teacher (a list: what each of several teachers) would return; ``None``: they are run.
            found: with a teacher cache: what it has of the batch, for each teacher.
        """
        numbers = range(len(self.models[task]))
        if stored is not None:
            stored, batch = runtime.to_device(stored), runtime.to_device(batch)
            outputs = stored if len(numbers) > 1 else [stored]
            with torch.no_grad():
                return [self._read(task, number, batch, outputs[number], {}) for number in numbers]
        if found is not None:
            return [self.cached[task][number].views(batch, found[number]) for number in numbers]
        batch = runtime.to_device(batch)
        return [self.view(runtime, task, number, batch, model_args) for number in numbers]

    def view(self, runtime: Runtime, task: str, number: int, batch: Any, model_args: Mapping[str, Any]) -> Views:
        """Run one teacher on a batch that is on the device, and return its views."""
        run = partial(self._run, runtime, task, number, batch, model_args)
        with torch.no_grad(), first_step.explained(batch):
            return self._forward(task, number).views(run)

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
        layers = self._int8.get(id(model))
        listening: AbstractContextManager[dict[int, Any]] = recording(watched) if watched else nullcontext({})
        with layers.in_place() if layers else nullcontext(), listening as captured, runtime.teacher_autocast():
            raw = call(model, batch, arguments)
        missing = set(range(len(watched))) - captured.keys()
        if missing:
            raise ValueError(f"module_T of custom match {min(missing)} did not run in the teacher's forward pass")
        to_float32 = runtime.teacher_to_float32
        return self._read(task, number, batch, to_float32(raw), to_float32(dict(captured)))

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
        if task not in self._contents:
            self._contents[task] = [self._memory(number, item, everything) for number, item in enumerate(views)]
        return Remembered(batch, [kept(*pair) for pair in zip(views, self._contents[task], strict=True)])

    def _memory(self, number: int, views: Views, everything: bool) -> Contents:
        """Return what to keep in memory of a teacher's views, by those of a first batch."""
        matches = [(item.number, item.match) for item in self.plan if item.match.teacher == number]
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
