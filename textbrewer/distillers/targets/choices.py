"""Targets that ask one teacher: drawn for each batch, or named by each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.distillers import heads, terms
from textbrewer.distillers.batch_parts import TaskBatch, inner
from textbrewer.distillers.targets.base import TARGETS, Blend, Moment, Target, checked_weights
from textbrewer.distillers.targets.drawing import DrawnBatches
from textbrewer.distillers.targets.separate import Separate, SeparateBlend
from textbrewer.engine import Source
from textbrewer.teacher_cache.keys import entries_of, row_count

__all__ = ["Route", "Sample"]

_TEACHERS = "teacher_of_row"


@TARGETS.add("sample")
class Sample(Separate):
    """One teacher a batch, drawn at random: the expected loss is that of ``mean_loss``, for one forward pass a step.

    Only the teacher that is drawn runs, and only its intermediate matches count in that step. The draws have a
    generator of their own: they are the same on all processes, and go on after a resume as if nothing had happened.
    With gradient accumulation each micro-batch draws its own.

    Args:
        count: how many teachers there are.
        weights: the probability of each; their sum is made 1; ``None``: all the same.
        seed: of the draws.
    """

    reads_student = False

    def __init__(self, count: int, weights: Sequence[float] | None = None, seed: int = 0) -> None:
        super().__init__(count)
        self.weights = checked_weights(weights, count, "weights of target 'sample'")
        checks.integer(seed, "seed of target 'sample'", minimum=0)
        self.seed = int(seed)

    def source(self, batches: Source) -> Source:
        """Return the batches, each with the teacher that was drawn for it."""
        return DrawnBatches(batches, self.weights, self.seed)

    def choice(self, batch: Any) -> int:
        """Return the number of the teacher that was drawn."""
        drawn = batch.teacher if isinstance(batch, TaskBatch) else None
        if drawn is None:
            raise ValueError("target='sample' needs batches for which a teacher was drawn, as train() makes them")
        return int(drawn)

    def numbers(self, choice: Any) -> Sequence[int]:
        """Return the one teacher."""
        return [int(choice)]

    def start(self, moment: Moment) -> Blend:
        """Return what takes in the one teacher."""
        return _Only(self, moment)

    def combine(self, losses: Sequence[Tensor], blend: SeparateBlend, results_S: Views) -> Tensor:
        """Return the only loss."""
        (loss,) = losses
        return loss


class _Only(SeparateBlend):
    """One teacher, compared with the student when both have been heard."""

    def add(self, number: int, results_T: Views, rows: Sequence[int] | None = None) -> None:
        """Keep what the teacher says."""
        self.results_T = Views(results_T)

    def terms(self, results_S: Views) -> list[terms.Term]:
        """Return the KD term."""
        return terms.kd_terms(results_S, self.results_T, self.moment.knowledge, self.moment.now)


@TARGETS.add("route")
class Route(Target):
    """The teacher that each row names: of domains, languages or tasks of the same classes.

    A column of the batch holds each row's teacher, by its number in ``model_T``. It is taken out of the batch and
    reaches no model. Each teacher runs on its own rows only, unless an intermediate match reads it: matches are over
    all rows. A teacher that sees all rows, because its outputs come from a cache, gives the same.

    With :func:`textbrewer.precompute` take the column out of the batches (``batch_postprocessor``): there it would
    reach the teacher.

    Args:
        count: how many teachers there are.
        column: its name, in a dict batch or (with ``'teacher'`` and ``'student'``) beside these or in one of them.
    """

    def __init__(self, count: int, column: str = "teacher_id") -> None:
        super().__init__(count)
        checks.is_a(column, str, "column of target 'route'", "a name")
        self.column = column

    def start(self, moment: Moment) -> Blend:
        """Return what takes in the teachers of a step."""
        return RouteBlend(moment)

    def choice(self, batch: Any) -> list[int]:
        """Return each row's teacher."""
        batch = inner(batch)
        if not isinstance(batch, Mapping) or _TEACHERS not in batch:
            raise ValueError("target='route' needs batches whose column was read, as train() makes them")
        return list(batch[_TEACHERS])

    def rows(self, number: int, choice: Any) -> Sequence[int]:
        """Return the rows that name a teacher."""
        return [row for row, teacher in enumerate(choice) if teacher == number]

    def postprocessor(self, given: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        """Return what takes the column out of each batch."""
        return lambda batch: self.read(batch if given is None else given(batch))

    def read(self, batch: Any) -> dict[str, Any]:
        """Return a batch with a part for each side, and each row's teacher beside these.

        Raises:
            TypeError: if the batch is no dict, or the column holds no whole numbers.
            KeyError: if there is no such column.
            ValueError: if a number is not a teacher's, or there is not one for each row.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"target='route' reads a column of dict batches, got a batch of type {type(batch).__name__}"
            )
        sides = {"teacher", "student", "teacher_cache"} & set(batch)
        if "student" not in sides or len(sides) < 2:
            rest = self._without(batch)
            return {"teacher": rest, "student": rest, _TEACHERS: self._numbers(self._found([batch]), rest)}
        parts = {side: self._without(batch[side]) for side in sides}
        found = self._found([batch, batch["student"], batch.get("teacher")])
        return {**parts, _TEACHERS: self._numbers(found, parts["student"])}

    def _found(self, places: Sequence[Any]) -> Any:
        for place in places:
            if isinstance(place, Mapping) and self.column in place:
                return place[self.column]
        names = sorted({str(name) for place in places if isinstance(place, Mapping) for name in place})
        raise KeyError(f"target='route' needs the column {self.column!r} in every batch, which has only {names}")

    def _without(self, part: Any) -> Any:
        if not isinstance(part, Mapping) or self.column not in part:
            return part
        return type(part)({name: value for name, value in part.items() if name != self.column})  # type: ignore[call-arg]

    def _numbers(self, column: Any, rest: Any) -> list[int]:
        values = column.tolist() if isinstance(column, Tensor) else list(column)
        rows = row_count(entries_of(rest))
        if len(values) != rows:
            raise ValueError(
                f"column {self.column!r} must have one number for each row of the batch ({rows}), got {len(values)}"
            )
        for row, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"column {self.column!r} must hold one whole number a row, got {value!r} in row {row}")
            if not 0 <= value < self.count:
                raise ValueError(
                    f"column {self.column!r} must name teachers from 0 to {self.count - 1}, got {value} in row {row}"
                )
        return values


class RouteBlend(Blend):
    """The teachers of one step, of each the rows that name it.

    Args:
        moment: the step; its choice is each row's teacher.
    """

    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self.moment, self.of_row = moment, list(moment.choice)
        self.logits: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.having: dict[int, tuple[int, bool]] = {}

    def add(self, number: int, results_T: Views, rows: Sequence[int] | None = None) -> None:
        """Take in a teacher's rows.

        Raises:
            ValueError: if teachers differ in heads, shapes or masks, or their logits have other rows than the batch.
        """
        own = [row for row, teacher in enumerate(self.of_row) if teacher == number]
        if not own:
            return
        if "logits" not in results_T:
            self.having[number] = (0, False)
            return
        given = results_T["logits"]
        masks = heads.masks_of(results_T, len(given)) if "logits_mask" in results_T else []
        self.having[number] = (len(given), bool(masks))
        if len(set(self.having.values())) > 1:
            raise ValueError(
                "all teachers must return as many heads of logits, and all a logits_mask or none of them, got "
                f"{ {teacher: {'heads': count, 'mask': mask} for teacher, (count, mask) in self.having.items()} }"
            )
        count = len(self.of_row) if rows is None else len(rows)
        picked = torch.tensor(own, device=given[0].device)
        self.logits = self._filled(self.logits, given, count, picked, rows is None)
        self.masks = self._filled(self.masks, [item for item in masks if item is not None], count, picked, rows is None)

    def _filled(
        self,
        kept: list[Tensor],
        given: Sequence[Tensor],
        count: int,
        picked: Tensor,
        whole: bool,
    ) -> list[Tensor]:
        """Return what is kept with a teacher's rows written into it."""
        filled = []
        for place, tensor in enumerate(given):
            if len(tensor) != count:
                raise ValueError(
                    f"target='route' needs logits with one row for each row of the batch ({count}), got {len(tensor)}"
                )
            shape = (len(self.of_row), *tensor.shape[1:])
            into = kept[place] if kept else tensor.new_zeros(shape)
            if into.shape != shape:
                raise ValueError(
                    f"logits of all teachers must have the same shape, got {sorted({tuple(into.shape), shape})}"
                )
            filled.append(into.index_copy(0, picked, tensor[picked] if whole else tensor))
        return filled

    def terms(self, results_S: Views) -> list[terms.Term]:
        """Return the KD term.

        Raises:
            KeyError: if only some of the teachers have logits.
        """
        having = [number for number, (count, _) in self.having.items() if count]
        if having and len(having) < len(self.having):
            raise KeyError(f"all teachers' adaptors must return 'logits' or none of them; only those of {having} did")
        views = Views({"logits": self.logits} if self.logits else {})
        if self.masks:
            views["logits_mask"] = self.masks
        return terms.kd_terms(results_S, views, self.moment.knowledge, self.moment.now)
