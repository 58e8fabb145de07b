"""What all distillers share: how a batch becomes views of both sides, and what happens around the engine's loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from textbrewer import adaptors, checks, engine
from textbrewer.adaptors import Adaptor, Views
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import cached_run, first_step, terms, weighting
from textbrewer.distillers.batch_parts import TaskBatch
from textbrewer.distillers.cached_run import CachedRun
from textbrewer.distillers.cached_teacher import Prepared
from textbrewer.distillers.compiling import compiled, refuse
from textbrewer.distillers.hearing import Said, heard
from textbrewer.distillers.inner_features import asked_of_student, listening_inside
from textbrewer.distillers.lessons import build_projections, configured_widths, make_lessons
from textbrewer.distillers.needs import Needs, needs_of
from textbrewer.distillers.stacking import Stacking, make_stacking
from textbrewer.distillers.student import StudentModule
from textbrewer.distillers.teachers import Teachers, check_models
from textbrewer.hooks import resolve
from textbrewer.hooks.forward import Modes, modes_of, set_modes
from textbrewer.matching import CustomMatch
from textbrewer.teacher_cache import TeacherCache

Self = TypeVar("Self", bound="BaseDistiller")
Results = Any
"""The teachers' views as ``compute_loss`` gets them: one ``Views``, or a list of them with several teachers."""


