"""Models measured beside each other: :func:`report`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from textbrewer import checks
from textbrewer.hooks.forward import evaluating, on_device
from textbrewer.names import suggestion
from textbrewer.report import cost, latency, weights
from textbrewer.report.batches import describe, first_batches, pieces, rows_of
from textbrewer.report.entries import Entry, Exported, Measured, read_entries
from textbrewer.report.latency import Timing
from textbrewer.report.result import ModelReport, Report, check_path

__all__ = ["report"]

Score = Callable[[Any], Any]
Models = Sequence[nn.Module | Measured | Exported] | Mapping[str, nn.Module | Measured | Exported]


def report(
    models: Models,
    data: Iterable[Any],
    *,
    names: Sequence[str] | None = None,
    score: Score | None = None,
    path: str | Path | None = None,
    threads: int | None = None,
    repeats: int = 30,
    batch_sizes: Sequence[int | None] = (1, None),
    warmup: int = 3,
    baseline: str | None = None,
) -> Report:
    """Measure models beside each other: size, sparsity, FLOPs, latency, throughput, memory and score.

    >>> found = report({"teacher": teacher, "student": student}, dataloader, score=accuracy)
    >>> print(found)
    >>> found.save_html("report.html")

    Models run where they are, in eval mode and without gradients; their modes are put back. They take turns, round by
    round on the same batches, which are on their device before the clock starts; on GPUs it stops when the work is
    done. Rows taken out of a batch keep their padding: give batches of single rows to time those without.

    Args:
        models: a list, or a dict by name, of modules, :class:`Measured`, and what
            :func:`textbrewer.compression.load_exported` returns.
        data: batches as the models take them; no more than ``repeats`` are read. FLOPs and memory are of the first one.
        names: of the models in a list; by default their classes.
        score: is given a model, as it was given here, without gradients, and returns a number or a dict of numbers;
            more is better, and the first one is drawn.
        path: where to write the report: a file with the suffix ``.html``, ``.json``, ``.md``, ``.txt`` or ``.png``, or
            a folder for all of them.
        threads: of torch on the CPU while the models are timed and scored; ``None``: as they are.
        repeats: rounds that are timed for each batch size.
        batch_sizes: rows of a batch, ``None``: the data's batches as they are.
        warmup: rounds before that are not timed.
        baseline: name of the model that the others are compared with; by default the first.

    Raises:
        ValueError: without models or data, or if a model does not take the data.
        TypeError: if a model is neither a module nor ``Measured``, or a score is no number.
        KeyError: if there is no model of the baseline's name.
        ImportError: if a picture is asked for without matplotlib.
    """
    entries = read_entries(models, names)
    _check(entries, threads, repeats, batch_sizes, warmup, baseline)
    if path is not None:
        check_path(Path(path))
    batches = first_batches(data, int(repeats))
    plans = {size: batches if size is None else pieces(batches, size, int(repeats)) for size in batch_sizes}
    total = len(entries) * (1 if score is None else 2) + len(plans) * int(repeats + warmup)
    with ExitStack() as stack, tqdm(desc="report", total=total) as bar:
        used = stack.enter_context(latency.limited_threads(threads))
        for entry in entries:
            if entry.module is not None:
                stack.enter_context(evaluating(entry.module))
        costs = {}
        for entry in entries:
            costs[entry.name] = _costs(entry, batches[0])
            bar.update()
        timings = _timings(entries, plans, int(repeats), int(warmup), lambda: bool(bar.update()))
        scores: dict[str, dict[str, float]] = {}
        for entry in entries if score is not None else ():
            scores[entry.name] = _scores(score, entry)  # type: ignore[arg-type]  # which is not None here
            bar.update()
    measured = [
        ModelReport(
            name=entry.name, timings=timings[entry.name], scores=scores.get(entry.name, {}), **costs[entry.name]
        )
        for entry in entries
    ]
    rounds = {"rounds": int(repeats), "warmup": int(warmup)}
    result = Report(measured, baseline or entries[0].name, describe(batches[0]), used, **rounds, environment=_machine())
    if path is not None:
        result.save(path)
    return result


def _check(
    entries: Sequence[Entry],
    threads: int | None,
    repeats: int,
    batch_sizes: Sequence[int | None],
    warmup: int,
    baseline: str | None,
) -> None:
    if threads is not None:
        checks.integer(threads, "threads", minimum=1)
    checks.integer(repeats, "repeats", minimum=1)
    checks.integer(warmup, "warmup", minimum=0)
    checks.is_a(batch_sizes, Sequence, "batch_sizes", "a list of numbers of rows, None for the data's batches")
    if not batch_sizes or len(set(batch_sizes)) < len(batch_sizes):
        raise ValueError(f"batch_sizes must be different, at least one, got {batch_sizes!r}")
    for size in batch_sizes:
        if size is not None:
            checks.integer(size, "batch_sizes", minimum=1)
    known = [entry.name for entry in entries]
    if baseline is not None and baseline not in known:
        raise KeyError(f"baseline: unknown model {baseline!r}; {suggestion(baseline, known)}")


def _costs(entry: Entry, batch: Any) -> dict[str, Any]:
    """Return what :class:`ModelReport` holds of a model, but for timings and scores.

    Raises:
        ValueError: if the model does not take the batch.
    """
    batch, module = on_device(batch, entry.device), entry.module
    try:
        with torch.inference_mode():
            entry.run(batch)
    except Exception as error:
        raise ValueError(
            f"data must yield batches that all models take, but {entry.name!r} failed on a batch of "
            f"{describe(batch)}: {type(error).__name__}: {error}"
        ) from error
    files = entry.given.paths if isinstance(entry.given, Measured) else []
    size, kind = (cost.bytes_of_files(files), ", ".join(path.name for path in files)) if files else (None, None)
    found: dict[str, Any] = {
        "kind": type(module if module is not None else entry.given.call).__name__,
        "device": str(entry.device),
        **dict.fromkeys(("parameters", "components", "zeros", "flops", "peak_memory")),
        "matrices": [],
    }
    if module is not None:
        components = weights.parameters_by_component(module)
        found["components"], found["parameters"] = components, sum(components.values())
        found["zeros"], found["matrices"] = weights.zeros_by_matrix(module)
        # Torch's counter does not know the products of quantised weights: no number rather than one too small.
        found["flops"] = None if cost.is_quantised(module) else cost.flops_of(entry.run, batch)
        found["peak_memory"] = cost.peak_memory(entry.run, batch, entry.device)
        if size is None:
            size, kind = cost.bytes_on_disk(module)
    return {**found, "file_bytes": size, "file_format": kind}


def _timings(
    entries: Sequence[Entry],
    plans: Mapping[int | None, list[Any]],
    rounds: int,
    warmup: int,
    done: Callable[[], Any],
) -> dict[str, list[Timing]]:
    """Return each model's timings, one for each batch size."""
    found: dict[str, list[Timing]] = {entry.name: [] for entry in entries}
    for size, batches in plans.items():
        rows = [rows_of(batches[number % len(batches)]) for number in range(rounds)]
        runs = {entry.name: (entry.run, [on_device(batch, entry.device) for batch in batches]) for entry in entries}
        for name, seconds in latency.time_in_turns(runs, rounds, warmup, done=done).items():
            rates = [count / max(second, 1e-9) for count, second in zip(rows, seconds, strict=True)]
            ms = latency.quartiles([1000 * second for second in seconds])
            found[name].append(Timing(size, sum(rows) / rounds, rounds, ms, latency.quartiles(rates)))
    return found


def _scores(score: Score, entry: Entry) -> dict[str, float]:
    """Return what the score function says, by name."""
    with torch.no_grad():
        result = score(entry.given)
    named = dict(result) if isinstance(result, Mapping) else {"score": result}
    if not named:
        raise ValueError(f"score must return at least one number, got {result!r} for {entry.name!r}")
    for name, value in named.items():
        if hasattr(value, "item"):  # of torch and numpy
            named[name] = value = value.item()
        checks.is_a(value, (int, float), f"score of {entry.name!r}, {name!r}", "a number or a dict of numbers")
    return {str(name): float(value) for name, value in named.items()}


def _machine() -> dict[str, str]:
    """Return versions and machine, for readers of the report."""
    found = {"measured": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), "processor": _processor()}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    found["cores"] = str(os.cpu_count())
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["Python"] = platform.python_version()
    for package in ("textbrewer", "torch", "transformers", "onnxruntime", "openvino", "torchao"):
        if package in sys.modules:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:  # a nightly build under another name
                found[package] = str(getattr(sys.modules[package], "__version__", "unknown"))
    return found


def _processor() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
