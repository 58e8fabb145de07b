"""Steps on a GPU: rate, utilisation, waits for the device, in float32 and bf16, with and without a teacher cache.

    python benchmarks/gpu_step.py                       # both shapes; says that it was not run where there is no GPU
    python benchmarks/gpu_step.py --size tiny --steps 6 --device cpu    # only to try the script, without a GPU

Each competitor trains three epochs in this process: one to warm up (which fills the cache), one with the clock, in
which a thread samples the utilisation (NVIDIA's, if its Python package nvidia-ml-py is there), and one under
torch.profiler, which counts the calls that wait for the device (synchronisations of stream, device or event; copies to
the host, and from memory that is not pinned, end in one). The clock waits for the device only at its ends.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import headline
import torch
import workers
from headline import Loaded
from torch.profiler import ProfilerActivity, profile

import textbrewer

EPOCHS = 3
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
SIDES = {
    "fp32": ("no cache, fp32", "", "no"),
    "fp32_cached": ("cache float16, fp32", "float16", "no"),
    "bf16": ("no cache, bf16, fused AdamW", "", "bf16"),
    "bf16_cached": ("cache float16, bf16, fused AdamW", "float16", "bf16"),
}


class Utilisation(threading.Thread):
    """Samples the device's utilisation in percent."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.values: list[int] = []
        self.problem = ""
        self.ended = threading.Event()

    def run(self) -> None:
        """Sample until told to end, or until the driver's library is found missing."""
        while not self.ended.wait(0.1):
            try:
                self.values.append(torch.cuda.utilization())
            except (ModuleNotFoundError, RuntimeError) as error:
                self.problem = str(error)
                return


@dataclass
class Clock:
    """Starts and stops what an epoch is for, at the optimiser's steps.

    Args:
        steps: an epoch's.
        cuda: whether there is a GPU.
        cache: a TeacherCache or ``None``.
    """

    steps: int
    cuda: bool
    cache: Any
    count: int = 0
    start: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    waits: float = float("nan")
    sampler: Utilisation = field(default_factory=Utilisation)
    profiler: Any = None

    def stepped(self) -> None:
        """Count a step of the optimiser."""
        self.count += 1
        if self.count == self.steps:
            self.waited = workers.waited_so_far(self.cache)
            if self.cuda:
                self.sampler.start()
            self.start = self._now()
        elif self.count == 2 * self.steps:
            self.seconds = self._now() - self.start
            self.waited = workers.waited_so_far(self.cache) - self.waited
            self.sampler.ended.set()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()
        elif self.count == 3 * self.steps:
            self.profiler.stop()
            found = {item.key: item.count for item in self.profiler.key_averages()}
            if self.cuda:
                # Less the profiler's own, when it stops.
                found["cudaDeviceSynchronize"] = max(found.get("cudaDeviceSynchronize", 0) - 1, 0)
            self.waits = sum(found.get(name, 0) for name in WAITING) / self.steps

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(loaded: Loaded, dtype: str, precision: str) -> Clock:
    """Train one competitor."""
    student = copy.deepcopy(loaded.student)
    cuda = torch.device(loaded.job.device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        cache = headline.make_cache(textbrewer, Path(folder) / "cache", dtype) if dtype else None
        optimizer = headline.optimiser(loaded.job, student, fused=precision != "no")
        clock = Clock(loaded.job.steps, cuda, cache)
        optimizer.register_step_post_hook(lambda *_: clock.stepped())
        made = headline.distiller(textbrewer, loaded, student, Path(folder) / "out", precision, cache)
        with headline.quiet():
            made.train(optimizer, headline.Loader(loaded.batches), num_epochs=EPOCHS)
        workers.close(cache)
    return clock


def row(title: str, clock: Clock, base: Clock) -> list[str]:
    """Return a line of the table."""
    sampled = f"{statistics.mean(clock.sampler.values):.0f}%" if clock.sampler.values else "not sampled"
    return [
        title,
        f"{clock.steps / clock.seconds:.1f}",
        f"{base.seconds / clock.seconds:.2f}",
        sampled,
        f"{clock.waits:.1f}" if clock.cuda else "",
        f"{1e3 * clock.waited / clock.steps:.2f}",
    ]


def main() -> int:
    parser = headline.parser(__doc__, steps=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", default=",".join(SIDES), help="competitors, comma-separated (default: all)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_step.py was not run: there is no GPU on this machine (torch.cuda.is_available() is False).")
        return 0
    sides = options.sides.split(",")
    if not set(sides) <= set(SIDES):
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {options.sides}")
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU: to try the script only"
    headline.print_header(options.threads, textbrewer=textbrewer.__version__, device=name)
    for shape in headline.chosen(options):
        loaded = headline.load(headline.make_job(options, shape))
        clocks = {side: measure(loaded, *SIDES[side][1:]) for side in sides}
        print(f"### {shape}, {options.size}: epochs of {options.steps} steps\n")
        header = ["competitor", "steps a second", "times the first", "utilisation", "waits for the device a step"]
        rows = [row(SIDES[side][0], clock, clocks[sides[0]]) for side, clock in clocks.items()]
        print(headline.markdown([*header, "waits for the cache, ms a step"], rows))
        problems = {clock.sampler.problem for clock in clocks.values()} - {""}
        print(f"\nUtilisation was not sampled: {problems.pop()}" if problems else "", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
