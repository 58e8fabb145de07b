"""What all distillers share: how a batch becomes views of both sides, and what happens around the engine's loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from textbrewer import adaptors, checks, engine
from textbrewer.adaptors import Adaptor, Views
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import first_step, terms, training, weighting
from textbrewer.distillers.caching import CachedBatches, Remembered, needed
from textbrewer.distillers.frozen import Modes, frozen, modes_of, set_modes
from textbrewer.distillers.student import StudentModule, call
from textbrewer.engine.batches import LoaderBatches, size_of
from textbrewer.engine.sharding import shard
from textbrewer.engine.step_plan import plan_steps
from textbrewer.matching import CustomMatch, build_projection, plan_matches, width_of_model
from textbrewer.matching.custom import module_in, recording
from textbrewer.presets import KD_LOSS_MAP, WEIGHT_SCHEDULER

Self = TypeVar("Self", bound="BaseDistiller")
Results = Any
"""The teachers' views as ``compute_loss`` gets them: one ``Views``, or a list of them with several teachers."""


@dataclass(frozen=True)
class TaskBatch:
    """A batch of one of several tasks."""

    task: str
    batch: Any


@dataclass
class Arguments:
    """The arguments of ``train()`` that do not depend on the kind of distiller."""

    optimizer: torch.optim.Optimizer
    num_epochs: int | None
    num_steps: int | None
    scheduler_class: Callable[..., Any] | None
    scheduler_args: Mapping[str, Any] | None
    scheduler: Any
    max_grad_norm: float
    callback: Callable[..., Any] | None
    resume_from: str | os.PathLike[str] | None
    model_args: dict[str, Any]


