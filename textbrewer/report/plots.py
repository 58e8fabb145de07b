"""A report as a PNG picture, by matplotlib."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from textbrewer.report.layout import Panel, axis, panels, place_labels

if TYPE_CHECKING:
    from textbrewer.report.result import Report

__all__ = ["is_possible", "png", "require"]

_DPI, _LABEL = 150, 8.5


def is_possible() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require() -> None:
    """Raise ImportError, with the remedy, unless matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'textbrewer[plot]'") from error


def png(report: Report) -> bytes:
    """Return a picture of score against latency and against size, or of latency against size without scores.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is nothing to draw.
    """
    require()
    from matplotlib.figure import Figure

    found = panels(report)
    if not found:
        raise ValueError("a plot needs a score or a size of at least one model, got neither")
    figure = Figure(figsize=(5.6 * len(found), 4.0), dpi=_DPI, layout="constrained")
    for panel, axes in zip(found, figure.subplots(1, len(found), squeeze=False)[0], strict=True):
        _prepare(panel, axes)
    figure.supxlabel(
        "filled: no other model is at least as good in both; ring: the baseline"
        + ("; bars: quartiles" if any(point.low is not None for panel in found for point in panel.points) else ""),
        size=8,
        color="dimgray",
    )
    figure.draw_without_rendering()  # labels are placed in pixels, which are known only then
    figure.set_layout_engine("none")
    for panel, axes in zip(found, figure.axes, strict=True):
        _draw(panel, axes, report.baseline)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def _prepare(panel: Panel, axes: Any) -> None:
    """Set up the axes."""
    x_axis = axis([value for point in panel.points for value in (point.x, point.low, point.high) if value], True)
    y_axis = axis([point.y for point in panel.points], not panel.higher_is_better)
    if x_axis.log:
        axes.set_xscale("log")
    axes.set_xlim(x_axis.start, x_axis.end)
    axes.set_xticks(x_axis.ticks, [f"{tick:g}" for tick in x_axis.ticks])
    axes.set_xticks([], minor=True)
    if y_axis.log:
        axes.set_yscale("log")
    axes.set_ylim(y_axis.start, y_axis.end)
    axes.set_yticks(y_axis.ticks, [f"{tick:g}" for tick in y_axis.ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel(panel.x_title)
    axes.set_ylabel(panel.y_title)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(panel: Panel, axes: Any, baseline: str) -> None:
    """Draw the points and their names."""
    from matplotlib.transforms import IdentityTransform

    box = axes.get_window_extent()
    pixels = axes.transData.transform([(point.x, point.y) for point in panel.points])
    places = [(float(x - box.x0), float(box.y1 - y)) for x, y in pixels]
    height = _LABEL * _DPI / 72 * 1.35
    widths = [len(point.name) * height * 0.45 for point in panel.points]
    quartiles = [(point.low, point.high, point.y) for point in panel.points if None not in (point.low, point.high)]
    ends = [axes.transData.transform([(low, y), (high, y)]) for low, high, y in quartiles]
    bars = [(float(a[0] - box.x0), float(b[0] - box.x0), float(box.y1 - a[1])) for a, b in ends]
    labels = place_labels(places, widths, height, (box.width, box.height), bars)
    for point, (left, middle, anchor) in zip(panel.points, labels, strict=True):
        color = "#1f6feb" if point.best else "#8b949e"
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [point.y, point.y], color=color, linewidth=1.6, alpha=0.6)
        face = color if point.best else "white"
        axes.plot(point.x, point.y, "o", color=color, markerfacecolor=face, markersize=7)
        if point.name == baseline:
            axes.plot(point.x, point.y, "o", color=color, markerfacecolor="none", markersize=12)
        x, y = box.x0 + left, box.y1 - middle
        side = {"start": "left", "middle": "center", "end": "right"}[anchor]
        style = {"size": _LABEL, "va": "center", "ha": side, "parse_math": False}
        axes.text(x, y, point.name, transform=IdentityTransform(), **style)
