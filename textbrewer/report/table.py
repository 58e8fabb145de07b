"""A report as tables: for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textbrewer.report.weights import COMPONENTS

if TYPE_CHECKING:
    from textbrewer.report.result import Report

__all__ = [
    "NOTHING",
    "Column",
    "columns",
    "component_columns",
    "markdown",
    "notes",
    "rounded",
    "scaled",
    "size",
    "text",
]

NOTHING = "\N{EN DASH}"
_COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_OPERATIONS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs"), (1.0, "FLOPs"))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: what it is.
        unit: of the values, empty without one.
        values: as text, one a model.
        remarks: on the values, such as their spread; empty without any.
        hint: what the title means, in a sentence.
    """

    title: str
    unit: str
    values: Sequence[str]
    remarks: Sequence[str] = ()
    hint: str = ""

    @property
    def header(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def cells(self) -> list[str]:
        """Values with their remarks."""
        remarks = self.remarks or [""] * len(self.values)
        return [f"{value} ({remark})" if remark else value for value, remark in zip(self.values, remarks, strict=True)]


def rounded(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, and none before the point left out."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def scaled(values: Sequence[float | None], units: Sequence[tuple[float, str]]) -> tuple[list[str], str]:
    """Return numbers in the unit that suits the largest one, and that unit."""
    largest = max((value for value in values if value is not None), default=0.0)
    factor, unit = next(((factor, unit) for factor, unit in units if largest >= factor), units[-1])
    exact = factor == 1.0
    return [
        NOTHING if value is None else f"{value:,.0f}" if exact else rounded(value / factor) for value in values
    ], unit


def size(rows: int | None) -> str:
    """Return how a batch size is called."""
    return "the data's batches" if rows is None else "1 row" if rows == 1 else f"{rows} rows"


def columns(report: Report) -> list[Column]:
    """Return the columns of the main table, without those of which nothing is known."""
    models = report.models
    parameters, parameters_unit = scaled([model.parameters for model in models], _COUNTS)
    file_bytes, bytes_unit = scaled([model.file_bytes for model in models], _BYTES)
    flops, flops_unit = scaled([model.flops for model in models], _OPERATIONS)
    memory, memory_unit = scaled([model.peak_memory for model in models], _BYTES)
    sparsity = [None if model.sparsity is None else 100 * model.sparsity for model in models]
    smaller = [_times(report.smaller(model.name)) for model in models]
    found = [
        Column("parameters", parameters_unit, parameters, hint="shared tensors count once"),
        Column("zero", "%", [NOTHING if x is None else f"{x:.1f}" for x in sparsity], hint="parameters that are zero"),
        Column("on disk", bytes_unit, file_bytes, hint="bytes of the model's file"),
        Column("x smaller", "", smaller, hint="the baseline's file size over this one"),
        Column("a batch", flops_unit, flops, hint=f"multiplications and additions for {report.batch}"),
        *_time_columns(report),
        Column("memory", memory_unit, memory, hint=f"peak beyond weights and inputs for {report.batch}"),
    ]
    for name in dict.fromkeys(name for model in models for name in model.scores):
        found.append(Column(name, "", [rounded(model.scores.get(name), 4) for model in models], hint="score"))
    return [column for column in found if set(column.values) != {NOTHING}]


def _time_columns(report: Report) -> list[Column]:
    """Return latency (one row) or throughput (more) for each batch size, and how many times faster that is."""
    found = []
    for place, timing in enumerate(report.models[0].timings):
        timings = [model.timings[place] for model in report.models]
        single = timing.batch_size == 1
        spreads = [item.ms if single else item.rows_per_second for item in timings]
        values = [rounded(middle) for _, middle, _ in spreads]
        remarks = [f"{rounded(low)}\N{EN DASH}{rounded(high)}" for low, _, high in spreads]
        rows = f"{timing.rows:.3g} rows" if timing.batch_size is None else size(timing.batch_size)
        faster = [_times(report.faster(model.name, place)) for model in report.models]
        hint = f"median of {timing.rounds} rounds, and quartiles; batches of {rows}"
        title, unit = ("latency", "ms") if single else (f"throughput at {rows}", "rows/s")
        found += [Column(title, unit, values, remarks, hint), Column("x faster", "", faster, hint="by medians")]
    return found


def component_columns(report: Report) -> list[Column]:
    """Return the columns of the table of parameters by component, without components that no model has."""
    found = []
    for component in COMPONENTS:
        counts = [None if model.components is None else model.components.get(component, 0) for model in report.models]
        if any(counts):
            values, unit = scaled(counts, _COUNTS)
            shares = [
                "" if not count or not model.parameters else f"{count / model.parameters:.0%}"
                for count, model in zip(counts, report.models, strict=True)
            ]
            found.append(Column(component, unit, values, shares))
    return found


def notes(report: Report) -> list[str]:
    """Return how it was measured, in sentences."""
    devices = list(dict.fromkeys(model.device for model in report.models))
    foreign = [model.name for model in report.models if model.parameters is None]
    times = (
        f"Times: medians of {report.rounds} rounds after {report.warmup} to warm up, in brackets the quartiles; the "
        f"models took turns on the same batches. Device: {', '.join(devices)}; torch had {report.threads} "
        f"thread{'' if report.threads == 1 else 's'}."
    )
    costs = (
        f"FLOPs and memory are of one batch ({report.batch}). FLOPs: two for each multiplication with its addition in "
        "matrix products, convolutions and attention; zero weights count too. Memory: the most that torch held at a "
        "time in a forward pass, beyond weights and inputs; what libraries allocate themselves is not in it."
    )
    compared = f"Compared with {report.baseline}: so many times smaller on disk, so many times faster by medians."
    found = [compared, times, costs] if len(report.models) > 1 else [times, costs]
    formats = dict.fromkeys(model.file_format for model in report.models if model.file_format and not _own_file(model))
    if formats:
        found.append(f"On disk: the state dict as {' or '.join(filter(None, formats))}, or the file that was given.")
    if foreign:
        found.append(f"Not run by torch, so without what torch counts, and with threads of its own: {_list(foreign)}.")
    return found


def text(report: Report) -> str:
    """Return the tables for a terminal, and how it was measured."""
    names = [model.name for model in report.models]
    parts = [_text_table(names, columns(report))]
    if components := component_columns(report):
        parts.append("Parameters by component\n" + _text_table(names, components))
    return "\n\n".join([*parts, "\n".join(notes(report))])


def markdown(report: Report) -> str:
    """Return the tables as Markdown, and how it was measured."""
    names = [model.name for model in report.models]
    parts = [_markdown_table(names, columns(report))]
    if components := component_columns(report):
        parts += ["Parameters by component:", _markdown_table(names, components)]
    environment = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in [*notes(report), environment] if note)])


def _own_file(model: object) -> bool:
    return getattr(model, "file_format", None) not in ("safetensors", "torch.save")


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _list(names: Sequence[str]) -> str:
    return "; ".join(names)


def _grid(names: Sequence[str], found: Sequence[Column], escape: bool) -> tuple[list[list[str]], list[int]]:
    rows = [["model", *(column.header for column in found)]]
    rows += [[name, *(column.cells[number] for column in found)] for number, name in enumerate(names)]
    if escape:
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return rows, [max(map(len, column)) for column in zip(*rows, strict=True)]


def _text_table(names: Sequence[str], found: Sequence[Column]) -> str:
    rows, widths = _grid(names, found, escape=False)
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown_table(names: Sequence[str], found: Sequence[Column]) -> str:
    rows, widths = _grid(names, found, escape=True)
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
