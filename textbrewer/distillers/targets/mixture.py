"""Targets that mix the teachers' logits: each teacher is added to a running mean and forgotten."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.distillers import first_step, heads, terms
from textbrewer.distillers.targets.base import Blend, Moment, Target
from textbrewer.distillers.targets.positions import Positions, carry

__all__ = ["Mixture", "MixtureBlend", "log_probabilities", "log_probability_of", "wide"]


class Mixture(Target):
    """A target whose mean over the teachers can be taken while they come.

    The subclasses say what is kept of one teacher (:meth:`parts`), how the next is taken in (:meth:`merge`), and what
    logits the student then learns from (:meth:`logits`). All tensors have the positions of the logits, without or with
    the classes.
    """

    shifts_each = True
    """Whether ``probability_shift`` is applied to each teacher; if not, to what the student learns from."""

    def start(self, moment: Moment) -> Blend:
        """Return what takes in the teachers of a step."""
        return MixtureBlend(self, moment)

    @abstractmethod
    def parts(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> list[Tensor]:
        """Return what is kept of one teacher's logits; the first tensor has their shape."""

    @abstractmethod
    def merge(self, kept: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """Return what is kept with the next teacher; ``kept`` is empty at the first."""

    @abstractmethod
    def logits(self, kept: list[Tensor], temperature: float) -> Tensor:
        """Return the logits that the student learns from."""


class MixtureBlend(Blend):
    """The teachers of one step, each added to what is kept of them.

    Args:
        target: the target.
        moment: the step.
    """

    def __init__(self, target: Mixture, moment: Moment) -> None:
        super().__init__()
        self.target, self.moment = target, moment
        self.positions: list[Positions] = []
        self.counts: list[int] = []
        self.having: list[int] = []
        self.asked = 0
        self.shifts = target.shifts_each and moment.knowledge.probability_shift
        self.why_labels = "probability_shift=True" if self.shifts else target.reads_labels
        if self.why_labels and moment.first and moment.results_S is not None:
            first_step.check_labels(moment.results_S)

    def add(self, number: int, results_T: Views, rows: Sequence[int] | None = None) -> None:
        """Take in what a teacher says.

        Raises:
            KeyError: if labels are needed and missing.
            ValueError: if teachers differ in heads, shapes, or numbers of masked positions.
        """
        self.asked += 1
        if "logits" not in results_T:
            return
        self.having.append(number)
        self.counts.append(len(results_T["logits"]))
        if len(set(self.counts)) > 1:
            raise ValueError(f"'logits' of all teachers must have as many heads, got {self.counts}")
        masks = heads.masks_of(results_T, self.counts[0])
        labels = self._labels(results_T, masks)
        for head, (logits, mask) in enumerate(zip(results_T["logits"], masks, strict=True)):
            if head == len(self.positions):
                self.positions.append(Positions())
            fresh = self.parts(number, head, logits, labels[head])
            self.positions[head].add(number, fresh, mask, self.target.merge)

    def parts(self, number: int, head: int, logits: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return what is kept of one head of a teacher."""
        if self.shifts and labels is not None:
            logits = heads.probability_shift(logits, labels)
        return self.target.parts(number, logits, labels, self.moment)

    def _labels(self, results_T: Views, masks: list[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the labels at the positions of a teacher's logits, by head; ``None`` where nothing reads them."""
        results_S, count = self.moment.results_S, self.counts[0]
        if not self.why_labels or results_S is None:
            return [None] * count
        heads_S, heads_T = heads.logits_of(results_S, results_T)
        for head_S, head_T in zip(heads_S, heads_T, strict=True):
            if head_S.shape[-1] != head_T.shape[-1]:
                raise ValueError(
                    f"logits of student and teacher must have as many classes, got {head_S.shape[-1]} and "
                    f"{head_T.shape[-1]}"
                )
        given = heads.labels_of(results_S, count, self.why_labels)
        masks_S = heads.masks_of(results_S, count)
        return [carry(*each) for each in zip(given, heads_T, masks_S, masks, strict=True)]

    def views(self) -> Views:
        """Return views with the logits that the student learns from.

        Raises:
            KeyError: if only some of the teachers have logits.
        """
        if not self.having:
            return Views({})
        if len(self.having) < self.asked:
            raise KeyError(
                f"all teachers' adaptors must return 'logits' or none of them; only those of {self.having} did"
            )
        temperature = self.moment.knowledge.temperature
        views = Views({"logits": [self.target.logits(item.kept, temperature) for item in self.positions]})
        masks = [item.mask for item in self.positions]
        if any(mask is not None for mask in masks):
            views["logits_mask"] = masks
        return views

    def terms(self, results_S: Views) -> list[terms.Term]:
        """Return the KD term."""
        knowledge = self.moment.knowledge
        if self.shifts:
            knowledge = dataclasses.replace(knowledge, probability_shift=False)
        return terms.kd_terms(results_S, self.views(), knowledge, self.moment.now)


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of the softmax at a temperature, in float32 or wider."""
    return torch.log_softmax(wide(logits) / temperature, dim=-1)


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def log_probability_of(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logarithm of the true class's probability by position, 0 without a label (a negative one).

    Raises:
        ValueError: without labels.
    """
    if labels is None:
        raise ValueError("labels are needed and were not given")
    logs = log_probabilities(logits, 1.0).gather(-1, labels.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(labels >= 0, logs, 0.0)
