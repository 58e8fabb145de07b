"""How the stages of a recipe share the length of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textbrewer import checks
from textbrewer.recipes.stage import Stage

__all__ = ["lengths_of"]


def lengths_of(
    stages: Sequence[Stage],
    size: int | None,
    num_epochs: int | None,
    num_steps: int | None,
    accumulation: int,
) -> tuple[list[int], int]:
    """Return the steps of each stage, and those of one pass over the data (of the longest stage, if not known).

    Args:
        stages: the stages, with their shares.
        size: batches a pass, ``None`` if unknown.
        num_epochs: passes in all; 3 if neither is given.
        num_steps: optimiser steps in all; counts before ``num_epochs``.
        accumulation: batches a step.

    Raises:
        ValueError: if there is nothing to train on, the length cannot be told, or there are fewer steps than stages.
    """
    if size == 0:
        raise ValueError("dataloader must yield at least one batch, its length is 0 (dataset empty, or drop_last?)")
    a_pass = None if size is None else math.ceil(size / accumulation)
    if num_steps is None:
        epochs = 3 if num_epochs is None else num_epochs
        checks.integer(epochs, "num_epochs", minimum=1)
        if size is None:
            raise ValueError("num_steps must be given where the dataloader has no length, got num_epochs only")
        num_steps = math.ceil(int(epochs) * size / accumulation)
    elif num_epochs is not None:
        checks.warn(f"num_steps={num_steps} and num_epochs={num_epochs} are both given: num_steps counts")
    checks.integer(num_steps, "num_steps", minimum=1)
    if num_steps < len(stages):
        raise ValueError(f"num_steps must be at least the recipe's number of stages, {len(stages)}, got {num_steps}")
    whole, done, before, lengths = sum(stage.share for stage in stages), 0, 0.0, []
    for number, stage in enumerate(stages, 1):
        before += stage.share
        # Each stage has a step at least, and leaves one to each that follows.
        end = min(max(round(num_steps * before / whole), done + 1), int(num_steps) - (len(stages) - number))
        lengths.append(end - done)
        done = end
    return lengths, max(lengths) if a_pass is None else a_pass
