"""What a distiller does around the engine's loop: checks, projections, sources of batches, the job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import adaptors, engine
from textbrewer.adaptors import Views
from textbrewer.callbacks import StepCallback
from textbrewer.distillers import first_step, training, weighting
from textbrewer.distillers.base import BaseDistiller
from textbrewer.distillers.batch_parts import inner, split
from textbrewer.distillers.cached_run import CachedRun
from textbrewer.distillers.caching import CachedBatches, Remembered
from textbrewer.distillers.frozen import frozen
from textbrewer.distillers.knowledge import refuse_without_length
from textbrewer.engine import LoaderBatches, size_of
from textbrewer.hooks.forward import call, evaluating

PostProcessor = Callable[[Any], Any]
MakeSource = Callable[[Mapping[str, LoaderBatches]], engine.Source]


@dataclass
class Data:
    """Where the batches come from.

    Args:
        loaders: the dataloader of each task (``""`` where there are no tasks).
        postprocessors: applied to the batches of a task; tasks may be missing.
        make_source: makes one source of those of the tasks.
    """

    loaders: Mapping[str, Iterable[Any]]
    postprocessors: Mapping[str, PostProcessor | None]
    make_source: MakeSource


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
    step_callbacks: Sequence[StepCallback] = ()


def train(distiller: BaseDistiller, arguments: Arguments, data: Data) -> None:
    """Train a distiller's student.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work, or what the adaptors return for the first batch.
        NonFiniteError: if a loss or gradient is NaN or infinite.
    """
    config = distiller.t_config
    for task, loader in data.loaders.items():
        training.check_loader(loader, _loader_name(task))
    training.check_arguments(
        arguments.optimizer,
        distiller.model_S,
        config.output_dir,
        arguments.max_grad_norm,
        arguments.callback,
        arguments.resume_from,
        arguments.step_callbacks,
    )
    sizes = [size_of(loader) for loader in data.loaders.values()]
    engine.plan_steps(config, arguments.num_epochs, arguments.num_steps, sizes)
    if arguments.num_steps is None and None in sizes:
        for lesson in distiller.lessons.values():
            refuse_without_length(lesson.config, lesson.knowledge)
    cache = distiller.teacher_cache
    with (
        engine.Runtime(config) as runtime,
        distiller.working(runtime, arguments.model_args),
        frozen(distiller.teachers.all(), distiller.model_S),
        nullcontext() if cache is None else cache.opened(),
        cached(distiller, runtime),
    ):
        _run(distiller, runtime, arguments, data)


@contextmanager
def cached(distiller: BaseDistiller, runtime: engine.Runtime) -> Iterator[None]:
    """Use the distiller's teacher cache, if it has one, while the context is open."""
    if distiller.teacher_cache is None:
        yield
        return
    distiller.cached_run = run = CachedRun(distiller, runtime, distiller.teacher_cache)
    try:
        yield
    finally:
        distiller.cached_run = None
        run.finish()


def _run(distiller: BaseDistiller, runtime: engine.Runtime, arguments: Arguments, data: Data) -> None:
    config = distiller.t_config
    _probe(distiller, runtime, data)
    shards = {task: engine.shard(loader, runtime) for task, loader in data.loaders.items()}
    # The second plan, of what each process reads; a warning about both lengths was given with the first.
    epochs = arguments.num_epochs if arguments.num_steps is None else None
    plan = engine.plan_steps(config, epochs, arguments.num_steps, [size_of(item) for item in shards.values()])
    module = distiller.student_module().to(runtime.device)
    training.add_projections(arguments.optimizer, _projection_groups(distiller), arguments.scheduler)
    scheduler = training.make_scheduler(
        arguments.optimizer, arguments.scheduler_class, arguments.scheduler_args, arguments.scheduler
    )
    sources = {
        task: _batches(distiller, runtime, task, item, data.postprocessors.get(task)) for task, item in shards.items()
    }
    exact = config.accumulation_weighting == "positions"
    distiller.source = data.make_source(sources)
    job = engine.Job(
        module=module,
        student=distiller.model_S,
        optimizer=arguments.optimizer,
        source=distiller.source,
        step=distiller.step,
        scheduler=scheduler,
        teachers=distiller.teachers.all(),
        max_grad_norm=arguments.max_grad_norm,
        callback=arguments.callback,
        shares=(lambda batches: _shares(distiller, runtime, batches)) if exact else None,
        settings={**config.to_dict(), "temperature": distiller.d_config.temperature},
        step_callbacks=arguments.step_callbacks,
    )
    try:
        engine.run(job, config, runtime, plan, arguments.resume_from)
    finally:
        distiller.source = None
        for source in sources.values():
            source.close()


