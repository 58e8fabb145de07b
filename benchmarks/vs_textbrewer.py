"""The same job with the original TextBrewer 0.2.1.post1 and with this library, in alternation in one run.

    python benchmarks/vs_textbrewer.py                          # both shapes, full size: the tables of the docs
    python benchmarks/vs_textbrewer.py --shape headline --rounds 8
    python benchmarks/vs_textbrewer.py --size tiny --steps 4 --rounds 3     # only to try the script

Competitors: TextBrewer; this library without a cache; with a teacher cache (float16 storage) and all else equal to
TextBrewer's run (fp32, the same AdamW); with a teacher cache, bf16 for teacher and student, and fused AdamW. Each is a
process of its own, TextBrewer's with its own Python (``--original-python``, or made in runs/parity/original), which
stays alive and trains one epoch at a time on command, all others waiting; the order turns around every round. A step is
the time between two optimiser steps, the first two of an epoch left out; an epoch is all of the time from the word to
go to the end of its last step (the first: from the call of ``train()``), waiting for the cache and what background
threads do afterwards included. Checkpoints are written only after the last epoch and are not timed, on any side.

The work must be the same: first weights equal, and at the end the loss on fixed rows, computed alike by hand for all:
within 1e-4 of TextBrewer's without a cache, within 1% with one; else the exit status is 1. Two further checks of this
library: first epochs that fill a new cache against epochs without a cache, in turn; and the student's weights after two
epochs with a cache against those without.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import headline
import torch
import workers
from headline import ROOT, Job, Loaded
from workers import Channel, Turns, Worker

WARM_UP, EPOCHS = 2, 30
TEXTBREWER = "textbrewer"


@dataclasses.dataclass(frozen=True)
class Side:
    """A competitor.

    Args:
        title: in the table.
        cache: storage of the teacher cache, ``""`` for none.
        precision: of the library's mixed precision.
        fused: whether AdamW is the fused one.
        tolerance: how far its last loss may be from TextBrewer's, relative.
        target: how many times faster than TextBrewer the job of 30 epochs is to be; 0: no target.
    """

    title: str
    cache: str = ""
    precision: str = "no"
    fused: bool = False
    tolerance: float = 1e-4
    target: float = 0.0


SIDES = {
    TEXTBREWER: Side("TextBrewer 0.2.1.post1"),
    "uncached": Side("library, no cache"),
    "cached": Side("library, cache float16", "float16", tolerance=1e-2, target=2.8),
    "cached_bf16": Side(
        "library, cache float16, bf16, fused AdamW", "float16", "bf16", fused=True, tolerance=1e-2, target=4.5
    ),
}


# ---- in the workers -----------------------------------------------------------------------------------------------


def work(side: Side, job: Job, epochs: int, threads: int) -> None:
    """Train with this Python's textbrewer, an epoch on command, and report the last losses."""
    channel = Channel()
    torch.set_num_threads(threads)
    textbrewer = importlib.import_module("textbrewer")
    loaded = headline.load(job)
    workers.warm_up(loaded, copy.deepcopy(loaded.student), side.precision)
    checksum = float(headline.flat(loaded.student).double().abs().sum())
    first = headline.first_losses(loaded)
    with tempfile.TemporaryDirectory() as folder:
        cache = headline.make_cache(textbrewer, Path(folder) / "cache", side.cache) if side.cache else None
        optimizer = headline.optimiser(job, loaded.student, side.fused)
        turns = Turns(optimizer, job.steps, channel, cache)
        made = headline.distiller(textbrewer, loaded, loaded.student, Path(folder) / "out", side.precision, cache)
        channel.send(version=textbrewer.__version__, torch=torch.__version__, checksum=checksum, first=first)
        turns.begin()
        with made:
            made.train(optimizer, headline.Loader(loaded.batches, turns), num_epochs=epochs)
        background = turns.background
        workers.close(cache)
        losses = headline.evaluate(loaded, loaded.student, headline.projections_of(optimizer))
    channel.send(background=background, **losses)


