"""The parts of the loss: pure functions from views to terms, shared by all distillers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.losses.masking import denominator_of
from textbrewer.matching import CustomMatch, PlannedMatch, select


@dataclass(frozen=True)
class Now:
    """What is scheduled for the step under way.

    Args:
        kd_weight: factor of the KD loss.
        hard_label_weight: factor of the adaptor's losses.
        share: for exact accumulation, this micro-batch's factor for each kind of average; ``None``: 1 for all.
    """

    kd_weight: float
    hard_label_weight: float
    share: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Args:
        name: name in the log, without the leading ``unweighted_``.
        value: the unweighted scalar.
        weight: its factor.
        averaged_over: what the value is a mean of: ``"rows"``, ``"positions"``, ``"pairs"`` (under the inputs' mask),
            ``"cells"``, ``"cell_pairs"`` (all, padding included), ``"logits"`` (under the logits' mask), ``"labels"``;
            ``None`` if unknown.
    """

    name: str
    value: Tensor
    weight: float
    averaged_over: str | None


@dataclass(frozen=True)
class KnowledgeLoss:
    """How logits are compared.

    Args:
        loss: a function of ``KD_LOSS_MAP``.
        temperature: the base temperature.
        scheduler: a temperature schedule, or ``None``.
        probability_shift: whether the teacher's largest logit is swapped to the true label.
    """

    loss: Callable[..., Tensor]
    temperature: float
    scheduler: Callable[..., Any] | None = None
    probability_shift: bool = False

    @property
    def takes_mask(self) -> bool:
        """Whether loss and schedule can be given a mask; if not, masked positions are selected beforehand."""
        return accepts_mask(self.loss) and (self.scheduler is None or accepts_mask(self.scheduler))

    def __call__(self, logits_S: Tensor, logits_T: Tensor, mask: Tensor | None) -> Tensor:
        keywords = {} if mask is None else {"mask": mask}
        temperature: Any = self.temperature
        if self.scheduler is not None:
            temperature = self.scheduler(logits_S, logits_T, temperature, **keywords)
        return self.loss(logits_S, logits_T, temperature, **keywords)


