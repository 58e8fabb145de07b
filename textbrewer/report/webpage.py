"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from textbrewer.report import charts, table
from textbrewer.report.layout import panels
from textbrewer.report.style import STYLE

if TYPE_CHECKING:
    from textbrewer.report.result import ModelReport, Report

__all__ = ["page"]

# Nothing may be fetched, whatever the names of models hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: Report) -> str:
    """Return the page."""
    names = ", ".join(model.name for model in report.models)
    sections = [
        _section("Models", _models(report)),
        _section("Which to choose", _choice(report)),
        _section("Parameters by component", _components(report)),
        _section("Zero weights by layer", _sparsity(report.models)),
        _section("How it was measured", _method(report)),
    ]
    when = report.environment.get("measured", "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Models compared: {escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Models compared</h1>\n<p class="dim">{escape(_subtitle(report, when))}</p>\n'
        f"{_tiles(report)}\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(report: Report, when: str) -> str:
    several = f"{len(report.models)} models" if len(report.models) > 1 else "1 model"
    return ", ".join(filter(None, [several, f"baseline: {report.baseline}", when and f"measured {when}"]))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _tiles(report: Report) -> str:
    """Return the best of the models beside the baseline: smallest, fastest, best score."""
    others = [model.name for model in report.models if model.name != report.baseline]
    found = []
    smaller = {name: ratio for name in others if (ratio := report.smaller(name))}
    for what, ratios in [("smaller on disk", smaller), *_faster(report, others)]:
        if ratios:
            name = max(ratios, key=lambda other: ratios[other])
            found.append((f"{table.rounded(ratios[name])}\N{MULTIPLICATION SIGN}", what, name))
    scores = {model.name: model.score for model in report.models if model.score is not None}
    base = scores.get(report.baseline)
    rivals = {name: score for name, score in scores.items() if name != report.baseline}
    if rivals:
        name = max(rivals, key=lambda other: rivals[other])
        what = next(iter(report[name].scores))
        beside = f" (baseline {table.rounded(base, 4)})" if base is not None else ""
        found.append((table.rounded(rivals[name], 4), f"best {what}{beside}", name))
    tiles = [
        f'<div class="tile"><b>{value}</b><span class="dim">{escape(what)}</span><span>{escape(name)}</span></div>'
        for value, what, name in found
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _faster(report: Report, names: list[str]) -> list[tuple[str, dict[str, float]]]:
    found = []
    for place, timing in enumerate(report.models[0].timings):
        ratios = {name: ratio for name in names if (ratio := report.faster(name, place))}
        rows = "1 row" if timing.batch_size == 1 else f"{timing.rows:.3g} rows"
        found.append((f"faster at {rows}", ratios))
    return found


def _models(report: Report) -> str:
    """Return the main table; ratios to the baseline stand below the value that they are about."""
    merged: list[tuple[table.Column, table.Column | None]] = []
    for column in table.columns(report):
        if column.title.startswith("x ") and merged:
            merged[-1] = (merged[-1][0], column)
        else:
            merged.append((column, None))
    head = "".join(
        f'<th scope="col" title="{escape(column.hint)}">{escape(column.title)}'
        + (f"<small>{escape(column.unit)}</small>" if column.unit else "")
        + "</th>"
        for column, _ in merged
    )
    rows = []
    for number, model in enumerate(report.models):
        mark = "<small>baseline</small>" if model.name == report.baseline else f"<small>{escape(model.kind)}</small>"
        cells = "".join(_cell(column, ratio, number, model.name == report.baseline) for column, ratio in merged)
        rows.append(f'<tr><th scope="row">{escape(model.name)}{mark}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="models"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(column: table.Column, ratio: table.Column | None, number: int, is_baseline: bool) -> str:
    content = escape(column.values[number])
    if ratio is not None and not is_baseline and ratio.values[number] != table.NOTHING:
        content += _compared(float(ratio.values[number]), ratio.title.removeprefix("x "))
    if column.remarks and column.remarks[number]:
        content += f"<small>{escape(column.remarks[number])}</small>"
    nothing = ' class="nothing"' if content == table.NOTHING else ""
    return f'<td{nothing} data-label="{escape(column.header)}">{content}</td>'


def _compared(times: float, word: str) -> str:
    """Return the ratio to the baseline in words; in colour if it is more than what two runs of one model may differ."""
    opposite = {"faster": "slower", "smaller": "larger"}[word]
    kind = "good" if times >= 1.05 else "bad" if times <= 1 / 1.05 else ""
    shown = f"{times:.2f}" if times >= 1 else f"{1 / times:.2f}" if times else "far"
    return f'<small class="{kind}">{shown}\N{MULTIPLICATION SIGN} {word if times >= 1 else opposite}</small>'


def _choice(report: Report) -> str:
    found = panels(report)
    if not found:
        return ""
    better = "up and to the left" if found[0].higher_is_better else "down and to the left"
    note = (
        f'<p class="small">Better is {better}. Filled: no other model is at least as good in both. Ring: the baseline. '
        "Bars: quartiles.</p>"
    )
    return f'<div class="charts">{"".join(charts.scatter(panel, report.baseline) for panel in found)}</div>{note}'


def _components(report: Report) -> str:
    columns = table.component_columns(report)
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{column.title}<small>{column.unit}</small></th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(model.name)}</th>'
        + "".join(_cell(column, None, number, is_baseline=False) for column in columns)
        + "</tr>"
        for number, model in enumerate(report.models)
        if model.components is not None
    )
    return (
        f"{charts.component_bars(report.models)}<details><summary>As numbers</summary>"
        f'<div class="scroll"><table class="models"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _sparsity(models: list[ModelReport]) -> str:
    known = [model for model in models if model.zeros is not None]
    sparse = [model for model in known if charts.is_sparse(model)]
    if not known:
        return ""
    parts = []
    if sparse:
        parts.append('<p class="small">Percent of each matrix that is zero, a row for each block.</p>')
    for model in sparse:
        parts.append(f"<h3>{escape(model.name)}</h3>{charts.sparsity_map(model)}")
    dense = [model.name for model in known if model not in sparse]
    if dense:
        text = f"No matrix with 5% zeros or more: {'; '.join(dense)}."
        parts.append(f'<p class="small">{escape(text)}</p>')
    parts.append(
        '<p class="small">Zero weights alone make no model smaller on disk or faster; units that are taken out do.</p>'
    )
    return "".join(parts)


def _method(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes(report))
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in report.environment.items())
    return f'<ul>{notes}</ul><h3>Environment</h3><dl class="small">{items}</dl>'
