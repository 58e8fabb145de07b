"""Where the time of a headline step goes: the original TextBrewer, this library without a cache, and with one.

    python benchmarks/profile_step.py                       # full size: the tables of the docs
    python benchmarks/profile_step.py --precision bf16      # this library's sides in bf16, with fused AdamW
    python benchmarks/profile_step.py --size tiny --steps 4     # only to try the script

Each competitor is a process of its own that trains three epochs: one to warm up (which fills the cache), one with a
clock around the forward passes, losses, backward and optimiser (the sections; what is left is adaptors, logs, reading,
and, in this library, the projections, which TextBrewer has among its losses), and one under torch.profiler (the
operators, by the time in themselves, without those that they call).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import headline
import torch
import workers
from headline import ROOT, Job, Loaded
from torch import nn
from torch.profiler import ProfilerActivity, profile
from workers import Channel

SIDES = {"textbrewer": "TextBrewer", "uncached": "library, no cache", "cached": "library, cached"}
WAITING, REST = "waiting for the cache", "the rest"
SECTIONS = ("teacher forward", "student forward", "losses", "backward", "optimiser", WAITING, REST)
EPOCHS, TOP = 3, 12


class Sections:
    """A clock around the parts of a step, running while ``on``."""

    def __init__(self) -> None:
        self.on = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Start a section."""
        self._began[name] = now()

    def end(self, name: str) -> None:
        """End a section; one that did not begin (a pass under way when the clock was set up) does not count."""
        began = self._began.pop(name, None)
        if self.on and began is not None:
            self.seconds[name] += now() - began

    def around_module(self, module: nn.Module, name: str) -> None:
        """Time a module's forward pass."""
        module.register_forward_pre_hook(lambda *_: self.begin(name))
        module.register_forward_hook(lambda *_: self.end(name))

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Time a function or method."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            try:
                return inner(*args, **kwargs)
            finally:
                self.end(name)

        setattr(owner, attribute, timed)

    def around_optimiser(self, optimizer: torch.optim.Optimizer) -> None:
        """Time the optimiser's step; by hooks, since schedulers and accelerate look at the method itself."""
        optimizer.register_step_pre_hook(lambda *_: self.begin("optimiser"))
        optimizer.register_step_post_hook(lambda *_: self.end("optimiser"))


def now() -> float:
    """Return the time, after what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stages:
    """Goes from the warm-up to the sections to the profiler at the optimiser's steps.

    Args:
        optimizer: its steps are counted.
        steps: an epoch's.
        sections: the clock.
        cache: a TeacherCache or ``None``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, sections: Sections, cache: Any) -> None:
        self.steps, self.sections, self.cache = steps, sections, cache
        self.count, self.start, self.step_seconds, self.waited = 0, 0.0, 0.0, 0.0
        self.profiler = profile(activities=activities())
        self.averages: list[Any] = []
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _stepped(self) -> None:
        self.count += 1
        if self.count == self.steps:
            self.waited = workers.waited_so_far(self.cache)
            self.sections.on = True
            self.start = now()
        elif self.count == 2 * self.steps:
            self.step_seconds = (now() - self.start) / self.steps
            self.sections.on = False
            self.waited = (workers.waited_so_far(self.cache) - self.waited) / self.steps
            self.profiler.start()
        elif self.count == 3 * self.steps:
            self.profiler.stop()
            self.averages = list(self.profiler.key_averages())


