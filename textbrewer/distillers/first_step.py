"""What is checked once, on the first batch's views, before the first update."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.configurations import DistillationConfig
from textbrewer.distillers import heads
from textbrewer.losses.softened import OF_CLASSES
from textbrewer.losses.widths import width_rule_of
from textbrewer.matching import PlannedMatch, select, teacher_feature
from textbrewer.teacher_cache.contents import form_of_match

# What torch says on a CPU of a class without a logit, and of a number without a row in an embedding.
_NO_CLASS = re.compile(r"[Tt]arget -?\d+ is out of bounds")
_NO_ROW = re.compile(r"index out of range in self")


def check(
    results_S: Views, results_T: Sequence[Views], plan: Sequence[PlannedMatch], config: DistillationConfig
) -> None:
    """Check labels, masks, layers and widths; reads the device. Warns of a weight on losses that are not there.

    Raises:
        ValueError: if labels are outside the classes, masks pick other numbers of positions, or widths differ without
            a projection.
        KeyError, IndexError: if a feature or layer is missing.
    """
    check_labels(results_S)
    check_classes(results_S, config)
    warn_without_losses(results_S, config.hard_label_weight)
    for results in results_T:
        check_masks(results_S, results)
    for planned in plan:
        match = planned.match
        feature_T = teacher_feature(results_T, planned)
        feature_S = results_S.projected.get(planned.number)
        if feature_S is None:
            feature_S = select(results_S, match.feature, match.layer_S, "student")
        form = form_of_match(match)
        if planned.number in results_T[match.teacher].reduced and form is not None and form.uses_mask:
            check_same_mask(planned, results_S, results_T[match.teacher])
        if match.feature == "hidden" and width_rule_of(planned.loss) != "any":
            check_widths(planned, _first(feature_S), _first(feature_T))


def check_classes(results_S: Views, config: DistillationConfig) -> None:
    """Check that a loss between probabilities of classes that exclude each other meets logits of such classes.

    Warns where a row's labels say several classes at once, or none.

    Raises:
        ValueError: if logits are of one number, as of a regression: the softmax makes 1 of each.
    """
    kind = config.kd_loss_type if isinstance(config.kd_loss_type, str) else config.kd_loss_type[0]
    if not config.kd_loss_weight or kind not in OF_CLASSES:
        return
    logits, labels = results_S.get("logits", []), results_S.get("labels", [])
    if any(head.shape[-1] == 1 for head in logits):
        raise ValueError(
            f"kd_loss_type={kind!r} compares probabilities of classes, and logits of a single number have none: it "
            "would teach nothing; use 'mse' with temperature=1 for a regression (textbrewer.distill: "
            "kd_loss_type='mse'), 'sigmoid' for a yes or no"
        )
    if any(map(_several_at_once, labels, logits)):
        checks.warn(
            f"kd_loss_type={kind!r} compares probabilities of classes that exclude each other, and by the labels a row "
            "may have several, or none; use 'sigmoid' (textbrewer.distill: kd_loss_type='sigmoid')"
        )


def _several_at_once(label: Tensor, head: Tensor) -> bool:
    """Return whether labels are a number for each class, and not a distribution over them."""
    if not label.is_floating_point() or label.shape != head.shape:
        return False
    return bool(((label.float().sum(-1) - 1).abs() > 1e-2).any())


def warn_without_losses(results_S: Views, hard_label_weight: float) -> None:
    """Warn if the labels have a weight, but the student's adaptor returned no ``losses``."""
    if hard_label_weight and "losses" not in results_S:
        checks.warn(
            f"hard_label_weight={hard_label_weight:g} has no effect on this batch: the student's adaptor returned no "
            "'losses'; return them (a transformers model has a loss when the batch has labels), or set "
            "hard_label_weight=0"
        )


def check_same_mask(planned: PlannedMatch, results_S: Views, results_T: Views) -> None:
    """Raise ValueError unless both sides have the same inputs_mask, for a teacher's form that was made with it."""
    masks = results_S.get("inputs_mask"), results_T.get("inputs_mask")
    same = masks[0] is masks[1] or (
        masks[0] is not None
        and masks[1] is not None
        and masks[0].shape == masks[1].shape
        and bool((masks[0].to(masks[1].device) == masks[1]).all())
    )
    if not same:
        raise ValueError(
            f"match {planned.name!r}: its teacher feature is stored as computed with the teacher's inputs_mask, which "
            "must be the student's; return the same 'inputs_mask' from both adaptors, or train without teacher_cache"
        )


