"""Losses of one kind between features of one shape, computed in a single call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


class Stacking:
    """Computes match losses together where it can.

    The features of the matches are stacked, and the loss is vectorised over them with ``torch.vmap``. On its first use
    each loss is also computed one by one: one that ``vmap`` cannot run, or that gives other values then, is computed
    one by one from then on.
    """

    def __init__(self) -> None:
        self._fits: dict[Loss, bool] = {}

    def values(
        self, losses: Sequence[Loss], features_S: Sequence[Any], features_T: Sequence[Any], mask: Tensor | None
    ) -> list[Tensor]:
        """Return the value of each loss.

        Args:
            losses: one a match.
            features_S: the student's feature of each match, a tensor or a list of two.
            features_T: the teacher's.
            mask: ``(batch, length)``, the same for all.
        """
        values: list[Tensor | None] = [None] * len(losses)
        for numbers in _groups(losses, features_S, features_T):
            loss = losses[numbers[0]]
            if len(numbers) > 1 and self._fits.get(loss, True):
                found = self._together(
                    loss, [features_S[number] for number in numbers], [features_T[number] for number in numbers], mask
                )
            else:
                found = [loss(features_S[number], features_T[number], mask=mask) for number in numbers]
            for number, value in zip(numbers, found, strict=True):
                values[number] = value
        return [value for value in values if value is not None]

    def _together(
        self, loss: Loss, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        known = loss in self._fits
        one_by_one = [] if known else [loss(*pair, mask=mask) for pair in zip(student, teacher, strict=True)]
        try:
            stacked = torch.vmap(lambda state_S, state_T: loss(state_S, state_T, mask=mask))(
                torch.stack(list(student)), torch.stack(list(teacher))
            )
            fits = known or _close(stacked, one_by_one)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            # What vmap says of code that depends on the data, or of operations that it does not know. A fault of the
            # features' own is raised again below.
            fits = False
        self._fits[loss] = fits
        if fits:
            return list(stacked.unbind())
        return one_by_one or [loss(*pair, mask=mask) for pair in zip(student, teacher, strict=True)]


def make_stacking(wanted: bool | None, device: torch.device) -> Stacking | None:
    """Return what computes matches together, ``None`` if each is to be computed on its own.

    Args:
        wanted: ``TrainingConfig.stack_matches``; ``None``: not on a CPU, which gains nothing from fewer calls and loses
            the time to copy the features together.
        device: where the features are.
    """
    stacks = device.type != "cpu" if wanted is None else wanted
    return Stacking() if stacks else None


def _close(stacked: Any, one_by_one: Sequence[Tensor]) -> bool:
    expected = torch.stack(list(one_by_one))
    return stacked.shape == expected.shape == (len(one_by_one),) and bool(
        torch.allclose(stacked, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    )


def _groups(losses: Sequence[Loss], features_S: Sequence[Any], features_T: Sequence[Any]) -> list[list[int]]:
    """Return the numbers of the matches, those that can be computed together in one list."""
    groups: dict[Any, list[int]] = {}
    for number, (loss, *features) in enumerate(zip(losses, features_S, features_T, strict=True)):
        key: Any = number
        if all(isinstance(feature, Tensor) for feature in features):
            key = (loss, *((tuple(item.shape), item.dtype, item.device) for item in features))
        groups.setdefault(key, []).append(number)
    return list(groups.values())
