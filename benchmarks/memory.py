"""Peak memory of the same job with the original TextBrewer and with this library, with and without a teacher cache.

    python benchmarks/memory.py                         # both shapes, full size: the tables of the docs
    python benchmarks/memory.py --shape headline --repeats 1
    python benchmarks/memory.py --size tiny --steps 3 --repeats 1       # only to try the script

Each competitor is a fresh process that trains the same number of steps over two epochs (with a new cache: one that
fills it and one that reads it) and writes one checkpoint. The peak is the process's largest resident size (VmHWM; where
there is no /proc, ru_maxrss), all libraries, models and batches included. Its anonymous part, sampled every 5 ms, is
what cannot be dropped: pages of a memory-mapped file, the cache's and the models', count as resident only as long as
nobody else needs the memory. Where there is a GPU, its peak too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import resource
import statistics
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headline
import torch
import workers
from headline import ROOT, Job, Loaded
from workers import Channel

EPOCHS = 2
STATUS = Path("/proc/self/status")
SIDES = {
    "textbrewer": "TextBrewer 0.2.1.post1",
    "uncached": "library, no cache",
    "cached": "library, cache float16, filled and read",
    "precompute": "library, precompute() of that cache",
    "filled": "library, that cache, filled before",
    "alone": "library, that cache, no teacher",
}


def kilobytes(name: str) -> int:
    """Return a figure of this process's status, in kB; 0 where there is none."""
    if not STATUS.exists():
        return 0
    found = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) if found else 0


class Anonymous(threading.Thread):
    """Samples the anonymous part of the resident size."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self) -> None:
        """Sample until told to end."""
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, kilobytes("RssAnon"))


def train(textbrewer: Any, loaded: Loaded, side: str, folder: Path) -> None:
    """Do a competitor's work."""
    cache = None
    if side not in ("textbrewer", "uncached"):
        # Filled by "cached" or "precompute" for those that come after: they share the folder.
        cache = headline.make_cache(textbrewer, folder / ("new" if side == "cached" else "computed"), "float16")
    loader = headline.Loader(loaded.batches)
    if side == "precompute":
        textbrewer.precompute(
            loaded.teacher,
            loader,
            headline.adaptor_of(loaded.job),
            cache,
            distill_config=headline.distill_config(textbrewer, loaded),
            train_config=textbrewer.TrainingConfig(output_dir=str(folder / side), device=loaded.job.device),
        )
    else:
        optimizer = headline.optimiser(loaded.job, loaded.student)
        made = headline.distiller(textbrewer, loaded, loaded.student, folder / side, cache=cache)
        with made:
            made.train(optimizer, loader, num_epochs=EPOCHS)
    workers.close(cache)


def work(side: str, job: Job, folder: Path, threads: int) -> None:
    """Train and report the peaks."""
    channel = Channel()
    torch.set_num_threads(threads)
    textbrewer = importlib.import_module("textbrewer")
    sampler = Anonymous()
    sampler.start()
    loaded = headline.load(job, with_teacher=side != "alone")
    before = kilobytes("VmRSS")
    train(textbrewer, loaded, side, folder)
    sampler.ended.set()
    sampler.join()
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    # Not ru_maxrss where there is a choice: a child begins with its parent's.
    peak = kilobytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    channel.send(peak=peak, anonymous=sampler.peak, before=before, gpu=gpu, version=textbrewer.__version__)


def measure(side: str, job: Job, folder: Path, options: argparse.Namespace, original: str) -> dict[str, Any]:
    """Run a competitor in a new process and return its figures."""
    arguments = {"side": side, "job": dataclasses.asdict(job), "folder": str(folder)}
    log = ROOT / "runs" / "memory" / f"{job.shape}-{side}.log"
    theirs = original if side == "textbrewer" else None
    return workers.run_once(SIDES[side], __file__, arguments, options.threads, log, theirs)


def megabytes(values: list[int]) -> str:
    """Return the median of figures in kB, and their spread, in MB."""
    scaled = [value * 1024 / 1e6 for value in values]
    return f"{statistics.median(scaled):,.0f} ({min(scaled):,.0f} to {max(scaled):,.0f})"


def report(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Print the table."""
    base = statistics.median(message["peak"] for message in next(iter(found.values())))
    gpu = any(message["gpu"] for messages in found.values() for message in messages)
    rows = []
    for side, messages in found.items():
        peaks = [message["peak"] for message in messages]
        row = [SIDES[side], megabytes(peaks), f"{statistics.median(peaks) / base:.3f}"]
        row += [megabytes([message[name] for message in messages]) for name in ("anonymous", "before")]
        if gpu:
            row.append(megabytes([message["gpu"] // 1024 for message in messages]))
        rows.append(row)
    header = ["competitor", "peak resident, MB", "ratio", "its anonymous part, peak", "models loaded, before training"]
    print(headline.markdown([*header, "GPU peak, MB"] if gpu else header, rows))
    if "textbrewer" in found:
        above = [SIDES[side] for side, messages in found.items() if min(m["peak"] for m in messages) > base]
        print(
            f"\nNever above TextBrewer's asked: {'**above it**: ' + ', '.join(above) if above else 'met'}.", flush=True
        )


def main() -> int:
    parser = headline.parser(__doc__, steps=3)
    parser.add_argument("--repeats", type=int, default=2, help="processes of each competitor (default 2)")
    parser.add_argument("--sides", default=",".join(SIDES), help="competitors, comma-separated (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--original-python", help="of an environment that has the original; default: make one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arguments = json.loads(options.worker)
        work(arguments["side"], Job(**arguments["job"]), Path(arguments["folder"]), options.threads)
        return 0
    sides = options.sides.split(",")
    if not set(sides) <= set(SIDES):
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {options.sides}")
    if {"filled", "alone"} & set(sides) and "precompute" not in sides:
        parser.error("the sides filled and alone read what precompute wrote: add precompute to --sides")
    original = workers.original_python(options.original_python) if "textbrewer" in sides else ""
    headline.print_header(options.threads, device=options.device)
    for shape in headline.chosen(options):
        job = headline.make_job(options, shape)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                for side in sides:
                    found[side].append(measure(side, job, Path(folder), options, original))
        print(f"### {shape}, {options.size}: {EPOCHS} epochs of {job.steps} steps\n")
        report(found)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