class BaseDistiller:
    """Trains a student on what teachers say; the subclasses say how many teachers and tasks there are.

    Args:
        train_config: how to train.
        distill_config: what to learn, of each task or of all.
        models_T: the teachers of each task (``""`` where there are no tasks).
        model_S: the student.
        adaptors_T: an adaptor a teacher, by task.
        adaptors_S: the student's adaptor by task.
        custom_matches: matches between modules.
        teacher_cache: where the teachers' outputs are stored: a ``TeacherCache`` or a folder; ``None``: nowhere.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work; the message names it.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig | Mapping[str, DistillationConfig],
        models_T: Mapping[str, Sequence[nn.Module | None]],
        model_S: nn.Module,
        adaptors_T: Mapping[str, Sequence[Adaptor | str]],
        adaptors_S: Mapping[str, Adaptor | str],
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] | None = None,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        checks.is_a(train_config, TrainingConfig, "train_config", "a TrainingConfig")
        checks.is_a(model_S, nn.Module, "model_S", "a torch module")
        self.lessons = make_lessons(distill_config, models_T)
        self.lesson = next(iter(self.lessons.values()))
        self.d_config = self.lesson.config
        self.teacher_cache = cached_run.resolve(teacher_cache, self.d_config)
        check_models(models_T, model_S, may_be_missing=self.teacher_cache is not None)
        # A copy, checked again: what the caller changes afterwards does not reach a distiller half way.
        self.t_config = dataclasses.replace(train_config)
        self.model_S = model_S
        self.kd_loss = self.lesson.knowledge.loss
        plans = {task: lesson.plan for task, lesson in self.lessons.items()}
        self.plan = list({planned.number: planned for plan in plans.values() for planned in plan}.values())
        self.strategies = [planned.strategy for planned in self.plan if planned.strategy is not None]
        self.source: engine.Source | None = None
        self.custom_matches = [
            match if isinstance(match, CustomMatch) else CustomMatch.from_dict(match) for match in custom_matches or []
        ]
        first = next(iter(models_T.values()))
        self._custom_modules = [resolve(model_S, match.module_S) for match in self.custom_matches]
        self.teachers = Teachers(
            models_T,
            {task: [adaptors.resolve(item, "adaptor_T") for item in items] for task, items in adaptors_T.items()},
            plans,
            [resolve(first[0], match.module_T) for match in self.custom_matches if first[0] is not None],
        )
        self.adaptors_S = {task: adaptors.resolve(adaptor, "adaptor_S") for task, adaptor in adaptors_S.items()}
        self.projections: dict[int, nn.Module] = {}
        self.build_projections(configured_widths(self.lessons, models_T, model_S))
        self.learner: nn.Module | None = None
        self.learner_options: dict[str, Any] = {}
        self.now = terms.Now(self.d_config.kd_loss_weight, self.d_config.hard_label_weight)
        self._stacking: Stacking | None = None
        self._modes_before: Modes | None = None
        self.cached_run: CachedRun | None = None
        self._checked: set[Any] = set()
        self._runtime: engine.Runtime | None = None
        self.model_args: dict[str, Any] = {}
        self.student_args: dict[str, dict[str, Any]] = {}

    def build_projections(self, widths: Mapping[int, tuple[int | None, int | None]]) -> None:
        """Build the projections whose widths are known, in the order of the matches."""
        missing = [planned for planned in self.plan if planned.number not in self.projections]
        self.projections.update(build_projections(missing, widths))

    def student_module(self) -> StudentModule:
        """Return the module to train: the student with the projections of its features."""
        custom = (self.custom_matches, self._custom_modules)
        numbers = {task: {planned.number for planned in lesson.plan} for task, lesson in self.lessons.items()}
        return StudentModule(self.model_S, self.adaptors_S, self.projections, self.plan, *custom, self.learner, numbers)

    # ---- modes -------------------------------------------------------------------------------------------------

    def __enter__(self: Self) -> Self:
        """Put the teachers in eval mode and the student in train mode."""
        self._modes_before = modes_of([*self.teachers.all(), self.model_S])
        for teacher in self.teachers.all():
            teacher.eval()
        self.model_S.train()
        return self

    def __exit__(self, *error: object) -> None:
        """Put the modes back."""
        if self._modes_before is not None:
            set_modes(self._modes_before)
            self._modes_before = None

    # ---- one step ----------------------------------------------------------------------------------------------

    def compute_loss(self, results_S: Views, results_T: Results) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to optimise and its unweighted parts to log. Override this to add a term.

        Args:
            results_S: the student's views; reads as the adaptor's dict.
            results_T: the teacher's views; with several teachers, a list of them.

        Returns:
            The total, and ``{"unweighted_<name>": scalar}``.
        """
        every_T = results_T if isinstance(results_T, list) else [results_T]
        # Terms of weight 0 are left out; but a step in which none has a weight still needs a loss with a graph.
        skips = self._may_skip() and terms.some_weight(results_S, self.lesson.plan, self.custom_matches, self.now)
        parts: list[terms.Term] = []
        if self.now.kd_weight or not skips:
            parts += self._kd_terms(results_S, results_T)
        plan = [planned for planned in heard(self.lesson.plan, every_T) if planned.match.weight or not skips]
        parts += terms.match_terms(results_S, every_T, plan, self._stacking)
        parts += terms.custom_terms(results_S, every_T[0], self.custom_matches, weighted_only=skips)
        parts += terms.hard_label_terms(results_S, self.now)
        return terms.total(parts, self.now)

    def _kd_terms(self, results_S: Views, results_T: Results) -> list[terms.Term]:
        return terms.kd_terms(results_S, self.kd_target(results_T), self.lesson.knowledge, self.now)

    def kd_target(self, results_T: Results) -> Views:
        """Return the views whose logits the student learns from."""
        views: Views = results_T
        return views

    def _may_skip(self) -> bool:
        """Return whether terms may be left out: processes that gave every parameter a gradient must go on doing so."""
        return self._runtime is None or self._runtime.world == 1 or self.t_config.find_unused_parameters

    def teacher_needs(self, task: str, number: int, student_has_losses: bool = False) -> Needs | None:
        """Return what the loss reads of a teacher in every step; ``None``: it may read everything.

        Args:
            task: the teacher's task.
            number: its number.
            student_has_losses: whether the student's adaptor is known to return ``losses``.
        """
        if self.reads_everything() or not self._may_skip():
            return None
        lesson = self.lessons[task]
        return needs_of(number, lesson.config, lesson.plan, self.custom_matches, student_has_losses)

    def reads_everything(self) -> bool:
        """Return whether ``compute_loss`` or ``kd_target`` is the user's own, which may read everything."""
        return self._own_target() or getattr(self.compute_loss, "__func__", None) is not BaseDistiller.compute_loss

    def _own_target(self) -> bool:
        return "kd_target" in vars(self) or not type(self).kd_target.__module__.startswith("textbrewer.")

    def count_positions(self, batch: Any) -> weighting.Counts:
        """Count what the losses average over in a student's batch; override for batches of your own.

        Used with ``accumulation_weighting="positions"`` only.
        """
        return weighting.count_positions(batch)

    def step(self, module: nn.Module, batch: Any, progress: float, share: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Do one forward pass of both sides; the engine calls this for every micro-batch.

        Args:
            module: the student with its projections, as the engine wrapped it.
            batch: a batch.
            progress: how much of the run is done, 0 to 1.
            share: with exact accumulation, this batch's factors.
        """
        task, batch = (batch.task, batch.batch) if isinstance(batch, TaskBatch) else ("", batch)
        self.lesson = self.lessons[task]
        self.now = terms.scheduled(self.lesson.config, progress, share)
        for strategy in self.strategies:
            strategy.epoch = 0 if self.source is None else self.source.epoch
        said, student_batch = self.teachers.sides(self.runtime, task, batch, self.model_args)
        results_T = None if self._student_first() else self._hear(said, None)
        student_batch = self.runtime.to_device(student_batch)
        with first_step.explained(student_batch):
            output = module(student_batch, self.student_args[task], task)
        results_S = Views(output["views"], output["projected"], output["captured"])
        results_S.learned = output.get("learned")
        results_T = self._hear(said, results_S) if results_T is None else results_T
        if isinstance(batch, Prepared) and self.cached_run is not None:
            self.cached_run.check(task, batch, results_S, results_T)
        first = self._key(task) not in self._checked
        if first:
            first_step.check(results_S, results_T, heard(self.lesson.plan, results_T), self.lesson.config)
            if share is not None:
                counts = self.count_positions(student_batch)
                weighting.check_counts(counts, results_S, self.lesson.knowledge.takes_labels)
        loss, logs = self.compute_loss(results_S, self._as_results(results_T))
        if first:
            self._checked.add(self._key(task))
            for number in range(len(results_T)):
                self.teachers.narrow(task, number, self.teacher_needs(task, number, "losses" in results_S))
        return self._finish(loss, logs, results_S, task)

    def _student_first(self) -> bool:
        """Return whether the teachers are asked after the student's forward pass, because its views are needed."""
        return False

    def _hear(self, said: Said, results_S: Views | None) -> list[Views]:
        """Ask the teachers."""
        return said.all()

    def _as_results(self, results_T: list[Views]) -> Results:
        return results_T[0]

    def _key(self, task: str) -> Any:
        """Return what a step is the first of, when the views are checked."""
        return task

    def _finish(
        self, loss: Tensor, logs: dict[str, Tensor], results_S: Views, task: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a step and its logs as they go to the engine."""
        return loss, logs

    def _student_features(self) -> set[str]:
        """Return features of the student that are read beside those of the matches."""
        return set()

    def build_learner(self, results_S: Views | None) -> bool:
        """Build what is learnt beside the student, if anything is; return whether a batch's views are needed for it."""
        return False

    @contextmanager
    def working(self, runtime: engine.Runtime, model_args: dict[str, Any]) -> Iterator[None]:
        """Make ready for a run, and tidy up after it: modes, arguments of the models, teachers on the device."""
        refuse(self.t_config, self.custom_matches)
        self._runtime, self._checked = runtime, set()
        self.lessons = {task: lesson.anew() for task, lesson in self.lessons.items()}
        self.model_args = model_args
        features = self.teachers.features | self._student_features()
        self.student_args = {
            task: {**adaptors.auto_arguments(adaptor, features), **model_args}
            for task, adaptor in self.adaptors_S.items()
        }
        self.teachers.to_devices(runtime)
        self._stacking = make_stacking(self.t_config.stack_matches, runtime.device)
        try:
            with ExitStack() as stack:
                if self._modes_before is None:
                    stack.enter_context(self)
                stack.enter_context(self.teachers.prepared(runtime, self.model_S))
                inner = asked_of_student(self.model_S, self.adaptors_S.values(), self.plan)
                stack.enter_context(listening_inside(inner, "student", self.t_config))
                stack.enter_context(compiled([self.model_S] if self.t_config.compiles("student") else [], "student"))
                yield
        finally:
            self._runtime = None

    @property
    def runtime(self) -> engine.Runtime:
        """The machine of the run under way.

        Raises:
            RuntimeError: outside ``train()``.
        """
        if self._runtime is None:
            raise RuntimeError("a distiller has a runtime only while train() is at work")
        return self._runtime