def fresh_training(
    textbrewer: Any, loaded: Loaded, cache_dtype: str, epochs: int, steps: int
) -> tuple[float, torch.Tensor]:
    """Train a copy of the student from the start, with a new cache if any.

    Returns:
        The seconds of ``train()`` and of closing the cache, without the checkpoint; and the student's movement.
    """
    student = copy.deepcopy(loaded.student)
    optimizer = headline.optimiser(loaded.job, student)
    last_step = time.perf_counter()
    saved = last_step

    def stepped(*_: Any) -> None:
        nonlocal last_step
        last_step = time.perf_counter()

    def callback(model: Any, step: int) -> None:
        nonlocal saved
        saved = time.perf_counter()

    optimizer.register_step_post_hook(stepped)
    with tempfile.TemporaryDirectory() as folder:
        cache = headline.make_cache(textbrewer, Path(folder) / "cache", cache_dtype) if cache_dtype else None
        made = headline.distiller(textbrewer, loaded, student, Path(folder) / "out", cache=cache)
        start = time.perf_counter()
        made.train(optimizer, headline.Loader(loaded.batches[:steps]), num_epochs=epochs, callback=callback)
        workers.close(cache)
        seconds = last_step - start + time.perf_counter() - saved
    return seconds, headline.flat(student) - headline.flat(loaded.student)


def work_fresh(job: Job, threads: int) -> None:
    """Answer commands ``{"cache": dtype, "epochs": n, "steps": n}`` with the seconds, and how the weights compare."""
    channel = Channel()
    torch.set_num_threads(threads)
    textbrewer = importlib.import_module("textbrewer")
    loaded = headline.load(job)
    workers.warm_up(loaded, copy.deepcopy(loaded.student), "no")
    channel.send(version=textbrewer.__version__)
    reference: torch.Tensor | None = None
    while True:
        command = channel.receive()
        if not command:
            return
        seconds, moved = fresh_training(textbrewer, loaded, command["cache"], command["epochs"], command["steps"])
        if not command["cache"]:
            reference = moved
        apart, largest = float("nan"), float("nan")
        if reference is not None:
            apart = float((moved - reference).double().norm() / reference.double().norm())
            largest = float((moved - reference).abs().max() / reference.abs().max())
        channel.send(seconds=seconds, apart=apart, largest=largest)


# ---- in the driver ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """What one side did.

    Args:
        ticks: of each epoch, the seconds since its start at the end of each step.
        seconds: of each epoch, with background work after it.
        waited: of each epoch, seconds waiting for the cache.
        losses: the last ones.
        versions: what the worker ran with.
    """

    ticks: list[list[float]]
    seconds: list[float]
    waited: list[float]
    losses: dict[str, float]
    versions: dict[str, Any]

    def steps(self, epoch: int) -> list[float]:
        """Return the seconds of an epoch's steps but for the first."""
        return [after - before for before, after in itertools.pairwise(self.ticks[epoch])][WARM_UP - 1 :]

    def later_steps(self) -> list[float]:
        """Return the seconds of the steps of all epochs but the first."""
        return [step for epoch in range(1, len(self.ticks)) for step in self.steps(epoch)]

    def whole(self, later: float) -> float:
        """Return the seconds of 30 epochs, extrapolated: the first and 29 like ``later``."""
        return self.seconds[0] + (EPOCHS - 1) * later

    @property
    def later(self) -> float:
        """The median later epoch's seconds."""
        return statistics.median(self.seconds[1:])


def start(name: str, arguments: dict[str, Any], options: argparse.Namespace, python: str | None = None) -> Worker:
    """Start a worker; with ``python``, that of the original."""
    command = [python or sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(arguments)]
    command += ["--threads", str(options.threads)]
    log = ROOT / "runs" / "vs_textbrewer" / f"{arguments['job']['shape']}-{name}.log"
    return Worker(name, command, options.threads, log, None if python else ROOT)


