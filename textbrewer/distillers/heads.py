"""The logits of both sides, head by head: counted, masked, and brought into correspondence."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer.adaptors import Views


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


def labels_of(results: Views, heads: int, why: str) -> list[Tensor]:
    """Return one tensor of labels a head.

    Args:
        results: the student's views.
        heads: how many heads there are.
        why: what needs them, for messages.

    Raises:
        KeyError: if the student's adaptor returned none.
        ValueError: if there is not one a head.
    """
    if "labels" not in results:
        raise KeyError(f"{why} needs 'labels' from adaptor_S, which returned only {sorted(results)}")
    if len(results["labels"]) != heads:
        raise ValueError(f"'labels' must be one tensor a head ({heads}), got {len(results['labels'])}")
    return list(results["labels"])


def align(
    logits_S: Tensor,
    logits_T: Tensor,
    mask_S: Tensor | None,
    mask_T: Tensor | None,
    labels: Tensor | None,
    names: tuple[str, str] = ("adaptor_S", "adaptor_T"),
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
        names: whose they are, for messages.

    Raises:
        ValueError: if a mask does not have the shape of the logits it counts for, or (on the CPU, where that can be
            seen without waiting) the masks pick other numbers of positions.
    """
    own_S = mask_S if mask_S is not None else mask_T
    own_T = mask_T if mask_T is not None else mask_S
    if own_S is None or own_T is None:
        raise ValueError("align needs at least one mask")
    for who, logits, mask, given in zip(names, (logits_S, logits_T), (own_S, own_T), (mask_S, mask_T), strict=True):
        if mask.shape != logits.shape[:2]:
            hint = "" if given is not None else f", the other side's, as {who} returned none"
            raise ValueError(
                f"logits_mask of {who} must have the shape (batch, length) of its logits {tuple(logits.shape[:2])}, "
                f"got {tuple(mask.shape)}{hint}"
            )
    if logits_S.shape[:2] == logits_T.shape[:2] and same_mask(own_S, own_T):
        return logits_S, logits_T, own_S.bool(), labels
    if own_S.device.type == "cpu":
        check_counts(own_S, own_T, names)
    front_S, picked_S, labels = to_front(logits_S, own_S, labels)
    front_T, picked_T, _ = to_front(logits_T, own_T, None)
    count = min(len(front_S), len(front_T))
    return (
        front_S[:count],
        front_T[:count],
        (picked_S[:count] & picked_T[:count]),
        None if labels is None else labels[:count],
    )


def check_counts(mask_S: Tensor, mask_T: Tensor, names: tuple[str, str] = ("adaptor_S", "adaptor_T")) -> None:
    """Raise ValueError unless two masks pick as many positions (waits for the device)."""
    counts = int(mask_S.bool().sum()), int(mask_T.bool().sum())
    if counts[0] != counts[1]:
        raise ValueError(
            f"logits_mask of {names[0]} and {names[1]} must pick as many positions, got {counts[0]} and {counts[1]}; "
            "the first that one picks is compared with the first that the other picks, and so on"
        )


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