def check_widths(planned: PlannedMatch, feature_S: Tensor, feature_T: Tensor) -> None:
    """Raise ValueError unless the student's (projected) feature has the teacher's width, or twice that for its loss."""
    width_S, width_T = feature_S.shape[-1], feature_T.shape[-1]
    twice = width_rule_of(planned.loss) == "twice"
    if width_S == width_T * (2 if twice else 1):
        return
    if twice:
        raise ValueError(
            f"match {planned.name!r}: loss {planned.match.loss_name!r} compares the teacher with a mean and a variance "
            f"for each of its {width_T} dimensions, got a student feature of width {width_S}; "
            "add 'proj': 'gaussian' to the match"
        )
    if planned.match.proj is None:
        remedy = f"add 'proj': 'linear' (or ['linear', {width_S}, {width_T}]) to the match"
    else:
        remedy = f"name the teacher's width {width_T} as the last number of proj {planned.match.proj!r}"
    raise ValueError(
        f"match {planned.name!r}: the student's width must be the teacher's, {width_T}, got {width_S}; {remedy}"
    )


def check_labels(results_S: Views) -> None:
    """Raise ValueError if a label is not a class of its head's logits (negative labels are ignored ones)."""
    logits, labels = results_S.get("logits", []), results_S.get("labels", [])
    if len(logits) != len(labels):
        return
    for head, label in zip(logits, labels, strict=True):
        if label.is_floating_point() or label.shape != head.shape[:-1] or label.numel() == 0:
            continue
        largest = int(label.max())
        if largest >= head.shape[-1]:
            raise ValueError(
                f"labels must be less than the number of classes, {head.shape[-1]}, got {largest}; "
                "give the models as many classes (num_labels), or map the labels"
            )


def check_masks(results_S: Views, results_T: Views) -> None:
    """Raise ValueError unless the sides' logits masks pick as many positions, head by head."""
    logits = results_S.get("logits", [])
    if len(logits) != len(results_T.get("logits", [])):
        return
    masks = (heads.masks_of(results, len(logits)) for results in (results_S, results_T))
    for head_S, head_T, mask_S, mask_T in zip(logits, results_T.get("logits", []), *masks, strict=True):
        # Masks of another shape than their logits are refused when the loss is computed.
        if mask_S is None or mask_T is None or mask_S is mask_T or head_S.dim() != 3 or head_T.dim() != 3:
            continue
        if mask_S.shape == head_S.shape[:2] and mask_T.shape == head_T.shape[:2]:
            heads.check_counts(mask_S, mask_T)


def widths(
    results_S: Views, results_T: Sequence[Views], matches: Sequence[PlannedMatch]
) -> dict[int, tuple[int | None, int | None]]:
    """Return the widths of each match's features, student's and teacher's, by its number."""
    found: dict[int, tuple[int | None, int | None]] = {}
    for planned in matches:
        match = planned.match
        feature_S = _first(select(results_S, match.feature, match.layer_S, "student"))
        feature_T = _first(teacher_feature(results_T, planned))
        found[planned.number] = (feature_S.shape[-1], feature_T.shape[-1])
    return found


def _first(feature: Any) -> Tensor:
    tensor: Tensor = feature[0] if isinstance(feature, (list, tuple)) else feature
    return tensor


@contextmanager
def explained(batch: Any) -> Iterator[None]:
    """Turn a model's bare "out of bounds" into an error that names what in the batch is."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if _NO_CLASS.search(str(error)):
            raise ValueError(
                f"labels must be classes of the model, got {_ranges(batch, labels=True) or 'others'} ({error}); give "
                "the models as many classes (num_labels), or map the labels"
            ) from error
        if _NO_ROW.search(str(error)):
            raise ValueError(
                f"numbers looked up in a table of the model must be less than its length, got "
                f"{_ranges(batch, labels=False) or 'larger ones'} ({error}); use the tokenizer that belongs to the "
                "model (vocab_size), and texts no longer than its positions"
            ) from error
        raise


def _ranges(batch: Any, labels: bool) -> str:
    """Return the least and largest numbers of a batch's integer entries by name: of those for labels, or of all."""
    named = batch.items() if isinstance(batch, Mapping) else ()
    return ", ".join(
        f"{name} from {int(value.min())} to {int(value.max())}"
        for name, value in named
        if isinstance(value, Tensor) and value.numel() and not value.is_floating_point() and value.dtype != torch.bool
        if not labels or "label" in str(name) or "positions" in str(name)
    )
