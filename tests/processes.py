"""Functions run in processes of their own, forked from a server that has only imported torch and this library.

They start at once and share nothing with the test: a process that is killed leaves no more behind than any other.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# The second is imported by the first optimiser that is made, and takes longer than all the rest.
_context.set_forkserver_preload(["tests.engine.runs", "torch._dynamo"])
LIMIT = 120.0
"""Seconds after which a process counts as hanging."""


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function of a test module in a process of its own."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    """Wait for a process and return its exit status, negative for the signal it died of."""
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"the process did not end within {LIMIT} seconds")
    return process.exitcode


def run(function: Callable[..., None], *arguments: Any) -> int | None:
    """Start a function, wait for it, and return its exit status."""
    return finish(start(function, *arguments))


def run_ranks(world: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in processes that are told of each other as ``torchrun`` does.

    Raises:
        RuntimeError: with their tracebacks, if one of them fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    reports = [folder / f"error-of-rank-{rank}" for rank in range(world)]
    processes = [start(_as_rank, rank, world, port, report, function, arguments) for rank, report in enumerate(reports)]
    try:
        status = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(status):
        errors = [report.read_text() for report in reports if report.exists()]
        raise RuntimeError(f"exit statuses {status}\n" + "\n".join(errors))


def _as_rank(
    rank: int, world: int, port: int, report: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        function(rank, *arguments)
    except BaseException:
        report.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        # Not an orderly end: that would wait for the other processes.
        os._exit(1)