def alternate(job: Job, options: argparse.Namespace, original: str) -> dict[str, Measured]:
    """Let the sides train in turn."""
    running: dict[str, Worker] = {}
    measured: dict[str, Measured] = {}
    try:
        for name in options.sides:
            arguments = {"side": name, "job": dataclasses.asdict(job), "epochs": options.rounds}
            running[name] = start(name, arguments, options, original if name == TEXTBREWER else None)
            measured[name] = Measured([], [], [], {}, running[name].receive())
        if TEXTBREWER in measured:
            workers.check_original(measured[TEXTBREWER].versions["version"])
        for number in range(options.rounds):
            for name in options.sides if number % 2 == 0 else reversed(options.sides):
                message, side = running[name].ask(go=True), measured[name]
                if number:
                    side.seconds[-1] += message["background"]
                side.ticks.append(message["ticks"])
                side.seconds.append(message["ticks"][-1])
                side.waited.append(message["waited"])
        for name in options.sides:
            message = running[name].ask(go=True)
            measured[name].seconds[-1] += message.pop("background")
            measured[name].losses = message
    finally:
        for worker in running.values():
            worker.close()
    return measured


def spread(values: Sequence[float], form: str) -> str:
    """Return the median and, in parentheses, least and largest value."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(base: Measured, side: Measured) -> list[float]:
    """Return, round by round, how many times faster than ``base`` the job of 30 epochs is."""
    later = zip(base.seconds[1:], side.seconds[1:], strict=True)
    return [base.whole(theirs) / side.whole(ours) for theirs, ours in later]


def difference(base: Measured, side: Measured) -> float:
    """Return the largest relative difference of the last losses."""
    return max(abs(side.losses[name] - loss) / abs(loss) for name, loss in base.losses.items())


def of_the_fall(base: Measured, side: Measured) -> float:
    """Return the difference of the held-out losses over the fall of TextBrewer's since before the training."""
    last = base.losses["held_out"]
    return abs(side.losses["held_out"] - last) / abs(base.versions["first"]["held_out"] - last)


def report(job: Job, measured: dict[str, Measured]) -> list[str]:
    """Print the table of the alternation and return what went wrong."""
    base = measured.get(TEXTBREWER) or next(iter(measured.values()))
    rows, problems, targets = [], [], []
    for name, side in measured.items():
        away = difference(base, side)
        step_ratio = statistics.median(base.later_steps()) / statistics.median(side.later_steps())
        whole_ratio = base.whole(base.later) / side.whole(side.later)
        by_round = ratios(base, side)
        by_epoch = [1e3 * statistics.median(side.steps(epoch)) for epoch in range(1, len(side.ticks))]
        waits = 1e3 * sum(side.waited[1:]) / (job.steps * len(side.waited[1:]))
        rows.append(
            [
                SIDES[name].title,
                f"{1e3 * statistics.median(side.later_steps()):.1f} ({min(by_epoch):.1f} to {max(by_epoch):.1f})",
                f"{step_ratio:.2f}",
                f"{waits:.1f}" if SIDES[name].cache else "",
                f"{side.seconds[0]:.2f}",
                spread(side.seconds[1:], ".2f"),
                f"{side.whole(side.later):.1f}",
                f"{whole_ratio:.2f} ({min(by_round):.2f} to {max(by_round):.2f})",
                f"{side.losses['held_out']:.5f}",
                f"{away:.1e}",
                f"{of_the_fall(base, side):.1e}",
            ]
        )
        if side.versions["checksum"] != base.versions["checksum"]:
            problems.append(f"{job.shape}, {SIDES[name].title}: the first weights are not TextBrewer's")
        if not away <= SIDES[name].tolerance:
            problems.append(f"{job.shape}, {SIDES[name].title}: last loss {away:.1e} away from TextBrewer's")
        if SIDES[name].target and job.shape == "headline":
            verdict = "met" if whole_ratio >= SIDES[name].target else "**not met**"
            targets.append(f"{SIDES[name].title}: at least {SIDES[name].target}x asked, {whole_ratio:.2f}x: {verdict}.")
    header = ["competitor", "later step, ms (by epoch)", "times faster", "waits for cache, ms a step", "first epoch, s"]
    header += [
        "later epochs, s",
        f"{EPOCHS} epochs, s",
        "times faster (by round)",
        "last loss",
        "difference",
        "of its fall",
    ]
    print(headline.markdown(header, rows))
    print(
        f"\n{job.steps} steps an epoch, {len(base.seconds)} epochs measured in alternation; the job of {EPOCHS} epochs "
        f"is extrapolated: the first epoch and {EPOCHS - 1} times the median later one. The loss on the held-out rows "
        f"was {base.versions['first']['held_out']:.5f} before."
    )
    print("\n".join(targets), flush=True)
    return problems


