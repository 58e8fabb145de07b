"""Where things go in a picture: axes, labels that do not cover each other, and which models no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textbrewer.report.result import Report

__all__ = ["Axis", "Panel", "Point", "axis", "panels", "place_labels", "unbeaten"]


@dataclass(frozen=True)
class Point:
    """A model in a picture.

    Args:
        name: of the model.
        x: its cost.
        y: its score, or another cost.
        low: first quartile of ``x``, where there is one.
        high: third quartile.
        best: whether no other model is at least as good in both and better in one.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture of one cost.

    Args:
        x_title: what is on the horizontal axis.
        y_title: what is on the vertical one.
        points: the models.
        higher_is_better: whether ``y`` is a score rather than a cost.
    """

    x_title: str
    y_title: str
    points: list[Point]
    higher_is_better: bool


@dataclass(frozen=True)
class Axis:
    """The range of an axis, and its ticks.

    Args:
        start: value at the left or bottom.
        end: value at the right or top.
        ticks: values that are written at it.
        log: whether equal steps are equal factors.
    """

    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value is, 0 at the start and 1 at the end."""
        if self.log:
            return math.log(value / self.start) / math.log(self.end / self.start)
        return (value - self.start) / (self.end - self.start)


def panels(report: Report) -> list[Panel]:
    """Return the pictures of a report: score against latency and against size; without scores latency against size."""
    single = next((place for place, item in enumerate(report.models[0].timings) if item.batch_size == 1), 0)
    timing = report.models[0].timings[single]
    latency = "latency of 1 row, ms" if timing.batch_size == 1 else f"ms a batch of {timing.rows:.3g} rows"
    score = next((name for model in report.models for name in model.scores), None)
    times = {model.name: model.timings[single].ms for model in report.models}
    sizes = {model.name: model.file_bytes / 1e6 for model in report.models if model.file_bytes is not None}
    spread = {name: (ms[0], ms[2]) for name, ms in times.items()}
    medians = {name: ms[1] for name, ms in times.items()}
    if score is None:
        return [_panel(latency, medians, "on disk, MB", sizes, spread, higher_is_better=False)] if sizes else []
    scores = {model.name: model.scores[score] for model in report.models if score in model.scores}
    found = [_panel(latency, medians, score, scores, spread), _panel("on disk, MB", sizes, score, scores, {})]
    return [panel for panel in found if panel.points]


def _panel(
    x_title: str,
    xs: dict[str, float],
    y_title: str,
    ys: dict[str, float],
    spread: dict[str, tuple[float, float]],
    higher_is_better: bool = True,
) -> Panel:
    names = [name for name in xs if name in ys and math.isfinite(ys[name])]
    best = unbeaten([(-xs[name], ys[name] if higher_is_better else -ys[name]) for name in names])
    points = [
        Point(name, xs[name], ys[name], low, high, good)
        for name, good in zip(names, best, strict=True)
        for low, high in [spread.get(name, (None, None))]
    ]
    return Panel(x_title, y_title, points, higher_is_better)


def unbeaten(values: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each pair (more is better) whether no other is at least as good in both and better in one."""
    return [
        not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in values) for mine in values
    ]


def axis(values: Sequence[float], from_zero: bool) -> Axis:
    """Return an axis for values: from zero, or around them; logarithmic for costs that differ by more than 20 times."""
    low, high = min(values), max(values)
    if from_zero and low > 0 and high / low > 20:
        first, last = math.floor(math.log10(low * 0.8)), math.ceil(math.log10(high * 1.2))
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        start, end = low * 0.7, high * 1.4
        shown = [tick for tick in ticks if start <= tick <= end]
        return Axis(start, end, shown if len(shown) < 8 else [x for x in shown if f"{x:e}".startswith("1")], log=True)
    if from_zero:
        low = min(low, 0.0)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    start, end = (low if from_zero else low - room), high + room
    step = _round_step((end - start) / 5)
    first = math.ceil(start / step - 1e-9)
    ticks = [number * step for number in range(first, math.floor(end / step + 1e-9) + 1)]
    return Axis(start, end, ticks)


def _round_step(width: float) -> float:
    """Return the nearest of 1, 2 and 5 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * 0.999)


def place_labels(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    room: tuple[float, float],
    bars: Sequence[tuple[float, float, float]] = (),
) -> list[tuple[float, float, str]]:
    """Return where labels go, each beside its point, so that they cover as little as may be.

    Args:
        points: in pixels, y downwards.
        widths: of the labels.
        height: of a label.
        room: width and height of the picture, which labels stay inside.
        bars: horizontal lines that labels had better not cover: start, end, y.

    Returns:
        For each label x, the y of its middle, and which side of it is at x: ``"start"``, ``"middle"`` or ``"end"``.
    """
    gap = height * 0.85
    taken = [(x - gap / 2, y - gap / 2, x + gap / 2, y + gap / 2) for x, y in points]
    taken += [(start, y - 2, end, y + 2) for start, end, y in bars]
    found = []
    for (x, y), width in zip(points, widths, strict=True):
        candidates = []
        for shift in (0.0, 1.0, -1.0, 2.0, -2.0):
            middle = y + shift * height
            candidates += [(x, middle, "middle")] if shift else []
            candidates += [(x + gap, middle, "start"), (x - gap, middle, "end")]
        boxes = [_box(place, width, height) for place in candidates]
        costs = [_outside(box, room) * 100 + sum(_overlap(box, other) for other in taken) for box in boxes]
        # Of places that are as free the first, which is nearest.
        best = min(range(len(costs)), key=lambda number: (costs[number], number))
        taken.append(boxes[best])
        found.append(candidates[best])
    return found


def _box(place: tuple[float, float, str], width: float, height: float) -> tuple[float, float, float, float]:
    x, middle, anchor = place
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return left, middle - height / 2, left + width, middle + height / 2


def _outside(box: tuple[float, float, float, float], room: tuple[float, float]) -> float:
    return sum(max(0.0, over) for over in (-box[0], box[2] - room[0], -box[1], box[3] - room[1]))


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
