"""Tensors by position from several teachers, brought into one order while the teachers come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from textbrewer.adaptors import IGNORED_LABEL
from textbrewer.distillers import heads

Merge = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""``f(kept, fresh) -> kept``: takes the next teacher's tensors in."""


class Positions:
    """What is kept of one head's logits over several teachers.

    Teachers whose masks pick the same positions are kept position by position; once one picks others, the picked
    positions of all are brought to the front, in their order. A teacher without a mask shares the first that there is.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.mask: Tensor | None = None
        self.shapes: list[tuple[int, ...]] = []
        self._given: Tensor | None = None
        self._at_front = False

    def add(self, number: int, fresh: list[Tensor], mask: Tensor | None, merge: Merge) -> None:
        """Take in a teacher.

        Args:
            number: its number.
            fresh: tensors ``(batch, classes)`` or ``(batch, length, ...)``; the first has the shape of the logits.
            mask: ``(batch, length)``, of logits by position.
            merge: makes what is kept of what was kept (nothing before the first teacher) and the fresh tensors.

        Raises:
            ValueError: if the shapes of the logits differ, or the masks pick other numbers of positions.
        """
        if fresh[0].dim() == 3:
            fresh = self._in_order(number, fresh, mask)
        else:
            # A mask means nothing here, and is handed on as the first teacher's.
            self.mask = mask if self.mask is None else self.mask
        self.shapes.append(tuple(fresh[0].shape))
        if self.shapes[-1] != self.shapes[0]:
            raise ValueError(f"logits of all teachers must have the same shape, got {sorted(set(self.shapes))}")
        self.kept = merge(self.kept, fresh)

    def _in_order(self, number: int, fresh: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        if self.mask is None:
            self.mask = mask
            if mask is None:
                return fresh
            for shape, who in zip(self.shapes, range(number), strict=False):
                _check_shape(mask, shape, who, f", that of adaptor_T[{number}], as adaptor_T[{who}] returned none")
        elif mask is None:
            mask = self.mask_of_first
        _check_shape(mask, tuple(fresh[0].shape), number)
        first = self.mask_of_first
        if not self._at_front:
            if mask.shape == first.shape and heads.same_mask(first, mask):
                return fresh
            self._to_front(first)
        if mask.device.type == "cpu":
            heads.check_counts(first, mask, ("adaptor_T[0]", f"adaptor_T[{number}]"))
        return self._cut([front(item, mask) for item in fresh])

    @property
    def mask_of_first(self) -> Tensor:
        """The first mask, as it was given."""
        mask = self._given if self._at_front else self.mask
        if mask is None:
            raise ValueError("no teacher returned a logits_mask")
        return mask

    def _to_front(self, mask: Tensor) -> None:
        """Bring the picked positions of all that is kept to the front."""
        self._given, self._at_front = mask, True
        self.kept = [front(item, mask) for item in self.kept]
        self.mask = front(mask.bool(), mask)
        self.shapes = [tuple(self.kept[0].shape)]

    def _cut(self, fresh: list[Tensor]) -> list[Tensor]:
        """Cut what is kept, and the fresh tensors, to one length: behind the picked positions there is nothing."""
        count = min(fresh[0].shape[1], self.kept[0].shape[1])
        self.kept = [item[:, :count] for item in self.kept]
        self.mask = None if self.mask is None else self.mask[:, :count]
        self.shapes = [tuple(self.kept[0].shape)]
        return [item[:, :count] for item in fresh]


def _check_shape(mask: Tensor, shape: Sequence[int], number: int, hint: str = "") -> None:
    if tuple(mask.shape) != tuple(shape[:2]):
        raise ValueError(
            f"logits_mask of adaptor_T[{number}] must have the shape (batch, length) of its logits {tuple(shape[:2])}, "
            f"got {tuple(mask.shape)}{hint}"
        )


def front(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``(batch, length, ...)`` as ``(1, batch * length, ...)``, the masked positions first, in their order."""
    return heads.to_front(tensor, mask, None)[0].unsqueeze(0)


def carry(labels: Tensor, logits: Tensor, mask_S: Tensor | None, mask_T: Tensor | None) -> Tensor:
    """Return the student's labels at the positions of a teacher's logits.

    The first position that the student's mask picks has the label of the first that the teacher's picks, and so on;
    positions without a label get :data:`IGNORED_LABEL`.

    Args:
        labels: the student's labels, ``(batch,)`` or ``(batch, length)``.
        logits: the teacher's, ``(batch, classes)`` or ``(batch, length_T, classes)``.
        mask_S: the student's mask, ``(batch, length)``; ``None``: the teacher's counts for both.
        mask_T: likewise.

    Raises:
        TypeError: if the labels are no classes.
        ValueError: if their shape fits neither the logits nor the masks.
    """
    if labels.is_floating_point():
        raise TypeError(f"labels must be classes (whole numbers), got a tensor of {labels.dtype}")
    own_S, own_T = (mask_T if mask_S is None else mask_S), (mask_S if mask_T is None else mask_T)
    other = None
    if logits.dim() == 3 and own_S is not None and own_T is not None:
        other = None if own_S.shape == own_T.shape and heads.same_mask(own_S, own_T) else (own_S, own_T)
    if other is None:
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels must have the shape of the teachers' logits without the classes, "
                f"{tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
            )
        return labels
    own_S, own_T = other
    if labels.shape != own_S.shape:
        raise ValueError(
            f"labels must have the shape of the logits_mask, {tuple(own_S.shape)}, got {tuple(labels.shape)}"
        )
    picked, found = own_T.bool().flatten(), heads.to_front(labels, own_S, None)
    values = torch.where(found[1], found[0], IGNORED_LABEL)
    count = min(len(values), len(picked))
    order = torch.argsort(~picked, stable=True)[:count]
    carried = torch.full_like(picked, IGNORED_LABEL, dtype=labels.dtype)
    carried[order] = torch.where(picked[order], values[:count], IGNORED_LABEL)
    return carried.view(own_T.shape)