class BaseDistiller:
    """Trains a student on what teachers say; the subclasses say how many teachers and tasks there are.

    Args:
        train_config: how to train.
        distill_config: what to learn.
        teachers: the teachers of each task (``""`` where there are no tasks).
        model_S: the student.
        adaptors_T: an adaptor a teacher, by task.
        adaptors_S: the student's adaptor by task.
        custom_matches: matches between modules.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work; the message names it.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        teachers: Mapping[str, Sequence[nn.Module]],
        model_S: nn.Module,
        adaptors_T: Mapping[str, Sequence[Adaptor | str]],
        adaptors_S: Mapping[str, Adaptor | str],
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] | None = None,
    ) -> None:
        checks.is_a(train_config, TrainingConfig, "train_config", "a TrainingConfig")
        checks.is_a(distill_config, DistillationConfig, "distill_config", "a DistillationConfig")
        # Copies, checked again: what the caller changes afterwards does not reach a distiller half way.
        self.t_config = dataclasses.replace(train_config)
        self.d_config = dataclasses.replace(distill_config)
        self.model_S = model_S
        self._teachers = {task: list(models) for task, models in teachers.items()}
        checks.is_a(model_S, nn.Module, "model_S", "a torch module")
        for teacher in self._all_teachers():
            checks.is_a(teacher, nn.Module, "model_T", "a torch module")
            if teacher is model_S:
                raise ValueError("model_T and model_S must be two objects; deep-copy the model to distil it into itself")
        self._adaptors_T = {
            task: [adaptors.resolve(adaptor, "adaptor_T") for adaptor in items] for task, items in adaptors_T.items()
        }
        self._adaptors_S = {task: adaptors.resolve(adaptor, "adaptor_S") for task, adaptor in adaptors_S.items()}
        self._set_up_losses(custom_matches or [])
        self._modes_before: Modes | None = None
        self._checked: set[str] = set()
        self._runtime: engine.Runtime | None = None
        self._model_args: dict[str, Any] = {}

    def _set_up_losses(self, custom_matches: Sequence[CustomMatch | Mapping[str, Any]]) -> None:
        config = self.d_config
        self.kd_loss = KD_LOSS_MAP[config.kd_loss_type]
        self.plan = plan_matches(config.intermediate_matches)
        teacher_count = max(len(models) for models in self._teachers.values())
        for planned in self.plan:
            if planned.match.teacher >= teacher_count:
                raise ValueError(
                    f"teacher of match {planned.name!r} must be less than the number of teachers, {teacher_count}, "
                    f"got {planned.match.teacher}"
                )
        self.custom_matches = [
            match if isinstance(match, CustomMatch) else CustomMatch.from_dict(match) for match in custom_matches
        ]
        first = next(iter(self._teachers.values()))
        self._custom_modules_S = [module_in(self.model_S, match.module_S, "module_S") for match in self.custom_matches]
        self._custom_modules_T = [module_in(first[0], match.module_T, "module_T") for match in self.custom_matches]
        self.projections: dict[int, nn.Module] = {}
        self._build_projections(
            {
                planned.number: (
                    width_of_model(self.model_S, planned.match.feature),
                    width_of_model(first[planned.match.teacher], planned.match.feature),
                )
                for planned in self.plan
            }
        )
        self.now = terms.Now(config.kd_loss_weight, config.hard_label_weight)

    def _build_projections(self, widths: Mapping[int, tuple[int | None, int | None]]) -> None:
        """Build the projections whose widths are known, in the order of the matches."""
        for planned in self.plan:
            projection = planned.match.projection
            if projection is None or planned.number in self.projections:
                continue
            module = build_projection(projection, *widths[planned.number])
            if module is not None:
                self.projections[planned.number] = module

    def _all_teachers(self) -> list[nn.Module]:
        return [model for models in self._teachers.values() for model in models]

    # ---- modes -------------------------------------------------------------------------------------------------

    def __enter__(self: Self) -> Self:
        """Put the teachers in eval mode and the student in train mode."""
        models = [*self._all_teachers(), self.model_S]
        self._modes_before = modes_of(models)
        for teacher in self._all_teachers():
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
        parts = terms.kd_terms(results_S, self.kd_target(results_T), self._knowledge, self._takes_mask, self.now)
        parts += terms.match_terms(results_S, self._list(results_T), self.plan)
        parts += terms.custom_terms(results_S, self._list(results_T)[0], self.custom_matches)
        parts += terms.hard_label_terms(results_S, self.now)
        return terms.total(parts, self.now)

    def kd_target(self, results_T: Results) -> Views:
        """Return the views whose logits the student learns from."""
        views: Views = results_T
        return views

    @property
    def _knowledge(self) -> terms.KnowledgeLoss:
        return terms.KnowledgeLoss(
            self.kd_loss, self.d_config.temperature, self._temperature_scheduler, self.d_config.probability_shift
        )

    @staticmethod
    def _list(results_T: Results) -> list[Views]:
        return results_T if isinstance(results_T, list) else [results_T]

    def _step(self, module: nn.Module, batch: Any, progress: float, share: Any) -> tuple[Tensor, dict[str, Tensor]]:
        task, batch = (batch.task, batch.batch) if isinstance(batch, TaskBatch) else ("", batch)
        self.now = self._scheduled(progress, share)
        if isinstance(batch, Remembered):
            results_T = self.runtime.to_device(batch.results_T)
            _, student_batch, _ = split(batch.batch)
        else:
            teacher_batch, student_batch, outputs = split(batch)
            results_T = self._teach(task, teacher_batch, outputs)
        student_batch = self.runtime.to_device(student_batch)
        with first_step.explained(student_batch):
            output = module(student_batch, self._student_args, task)
        results_S = Views(output["views"], output["projected"], output["captured"])
        if task not in self._checked:
            first_step.check(results_S, results_T, self.plan)
            if share is not None:
                weighting.check_counts(self.count_positions(student_batch), results_S)
            self._checked.add(task)
        loss, logs = self.compute_loss(results_S, self._as_results(results_T))
        return loss, self._log_names(logs, task)

    def _as_results(self, results_T: list[Views]) -> Results:
        return results_T[0]

    def _log_names(self, logs: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        return logs

    def _scheduled(self, progress: float, share: Any) -> terms.Now:
        """Return the weights for this progress; the configuration is left as it is."""
        config = self.d_config
        weights = []
        for weight, name in (
            (config.kd_loss_weight, config.kd_loss_weight_scheduler),
            (config.hard_label_weight, config.hard_label_weight_scheduler),
        ):
            weights.append(weight if name in (None, "none") else weight * WEIGHT_SCHEDULER[name](progress))
        return terms.Now(weights[0], weights[1], share)

    def _teach(self, task: str, batch: Any, outputs: Any = None) -> list[Views]:
        """Return the views of a task's teachers: from stored raw outputs, if the batch has them, else computed."""
        teachers = self._teachers[task]
        batch = self.runtime.to_device(batch)
        if outputs is not None:
            stored = self.runtime.to_device(outputs)
            stored = stored if len(teachers) > 1 else [stored]
        with torch.no_grad():
            results = []
            for number, (teacher, adaptor) in enumerate(zip(teachers, self._adaptors_T[task], strict=True)):
                captured: dict[int, Any] = {}
                if outputs is not None:
                    raw = stored[number]
                else:
                    arguments = {**adaptors.auto_arguments(adaptor, self._features), **self._model_args}
                    with recording(self._custom_modules_T if number == 0 else []) as captured, self.runtime.autocast():
                        raw = call(teacher, batch, arguments)
                raw, captured = (self.runtime.to_float32(raw), self.runtime.to_float32(captured))
                results.append(Views(adaptors.normalise(adaptor(batch, raw), "adaptor_T"), captured=captured))
        return results

    def _remember(self, task: str, batch: Any) -> Remembered:
        """Return a batch with what the losses need of the teachers' outputs, on the CPU."""
        teacher_batch, _, outputs = split(batch)
        everything = type(self).compute_loss is not BaseDistiller.compute_loss
        views = self._teach(task, teacher_batch, outputs)
        return Remembered(
            batch,
            [
                needed(results, [item for item in self.plan if item.match.teacher == number], everything)
                for number, results in enumerate(views)
            ],
        )

    def count_positions(self, batch: Any) -> weighting.Counts:
        """Count what the losses average over in a student's batch; override for batches of your own.

        Used with ``accumulation_weighting="positions"`` only; see :func:`textbrewer.distillers.weighting.count_positions`.
        """
        return weighting.count_positions(batch)

    @property
    def runtime(self) -> engine.Runtime:
        """The machine of the run under way.

        Raises:
            RuntimeError: outside ``train()``.
        """
        if self._runtime is None:
            raise RuntimeError("the distiller has a runtime only while train() is at work")
        return self._runtime

    # ---- training ----------------------------------------------------------------------------------------------

    def _train(
        self,
        arguments: Arguments,
        loaders: Mapping[str, Iterable[Any]],
        postprocessors: Mapping[str, Callable[[Any], Any] | None],
        make_source: Callable[[Mapping[str, LoaderBatches]], engine.Source],
    ) -> None:
        for task, loader in loaders.items():
            training.check_loader(loader, f"dataloaders[{task!r}]" if task else "dataloader")
        training.check_arguments(
            arguments.optimizer,
            self.model_S,
            self.t_config.output_dir,
            arguments.max_grad_norm,
            arguments.callback,
            arguments.resume_from,
        )
        plan_steps(self.t_config, arguments.num_epochs, arguments.num_steps, [size_of(item) for item in loaders.values()])
        self._check_schedulers(arguments, loaders)
        self._runtime = engine.Runtime(self.t_config)
        self._start(arguments.model_args)
        entered = self._modes_before is None
        if entered:
            self.__enter__()
        try:
            with frozen(self._all_teachers(), self.model_S):
                self._run(arguments, loaders, postprocessors, make_source)
        finally:
            if entered:
                self.__exit__()
            self._runtime = None

    def _start(self, model_args: dict[str, Any]) -> None:
        self._model_args = model_args
        self._checked = set()
        self._features = {planned.match.feature for planned in self.plan}
        adaptor = next(iter(self._adaptors_S.values()))
        self._student_args = {**adaptors.auto_arguments(adaptor, self._features), **model_args}
        self._temperature_scheduler = self.d_config.make_temperature_scheduler()
        self._takes_mask = self._knowledge.takes_mask
        for teacher in self._all_teachers():
            teacher.to(self.runtime.device)

    def _check_schedulers(self, arguments: Arguments, loaders: Mapping[str, Iterable[Any]]) -> None:
        names = (self.d_config.kd_loss_weight_scheduler, self.d_config.hard_label_weight_scheduler)
        unknown = arguments.num_steps is None and any(size_of(loader) is None for loader in loaders.values())
        if unknown and any(name not in (None, "none") for name in names):
            raise ValueError("a weight scheduler must know the run's length: the dataloader has none, so give num_steps")

    def _run(
        self,
        arguments: Arguments,
        loaders: Mapping[str, Iterable[Any]],
        postprocessors: Mapping[str, Callable[[Any], Any] | None],
        make_source: Callable[[Mapping[str, LoaderBatches]], engine.Source],
    ) -> None:
        runtime = self.runtime
        self._probe_widths(loaders, postprocessors)
        shards = {task: shard(item, runtime.rank, runtime.world, runtime.agree) for task, item in loaders.items()}
        plan = plan_steps(
            self.t_config,
            None if arguments.num_steps is not None else arguments.num_epochs,
            arguments.num_steps,
            [size_of(item) for item in shards.values()],
        )
        module = StudentModule(
            self.model_S, self._adaptors_S, self.projections, self.plan, self.custom_matches, self._custom_modules_S
        ).to(runtime.device)
        training.add_projections(arguments.optimizer, self._projection_groups(), arguments.scheduler)
        scheduler = training.make_scheduler(
            arguments.optimizer, arguments.scheduler_class, arguments.scheduler_args, arguments.scheduler
        )
        sources = {task: self._batches(task, item, postprocessors.get(task)) for task, item in shards.items()}
        exact = self.t_config.accumulation_weighting == "positions"
        job = engine.Job(
            module=module,
            student=self.model_S,
            optimizer=arguments.optimizer,
            source=make_source(sources),
            step=self._step,
            scheduler=scheduler,
            teachers=self._all_teachers(),
            max_grad_norm=arguments.max_grad_norm,
            callback=arguments.callback,
            shares=self._shares if exact else None,
            settings={**self.t_config.to_dict(), "temperature": self.d_config.temperature},
        )
        engine.run(job, self.t_config, runtime, plan, arguments.resume_from)

    def _projection_groups(self) -> list[training.ParameterGroup]:
        groups: list[training.ParameterGroup] = []
        for planned in self.plan:
            projection = planned.match.projection
            if projection is not None:
                groups.append((self.projections[planned.number], projection.options))
        for match in self.custom_matches:
            if isinstance(match.proj_func, nn.Module):
                groups.append((match.proj_func, match.proj_group or {}))
        return groups

    def _batches(self, task: str, loader: Iterable[Any], postprocess: Callable[[Any], Any] | None) -> LoaderBatches:
        name = f"dataloaders[{task!r}]" if task else "dataloader"
        if not self.d_config.is_caching_logits:
            return LoaderBatches(loader, postprocess, name)
        quiet = not (self.t_config.progress_bar and self.runtime.is_main)
        return CachedBatches(loader, postprocess, name, lambda batch: self._remember(task, batch), quiet)

    def _shares(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        plain = [batch.batch if isinstance(batch, TaskBatch) else batch for batch in batches]
        plain = [batch.batch if isinstance(batch, Remembered) else batch for batch in plain]
        return weighting.shares([split(batch)[1] for batch in plain], self.runtime, self.count_positions)

    def _probe_widths(
        self, loaders: Mapping[str, Iterable[Any]], postprocessors: Mapping[str, Callable[[Any], Any] | None]
    ) -> None:
        """Build the projections whose widths no configuration tells, from one batch; nothing random is drawn for it."""
        open_matches = [item for item in self.plan if item.match.projection and item.number not in self.projections]
        if not open_matches:
            return
        task, loader = next(iter(loaders.items()))
        batch = engine.first_batch(loader, postprocessors.get(task))
        with engine.rng_kept(), torch.no_grad(), eval_mode(self.model_S):
            teacher_batch, student_batch, outputs = split(batch)
            results_T = self._teach(task, teacher_batch, outputs)
            student_batch = self.runtime.to_device(student_batch)
            outputs_S = call(self.model_S.to(self.runtime.device), student_batch, self._student_args)
            results_S = adaptors.normalise(self._adaptors_S[task](student_batch, outputs_S), "adaptor_S")
        self._build_projections(first_step.widths(Views(results_S), results_T, open_matches))


def split(batch: Any) -> tuple[Any, Any, Any]:
    """Return a batch's teacher part, student part, and stored teacher outputs (``None`` without).

    A dict with the keys ``'teacher'`` and ``'student'`` feeds each side its own part, and ``'teacher_cache'``, if it is
    there, holds what the teacher would return; the teacher's part may then be left out. Any other batch feeds both.
    """
    if isinstance(batch, Mapping) and "student" in batch and ("teacher" in batch or "teacher_cache" in batch):
        return batch.get("teacher"), batch["student"], batch.get("teacher_cache")
    return batch, batch, None


class eval_mode:  # noqa: N801  (reads as a context manager)
    """Keep a model in eval mode while the context is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modes = model, modes_of([model])

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        set_modes(self.modes)
