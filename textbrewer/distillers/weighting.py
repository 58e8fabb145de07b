"""Exact accumulation: how much each micro-batch of a window counts, for every kind of average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from textbrewer.adaptors import IGNORED_LABEL, Views
from textbrewer.engine import Runtime

Counts = dict[str, Tensor | float]


def count_positions(batch: Any) -> Counts:
    """Count, in a student's batch, what the losses average over.

    Reads ``attention_mask`` ``(batch, length)`` and ``labels`` (ignored where -100) of a dict batch; other batches
    count rows, and every position.

    Args:
        batch: the student's batch.

    Returns:
        ``rows``; ``positions`` and ``pairs`` (of positions in one row) under the mask; ``cells`` and ``cell_pairs``
        without; ``labels``, and ``logits``, the positions of the logits mask.
    """
    tensors = [item for item in _values(batch) if isinstance(item, Tensor) and item.dim() > 0]
    if not tensors:
        raise ValueError(f"a batch of type {type(batch).__name__} has no tensors whose rows could be counted")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    rows = float(len(tensors[0]))
    length = float(next((item.shape[1] for item in tensors if item.dim() > 1), 1))
    # A row without any position counts for no loss that averages over rows under the mask.
    kept_rows = rows if mask is None else (mask != 0).any(dim=1).sum().double()
    counts: Counts = {"rows": kept_rows, "cells": rows * length, "cell_pairs": rows * length * length}
    lengths = None if mask is None else mask.sum(dim=1).double()
    counts["positions"] = counts["cells"] if lengths is None else lengths.sum()
    counts["pairs"] = counts["cell_pairs"] if lengths is None else lengths.square().sum()
    has_positions = labels is not None and labels.dim() > 1 and not labels.is_floating_point()
    if labels is None or labels.is_floating_point():
        counts["labels"] = rows
    else:
        counts["labels"] = (labels != IGNORED_LABEL).sum().double()
    counts["logits"] = counts["labels"] if has_positions else counts["positions"]
    return counts


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (list, tuple)) else [batch]


def shares(batches: Sequence[Any], runtime: Runtime, count: Callable[[Any], Counts]) -> list[dict[str, Tensor]]:
    """Return, for each micro-batch, its factor for each kind of average.

    A mean over n of the window's N items weighs n / N of the large batch's mean. The engine divides by the number of
    micro-batches, and gradients are averaged over the processes; the factors undo both:
    ``n / N * micro-batches * processes``, with N summed over the window and all processes.

    Args:
        batches: the student's batches of the window.
        runtime: sums over the processes.
        count: counts one batch.
    """
    counted = [count(batch) for batch in batches]
    names = list(counted[0])
    table = torch.stack(
        [
            torch.stack([torch.as_tensor(item[name], dtype=torch.float32).to(runtime.device) for name in names])
            for item in counted
        ]
    )
    totals = runtime.sum_over_ranks(table.sum(dim=0)).clamp_min(1.0)
    factors = table / totals * len(batches) * runtime.world
    return [dict(zip(names, row.unbind(), strict=True)) for row in factors]


def check_counts(counts: Counts, views: Views, takes_labels: bool = False) -> None:
    """Raise ValueError if the adaptor's masks count otherwise than the batch (waits for the device; once a run).

    Args:
        counts: of the student's batch.
        views: the student's.
        takes_labels: whether the KD loss reads the true classes, and so averages over those that are there.
    """
    if takes_labels and "labels" in views:
        for labels in views["labels"]:
            _compare("labels", int((labels >= 0).sum()), counts["labels"])
    for name, key in (("positions", "inputs_mask"), ("logits", "logits_mask")):
        if key not in views:
            continue
        masks = views[key] if isinstance(views[key], list) else [views[key]]
        for mask in masks:
            _compare(key, int(mask.bool().sum()), counts[name])


def _compare(key: str, picked: int, counted: Tensor | float) -> None:
    if picked != int(counted):
        raise ValueError(
            f"accumulation_weighting='positions': the adaptor's {key!r} picks {picked} positions, the batch was "
            f"counted to have {int(counted)}; override the distiller's count_positions(batch)"
        )
