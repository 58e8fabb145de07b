"""A distiller's teacher cache in a run: what is asked of it, how rows are stored, and batches looked up ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from textbrewer import checks, engine
from textbrewer.adaptors import Views
from textbrewer.configurations import DistillationConfig, IntermediateMatch
from textbrewer.distillers.batch_parts import split
from textbrewer.distillers.cached_teacher import CachedTeacher, Prepared
from textbrewer.distillers.hearing import Unheard
from textbrewer.distillers.needs import Needs
from textbrewer.distillers.teachers import Teachers
from textbrewer.hooks.forward import is_encoder_decoder
from textbrewer.hooks.modules import label
from textbrewer.matching import PlannedMatch
from textbrewer.teacher_cache import CacheError, Contents, Space, TeacherCache, fingerprint, layout
from textbrewer.teacher_cache.contents import form_of_match
from textbrewer.teacher_cache.keys import entries_of, row_count

if TYPE_CHECKING:
    from textbrewer.distillers.base import BaseDistiller


def resolve(given: Any, config: DistillationConfig) -> TeacherCache | None:
    """Return the cache that a distiller was given, or that its configuration names.

    Raises:
        TypeError: if it is neither a cache nor a path.
        ValueError: if two are given, or one beside ``is_caching_logits``.
    """
    if given is not None and config.teacher_cache is not None:
        raise ValueError(
            f"teacher_cache={given!r} and DistillationConfig(teacher_cache={config.teacher_cache!r}) were both given; "
            "give one of them"
        )
    given = config.teacher_cache if given is None else given
    if given is None:
        return None
    if config.is_caching_logits:
        raise ValueError(
            "teacher_cache and is_caching_logits=True exclude each other: the first stores the teacher's outputs on "
            "the disk, the second keeps them in memory; give one of them"
        )
    checks.is_a(given, (TeacherCache, str, os.PathLike), "teacher_cache", "a TeacherCache or a folder")
    return given if isinstance(given, TeacherCache) else TeacherCache(given)


class CachedRun:
    """The cache of a distiller's teachers while a run is at work.

    Args:
        distiller: whose teachers they are.
        runtime: the machine.
        cache: the cache, open.
    """

    def __init__(self, distiller: BaseDistiller, runtime: engine.Runtime, cache: TeacherCache) -> None:
        self.distiller, self.runtime, self.cache = distiller, runtime, cache
        self.teachers: dict[str, list[CachedTeacher]] = {}
        custom = [match.module_T for match in distiller.custom_matches]
        for task, models in distiller.teachers.models.items():
            self.teachers[task] = []
            lesson = distiller.lessons[task]
            for number in range(len(models)):
                needs = distiller.teacher_needs(task, number)
                asked = Asked(
                    Contents(matches_of(lesson.plan, number, needs), distiller.reads_everything()),
                    needs,
                    lesson.config.temperature,
                    custom if number == 0 else [],
                    lesson.first_number,
                )
                opened = open_teacher(cache, asked, distiller.teachers, runtime, task, number, distiller.model_args)
                self.teachers[task].append(opened)
        distiller.teachers.cached = self.teachers

    # ---- the first batch -------------------------------------------------------------------------------------------

    def is_settled(self, task: str) -> bool:
        """Return whether it is known how the rows of a task are stored."""
        return all(teacher.space.layout is not None for teacher in self.teachers[task])

    def first_views(self, task: str, batch: Any) -> list[Views]:
        """Return the teachers' views of a first batch: stored ones where they are, else those of a run."""
        return [teacher.views(batch, teacher.look_up(batch, 0)) for teacher in self.teachers[task]]

    def settle(self, task: str, batch: Any, results_T: list[Views], results_S: Views, loader: Iterable[Any]) -> None:
        """Decide how the rows of a task are stored, say so, and store those of the first batch."""
        for teacher, views in zip(self.teachers[task], results_T, strict=True):
            if teacher.space.layout is None:
                teacher.space.settle(batch, views, results_S, rows_in(loader, batch))
                engine.say(self.distiller.t_config, self.runtime, teacher.space.plan_line)
                teacher.store(batch, views)

    # ---- batches ---------------------------------------------------------------------------------------------------

    def source(
        self, task: str, loader: Iterable[Any], postprocess: Callable[[Any], Any] | None, name: str
    ) -> engine.PreparedBatches:
        """Return the batches of a task, looked up in the cache on a thread while the step before is at work."""
        return engine.PreparedBatches(loader, postprocess, name, partial(self._prepare, task), self.cache.waited)

    def _prepare(self, task: str, batch: Any, epoch: int) -> Prepared:
        teacher_batch, _, stored = split(batch)
        if stored is not None:
            return Prepared(batch, None)
        return Prepared(batch, [teacher.look_up(teacher_batch, epoch) for teacher in self.teachers[task]])

    def check(self, task: str, batch: Prepared, results_S: Views, results_T: list[Views]) -> None:
        """Check by a batch's masks that the losses leave out what was not stored.

        Raises:
            CacheError: if padding was not stored that they count, or forms were made with another mask.
        """
        for teacher, found, views in zip(self.teachers[task], batch.found or [], results_T, strict=False):
            settled = teacher.space.layout
            if found is None or settled is None or isinstance(views, Unheard):
                continue
            contents = teacher.space.contents
            if not layout.forms_are_valid(results_S, views, contents):
                raise CacheError(
                    f"the teacher cache {str(self.cache.path)!r} has means or products that were made with the "
                    "teacher's 'inputs_mask', but that of the student is another one; return the same from both "
                    "adaptors, or give the cache a new folder"
                )
            if settled.keep_padding or not found.rows.padded:
                continue
            if not layout.masks_cover_padding(results_S, views, found.rows, contents):
                raise CacheError(
                    f"the rows in the teacher cache {str(self.cache.path)!r} were stored without padding, but the "
                    "losses of this run count it: the adaptors' 'inputs_mask' and 'logits_mask' must leave it out; "
                    "return them, or use TeacherCache(..., keep_padding=True)"
                )

    def finish(self) -> None:
        """Finish what is written, and note what the teachers cost."""
        self.cache.flush()
        for teachers in self.teachers.values():
            for teacher in teachers:
                teacher.space.tell()
                teacher.space.finish()
        self.distiller.teachers.cached = {}


