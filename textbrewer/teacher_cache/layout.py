"""How a teacher's rows are stored: which tensors, in what shapes, with or without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.losses.masking import denominator_of
from textbrewer.teacher_cache.codec import Place
from textbrewer.teacher_cache.contents import Contents, form_of_match
from textbrewer.teacher_cache.items import Item
from textbrewer.teacher_cache.keys import Rows

_OF_HEADS = ("query", "key", "value")
_POSITIONS = {"logits_mask": (1,), "inputs_mask": (1,), "labels": (1,)}


@dataclass(frozen=True)
class Layout:
    """How rows are stored.

    Args:
        items: what is stored, in the order of the bytes.
        counts: how many heads or layers the teacher's views have, by key.
        whole: numbers of the matches whose layers are stored whole.
        keep_padding: padding is stored and counts in the key.
        recomputed: names of tensors that are not stored.
        share_of_rows: below 1: so many of the rows fit.
    """

    items: tuple[Item, ...]
    counts: dict[str, int]
    whole: tuple[int, ...]
    keep_padding: bool
    recomputed: tuple[str, ...]
    share_of_rows: float = 1.0

    def can_hold(self, rows: Rows) -> bool:
        """Return whether rows can be stored so: without a mask nothing tells how long they are."""
        return self.keep_padding or rows.kept is not None or not any(0 in item.shape for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "items": [item.to_dict() for item in self.items],
            "counts": self.counts,
            "whole": list(self.whole),
            "keep_padding": self.keep_padding,
            "recomputed": list(self.recomputed),
            "share_of_rows": self.share_of_rows,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Layout:
        """Construct a layout of what :meth:`to_dict` returned."""
        return cls(
            tuple(Item.from_dict(item) for item in content["items"]),
            {str(key): int(value) for key, value in content["counts"].items()},
            tuple(content["whole"]),
            bool(content["keep_padding"]),
            tuple(content["recomputed"]),
            float(content["share_of_rows"]),
        )


def positions_of(name: str, tensor: Tensor, contents: Contents) -> tuple[int, ...]:
    """Return the dimensions of a tensor ``(batch, ...)`` that run over positions, by what it is."""
    key = name.partition("/")[0]
    if key in _POSITIONS:
        return _POSITIONS[key] if tensor.dim() > 1 else ()
    if key in ("logits", "hidden"):
        return (1,) if tensor.dim() == 3 else ()
    if key in ("attention", "scores"):
        return tuple(range(tensor.dim() - 2, tensor.dim()))
    if key in _OF_HEADS:
        return {3: (1,), 4: (2,)}.get(tensor.dim(), ())
    if key == "form":
        named = name.split("/")[1]
        forms = [form_of_match(match) for _, match in contents.matches]
        return next((form.positions for form in forms if form is not None and form.name == named), ())
    return ()


def depends_on_padding(tensors: Mapping[str, Tensor], rows: Rows, contents: Contents) -> bool:
    """Return whether rows can only be stored with their padding.

    So it is without a mask, where a tensor has positions that are not those of the mask (a decoder's), and for logits
    over the positions themselves (span prediction), whose softmax runs over the padding too. And of tensors with more
    dimensions than usual it is not known which of these run over positions.
    """
    if rows.kept is None:
        return True
    if has_other_positions(tensors, rows, contents):
        return True
    length = rows.kept.shape[1]
    for name, tensor in tensors.items():
        key = name.partition("/")[0]
        if tensor.dim() > {"logits": 3, "hidden": 3, **dict.fromkeys(_OF_HEADS, 4)}.get(key, tensor.dim()):
            return True
        if name.startswith("logits/") and tensor.dim() == 2 and tensor.shape[1] == length:
            return True
    return False


def has_other_positions(tensors: Mapping[str, Tensor], rows: Rows, contents: Contents) -> bool:
    """Return whether a tensor has positions that are not those of the mask: another number of them."""
    if rows.kept is None:
        return any(positions_of(name, tensor, contents) for name, tensor in tensors.items())
    length = rows.kept.shape[1]
    return any(
        tensor.shape[dimension] != length
        for name, tensor in tensors.items()
        for dimension in positions_of(name, tensor, contents)
    )


def masks_cover_padding(views_S: Views, views_T: Views, rows: Rows, contents: Contents) -> bool:
    """Return whether the losses leave out all padding, so that it need not be stored.

    Args:
        views_S: the student's views of a batch.
        views_T: the teacher's.
        rows: the rows of the batch.
        contents: what the losses read.
    """
    if rows.kept is None or contents.everything or views_T.captured:
        return False
    if contents.matches:
        # A loss that says what it averages over is one of the library's, and heeds the mask.
        if any(denominator_of(match.loss_function) is None for _, match in contents.matches):
            return False
        if "inputs_mask" not in views_S or not _within(views_S["inputs_mask"], rows.kept):
            return False
    masks = [*views_S.get("logits_mask", []), *views_T.get("logits_mask", [])]
    if any(logits.dim() == 3 for logits in views_T.get("logits", [])):
        return bool(masks) and all(_within(mask, rows.kept) for mask in masks)
    return True


def same_mask(views_S: Views, views_T: Views) -> bool:
    """Return whether both sides have the same ``inputs_mask``, or both have none."""
    own, other = views_S.get("inputs_mask"), views_T.get("inputs_mask")
    if own is other:
        return True
    if own is None or other is None:
        return False
    return own.shape == other.shape and bool((own.cpu() == other.cpu()).all())


def forms_are_valid(views_S: Views, views_T: Views, contents: Contents) -> bool:
    """Return whether the student's mask is the one with which stored forms were made, where there are such."""
    forms = [contents.form(number, match) for number, match in contents.matches]
    return not any(form is not None and form.uses_mask for form in forms) or same_mask(views_S, views_T)


def _within(mask: Tensor, kept: Tensor) -> bool:
    mask = mask.cpu() != 0
    return mask.shape == kept.shape and not bool((mask & ~kept).any())


def items_of(
    tensors: Mapping[str, Tensor], keep_padding: bool, contents: Contents, top_k: int | None, temperature: float
) -> list[Item]:
    """Return how each tensor is stored."""
    items = []
    for name, tensor in tensors.items():
        positions = () if keep_padding else positions_of(name, tensor, contents)
        shape = tuple(0 if place in positions else size for place, size in enumerate(tensor.shape) if place > 0)
        few = top_k if name.startswith("logits/") and top_k is not None and tensor.shape[-1] > top_k + 1 else 0
        items.append(Item(name, str(tensor.dtype).removeprefix("torch."), shape, few or 0, temperature))
    return items


def places_of(rows: Rows) -> list[Place]:
    """Return the kept positions of each row: a slice from the start where there is no hole."""
    if rows.kept is None:
        return [slice(0, 0)] * len(rows.keys)
    places: list[Place] = []
    for row in rows.kept.numpy():
        numbers = row.nonzero()[0]
        dense = len(numbers) == 0 or int(numbers[-1]) + 1 == len(numbers)
        places.append(slice(0, len(numbers)) if dense else numbers)
    return places


def in_words(names: Sequence[str]) -> str:
    """Return names of stored tensors as a reader would say them: ``logits, hidden 0, 3, 6``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key, _, place = name.partition("/")
        if key in ("logits", "inputs_mask", "logits_mask", "labels"):
            if key == "logits":
                groups.setdefault("logits", [])
        elif key == "form":
            form, feature, layers = place.split("/")
            groups.setdefault(f"{form.replace('_', ' ')} of {feature}", []).append(layers.replace(",", "-"))
        else:
            groups.setdefault(key, []).append(place)
    return "; ".join(f"{key} {', '.join(sorted(places, key=_number))}".strip() for key, places in groups.items())


def _number(place: str) -> tuple[int, str]:
    return int(place.split("-")[0]), place