def activities() -> list[ProfilerActivity]:
    """Return what to profile on this machine."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def train(textbrewer: Any, loaded: Loaded, side: str, precision: str, folder: Path) -> tuple[Stages, Sections]:
    """Train three epochs."""
    ours = side != "textbrewer"
    cache = headline.make_cache(textbrewer, folder / "cache", "float16") if side == "cached" else None
    optimizer = headline.optimiser(loaded.job, loaded.student, fused=ours and precision != "no")
    made = headline.distiller(
        textbrewer, loaded, loaded.student, folder / "out", precision if ours else "no", cache=cache
    )
    sections = Sections()
    sections.around(made, "compute_loss", "losses")
    sections.around_module(loaded.teacher, "teacher forward")
    sections.around_module(loaded.student, "student forward")
    sections.around(torch.Tensor, "backward", "backward")
    sections.around_optimiser(optimizer)
    stages = Stages(optimizer, loaded.job.steps, sections, cache)
    with made:
        made.train(optimizer, headline.Loader(loaded.batches), num_epochs=EPOCHS)
    workers.close(cache)
    return stages, sections


def work(side: str, precision: str, job: Job, threads: int) -> None:
    """Train and report milliseconds a step."""
    channel = Channel()
    torch.set_num_threads(threads)
    textbrewer = importlib.import_module("textbrewer")
    with tempfile.TemporaryDirectory() as folder:
        stages, sections = train(textbrewer, headline.load(job), side, precision, Path(folder))
    found = {name: 1e3 * seconds / job.steps for name, seconds in sections.seconds.items()}
    found[WAITING] = 1e3 * stages.waited
    found[REST] = 1e3 * stages.step_seconds - sum(found.values())
    attribute = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = {item.key: getattr(item, attribute) / 1e3 / job.steps for item in stages.averages}
    calls = {item.key: item.count / job.steps for item in stages.averages}
    channel.send(
        step=1e3 * stages.step_seconds,
        sections=found,
        operators=operators,
        calls=calls,
        version=textbrewer.__version__,
    )


def measure(side: str, job: Job, options: argparse.Namespace, original: str) -> dict[str, Any]:
    """Run one side in a process of its own."""
    arguments = {"side": side, "job": dataclasses.asdict(job), "precision": options.precision}
    log = ROOT / "runs" / "profile_step" / f"{job.shape}-{side}.log"
    theirs = original if side == "textbrewer" else None
    return workers.run_once(SIDES[side], __file__, arguments, options.threads, log, theirs)


def cell(value: float, whole: float) -> str:
    """Return milliseconds and their share."""
    return f"{value:.1f} ({100 * value / whole:.0f}%)"


def report(found: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> None:
    """Print the tables of the sections and of the operators."""
    rows = [
        [name, *(cell(found[side]["sections"].get(name, 0.0), found[side]["step"]) for side in sides)]
        for name in SECTIONS
    ]
    rows.append(["the step", *(f"{found[side]['step']:.1f}" for side in sides)])
    print(headline.markdown(["section, ms a step", *(SIDES[side] for side in sides)], rows))
    largest = {
        name
        for side in sides
        for name in sorted(found[side]["operators"], key=found[side]["operators"].get, reverse=True)[:TOP]
    }
    order = sorted(largest, key=lambda name: found[sides[0]]["operators"].get(name, 0.0), reverse=True)
    rows = []
    for name in order:
        row = [f"`{name}`"]
        for side in sides:
            operators = found[side]["operators"]
            calls = found[side]["calls"].get(name, 0.0)
            row.append(f"{cell(operators.get(name, 0.0), sum(operators.values()))}, {calls:.0f} calls")
        rows.append(row)
    rows.append(["all", *(f"{sum(found[side]['operators'].values()):.1f}" for side in sides)])
    print()
    print(headline.markdown(["operator itself, ms a step", *(SIDES[side] for side in sides)], rows), flush=True)


def main() -> int:
    parser = headline.parser(__doc__, shapes=False, steps=5)
    parser.add_argument("--shape", choices=headline.SHAPES, default="headline")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of this library's sides")
    parser.add_argument("--sides", default=",".join(SIDES), help="competitors, comma-separated (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--original-python", help="of an environment that has the original; default: make one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arguments = json.loads(options.worker)
        work(arguments["side"], arguments["precision"], Job(**arguments["job"]), options.threads)
        return 0
    sides = options.sides.split(",")
    if not set(sides) <= set(SIDES):
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {options.sides}")
    original = workers.original_python(options.original_python) if "textbrewer" in sides else ""
    headline.print_header(options.threads, device=options.device)
    job = headline.make_job(options, options.shape)
    report({side: measure(side, job, options, original) for side in sides}, sides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
