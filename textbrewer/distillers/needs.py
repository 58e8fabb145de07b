"""What the losses read of a teacher: what it need not say, it need not compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from textbrewer.adaptors import FEATURES, Views
from textbrewer.configurations import DistillationConfig
from textbrewer.matching import CustomMatch, PlannedMatch
from textbrewer.teacher_cache.contents import layers_of, resolved


@dataclass(frozen=True)
class Needs:
    """What of a teacher's views the losses read.

    Args:
        logits: whether they read the logits, and with them all that the adaptor returns beside features of layers.
        layers: numbers of the layers by feature, as the adaptor's lists are indexed; negative ones count from the end.
    """

    logits: bool
    layers: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = {feature: frozenset(numbers) for feature, numbers in self.layers.items() if numbers}
        object.__setattr__(self, "layers", layers)

    def __hash__(self) -> int:
        return hash((self.logits, frozenset(self.layers.items())))

    def keep(self, views: Views, counts: Mapping[str, int]) -> Views:
        """Return the views with ``None`` in place of the layers that are not needed.

        Without logits, only the needed layers and ``inputs_mask`` are left: what a teacher that stops early says
        beside them means nothing.

        Args:
            views: of a run to the end, or of a shortened one.
            counts: the length of each feature's list in a run to the end.

        Raises:
            IndexError: if a needed layer is not there.
        """
        kept: dict[str, Any] = {}
        for key, value in views.items():
            if key in self.layers:
                count = counts.get(key, len(value))
                numbers = resolved(self.layers[key], count)
                kept[key] = [value[number] if number in numbers else None for number in range(count)]
            elif key == "inputs_mask" or (self.logits and key not in FEATURES):
                kept[key] = value
        return Views(kept, captured=views.captured)


def needs_of(
    number: int,
    config: DistillationConfig,
    plan: Sequence[PlannedMatch],
    custom: Sequence[CustomMatch],
    student_has_losses: bool,
) -> Needs | None:
    """Return what the losses read of a teacher in every step; ``None``: in some step they may read everything.

    Args:
        number: the teacher's number.
        config: weights and schedules.
        plan: the intermediate matches.
        custom: the custom matches.
        student_has_losses: whether the student's adaptor is known to return ``losses``.
    """
    weights = [planned.match.weight for planned in plan] + [match.weight for match in custom]
    if student_has_losses and config.hard_label_weight_scheduler in (None, "none"):
        weights.append(config.hard_label_weight)
    # A step in which no term has a weight computes them all, so that there is a loss with a graph.
    if not any(weights):
        return None
    layers: dict[str, set[int]] = {}
    for planned in plan:
        match = planned.match
        if match.weight and match.teacher == number:
            layers.setdefault(match.feature, set()).update(layers_of(match))
    return Needs(config.kd_loss_weight != 0, {feature: frozenset(item) for feature, item in layers.items()})
