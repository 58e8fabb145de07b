"""What it costs on a CPU that glibc gives memory back to the system after each step, and takes it again.

Tensors of more than 32 MB, and of less at first, are mapped anew each time, and the system clears every page of them.
With ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` in the environment they stay with the process. Both ways train the
student of ``step_overhead.py`` by the library, in processes of their own that take turns; their losses must be equal.

    python benchmarks/allocator.py                              # prints a table
    python benchmarks/allocator.py --threads 1 --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import step_overhead
import torch

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
SETTINGS: dict[str, dict[str, str]] = {"glibc's own": {}, "kept": KEEP}
STEPS = 24
PRECISIONS = ("no", "bf16")


class Usage(step_overhead.Timed):
    """A loader that notes, at each request for a batch, the time and what the process used of the machine."""

    def __init__(self, data: list[Any]) -> None:
        super().__init__(data)
        self.used: list[resource.struct_rusage] = []

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.used.append(resource.getrusage(resource.RUSAGE_SELF))
            yield batch


def work(precision: str) -> dict[str, Any]:
    """Train, and return what a step used, warm-up left out."""
    size = replace(step_overhead.SIZES["minilm"], steps=STEPS)
    torch.manual_seed(0)
    teacher = step_overhead.model(size, size.teacher_layers)
    student = step_overhead.model(size, size.student_layers)
    data = Usage(step_overhead.batches(size))
    with tempfile.TemporaryDirectory() as folder:
        step_overhead.by_library(size, student, teacher, data, folder, precision=precision)
    used = data.used[step_overhead.WARM_UP :]
    steps = len(used) - 1
    return {
        "ms": [1e3 * time for time in data.step_times()],
        "cpu": 1e3 * sum(getattr(used[-1], k) - getattr(used[0], k) for k in ("ru_utime", "ru_stime")) / steps,
        "system": 1e3 * (used[-1].ru_stime - used[0].ru_stime) / steps,
        "faults": (used[-1].ru_minflt - used[0].ru_minflt) / steps,
        "memory": used[-1].ru_maxrss / 1024,
        "loss": step_overhead.loss_of(size, student, teacher, copy.deepcopy(data.batches[0])),
    }


def start(setting: str, precision: str, threads: int) -> dict[str, Any]:
    """Return what a process of its own measured."""
    clean = {key: value for key, value in os.environ.items() if key not in KEEP}
    environment = {**clean, **SETTINGS[setting], "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", precision, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{setting}: a worker failed\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print, or be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(work(options.worker)))
        return
    print(f"torch {torch.__version__}, {platform.libc_ver()}, {options.threads} threads, {options.rounds} rounds")
    columns = ["a step, ms", "CPU time, ms", "of it the system's", "new pages", "at most, MB", "times faster"]
    print(f"| precision | memory | {' | '.join(columns)} |\n|---|---|{'--:|' * len(columns)}")
    for precision in PRECISIONS:
        found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
        for _, setting in itertools.product(range(options.rounds), SETTINGS):
            found[setting].append(start(setting, precision, options.threads))
        if len({result["loss"] for results in found.values() for result in results}) > 1:
            raise SystemExit(f"{precision}: the losses differ, so the work was not the same")
        times = {name: [statistics.median(one["ms"]) for one in results] for name, results in found.items()}
        ratios = [before / after for before, after in zip(*times.values(), strict=True)]
        for setting, results in found.items():
            cells = [
                statistics.median(times[setting]),
                *(statistics.median(one[key] for one in results) for key in ("cpu", "system", "faults", "memory")),
            ]
            gain = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                if setting == "kept"
                else "1"
            )
            print(f"| {precision} | {setting} | {' | '.join(f'{cell:.0f}' for cell in cells)} | {gain} |")


if __name__ == "__main__":
    main()
