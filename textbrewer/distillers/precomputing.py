"""A teacher's outputs stored before the training, on another machine if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from textbrewer import adaptors, checks, engine
from textbrewer.adaptors import Adaptor
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import training
from textbrewer.distillers.batch_parts import split
from textbrewer.distillers.cached_run import Asked, matches_of, open_teacher, rows_in
from textbrewer.distillers.cached_teacher import CachedTeacher
from textbrewer.distillers.needs import needs_of
from textbrewer.distillers.teachers import Teachers
from textbrewer.hooks.forward import evaluating
from textbrewer.matching import plan_matches
from textbrewer.teacher_cache import CacheError, CacheInfo, Contents, TeacherCache


def precompute(
    teacher: nn.Module,
    dataloader: Iterable[Any],
    adaptor: Adaptor | str,
    cache: TeacherCache | str,
    distill_config: DistillationConfig | None = None,
    train_config: TrainingConfig | None = None,
    batch_postprocessor: Callable[[Any], Any] | None = None,
    task: str = "",
    number: int = 0,
    **args: Any,
) -> CacheInfo:
    """Run a teacher over a data set and store what the losses read of its outputs.

    Afterwards a distiller with the same ``distill_config`` and cache settings needs no teacher: ``model_T=None``. Rows
    that are stored already are left out, so an interrupted run goes on where it stopped; and under ``torchrun`` or
    ``accelerate launch`` the batches are shared among the processes.

    Args:
        teacher: the teacher.
        dataloader: yields the batches that the training will see, in any order and batch size.
        adaptor: what the teacher's outputs mean, or ``"auto"`` for a transformers model.
        cache: where to store: a ``TeacherCache``, or a folder.
        distill_config: what the training will learn; ``None``: logits.
        train_config: device, ``teacher_precision``, ``compile``, ``progress_bar``; the rest does not matter here.
        batch_postprocessor: applied to each batch, as in ``train()``.
        task: with a ``MultiTaskDistiller``: the teacher's task.
        number: with a ``MultiTeacherDistiller``: the teacher's number in the list.
        **args: further arguments of the model, as in ``train()``.

    Returns:
        The cache's figures.

    Raises:
        TypeError, ValueError: if an argument cannot work.
        CacheError: if the folder holds something else, or the rows cannot all be stored.
    """
    checks.is_a(teacher, nn.Module, "teacher", "a torch module")
    training.check_loader(dataloader, "dataloader")
    cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
    config = distill_config if distill_config is not None else DistillationConfig()
    checks.is_a(config, DistillationConfig, "distill_config", "a DistillationConfig")
    train_config = train_config if train_config is not None else TrainingConfig()
    checks.is_a(train_config, TrainingConfig, "train_config", "a TrainingConfig")
    plan = plan_matches(config.intermediate_matches)
    checks.is_a(task, str, "task", "a task's name")
    checks.integer(number, "number", minimum=0)
    teachers = Teachers(
        {task: [None] * number + [teacher]},
        {task: [adaptors.resolve(adaptor, "adaptor")] * (number + 1)},
        {task: plan},
        [],
    )
    needs = needs_of(number, config, plan, (), student_has_losses=False)
    asked = Asked(Contents(matches_of(plan, number, needs), everything=False), needs, config.temperature)
    with (
        engine.Runtime(train_config) as runtime,
        cache.opened(),
        evaluating(teacher.to(runtime.device)),
        teachers.prepared(runtime),
        torch.no_grad(),
    ):
        cached = open_teacher(cache, asked, teachers, runtime, task, number, args)
        loader = engine.shard(dataloader, runtime)
        size = engine.size_of(loader)
        with engine.progress_bar(train_config, runtime, total=size, desc="Teacher outputs", unit="batch") as bar:
            for batch in loader:
                batch = batch if batch_postprocessor is None else batch_postprocessor(batch)
                _store(cached, split(batch)[0], dataloader, train_config, runtime)
                bar.update(1)
        cache.flush()
        cached.space.finish()
        _check_all_stored(cache)
        runtime.wait()
        return cache.info()


def _store(cached: CachedTeacher, batch: Any, loader: Any, config: TrainingConfig, runtime: engine.Runtime) -> None:
    """Store the rows of a batch that are missing."""
    if cached.space.layout is None:
        views = cached.views(batch, None)
        cached.space.settle(batch, views, None, rows_in(loader, batch))
        engine.say(config, runtime, cached.space.plan_line)
        cached.store(batch, views)
        return
    _check_all_stored(cached.space.cache)
    found = cached.look_up(batch, 0)
    if found is not None and found.missing:
        cached.views(batch, found)


def _check_all_stored(cache: TeacherCache) -> None:
    if cache.stopped is not None:
        raise CacheError(
            f"not all rows could be stored in the teacher cache {str(cache.path)!r}: {cache.stopped}; make room or "
            "raise max_bytes, and run it again: what is stored stays"
        )
