"""A cached distillation step against hand-written PyTorch loops and against training without a teacher.

    python benchmarks/vs_bare_loop.py                           # both shapes, full size: the tables of the docs
    python benchmarks/vs_bare_loop.py --shape sst2 --rounds 10
    python benchmarks/vs_bare_loop.py --size tiny --steps 6 --rounds 2      # only to try the script

In one process, chunk by chunk in turn, from the same first weights and with the same optimiser:

- library: GeneralDistiller with a filled teacher cache (float16 storage unless ``--dtype`` says otherwise);
- floor: a hand-written loop that has the teacher's tensors in memory, a dict a batch, as float32: the logits, the
  matched states and, for mmd, the teacher's products, computed once (the best a hand-written loop would do);
- with teacher: the same loop, but the teacher is run at every step;
- student only: a hand-written loop with the labels' cross-entropy.

Library and floor also in bf16 autocast with fused AdamW; there the floor runs student and projections under autocast
and the losses in float32, as the library does. Every loop reads its loss at every step and shows a progress bar. A step
is the time between two optimiser steps, the first three of each chunk left out; the library's waiting for its cache is
part of it. The losses on fixed rows must agree after every chunk, else the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import headline
import torch
import workers
from headline import Job, Loaded
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)
from tqdm.auto import tqdm

import textbrewer

WARM_UP, TARGET = 3, 1.10


@dataclass
class Side:
    """A competitor.

    Args:
        title: in the table.
        train: ``train(optimizer, student, epochs)``, which returns the projections.
        epochs: of each chunk.
        precision: ``"no"`` or ``"bf16"``.
        fused: whether AdamW is the fused one.
        reference: the competitor whose loss it must reach, and whose step it is compared with.
        tolerance: relative, for that loss.
    """

    title: str
    train: Callable[[torch.optim.Optimizer, nn.Module, int], list[Any]]
    epochs: int = 2
    precision: str = "no"
    fused: bool = False
    reference: str = ""
    tolerance: float = 1e-2
    chunks: list[list[float]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)

    def steps(self) -> list[float]:
        """Return the seconds of all steps."""
        return [step for chunk in self.chunks for step in chunk]


class ByHand:
    """The hand-written loops.

    Args:
        loaded: models and data.
        kept: the teacher's tensors of each batch; ``None``: the teacher is run.
        alone: no teacher at all, the labels' cross-entropy.
        precision: ``"no"`` or ``"bf16"``.
    """

    def __init__(
        self, loaded: Loaded, kept: list[dict[str, Any]] | None, alone: bool = False, precision: str = "no"
    ) -> None:
        self.loaded, self.kept, self.alone, self.precision = loaded, kept, alone, precision

    def __call__(self, optimizer: torch.optim.Optimizer, student: nn.Module, epochs: int) -> list[Any]:
        """Train and return the projections."""
        job, loaded = self.loaded.job, self.loaded
        projections = [] if self.alone else headline.make_projections(loaded)
        for projection in projections:
            optimizer.add_param_group({"params": list(projection.parameters())})
        student.train()
        with tqdm(total=epochs * len(loaded.batches), dynamic_ncols=True, disable=None) as bar:
            for _ in range(epochs):
                for number, batch in enumerate(loaded.batches):
                    with headline.autocast(job, self.precision):
                        outputs = student(**batch)
                        states = [outputs.hidden_states[layer_S] for _, layer_S in job.layers]
                        if projections:
                            states = [module(state) for module, state in zip(projections, states, strict=True)]
                    if self.alone:
                        loss = F.cross_entropy(outputs.logits.float(), loaded.labels[number])
                    else:
                        kept = self._teacher(number, batch)
                        loss = headline.hand_loss(job, outputs, kept, states, batch["attention_mask"])
                    bar.set_postfix(loss=loss.item(), refresh=False)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    bar.update(1)
        return headline.projections_of(optimizer)

    def _teacher(self, number: int, batch: headline.Batch) -> dict[str, Any]:
        if self.kept is not None:
            return self.kept[number]
        with headline.autocast(self.loaded.job, self.precision):
            return headline.teacher_tensors(self.loaded.job, self.loaded.teacher, batch)


class ByLibrary:
    """The library with a cache, which the first call fills.

    Args:
        loaded: models and data.
        folder: of cache and output.
        dtype: of the storage.
        precision: the library's.
    """

    def __init__(self, loaded: Loaded, folder: Path, dtype: str, precision: str = "no") -> None:
        self.loaded, self.folder, self.dtype, self.precision = loaded, folder, dtype, precision
        self.waited = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, student: nn.Module, epochs: int) -> list[Any]:
        """Train and return the projections."""
        cache = None
        if self.dtype != "none":
            cache = headline.make_cache(textbrewer, self.folder / "cache", self.dtype)
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            made = headline.distiller(textbrewer, self.loaded, student, out, self.precision, cache)
            with headline.quiet():
                made.train(optimizer, headline.Loader(self.loaded.batches), num_epochs=epochs)
        self.waited = workers.waited_so_far(cache)
        workers.close(cache)
        return headline.projections_of(optimizer)


def chunk(side: Side, loaded: Loaded, epochs: int) -> None:
    """Train a new copy of the student with one side and note step times and last loss."""
    student = copy.deepcopy(loaded.student)
    optimizer = headline.optimiser(loaded.job, student, side.fused)
    ticks: list[float] = []
    optimizer.register_step_post_hook(lambda *_: ticks.append(time.perf_counter()))
    projections = side.train(optimizer, student, epochs)
    side.chunks.append([after - before for before, after in itertools.pairwise(ticks)][WARM_UP - 1 :])
    if isinstance(side.train, ByLibrary):
        side.waits.append(side.train.waited / len(ticks))
    side.losses.append(headline.evaluate(loaded, student, projections) if side.reference else {})


def make_sides(loaded: Loaded, folder: Path, options: argparse.Namespace) -> dict[str, Side]:
    """Return the competitors; the floor's tensors are computed here."""
    kept = [headline.teacher_tensors(loaded.job, loaded.teacher, batch) for batch in loaded.batches]
    with headline.autocast(loaded.job, "bf16"):
        kept_bf16 = [headline.teacher_tensors(loaded.job, loaded.teacher, batch) for batch in loaded.batches]
    sides = {
        "floor": Side("floor, fp32", ByHand(loaded, kept), reference="floor"),
        "teacher": Side("by hand with teacher, fp32", ByHand(loaded, None), 1, reference="floor", tolerance=1e-4),
        "alone": Side("student only, fp32", ByHand(loaded, None, alone=True), 1),
        "floor_bf16": Side(
            "floor, bf16, fused AdamW",
            ByHand(loaded, kept_bf16, precision="bf16"),
            precision="bf16",
            fused=True,
            reference="floor_bf16",
        ),
        "alone_bf16": Side(
            "student only, bf16, fused AdamW",
            ByHand(loaded, None, alone=True, precision="bf16"),
            1,
            precision="bf16",
            fused=True,
        ),
        "cached": Side(
            f"library, cache {options.dtype}, fp32", ByLibrary(loaded, folder / "a", options.dtype), reference="floor"
        ),
        "cached_bf16": Side(
            f"library, cache {options.dtype}, bf16, fused AdamW",
            ByLibrary(loaded, folder / "b", options.dtype, "bf16"),
            precision="bf16",
            fused=True,
            reference="floor_bf16",
        ),
    }
    return {name: side for name, side in sides.items() if not options.sides or name in options.sides}


