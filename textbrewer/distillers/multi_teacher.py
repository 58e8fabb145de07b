"""Distillation from several teachers of one task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from textbrewer.adaptors import Adaptor, Views, one_each
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import terms
from textbrewer.distillers.base import Results
from textbrewer.distillers.hearing import Said, Unheard, heard
from textbrewer.distillers.knowledge import KnowledgeLoss
from textbrewer.distillers.placement import make_placement
from textbrewer.distillers.single_task import SingleTaskDistiller
from textbrewer.distillers.targets import Blend, Heard, Mixture, Moment, make_target
from textbrewer.distillers.targets.means import MeanLogits
from textbrewer.distillers.targets.mixture import MixtureBlend
from textbrewer.engine import Source
from textbrewer.losses import kd_ce_loss
from textbrewer.teacher_cache import TeacherCache


class MultiTeacherDistiller(SingleTaskDistiller):
    """Distils several teachers' logits, their mean or another target, into a student, and features of each of them.

    The teachers run one after the other, and each one's logits are let go as soon as they are part of the target.

    Args:
        train_config: how to train.
        distill_config: what to learn; each intermediate match names its ``teacher`` by number (0 without).
        model_T: the teachers, a list.
        model_S: the student.
        adaptor_T: one adaptor for all teachers, or a list of one each; ``"auto"`` for transformers models.
        adaptor_S: what the student's outputs mean, likewise.
        teacher_cache: where the teachers' outputs are stored and found again: a ``TeacherCache`` or a folder. With
            every row in it, teachers may be ``None``.
        target: how several teachers become one KD loss: a name of :data:`textbrewer.distillers.targets.TARGETS` such
            as ``"mean_probs"``, ``"ca_mkd"`` or ``"sample"``, or ``[name, {option: value}]``.
        teacher_devices: the device of each teacher, ``None`` for the run's; what they say comes to the student's.
        teacher_precisions: the precision of each teacher's forward pass, as ``TrainingConfig.teacher_precision``;
            ``None`` for that one.

    Raises:
        ValueError: if there are not as many adaptors, devices or precisions as teachers.
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
        target: str | Sequence[Any] = "mean_logits",
        teacher_devices: Sequence[Any] | None = None,
        teacher_precisions: Sequence[str | None] | None = None,
    ) -> None:
        if not isinstance(model_T, (list, tuple, nn.ModuleList)) or len(model_T) == 0:
            raise TypeError(f"model_T must be a list of teachers, got {type(model_T).__name__}")
        super().__init__(
            train_config,
            distill_config,
            {"": model_T},
            model_S,
            {"": one_each(adaptor_T, len(model_T), "adaptor_T", "teacher")},
            {"": adaptor_S},
            teacher_cache=teacher_cache,
        )
        self.model_T, self.adaptor_T, self.adaptor_S = model_T, adaptor_T, adaptor_S
        self.target = make_target(target, len(model_T))
        self.learner, self.learner_options = self.target.learner, self.target.learner_options
        self.teachers.placement = make_placement(teacher_devices, teacher_precisions, model_T)
        self._choice: Any = None
        self._figures: dict[str, Tensor] = {}

    # ---- what is asked of the teachers -------------------------------------------------------------------------

    def step(self, module: nn.Module, batch: Any, progress: float, share: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Do one forward pass of both sides; see :meth:`BaseDistiller.step`."""
        self._choice, self._figures = self.target.choice(batch), {}
        return super().step(module, batch, progress, share)

    def _student_first(self) -> bool:
        shifts = isinstance(self.target, Mixture) and self.target.shifts_each and self.d_config.probability_shift
        return self._blends() and (self.target.reads_student or shifts)

    def _blends(self) -> bool:
        """Return whether logits are let go: not where the user's own code reads them, or the loss does not."""
        return not self.reads_everything() and self.d_config.kd_loss_weight != 0

    def _hear(self, said: Said, results_S: Views | None) -> list[Views]:
        """Ask the teachers of this batch, one after the other, and let go of the logits."""
        views: list[Views] = [Unheard() for _ in range(len(said))]
        blend = self.target.start(self._moment(results_S)) if self._blends() else None
        for number in self.target.numbers(self._choice):
            rows = None if blend is None or self._matched(number) else self.target.rows(number, self._choice)
            if rows is not None and (not rows or said.part is not None):
                if rows and said.part is not None and blend is not None:
                    blend.add(number, said.part(number, rows), rows)
                continue
            found = said(number)
            if blend is not None:
                blend.add(number, found)
                _let_go(found)
            views[number] = found
        return views if blend is None else Heard(views, blend)

    def _matched(self, number: int) -> bool:
        """Return whether a match reads a teacher."""
        return any(
            planned.match.teacher == number and (planned.match.weight or not self._may_skip())
            for planned in self.lesson.plan
        )

    def _moment(self, results_S: Views | None) -> Moment:
        return Moment(
            self.lesson.knowledge,
            self.now,
            results_S,
            self._choice,
            self._key("") not in self._checked,
            self.runtime.sum_over_ranks if self._runtime is not None else lambda value: value,
        )

    def _key(self, task: str) -> Any:
        """Return the task and, where one teacher is asked, which."""
        asked = tuple(self.target.numbers(self._choice))
        return (task, asked) if len(asked) < len(self.teachers.models[""]) else task

    # ---- what is made of it ------------------------------------------------------------------------------------

    def _as_results(self, results_T: list[Views]) -> Results:
        return results_T

    def _kd_terms(self, results_S: Views, results_T: Results) -> list[terms.Term]:
        if self._own_target():
            return super()._kd_terms(results_S, results_T)
        blend = results_T.blend if isinstance(results_T, Heard) else self._blend(results_S, results_T)
        found: list[terms.Term] = blend.terms(results_S)
        self._figures = blend.figures
        return self._with_unheard(found, results_S, results_T)

    def _blend(self, results_S: Views | None, results_T: Sequence[Views]) -> Blend:
        """Return what takes in teachers that have all been asked."""
        blend = self.target.start(self._moment(results_S))
        for number, views in enumerate(results_T):
            if not isinstance(views, Unheard):
                blend.add(number, views)
        return blend

    def _with_unheard(self, found: list[terms.Term], results_S: Views, results_T: Sequence[Views]) -> list[terms.Term]:
        """Return the terms, with a gradient of 0 for projections to teachers that were not asked.

        Processes that train together must give every parameter a gradient.
        """
        numbers = {planned.number for planned in heard(self.lesson.plan, results_T)}
        left = [item for number, item in results_S.projected.items() if number not in numbers]
        if self._may_skip() or not left or not found:
            return found
        nothing = [item.sum() * 0 for feature in left for item in (feature if isinstance(feature, list) else [feature])]
        return [dataclasses.replace(found[0], value=found[0].value + sum(nothing)), *found[1:]]

    def kd_target(self, results_T: Results) -> Views:
        """Return the views whose logits the student learns from. Override this to make them yourself.

        Args:
            results_T: the views of each teacher.

        Raises:
            KeyError: if only some of the teachers have logits.
            ValueError: if their numbers of heads or shapes differ, or the target depends on more than the teachers.
        """
        blend = None if self.target.reads_student else self._blend(None, results_T)
        if not isinstance(blend, MixtureBlend):
            raise ValueError(
                f"{type(self.target).__name__} makes no logits of the teachers' views alone; override compute_loss"
            )
        return blend.views()

    def _finish(
        self, loss: Tensor, logs: dict[str, Tensor], results_S: Views, task: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return loss, {**logs, **self._figures}

    # ---- around the training -----------------------------------------------------------------------------------

    def build_learner(self, results_S: Views | None) -> bool:
        """Build what the target learns; return whether a batch's views are needed for it."""
        waits = self.target.build_learner(results_S)
        self.learner = self.target.learner
        return waits

    def _student_features(self) -> set[str]:
        return set(self.target.student_features)

    def _postprocessor(self, given: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        return self.target.postprocessor(given)

    def _source(self, batches: Source) -> Source:
        return self.target.source(batches)


def mean_logits(results_T: Sequence[Views]) -> Views:
    """Return views with the mean of the teachers' logits by head, each teacher's under its own mask.

    Args:
        results_T: the views of each teacher.

    Raises:
        KeyError: if only some of the teachers have logits.
        ValueError: if their numbers of heads or shapes differ.
    """
    moment = Moment(KnowledgeLoss(kd_ce_loss, 1.0), terms.Now(1.0, 0.0))
    blend = MixtureBlend(MeanLogits(len(results_T)), moment)
    for number, views in enumerate(results_T):
        blend.add(number, views)
    return blend.views()


def _let_go(views: Views) -> None:
    """Leave a teacher's logits their shape alone."""
    if "logits" in views:
        views["logits"] = [logits.to("meta") for logits in views["logits"]]
