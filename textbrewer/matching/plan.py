"""Intermediate matches made ready for training: their losses, log names, projections, and how to pick the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbrewer.adaptors import Views
from textbrewer.configurations import IntermediateMatch, Projection
from textbrewer.matching.strategy import LayerStrategy, make_strategy
from textbrewer.presets import PROJ_MAP
from textbrewer.registry import name_of

Feature = Any
"""A tensor, or a list of two for losses that take pairs of layers."""


@dataclass(frozen=True)
class PlannedMatch:
    """A match with what training needs of it.

    Args:
        number: its place in ``intermediate_matches``.
        match: the configuration.
        loss: the loss function.
        name: name in the log, without the leading ``unweighted_``; unique within a plan.
        strategy: how several layers meet several, which then calls the loss; ``None``: the loss is called itself.
    """

    number: int
    match: IntermediateMatch
    loss: Callable[..., Tensor]
    name: str
    strategy: LayerStrategy | None = None

    @property
    def compare(self) -> Callable[..., Tensor]:
        """What is called with both sides' features and the mask."""
        return self.loss if self.strategy is None else self.strategy


def plan_matches(matches: Sequence[IntermediateMatch]) -> list[PlannedMatch]:
    """Return the matches with their losses and log names.

    A name is TextBrewer's ``<feature>_<loss>_<layer_S>_<layer_T>``, or ``<feature>_<loss>_<strategy>``; further matches
    of the same name get ``_2``, ...
    """
    plan: list[PlannedMatch] = []
    seen: dict[str, int] = {}
    for number, match in enumerate(matches):
        name = f"{match.feature}_{match.loss_name}_{_layer_name(match.layer_S)}_{_layer_name(match.layer_T)}"
        if match.strategy is not None:
            name = f"{match.feature}_{match.loss_name}_{name_of(match.strategy)}"
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name}_{seen[name]}"
        plan.append(PlannedMatch(number, match, match.loss_function, unique, _strategy_of(match)))
    return plan


def _strategy_of(match: IntermediateMatch) -> LayerStrategy | None:
    if match.strategy is None or not isinstance(match.layer_S, list) or not isinstance(match.layer_T, list):
        return None
    return make_strategy(match.strategy, match.loss_function, len(match.layer_S), len(match.layer_T))


def _layer_name(layers: int | list[int]) -> str:
    return "-".join(str(layer) for layer in layers) if isinstance(layers, list) else str(layers)


def build_projection(
    projection: Projection, width_S: int | None = None, width_T: int | None = None
) -> nn.Module | None:
    """Return the module of a projection, ``None`` while its widths are not known.

    Args:
        projection: the parsed ``proj``; widths that it names count before the following.
        width_S: the student's width.
        width_T: the teacher's width.
    """
    dim_in, dim_out = projection.dim_S or width_S, projection.dim_T or width_T
    if dim_in is None or dim_out is None:
        return None
    module: nn.Module = PROJ_MAP[projection.kind](dim_in, dim_out)
    return module


def width_of_model(model: nn.Module, feature: str) -> int | None:
    """Return the width of a model's hidden states as its configuration tells it, ``None`` if it does not."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return width if feature == "hidden" and isinstance(width, int) else None


def select(views: Mapping[str, Any], feature: str, layers: int | list[int], who: str) -> Feature:
    """Return the features of the named layers from one side's views.

    Args:
        views: the adaptor's dict in normal form.
        feature: ``"hidden"`` or ``"attention"``.
        layers: a layer number, or a list of them (gives a list).
        who: ``"student"`` or ``"teacher"``, for messages.

    Raises:
        KeyError: if the adaptor returned no such feature; the message says how to get it.
        IndexError: if there is no such layer.
    """
    if feature not in views:
        raise KeyError(
            f"an intermediate match needs {feature!r} of the {who}, but adaptor_{who[0].upper()} returned only "
            f"{sorted(views)}; {_remedy(feature)}"
        )
    sequence = views[feature]
    if isinstance(layers, list):
        return [_layer(sequence, layer, feature, who) for layer in layers]
    return _layer(sequence, layers, feature, who)


def teacher_feature(results_T: Sequence[Views], planned: PlannedMatch) -> Feature:
    """Return the teacher's feature that a match reads: in the reduced form of its loss, where there is one, or whole.

    Args:
        results_T: the views of each teacher.
        planned: the match.

    Raises:
        KeyError, IndexError: as :func:`select`.
    """
    match, views = planned.match, results_T[planned.match.teacher]
    if planned.number in views.reduced:
        return views.reduced[planned.number]
    return select(views, match.feature, match.layer_T, "teacher")


def _layer(sequence: Any, layer: int, feature: str, who: str) -> Tensor:
    count = len(sequence)
    if count == 0:
        raise KeyError(f"{feature!r} of the {who} is empty; {_remedy(feature)}")
    if not -count <= layer < count:
        raise IndexError(
            f"layer_{who[0].upper()}={layer} is out of range: {feature!r} of the {who} has {count} entries, "
            f"0 to {count - 1}"
        )
    value = sequence[layer]
    if not isinstance(value, Tensor):
        raise KeyError(f"{feature!r} of the {who} holds {type(value).__name__} at layer {layer}; {_remedy(feature)}")
    return value


def _remedy(feature: str) -> str:
    if feature == "attention":
        return (
            "return the attention maps under that key. A transformers model gives them only when it is called with "
            "output_attentions=True and was loaded with attn_implementation='eager' (its default, sdpa, computes "
            "none); or capture them with textbrewer.hooks"
        )
    if feature == "hidden":
        return (
            "return the hidden states under that key. A transformers model gives them when it is called with "
            "output_hidden_states=True, as in train(..., output_hidden_states=True); or capture them with "
            "textbrewer.hooks"
        )
    if feature in ("query", "key", "value", "scores"):
        return "return it under that key, as textbrewer.hooks.capture_qkv gives it; adaptor='auto' does so"
    return "return a list of tensors under that key"