def compare(job: Job, options: argparse.Namespace) -> list[str]:
    """Run one shape, print its table, and return what went wrong."""
    loaded = headline.load(job)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("a", "b"):
            (folder / part).mkdir()
        sides = make_sides(loaded, folder, options)
        for side in sides.values():
            # Not measured: the caches are filled, and torch does what it does only once.
            chunk(side, loaded, 1)
            side.first = side.losses[0]
            side.chunks, side.waits, side.losses = [], [], []
        for number in range(options.rounds):
            for key in list(sides) if number % 2 == 0 else list(reversed(sides)):
                chunk(sides[key], loaded, sides[key].epochs)
    return report(job, sides)


def away(side: Side, sides: dict[str, Side]) -> float:
    """Return how far a side's losses are from its reference's, after the first epoch and wherever both did as many."""
    reference = sides.get(side.reference)
    if reference is None:
        return float("nan")
    pairs = [(side.first, reference.first)]
    if reference.epochs == side.epochs:
        pairs += zip(side.losses, reference.losses, strict=True)
    return max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs for name in theirs)


def report(job: Job, sides: dict[str, Side]) -> list[str]:
    """Print the table and return what went wrong."""
    rows, problems, verdicts = [], [], []
    for side in sides.values():
        floor = sides.get("floor_bf16" if side.precision == "bf16" else "floor", side)
        medians = [statistics.median(chunk) for chunk in side.chunks]
        by_chunk = [statistics.mean(a) / statistics.mean(b) for a, b in zip(side.chunks, floor.chunks, strict=True)]
        ratio = statistics.median(side.steps()) / statistics.median(floor.steps())
        difference = away(side, sides)
        rows.append(
            [
                side.title,
                f"{1e3 * statistics.median(side.steps()):.1f} ({1e3 * min(medians):.1f} to {1e3 * max(medians):.1f})",
                f"{1e3 * statistics.mean(side.steps()):.1f}",
                f"{ratio:.3f}",
                f"{statistics.mean(side.steps()) / statistics.mean(floor.steps()):.3f}",
                f"{min(by_chunk):.3f} to {max(by_chunk):.3f}",
                f"{1e3 * statistics.mean(side.waits):.2f}" if side.waits else "",
                "" if difference != difference else f"{difference:.1e}",
            ]
        )
        if isinstance(side.train, ByLibrary):
            verdict = "met" if ratio <= TARGET else "**not met**"
            verdicts.append(f"{side.title}: at most {TARGET:.2f} times the floor asked, {ratio:.3f}: {verdict}.")
        if difference > side.tolerance:
            problems.append(f"{job.shape}, {side.title}: last loss {difference:.1e} away from the floor's")
    header = ["competitor", "step, ms: median (by chunk)", "mean", "/ floor's median", "/ its mean"]
    header += ["means by round", "waits for cache, ms a step", "loss difference"]
    print(headline.markdown(header, rows))
    print(f"\n{len(next(iter(sides.values())).chunks)} chunks in turn, epochs of {job.steps} steps.")
    print("\n".join(verdicts), flush=True)
    return problems


def main() -> int:
    parser = headline.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="alternations (default 4)")
    parser.add_argument("--dtype", default="float16", help="storage of the cache (default float16; none: no cache)")
    parser.add_argument("--sides", help="only these competitors, comma-separated, by their keys in the source")
    options = parser.parse_args()
    options.sides = options.sides.split(",") if options.sides else []
    torch.set_num_threads(options.threads)
    if options.steps < WARM_UP + 1:
        parser.error(f"--steps must be at least {WARM_UP + 1}, got {options.steps}")
    headline.print_header(options.threads, textbrewer=textbrewer.__version__)
    return headline.compare_all(options, lambda job: compare(job, options))


if __name__ == "__main__":
    sys.exit(main())