def fresh_checks(job: Job, options: argparse.Namespace) -> list[str]:
    """Measure first epochs with new caches against epochs without, compare the weights; return what went wrong."""
    worker = start("fresh", {"side": "fresh", "job": dataclasses.asdict(job)}, options)
    try:
        worker.receive()
        plain, filling = [], []
        for number in range(options.fresh):
            for cache in ("", "float16") if number % 2 == 0 else ("float16", ""):
                seconds = worker.ask(cache=cache, epochs=1, steps=job.steps)["seconds"]
                (filling if cache else plain).append(seconds)
        if options.fresh:
            pairs = [new / without for new, without in zip(filling, plain, strict=True)]
            ratio = statistics.median(filling) / statistics.median(plain)
            verdict = "met" if ratio <= 1.05 else "**not met**"
            print(
                f"\nFirst epoch, filling a new cache: {spread(filling, '.2f')} s, without a cache "
                f"{spread(plain, '.2f')} s, {options.fresh} in turn: ratio {ratio:.3f} ({min(pairs):.3f} to "
                f"{max(pairs):.3f}); at most 1.05 asked: {verdict}."
            )
        return weights_check(worker, job, options) if options.check_weights else []
    finally:
        worker.close()


def weights_check(worker: Worker, job: Job, options: argparse.Namespace) -> list[str]:
    """Compare the student's movement in two epochs with and without a cache."""
    steps = min(options.weight_steps, job.steps)
    worker.ask(cache="", epochs=2, steps=steps)
    rows, problems = [], []
    for dtype, limit in (("float32", 1e-3), ("float16", None), ("int8", None)):
        answer = worker.ask(cache=dtype, epochs=2, steps=steps)
        rows.append([dtype, f"{answer['apart']:.1e}", f"{answer['largest']:.1e}"])
        if limit is not None and not answer["apart"] < limit:
            problems.append(f"{job.shape}: weights with a {dtype} cache move {answer['apart']:.1e} otherwise")
    print(f"\nThe student's movement in 2 epochs of {steps} steps, with a cache against without:\n")
    header = ["storage", "difference / movement, norms", "largest difference / largest movement"]
    print(headline.markdown(header, rows), flush=True)
    return problems


def parse() -> argparse.Namespace:
    parser = headline.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each competitor (default 5)")
    parser.add_argument(
        "--fresh", type=int, default=4, help="new caches filled, in turn with epochs without (default 4)"
    )
    parser.add_argument("--sides", default=",".join(SIDES), help="competitors, comma-separated (default: all)")
    parser.add_argument("--check-weights", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--weight-steps", type=int, default=4, help="steps an epoch of that check (default 4)")
    parser.add_argument("--original-python", help="of an environment that has the original; default: make one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sides = [name for name in options.sides.split(",") if name]
    unknown = set(options.sides) - set(SIDES)
    if unknown or not options.sides:
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {', '.join(sorted(unknown)) or 'none'}")
    if options.rounds < 2 or options.steps < WARM_UP + 1:
        parser.error(f"--rounds must be at least 2 and --steps at least {WARM_UP + 1}")
    return options


def main() -> int:
    options = parse()
    if options.worker:
        arguments = json.loads(options.worker)
        job, threads = Job(**arguments["job"]), int(options.threads)
        if arguments["side"] == "fresh":
            work_fresh(job, threads)
        else:
            work(SIDES[arguments["side"]], job, arguments["epochs"], threads)
        return 0
    original = workers.original_python(options.original_python) if TEXTBREWER in options.sides else ""
    headline.print_header(options.threads)

    def compare(job: Job) -> list[str]:
        problems = report(job, alternate(job, options, original))
        if any(SIDES[name].cache for name in options.sides) and (options.fresh or options.check_weights):
            problems += fresh_checks(job, options)
        return problems

    return headline.compare_all(options, compare)


if __name__ == "__main__":
    sys.exit(main())
