"""Distillation from several teachers of one task."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor, nn

from textbrewer.adaptors import Adaptor, Views
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import heads
from textbrewer.distillers.base import Results
from textbrewer.distillers.single_task import SingleTaskDistiller
from textbrewer.teacher_cache import TeacherCache


class MultiTeacherDistiller(SingleTaskDistiller):
    """Distils the mean of several teachers' logits into a student, and features of each of them.

    Args:
        train_config: how to train.
        distill_config: what to learn; each intermediate match names its ``teacher`` by number (0 without).
        model_T: the teachers, a list.
        model_S: the student.
        adaptor_T: one adaptor for all teachers, or a list of one each; ``"auto"`` for transformers models.
        adaptor_S: what the student's outputs mean, likewise.
        teacher_cache: where the teachers' outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, teachers may be ``None``.

    Raises:
        ValueError: if there are not as many adaptors as teachers.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Sequence[nn.Module | None],
        model_S: nn.Module,
        adaptor_T: Adaptor | str | Sequence[Adaptor | str],
        adaptor_S: Adaptor | str,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model_T, (list, tuple, nn.ModuleList)) or len(model_T) == 0:
            raise TypeError(f"model_T must be a list of teachers, got {type(model_T).__name__}")
        adaptors_T: list[Adaptor | str]
        if isinstance(adaptor_T, Sequence) and not isinstance(adaptor_T, str):
            adaptors_T = list(adaptor_T)
        else:
            adaptors_T = [adaptor_T] * len(model_T)
        if len(adaptors_T) != len(model_T):
            raise ValueError(f"adaptor_T must be one adaptor, or one a teacher ({len(model_T)}), got {len(adaptors_T)}")
        super().__init__(
            train_config,
            distill_config,
            {"": model_T},
            model_S,
            {"": adaptors_T},
            {"": adaptor_S},
            teacher_cache=teacher_cache,
        )
        self.model_T, self.adaptor_T, self.adaptor_S = model_T, adaptor_T, adaptor_S

    def _as_results(self, results_T: list[Views]) -> Results:
        return results_T

    def kd_target(self, results_T: Results) -> Views:
        """Return views with the mean of the teachers' logits.

        Raises:
            KeyError: if only some of the teachers have logits.
            ValueError: if their numbers of heads or shapes differ.
        """
        return mean_logits(results_T)


def mean_logits(results_T: Sequence[Views]) -> Views:
    """Return views with the mean of the teachers' logits by head, each teacher's under its own mask.

    Args:
        results_T: the views of each teacher.

    Raises:
        KeyError: if only some of the teachers have logits.
        ValueError: if their numbers of heads or shapes differ.
    """
    having = [number for number, results in enumerate(results_T) if "logits" in results]
    if not having:
        return Views({})
    if len(having) < len(results_T):
        raise KeyError(f"all teachers' adaptors must return 'logits' or none of them; only those of {having} did")
    counts = [len(results["logits"]) for results in results_T]
    if len(set(counts)) > 1:
        raise ValueError(f"'logits' of all teachers must have as many heads, got {counts}")
    means, masks = [], []
    for head in range(counts[0]):
        own = [heads.masks_of(results, counts[0])[head] for results in results_T]
        logits, mask = _mean([results["logits"][head] for results in results_T], own)
        means.append(logits)
        masks.append(mask)
    views = Views({"logits": means})
    if any(mask is not None for mask in masks):
        views["logits_mask"] = masks
    return views


def _mean(logits: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Return the mean of one head's logits over the teachers, and its mask; a teacher without one shares the first."""
    mask = next((item for item in masks if item is not None), None)
    if logits[0].dim() == 3 and mask is not None:
        own = [mask if item is None else item for item in masks]
        aligned = [
            heads.align(logits[0], item, own[0], each, None, ("adaptor_T[0]", f"adaptor_T[{number}]"))
            for number, (item, each) in enumerate(zip(logits, own, strict=True))
        ]
        mask = own[0]
        if any(front is not logits[0] for front, *_ in aligned):
            # Some teacher picks other positions: bring the picked ones of each to the front before averaging.
            fronts = [heads.to_front(item, each, None) for item, each in zip(logits, own, strict=True)]
            count = min(len(front) for front, *_ in fronts)
            logits = [front[:count].unsqueeze(0) for front, *_ in fronts]
            mask = fronts[0][1][:count].unsqueeze(0)
    shapes = {tuple(item.shape) for item in logits}
    if len(shapes) > 1:
        raise ValueError(f"logits of all teachers must have the same shape, got {sorted(shapes)}")
    return sum(logits[1:], logits[0]) / len(logits), mask