def accepts_mask(function: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter ``mask``."""
    try:
        return "mask" in inspect.signature(function).parameters
    except ValueError:
        return False


def kd_terms(results_S: Views, results_T: Views, kd: KnowledgeLoss, takes_mask: bool, now: Now) -> list[Term]:
    """Return the KD term: the sum over the heads of the loss between the logits; none if neither side has logits.

    Args:
        results_S: the student's views.
        results_T: the teacher's views.
        kd: how logits are compared.
        takes_mask: ``kd.takes_mask``, found out once.
        now: scheduled weights.

    Raises:
        KeyError: if only one side has logits, or labels are needed and missing.
        ValueError: if the number or shapes of the logits differ.
    """
    if "logits" not in results_S and "logits" not in results_T:
        return []
    heads_S, heads_T = logits_of(results_S, results_T)
    masks = list(zip(masks_of(results_S, len(heads_S)), masks_of(results_T, len(heads_S)), strict=True))
    labels = labels_of(results_S, len(heads_S)) if kd.probability_shift else [None] * len(heads_S)
    values: list[Tensor] = []
    kind = "rows" if heads_S[0].dim() == 2 else "cells"
    for head_S, head_T, (mask_S, mask_T), label in zip(heads_S, heads_T, masks, labels, strict=True):
        mask = None
        if head_S.dim() == 3 and (mask_S is not None or mask_T is not None):
            kind = "logits"
            head_S, head_T, mask, label = align(head_S, head_T, mask_S, mask_T, label)
            if not takes_mask:
                head_S, head_T, mask, label = head_S[mask], head_T[mask], None, None if label is None else label[mask]
        if head_S.shape != head_T.shape:
            raise ValueError(
                f"logits of student and teacher must have the same shape, got {tuple(head_S.shape)} and "
                f"{tuple(head_T.shape)}; return other logits from the adaptors, or a logits_mask that picks the same ones"
            )
        if label is not None:
            head_T = probability_shift(head_T, label)
        values.append(kd(head_S, head_T, mask))
    return [Term("kd_loss", sum(values[1:], values[0]), now.kd_weight, kind)]


def logits_of(results_S: Views, results_T: Views) -> tuple[list[Tensor], list[Tensor]]:
    """Return both sides' heads.

    Raises:
        KeyError: if a side has none.
        ValueError: if the sides have another number of heads.
    """
    for who, results in (("S", results_S), ("T", results_T)):
        if "logits" not in results:
            raise KeyError(
                f"adaptor_{who} returned no 'logits' (only {sorted(results)}), the other adaptor did; return them on "
                "both sides, or on neither to train without the KD loss"
            )
    if len(results_S["logits"]) != len(results_T["logits"]):
        raise ValueError(
            f"'logits' of student and teacher must have as many heads, got {len(results_S['logits'])} and "
            f"{len(results_T['logits'])}"
        )
    return results_S["logits"], results_T["logits"]


def masks_of(results: Views, heads: int) -> list[Tensor | None]:
    """Return one logits mask a head; a single mask serves all heads.

    Raises:
        ValueError: if there are several masks, but not one a head.
    """
    masks = results.get("logits_mask", [None])
    if len(masks) == 1:
        return list(masks) * heads
    if len(masks) != heads:
        raise ValueError(f"'logits_mask' must be one mask, or one a head ({heads}), got {len(masks)}")
    return list(masks)


def labels_of(results: Views, heads: int) -> list[Tensor]:
    """Return one tensor of labels a head.

    Raises:
        KeyError: if the student's adaptor returned none.
        ValueError: if there is not one a head.
    """
    if "labels" not in results:
        raise KeyError(f"probability_shift=True needs 'labels' from adaptor_S, which returned only {sorted(results)}")
    if len(results["labels"]) != heads:
        raise ValueError(f"'labels' must be one tensor a head ({heads}), got {len(results['labels'])}")
    return list(results["labels"])


def align(
    logits_S: Tensor, logits_T: Tensor, mask_S: Tensor | None, mask_T: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return logits, one mask and labels whose positions correspond.

    Where both masks pick the same positions of equal shapes, that is the input. Where they differ (two tokenisations,
    say), the picked positions of each side are moved to the front in their order: what selecting them on each side
    would give, without reading the masks.

    Args:
        logits_S: ``(batch, length, classes)``.
        logits_T: ``(batch, length_T, classes)``.
        mask_S: ``(batch, length)`` or ``None``: the teacher's counts for both.
        mask_T: ``(batch, length_T)`` or ``None``: the student's counts for both.
        labels: ``(batch, length)`` or ``None``.

    Raises:
        ValueError: if a mask does not have the shape of its logits.
    """
    for who, logits, mask in (("S", logits_S, mask_S), ("T", logits_T, mask_T)):
        if mask is not None and mask.shape != logits.shape[:2]:
            raise ValueError(
                f"logits_mask of adaptor_{who} must have the shape (batch, length) of its logits "
                f"{tuple(logits.shape[:2])}, got {tuple(mask.shape)}"
            )
    own_S = mask_S if mask_S is not None else mask_T
    own_T = mask_T if mask_T is not None else mask_S
    if own_S is None or own_T is None:
        raise ValueError("align needs at least one mask")
    if logits_S.shape[:2] == logits_T.shape[:2] and same_mask(own_S, own_T):
        return logits_S, logits_T, own_S.bool(), labels
    front_S, picked_S, labels = to_front(logits_S, own_S, labels)
    front_T, picked_T, _ = to_front(logits_T, own_T, None)
    count = min(len(front_S), len(front_T))
    return front_S[:count], front_T[:count], (picked_S[:count] & picked_T[:count]), None if labels is None else labels[:count]


def same_mask(first: Tensor, second: Tensor) -> bool:
    """Return whether two masks are known to be equal without waiting for a device."""
    if first is second:
        return True
    return first.device.type == "cpu" and first.shape == second.shape and torch.equal(first.bool(), second.bool())


def to_front(logits: Tensor, mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return flattened logits, mask and labels with the masked positions first, in their order."""
    picked = mask.bool().flatten()
    order = torch.argsort(~picked, stable=True)
    return logits.flatten(0, 1)[order], picked[order], None if labels is None else labels.flatten()[order]


def probability_shift(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits with the true label's and the largest one swapped; the input is left as it is.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)``; negative labels swap nothing.
    """
    top = logits.argmax(dim=-1, keepdim=True)
    gold = torch.where(labels.unsqueeze(-1) < 0, top, labels.unsqueeze(-1))
    at_top, at_gold = logits.gather(-1, top), logits.gather(-1, gold)
    return logits.scatter(-1, top, at_gold).scatter(-1, gold, at_top)


def match_terms(results_S: Views, results_T: Sequence[Views], plan: Sequence[PlannedMatch]) -> list[Term]:
    """Return a term for each intermediate match.

    Args:
        results_S: the student's views, with its projected features.
        results_T: the views of each teacher.
        plan: the matches.
    """
    mask = results_S.get("inputs_mask")
    terms = []
    for planned in plan:
        match = planned.match
        if planned.number in results_S.projected:
            feature_S = results_S.projected[planned.number]
        else:
            feature_S = select(results_S, match.feature, match.layer_S, "student")
        feature_T = select(results_T[match.teacher], match.feature, match.layer_T, "teacher")
        value = planned.loss(feature_S, feature_T, mask=mask)
        kind = denominator_of(planned.loss)
        if mask is None and kind in ("positions", "pairs"):
            kind = {"positions": "cells", "pairs": "cell_pairs"}[kind]
        terms.append(Term(planned.name, value, match.weight, kind))
    return terms


def custom_terms(results_S: Views, results_T: Views, matches: Sequence[CustomMatch]) -> list[Term]:
    """Return a term for each custom match."""
    terms = []
    for number, match in enumerate(matches):
        value = match.value(
            results_S.captured[number],
            results_T.captured[number],
            results_S.get("inputs_mask"),
            results_T.get("inputs_mask"),
        )
        terms.append(Term(f"custom_match_{number}", value, match.weight, None))
    return terms


def hard_label_terms(results_S: Views, now: Now) -> list[Term]:
    """Return the term of the adaptor's ``losses``: the sum of their means; none without losses."""
    if "losses" not in results_S:
        return []
    means = [loss.mean() for loss in results_S["losses"]]
    return [Term("hard_label_loss", sum(means[1:], means[0]), now.hard_label_weight, "labels")]


def total(terms: Sequence[Term], now: Now) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the terms, and their unweighted values by log name.

    Raises:
        ValueError: if there are no terms, or exact accumulation meets a term that does not tell what it averages over.
    """
    if not terms:
        raise ValueError(
            "nothing to optimise: the adaptors returned neither 'logits' nor 'losses', and there are no matches"
        )
    loss: Tensor | None = None
    for term in terms:
        value = term.value * term.weight
        if now.share is not None:
            value = value * _share(term, now.share)
        loss = value if loss is None else loss + value
    return loss, {f"unweighted_{term.name}": term.value for term in terms}  # type: ignore[return-value]


def _share(term: Term, share: Mapping[str, Tensor]) -> Tensor:
    if term.averaged_over is None or term.averaged_over not in share:
        raise ValueError(
            f"accumulation_weighting='positions' cannot weigh {term.name!r}: its loss does not tell what it averages "
            "over; mark the function with textbrewer.losses.masking.averaged_over, or use 'micro_batch'"
        )
    return share[term.averaged_over]