@dataclass(frozen=True)
class Asked:
    """What is asked of one teacher.

    Args:
        contents: what the losses read.
        needs: how far it has to run; ``None``: to its end.
        temperature: of the logits.
        custom: its modules whose outputs custom matches read.
        first_number: the number of its task's first match: a task's rows do not depend on the tasks before it.
    """

    contents: Contents
    needs: Needs | None
    temperature: float
    custom: Sequence[nn.Module | str] = ()
    first_number: int = 0

    def to_dict(self, cache: TeacherCache, model: nn.Module | None) -> dict[str, Any]:
        """Return it as plain values, with what the cache's settings say."""
        matches = []
        for number, match in self.contents.matches:
            form = form_of_match(match)
            matches.append(
                [number - self.first_number, match.feature, match.layer_T, None if form is None else form.name]
            )
        return {
            "matches": matches,
            "logits": self.needs is None or self.needs.logits,
            "everything": self.contents.everything,
            "custom": [item if isinstance(item, str) or model is None else label(model, item) for item in self.custom],
            "dtype": cache.dtype,
            "top_k": cache.top_k,
            "temperature": self.temperature if cache.top_k is not None else None,
            "mask": cache.mask,
            "keep_padding": cache.keep_padding,
        }


def matches_of(plan: Sequence[PlannedMatch], number: int, needs: Needs | None) -> list[tuple[int, IntermediateMatch]]:
    """Return the matches with one teacher that are computed, with their numbers; all of them where it is not known."""
    mine = [item for item in plan if item.match.teacher == number]
    return [(item.number, item.match) for item in mine if needs is None or item.match.weight]


def open_teacher(
    cache: TeacherCache,
    asked: Asked,
    teachers: Teachers,
    runtime: engine.Runtime,
    task: str,
    number: int,
    model_args: dict[str, Any],
) -> CachedTeacher:
    """Return a teacher with its rows in an open cache.

    Args:
        cache: the cache.
        asked: what is asked of the teacher.
        teachers: all teachers.
        runtime: the machine.
        task: the teacher's task.
        number: the teacher's number.
        model_args: further arguments of the model.
    """
    model, adaptor = teachers.models[task][number], teachers.adaptors[task][number]
    precision = teachers.placement.precision(runtime, number)
    teacher: dict[str, Any] = dict.fromkeys(("teacher", "adaptor", "precision", "arguments"))
    if model is not None:
        teacher = {
            "teacher": fingerprint.of_model(model),
            "adaptor": fingerprint.of_function(adaptor),
            "precision": f"{runtime.precision}, {precision or runtime.precision}",
            "arguments": repr(sorted(model_args.items())),
        }
    two_stacks = model is not None and any(map(is_encoder_decoder, model.modules()))
    if two_stacks:
        teacher["positions"] = "of encoder and decoder"
    space = Space(cache, {**asked.to_dict(cache, model), **teacher}, asked.contents, f"{task}/{number}", two_stacks)
    space.open()

    def run(batch: Any, needs: Needs | None) -> Views:
        teachers.narrow(task, number, asked.needs if needs is None else needs)
        return teachers.view(runtime, task, number, batch, model_args)

    return CachedTeacher(space, None if model is None else run, runtime.to_device)


def rows_in(loader: Any, batch: Any) -> int | None:
    """Return how many rows a loader has, about; ``None`` if it does not tell."""
    batches = engine.size_of(loader)
    if batches is None:
        return None
    rows = batches * row_count(entries_of(batch))
    dataset = engine.size_of(getattr(loader, "dataset", None))
    # A dataset may be of rows, or of whole batches.
    return min(rows, dataset) if dataset is not None and dataset > batches else rows