def _projection_groups(distiller: BaseDistiller) -> list[training.ParameterGroup]:
    groups: list[training.ParameterGroup] = []
    for planned in distiller.plan:
        projection = planned.match.projection
        if projection is not None:
            groups.append((distiller.projections[planned.number], projection.options))
    for match in distiller.custom_matches:
        if isinstance(match.proj_func, nn.Module):
            groups.append((match.proj_func, match.proj_group or {}))
    if distiller.learner is not None:
        groups.append((distiller.learner, distiller.learner_options))
    return groups


def _batches(
    distiller: BaseDistiller,
    runtime: engine.Runtime,
    task: str,
    loader: Iterable[Any],
    postprocess: PostProcessor | None,
) -> LoaderBatches:
    if distiller.cached_run is not None:
        return distiller.cached_run.source(task, loader, postprocess, _loader_name(task))
    if not distiller.d_config.is_caching_logits:
        return LoaderBatches(loader, postprocess, _loader_name(task))

    def remember(batch: Any) -> Remembered:
        return distiller.teachers.remember(runtime, task, batch, distiller.model_args, distiller.reads_everything())

    make_bar = partial(engine.progress_bar, distiller.t_config, runtime)
    return CachedBatches(loader, postprocess, _loader_name(task), remember, make_bar)


def _shares(distiller: BaseDistiller, runtime: engine.Runtime, batches: list[Any]) -> list[dict[str, Tensor]]:
    return weighting.shares([split(inner(batch))[1] for batch in batches], runtime, distiller.count_positions)


def _probe(distiller: BaseDistiller, runtime: engine.Runtime, data: Data) -> None:
    """Look at one batch before the training, where something must be known of it; nothing random is drawn for it.

    It builds the projections whose widths no configuration tells, and decides how a teacher cache stores its rows.
    """
    run = distiller.cached_run
    for number, (task, loader) in enumerate(data.loaders.items()):
        missing = [
            item
            for item in distiller.lessons[task].plan
            if item.match.projection and item.number not in distiller.projections
        ]
        unsettled = run is not None and not run.is_settled(task)
        waits = number == 0 and distiller.build_learner(None)
        if not unsettled and not missing and not waits:
            continue
        batch = engine.first_batch(loader, data.postprocessors.get(task))
        teacher_batch, student_batch, stored = split(batch)
        with engine.rng_kept(), torch.no_grad(), evaluating(distiller.model_S.to(runtime.device)):
            if run is not None and stored is None:
                results_T = run.first_views(task, teacher_batch)
            elif missing:
                said = distiller.teachers.said(runtime, task, teacher_batch, distiller.model_args, stored)
                results_T = said.features()
            else:
                results_T = []
            student_batch = runtime.to_device(student_batch)
            outputs_S = call(distiller.model_S, student_batch, distiller.student_args[task])
            results_S = Views(adaptors.normalise(distiller.adaptors_S[task](student_batch, outputs_S), "adaptor_S"))
        if waits:
            distiller.build_learner(results_S)
        if missing:
            distiller.build_projections(first_step.widths(results_S, results_T, missing))
        if run is not None and unsettled and stored is None:
            run.settle(task, teacher_batch, results_T, results_S, loader)


def _loader_name(task: str) -> str:
    return f"dataloaders[{task!r}]" if task else "dataloader"
