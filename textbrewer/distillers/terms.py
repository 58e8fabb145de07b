"""The parts of the loss: pure functions from views to terms, shared by all distillers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.configurations import DistillationConfig
from textbrewer.distillers import heads
from textbrewer.distillers.knowledge import KnowledgeLoss
from textbrewer.distillers.stacking import Stacking
from textbrewer.losses.masking import denominator_of
from textbrewer.matching import CustomMatch, PlannedMatch, select, teacher_feature
from textbrewer.presets import WEIGHT_SCHEDULER


@dataclass(frozen=True)
class Now:
    """What is scheduled for the step under way.

    Args:
        kd_weight: factor of the KD loss.
        hard_label_weight: factor of the adaptor's losses.
        share: for exact accumulation, this micro-batch's factor for each kind of average; ``None``: 1 for all.
        progress: how much of the run is done, 0 to 1.
    """

    kd_weight: float
    hard_label_weight: float
    share: Mapping[str, Tensor] | None = None
    progress: float = 0.0


def scheduled(config: DistillationConfig, progress: float, share: Mapping[str, Tensor] | None) -> Now:
    """Return the weights for a progress, from 0 to 1; the configuration is left as it is."""
    return Now(
        _scheduled_weight(config.kd_loss_weight, config.kd_loss_weight_scheduler, progress),
        _scheduled_weight(config.hard_label_weight, config.hard_label_weight_scheduler, progress),
        share,
        progress,
    )


def _scheduled_weight(weight: float, scheduler: str | list[Any] | None, progress: float) -> float:
    if scheduler is None or scheduler == "none":
        return weight
    factor: float = WEIGHT_SCHEDULER.make(scheduler)(progress)
    return weight * factor


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


def kd_terms(results_S: Views, results_T: Views, kd: KnowledgeLoss, now: Now) -> list[Term]:
    """Return the KD term: the sum over the heads of the loss between the logits; none if neither side has logits.

    Args:
        results_S: the student's views.
        results_T: the teacher's views.
        kd: how logits are compared.
        now: scheduled weights.

    Raises:
        KeyError: if only one side has logits, or labels are needed and missing.
        ValueError: if the number or shapes of the logits differ.
    """
    if "logits" not in results_S and "logits" not in results_T:
        return []
    heads_S, heads_T = heads.logits_of(results_S, results_T)
    masks = list(zip(heads.masks_of(results_S, len(heads_S)), heads.masks_of(results_T, len(heads_S)), strict=True))
    labels = heads.labels_of(results_S, len(heads_S), kd.why_labels) if kd.why_labels else [None] * len(heads_S)
    values: list[Tensor] = []
    kinds: set[str] = set()
    for head_S, head_T, (mask_S, mask_T), label in zip(heads_S, heads_T, masks, labels, strict=True):
        mask = None
        kinds.add(_kind_of_head(head_S, mask_S is not None or mask_T is not None, kd.takes_labels))
        if head_S.dim() == 3 and (mask_S is not None or mask_T is not None):
            head_S, head_T, mask, label = heads.align(head_S, head_T, mask_S, mask_T, label)
            if not kd.takes_mask:
                head_S, head_T, mask, label = head_S[mask], head_T[mask], None, None if label is None else label[mask]
        if head_S.shape != head_T.shape:
            raise ValueError(
                f"logits of student and teacher must have the same shape, got {tuple(head_S.shape)} and "
                f"{tuple(head_T.shape)}; return other logits, or a logits_mask that picks the same ones"
            )
        if kd.probability_shift and label is not None:
            head_T = heads.probability_shift(head_T, label)
        values.append(kd(head_S, head_T, mask, label, now.progress))
    # Heads of rows beside heads of positions, or of labels each: the sum is no mean of one kind.
    of_one_kind = len(kinds) == 1 and (len(values) == 1 or not kd.takes_labels)
    averaged_over = kinds.pop() if of_one_kind and kd.has_parts else None
    return [Term("kd_loss", sum(values[1:], values[0]), now.kd_weight, averaged_over)]


def _kind_of_head(logits: Tensor, masked: bool, takes_labels: bool) -> str:
    """Return what the loss of a head averages over; with labels, what has one."""
    if takes_labels:
        return "labels"
    if logits.dim() == 2:
        return "rows"
    return "logits" if masked else "cells"


def some_weight(results_S: Views, plan: Sequence[PlannedMatch], custom: Sequence[CustomMatch], now: Now) -> bool:
    """Return whether a term has a weight in this step; terms without one then need not be computed."""
    return bool(
        (now.kd_weight and "logits" in results_S)
        or (now.hard_label_weight and "losses" in results_S)
        or any(planned.match.weight for planned in plan)
        or any(match.weight for match in custom)
    )


def match_terms(
    results_S: Views,
    results_T: Sequence[Views],
    plan: Sequence[PlannedMatch],
    stacking: Stacking | None = None,
) -> list[Term]:
    """Return a term for each intermediate match.

    Args:
        results_S: the student's views, with its projected features.
        results_T: the views of each teacher.
        plan: the matches.
        stacking: computes losses of one kind in a single call; ``None``: each on its own.
    """
    mask = results_S.get("inputs_mask")
    features_S, features_T = [], []
    for planned in plan:
        match = planned.match
        if planned.number in results_S.projected:
            features_S.append(results_S.projected[planned.number])
        else:
            features_S.append(select(results_S, match.feature, match.layer_S, "student"))
        features_T.append(teacher_feature(results_T, planned))
    losses = [planned.compare for planned in plan]
    if stacking is not None:
        values = stacking.values(losses, features_S, features_T, mask)
    else:
        triples = zip(losses, features_S, features_T, strict=True)
        values = [loss(feature_S, feature_T, mask=mask) for loss, feature_S, feature_T in triples]
    return [
        Term(planned.name, value, planned.match.weight, _kind_of_match(planned, mask))
        for planned, value in zip(plan, values, strict=True)
    ]


def _kind_of_match(planned: PlannedMatch, mask: Tensor | None) -> str | None:
    """Return what a match averages over; ``None`` if unknown, or its strategy chooses by the whole batch."""
    if planned.strategy is not None and not planned.strategy.has_parts:
        return None
    kind = denominator_of(planned.loss)
    if mask is None and kind in ("positions", "pairs"):
        return {"positions": "cells", "pairs": "cell_pairs"}[kind]
    return kind


def custom_terms(
    results_S: Views, results_T: Views, matches: Sequence[CustomMatch], weighted_only: bool = False
) -> list[Term]:
    """Return a term for each custom match; with ``weighted_only``, not for those of weight 0."""
    terms = []
    for number, match in enumerate(matches):
        if weighted_only and not match.weight:
            continue
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

    A term of weight 0 is logged, but costs no gradient; where no term has a weight, all are summed as they are.

    Raises:
        ValueError: if there are no terms, or exact accumulation meets a term that does not tell what it averages over.
    """
    if not terms:
        raise ValueError(
            "nothing to optimise: the adaptors returned neither 'logits' nor 'losses', and there are no matches"
        )
    loss: Tensor | None = None
    summed = [term for term in terms if term.weight] or terms
    for term in summed:
        value = term.value * term.weight
        if now.share is not None:
            value = value * _share(term, now.share)
        loss = value if loss is None else loss + value
    logs = {
        f"unweighted_{term.name}": term.value if term.weight or summed is terms else term.value.detach()
        for term in terms
    }
    return loss, logs  # type: ignore[return-value]


def _share(term: Term, share: Mapping[str, Tensor]) -> Tensor:
    if term.averaged_over is None or term.averaged_over not in share:
        raise ValueError(
            f"accumulation_weighting='positions' cannot weigh {term.name!r}: it depends on the batch as a whole (a "
            "loss between rows, a temperature or layers chosen by the batch), or its loss does not tell what it "
            "averages over; mark that with textbrewer.losses.masking.averaged_over, or use 'micro_batch'"
        )
    return share[term.averaged_over]
