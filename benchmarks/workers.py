"""Processes that stay alive and work in turn, an epoch on command, so that competitors can alternate in one run.

A worker builds its models, says that it is ready, and then blocks until it is told to go: before its first epoch, and
in the optimiser's hook after the last step of every epoch. So the training loop itself is the library's own, with one
``train()`` call over all epochs. Also the loader waits meanwhile: what reads ahead gets no head start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import headline
import torch
from torch import nn


class Channel:
    """A worker's side: JSON lines on the first stdout; whatever a library prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        """Send a message."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """Return the next command; end the process when the driver is gone."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        command: dict[str, Any] = json.loads(line)
        return command


class Worker:
    """The driver's side of one worker.

    Args:
        name: for messages and the log's name.
        command: Python, script and arguments.
        threads: of torch and OpenMP.
        log: file for the worker's stderr.
        library: folder to import textbrewer from; ``None``: the Python's own.
    """

    def __init__(self, name: str, command: list[str], threads: int, log: Path, library: Path | None) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(threads, library),
            )

    def send(self, **command: Any) -> None:
        """Send a command."""
        assert self.process.stdin is not None  # a pipe, see __init__
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def receive(self) -> dict[str, Any]:
        """Return the worker's next message."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._died()
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the answer."""
        self.send(**command)
        return self.receive()

    def _died(self) -> None:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{tail}\nthe worker of {self.name} ended with status {self.process.wait()}, see {self.log}")

    def close(self) -> None:
        """End the worker, if it has not ended by itself."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def environment(threads: int, library: Path | None) -> dict[str, str]:
    """Return a worker's environment: neither side can import the other's package."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    kept |= {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    if library is not None:
        kept["PYTHONPATH"] = str(library)
    return kept


def original_python(given: str | None) -> str:
    """Return the Python of an environment with the original TextBrewer and transformers; made if none is given."""
    if given:
        # Not resolved: a virtual environment's python is a link out of it.
        return str(Path(given).absolute()) if Path(given).exists() else given
    sys.path.insert(0, str(Path(__file__).resolve().parent / "parity"))
    from compare import make_original

    python = str(make_original(headline.ROOT / "runs" / "parity" / "original"))
    if subprocess.run([python, "-c", "import transformers"], check=False, stderr=subprocess.DEVNULL).returncode:
        constraints = headline.ROOT / "constraints.txt"
        pins = ["-c", str(constraints)] if constraints.exists() else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, "transformers"], check=True)
    return python


def check_original(version: str) -> None:
    """Refuse to measure another library under the original's name."""
    if not version.startswith("0.2.1"):
        raise SystemExit(f"--original-python must have textbrewer 0.2.1.post1, got {version}")


class Turns:
    """The clock of a training that works an epoch at a time.

    Args:
        optimizer: its steps are the clock's ticks.
        steps: an epoch's.
        channel: to the driver.
        cache: a TeacherCache to ask for the time waited, or ``None``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, channel: Channel, cache: Any = None) -> None:
        self.steps, self.channel, self.cache = steps, channel, cache
        self.running = threading.Event()
        self.ticks: list[float] = []
        self.waited = 0.0
        self.background = 0.0
        self._start = 0.0
        optimizer.register_step_post_hook(lambda *_: self._tick())

    def wait(self) -> None:
        """Let the loader yield only while it is this worker's turn."""
        self.running.wait()

    def begin(self) -> None:
        """Wait for the driver's word and start the clock."""
        before = time.process_time()
        self.channel.receive()
        # Nobody but threads left over from the epoch before can have used the processor meanwhile.
        self.background = time.process_time() - before
        self.ticks = []
        self.running.set()
        self._start = time.perf_counter()

    def _tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter() - self._start)
        if len(self.ticks) < self.steps:
            return
        self.running.clear()
        waited = waited_so_far(self.cache)
        self.channel.send(ticks=self.ticks, waited=waited - self.waited, background=self.background)
        self.waited = waited
        self.begin()


def waited_so_far(cache: Any) -> float:
    """Return the seconds that steps have waited for the cache."""
    return 0.0 if cache is None else float(cache.info().seconds_waited)


def close(cache: Any) -> None:
    """Close a cache, where there is one and it can be closed."""
    if cache is not None and hasattr(cache, "close"):
        cache.close()


def warm_up(loaded: headline.Loaded, student: nn.Module, precision: str) -> None:
    """Run both models once over a batch, so that no one's first epoch pays for what torch does only once.

    Args:
        loaded: models and data.
        student: a copy that is not used afterwards.
        precision: as it will be trained.
    """
    batch = headline.on_device(loaded.job, loaded.batches[0])
    with headline.autocast(loaded.job, precision):
        with torch.no_grad():
            loaded.teacher(**batch)
        student(**batch).logits.float().sum().backward()


def run_once(
    title: str, script: str, arguments: dict[str, Any], threads: int, log: Path, original: str | None = None
) -> dict[str, Any]:
    """Run a benchmark's own ``--worker`` in a new process and return the one message that it sends.

    Args:
        title: of the competitor, for messages.
        script: the benchmark's file.
        arguments: for its worker, as plain values.
        threads: of torch.
        log: file for what it prints.
        original: the Python that has the original TextBrewer; ``None``: this one, with this library.
    """
    command = [original or sys.executable, str(Path(script).resolve()), "--worker", json.dumps(arguments)]
    command += ["--threads", str(threads)]
    worker = Worker(title, command, threads, log, None if original else headline.ROOT)
    try:
        message = worker.receive()
    finally:
        worker.close()
    if original:
        check_original(message["version"])
    return message
