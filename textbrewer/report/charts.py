"""The pictures of the page, as SVG and HTML that take their colours from the page's style."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from textbrewer.report.layout import Axis, Panel, Point, axis, place_labels
from textbrewer.report.table import rounded
from textbrewer.report.weights import COMPONENTS, Zeros

if TYPE_CHECKING:
    from textbrewer.report.result import ModelReport

__all__ = ["component_bars", "is_sparse", "scatter", "sparsity_map"]

_WIDTH, _HEIGHT = 440.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 14.0, 46.0
_LETTER, _LINE = 6.6, 15.0
_VISIBLE = 0.05  # the codes of int8 weights alone have 1 or 2 of a hundred zeros
_SAY_NOTHING = {"weight", "dense", "self", "layer"}


def scatter(panel: Panel, baseline: str) -> str:
    """Return a picture of one cost and the score of all models, with their names beside the points."""
    xs = axis([value for point in panel.points for value in (point.x, point.low, point.high) if value], True)
    ys = axis([point.y for point in panel.points], not panel.higher_is_better)
    places = [(_x(xs, point.x) - _LEFT, _y(ys, point.y) - _TOP) for point in panel.points]
    room = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
    widths = [min(room[0], len(point.name) * _LETTER) for point in panel.points]
    bars = [
        (_x(xs, point.low) - _LEFT, _x(xs, point.high) - _LEFT, place[1])
        for point, place in zip(panel.points, places, strict=True)
        if point.low is not None and point.high is not None
    ]
    labels = place_labels(places, widths, _LINE, room, bars)
    parts = [*_axes(panel, xs, ys), *(_mark(point, xs, ys, point.name == baseline) for point in panel.points)]
    for point, (x, y, anchor) in zip(panel.points, labels, strict=True):
        place = f'x="{_LEFT + x:.1f}" y="{_TOP + y + 4:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {place}>{escape(point.name)}</text>')
    title = f"{panel.y_title} against {panel.x_title}"
    return (
        f'<svg class="scatter" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _x(xs: Axis, value: float) -> float:
    return _LEFT + xs.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(ys: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - ys.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(panel: Panel, xs: Axis, ys: Axis) -> list[str]:
    """Return grid lines, ticks and titles."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in xs.ticks:
        x = _x(xs, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP:g}" x2="{x:.1f}" y2="{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:g}" text-anchor="middle">{tick:g}</text>')
    for tick in ys.ticks:
        y = _y(ys, tick)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" y1="{y:.1f}" x2="{right:g}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7:g}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT:g}" y1="{bottom:g}" x2="{right:g}" y2="{bottom:g}"/>')
    x_middle, y_middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    x_title = f'<text class="title" x="{x_middle:g}" y="{_HEIGHT - 8:g}" text-anchor="middle">'
    y_title = f'<text class="title" transform="translate(13 {y_middle:g}) rotate(-90)" text-anchor="middle">'
    return [*parts, f"{x_title}{escape(panel.x_title)}</text>", f"{y_title}{escape(panel.y_title)}</text>"]


def _mark(point: Point, xs: Axis, ys: Axis, is_baseline: bool) -> str:
    """Return a model's point, with its quartiles, a ring for the baseline, and its values to hover."""
    x, y = _x(xs, point.x), _y(ys, point.y)
    kind = "best" if point.best else "beaten"
    hover = escape(f"{point.name}: {rounded(point.x)}, {rounded(point.y, 4)}")
    parts = [f'<g class="point {kind}"><title>{hover}</title>']
    if point.low is not None and point.high is not None:
        start, end = _x(xs, point.low), _x(xs, point.high)
        parts.append(f'<line class="quartiles" x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"/>')
    if is_baseline:
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
    parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>')
    return "".join(parts)


def component_bars(models: list[ModelReport]) -> str:
    """Return a bar for each model, as long as it has parameters beside the largest, in parts by component."""
    counted = [model for model in models if model.components and model.parameters]
    largest = max((model.parameters or 0 for model in counted), default=0)
    rows = []
    for model in counted:
        segments = []
        for number, component in enumerate(COMPONENTS):
            count = (model.components or {}).get(component, 0)
            if count:
                hover = f"{component}: {count:,} ({count / (model.parameters or 1):.1%})"
                width = 100 * count / largest
                segments.append(f'<i class="c{number}" style="width:{width:.3f}%" title="{hover}"></i>')
        name, total = escape(model.name), f"{model.parameters:,}"
        bar = f'<span class="bar">{"".join(segments)}</span>'
        rows.append(f'<div class="stack"><span class="who">{name}</span>{bar}<span class="total">{total}</span></div>')
    used = {component for model in counted for component, count in (model.components or {}).items() if count}
    legend = "".join(
        f'<span><i class="c{number}"></i>{component}</span>'
        for number, component in enumerate(COMPONENTS)
        if component in used
    )
    return f'<div class="legend">{legend}</div>{"".join(rows)}'


def is_sparse(model: ModelReport) -> bool:
    """Return whether a matrix of the model has at least 5% zeros: others are not drawn."""
    return any(matrix.share >= _VISIBLE for matrix in model.matrices)


def sparsity_map(model: ModelReport) -> str:
    """Return a table of the zeros of a model's matrices, coloured by share: a row for each block of its stacks."""
    blocks, outside = _blocks(model.matrices)
    prefixes = {block.rpartition(".")[0] for block in blocks}
    columns = list(dict.fromkeys(column for found in blocks.values() for column in found))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = []
    for block, found in blocks.items():
        stack, _, number = block.rpartition(".")
        label = f"{(stack if len(prefixes) > 1 else stack.rpartition('.')[2]) or 'layer'} {number}"
        cells = "".join(_cell(found.get(column)) for column in columns)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    grid = f'<div class="scroll"><table class="map"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'
    others = [f"{matrix.name} {matrix.share:.0%}" for matrix in outside if matrix.share >= _VISIBLE]
    below = f'<p class="small">Outside the blocks: {escape(", ".join(others))}.</p>' if others else ""
    return (grid if blocks else "") + below


def _cell(matrix: Zeros | None) -> str:
    if matrix is None:
        return "<td></td>"
    hover = escape(f"{matrix.name}: {matrix.zeros:,} of {matrix.total:,} are zero")
    strong = ' class="strong"' if matrix.share > 0.65 else ""
    share = f"{100 * matrix.share:.0f}"
    return f'<td{strong} style="--share:{matrix.share:.3f}" title="{hover}">{share}</td>'


def _blocks(matrices: list[Zeros]) -> tuple[dict[str, dict[str, Zeros]], list[Zeros]]:
    """Return the matrices by block (dotted name up to its first number) and short name, and those outside blocks."""
    blocks: dict[str, dict[str, Zeros]] = {}
    outside = []
    for matrix in matrices:
        parts = matrix.name.split(".")
        place = next((number for number, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            outside.append(matrix)
            continue
        found = blocks.setdefault(".".join(parts[: place + 1]), {})
        rest = parts[place + 1 :]
        short = " ".join(part for part in rest if part not in _SAY_NOTHING and not part.isdigit()) or "weight"
        found[short if short not in found else " ".join(rest)] = matrix
    return blocks, outside
