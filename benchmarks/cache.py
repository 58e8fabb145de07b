"""What a teacher cache costs: bytes a row and effect on the loss by storage choice, rates, a million rows, two writers.

    python benchmarks/cache.py                                    # everything
    python benchmarks/cache.py --part storage
    python benchmarks/cache.py --size tiny --rows 5000 --steps 2  # only to try the script

storage: the headline job with padded rows (--varied-lengths of the other benchmarks), one pass to fill the cache and
one to read it, with a learning rate of 0. The losses of each batch are compared with those of the same pass without a
cache. rates: `precompute` of logits of two classes over many rows, by a teacher that costs nothing, then a pass that
finds them all. writers: two processes fill one folder with half of the rows each, then one with all.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import headline
import torch
from torch import Tensor, nn

import textbrewer
from textbrewer.engine.tracking import Tracker

PARTS = ("storage", "rates", "writers")
CHOICES: tuple[dict[str, Any], ...] = (
    {"dtype": "float32"},
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"dtype": "int8"},
)


# ---- storage ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[list[dict[str, float]]]:
    """Collect the losses of every step while the context is open."""
    seen: list[dict[str, float]] = []
    record = Tracker.record

    def note(self: Tracker, step: int, logs: Any) -> None:
        seen.append({name: float(value) for name, value in logs.items()})
        record(self, step, logs)

    Tracker.record = note  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Tracker.record = record  # type: ignore[method-assign]


def one_pass(loaded: headline.Loaded, folder: str, cache: Any) -> tuple[list[dict[str, float]], float]:
    """Return the losses and seconds of one pass that changes nothing."""
    student = copy.deepcopy(loaded.student)
    distiller = headline.distiller(textbrewer, loaded, student, folder, cache=cache)
    started = time.perf_counter()
    with recorded() as seen, headline.quiet():
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.0), loaded.batches, num_epochs=1)
    return seen, time.perf_counter() - started


def differences(cached: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest relative difference of each kind of loss over the steps."""
    found: dict[str, float] = {}
    for ours, theirs in zip(cached, plain, strict=True):
        for name, value in theirs.items():
            kind = next((kind for kind in ("hidden_mse", "mmd", "kd_loss") if kind in name), name)
            found[kind] = max(found.get(kind, 0.0), abs(ours[name] - value) / abs(value))
    return found


def storage(options: argparse.Namespace) -> str:
    job = headline.Job(size=options.size, steps=options.steps, varied=True)
    loaded = headline.load(job)
    rows = sum(len(batch["input_ids"]) for batch in loaded.batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in loaded.batches) / rows
    table = []
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = one_pass(loaded, f"{folder}/plain", None)
        for number, choice in enumerate(CHOICES):
            cache = textbrewer.TeacherCache(f"{folder}/cache{number}", **choice)
            one_pass(loaded, f"{folder}/{number}/fill", cache)
            seen, _ = one_pass(loaded, f"{folder}/{number}/read", cache)
            found, info = differences(seen, plain), cache.info()
            cells = [f"{found[kind]:.1e}" for kind in ("kd_loss", "hidden_mse", "mmd", "total_loss")]
            table.append([choice["dtype"], f"{info.bytes / rows / 1000:.1f}", *cells])
    head = ["storage", "KB a row", "kd_loss", "hidden_mse", "mmd", "total loss"]
    title = f"Rows of {tokens:.0f} tokens on average: logits, 5 hidden states of width {loaded.widths[1]}, 5 products."
    return f"{title}\n\n{headline.markdown(head, table)}"


# ---- many rows -------------------------------------------------------------------------------------------------------


class Free(nn.Module):
    """A teacher that costs nothing: two logits of each row's first number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the logits, ``(batch, 2)``."""
        return numbers[:, :1].float() * self.weight


def logits_only(batch: Any, outputs: Tensor) -> dict[str, Any]:
    return {"logits": outputs}


def numbers(start: int, stop: int, batch: int) -> list[Tensor]:
    """Return batches of rows of 16 numbers, no two rows alike."""
    rows = torch.arange(start, stop).unsqueeze(1).repeat(1, 16)
    return list(rows.split(batch))


def fill(folder: str, start: int, stop: int, batch: int) -> float:
    """Store the logits of some rows; return the seconds."""
    config = textbrewer.TrainingConfig(device="cpu", progress_bar=False)
    data = numbers(start, stop, batch)
    started = time.perf_counter()
    textbrewer.precompute(Free(), data, logits_only, textbrewer.TeacherCache(folder), train_config=config)
    return time.perf_counter() - started


def rates(options: argparse.Namespace) -> str:
    table = []
    for batch in (32, 512):
        with tempfile.TemporaryDirectory() as folder:
            writing = fill(folder, 0, options.rows, batch)
            reading = fill(folder, 0, options.rows, batch)
            info = textbrewer.TeacherCache(folder).info()
        if info.entries != options.rows:
            raise SystemExit(f"{info.entries} rows were stored instead of {options.rows}")
        table.append(
            [
                f"{batch}",
                f"{options.rows:,}",
                f"{options.rows / writing:,.0f}",
                f"{options.rows / reading:,.0f}",
                f"{info.bytes / options.rows:.0f}",
            ]
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    head = ["rows a batch", "rows", "stored a second", "found a second", "bytes a row"]
    return f"{headline.markdown(head, table)}\n\nPeak memory of the process: {peak:.0f} MB."


def writers(options: argparse.Namespace) -> str:
    half = options.rows // 4
    table = []
    for count in (1, 2):
        seconds = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                parts = [(part * 2 * half // count, (part + 1) * 2 * half // count) for part in range(count)]
                command = [sys.executable, __file__, "--threads", "1", "--fill", folder]
                started = [
                    subprocess.Popen([*command, *map(str, part)], stdout=subprocess.PIPE, text=True) for part in parts
                ]
                told = [process.communicate()[0] for process in started]
                if any(process.returncode for process in started):
                    raise SystemExit("a writer failed")
                seconds.append(max(float(text) for text in told))
                entries = textbrewer.TeacherCache(folder).info().entries
                if entries != 2 * half:
                    raise SystemExit(f"{entries} rows were stored instead of {2 * half}")
        middle = statistics.median(seconds)
        table.append(
            [f"{count}", f"{2 * half:,}", f"{2 * half / middle:,.0f}", f"{min(seconds):.1f} to {max(seconds):.1f}"]
        )
    return headline.markdown(["processes", "rows", "stored a second", "seconds"], table)


def main() -> None:
    parser = headline.parser(__doc__, shapes=False, steps=6)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--fill", nargs=3, metavar=("FOLDER", "START", "STOP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.fill:
        print(fill(options.fill[0], int(options.fill[1]), int(options.fill[2]), 32))
        return
    headline.print_header(options.threads, textbrewer=textbrewer.__version__)
    parts = {"storage": storage, "rates": rates, "writers": writers}
    for name in PARTS if options.part == "all" else [options.part]:
        print(f"### {name}\n\n{parts[name](options)}\n", flush=True)


if __name__ == "__main__":
    main()
