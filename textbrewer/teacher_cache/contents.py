"""What of a teacher's views the losses read: named tensors with the rows first, and the views made of them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from textbrewer.adaptors import Views
from textbrewer.configurations import IntermediateMatch
from textbrewer.losses.forms import TeacherForm, form_of

_BY_HEAD = ("logits", "logits_mask", "labels")
# Features whose layer n comes from within block n; of hidden states, layer n enters it.
_INSIDE_BLOCKS = ("attention", "query", "key", "value", "scores")
# A form is stored only where it is that much smaller than the layers that it is made of.
_WORTH_IT = 0.5

Numbered = Sequence[tuple[int, IntermediateMatch]]


class Contents:
    """The part of a teacher's views that the losses read.

    Args:
        matches: the intermediate matches with this teacher, with their numbers.
        everything: take all that the adaptor returns, for a ``compute_loss`` of the user's own.
        whole: numbers of the matches whose layers are taken whole, though their loss has a smaller form.
    """

    def __init__(self, matches: Numbered, everything: bool, whole: Sequence[int] = ()) -> None:
        self.matches, self.everything, self.whole = list(matches), everything, set(whole)

    def form(self, number: int, match: IntermediateMatch) -> TeacherForm | None:
        """Return the reduced form in which a match's teacher feature is taken, ``None``: whole layers."""
        if self.everything or number in self.whole:
            return None
        return form_of_match(match)

    def settle(self, views: Views, masks_agree: bool = True) -> Contents:
        """Return contents in which forms that are hardly smaller than their layers give way to these.

        Args:
            views: the teacher's views of a batch.
            masks_agree: whether the student's ``inputs_mask`` is the teacher's; if not, forms that are made with the
                mask give way too.
        """
        whole = set(self.whole)
        for number, match in self.matches:
            form = self.form(number, match)
            if form is None or match.feature not in views or not _all_there(views, match):
                continue
            if form.uses_mask and not masks_agree:
                whole.add(number)
                continue
            layers = {layer: views[match.feature][layer] for layer in layers_of(match)}
            reduced = form.reduce(_feature(views, match), views.get("inputs_mask"))
            if reduced.numel() > _WORTH_IT * sum(item.numel() for item in layers.values()):
                whole.add(number)
        return Contents(self.matches, self.everything, sorted(whole))

    def counts(self, views: Views) -> dict[str, int]:
        """Return how many heads or layers the views have of each key."""
        return {key: len(value) for key, value in views.items() if key != "inputs_mask"}

    def tensors(self, views: Views) -> dict[str, Tensor]:
        """Return the tensors to keep, by name."""
        kept: dict[str, Tensor] = {}
        for key in _BY_HEAD if self.everything else _BY_HEAD[:2]:
            kept.update({f"{key}/{head}": value for head, value in enumerate(views.get(key, []))})
        if "inputs_mask" in views:
            kept["inputs_mask"] = views["inputs_mask"]
        if self.everything:
            for key in views.keys() - {*_BY_HEAD, "inputs_mask", "losses"}:
                kept.update({f"{key}/{layer}": value for layer, value in enumerate(views[key]) if value is not None})
        for number, match in self.matches:
            if self.everything or match.feature not in views:
                continue
            form = self.form(number, match)
            if form is None:
                for layer in sorted(resolved(layers_of(match), len(views[match.feature]))):
                    if views[match.feature][layer] is not None:
                        kept[f"{match.feature}/{layer}"] = views[match.feature][layer]
                continue
            name = form_name(form, match, len(views[match.feature]))
            if name not in kept and _all_there(views, match):
                kept[name] = form.reduce(_feature(views, match), views.get("inputs_mask"))
        kept.update({f"captured/{number}": value for number, value in views.captured.items()})
        return kept

    def views(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> Views:
        """Return views of the tensors; layers that were not kept are ``None``."""
        entries: dict[str, Any] = {}
        captured: dict[int, Tensor] = {}
        for name, value in tensors.items():
            key, _, place = name.partition("/")
            if key == "inputs_mask":
                entries[key] = value
            elif key == "captured":
                captured[int(place)] = value
            elif key != "form":
                entries.setdefault(key, [None] * counts[key])[int(place)] = value
        views = Views(entries, captured=captured)
        for number, match in self.matches:
            if match.feature in counts:
                # Also where no layer was kept: it is then told of the layer, not of the feature, that it is missing.
                views.setdefault(match.feature, [None] * counts[match.feature])
            form = self.form(number, match)
            if form is not None and match.feature in counts:
                name = form_name(form, match, counts[match.feature])
                if name in tensors:
                    views.reduced[number] = tensors[name]
        return views


def layers_of(match: IntermediateMatch) -> list[int]:
    """Return the teacher's layers that a match reads."""
    return match.layer_T if isinstance(match.layer_T, list) else [match.layer_T]


def form_of_match(match: IntermediateMatch) -> TeacherForm | None:
    """Return the reduced form that the loss of a match takes; a strategy hands whole layers to its loss."""
    return None if match.strategy is not None else form_of(match.loss_function)


def form_name(form: TeacherForm, match: IntermediateMatch, count: int) -> str:
    """Return the name of a match's reduced form, the same for matches that share it."""
    layers = ",".join(str(layer % count) for layer in layers_of(match))
    return f"form/{form.name}/{match.feature}/{layers}"


def depth_of(name: str) -> float:
    """Return how many blocks of the teacher have to run for a stored tensor: of masks none, of logits all."""
    key, _, place = name.partition("/")
    if key in ("inputs_mask", "labels"):
        return 0.0
    if key == "form":
        _, feature, layers = place.split("/")
        return max(int(layer) for layer in layers.split(",")) + (feature in _INSIDE_BLOCKS)
    if key == "hidden" or key in _INSIDE_BLOCKS:
        return int(place) + (key in _INSIDE_BLOCKS)
    return float("inf")


def resolved(layers: Iterable[int], count: int) -> set[int]:
    """Return the numbers from the front of those layers that a list of ``count`` has."""
    return {layer % count for layer in layers if -count <= layer < count}


def _feature(views: Views, match: IntermediateMatch) -> Any:
    sequence = views[match.feature]
    return [sequence[layer] for layer in match.layer_T] if isinstance(match.layer_T, list) else sequence[match.layer_T]


def _all_there(views: Views, match: IntermediateMatch) -> bool:
    """Return whether a match's layers exist; those that do not are reported where the loss looks for them."""
    count = len(views[match.feature])
    return all(-count <= layer < count and views[match.feature][layer] is not None for layer in layers_of(match))
