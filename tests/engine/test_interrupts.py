"""SIGTERM and SIGINT: the step under way is finished and saved, and the run goes on later as if nothing had been."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.engine.runs import Run, checkpoints, equal
from textbrewer.engine import interrupts

NAME = "basic, epochs, shuffled"
ROOT = Path(__file__).parents[2]
SCRIPT = "import sys, pathlib, tests.engine.test_interrupts as t; t.wait_in_third_step(pathlib.Path(sys.argv[1]))"


def wait_in_third_step(folder):
    """Train; in the third batch say so, and go on when told to."""
    batches = []

    def postprocess(batch):
        batches.append(batch)
        if len(batches) == 3:
            (folder / "waiting").touch()
            while not (folder / "go").exists():
                time.sleep(0.005)
        return batch

    Run(NAME, folder, every_step=False).train(batch_postprocessor=postprocess)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Run(NAME, tmp_path_factory.mktemp("whole"), every_step=False).train().state()


def test_a_script_is_stopped_and_resumed(whole, tmp_path):
    """Two scripts at once, one for each signal: they take long to start."""
    running = {}
    for signum in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / signum.name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        running[signum] = (
            folder,
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder)],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=folder,
            ),
        )
    try:
        for signum, (folder, process) in running.items():
            deadline = time.monotonic() + 120
            while not (folder / "waiting").exists():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signum)
            time.sleep(0.1)
            (folder / "go").touch()
        for signum, (folder, process) in running.items():
            errors = process.communicate(timeout=60)[1]
            # Python ends after a KeyboardInterrupt as if the signal had done it; but with 1 where torch finds tabulate,
            # as it then evaluates a text at exit, after which Python no longer knows what it ends of.
            assert process.returncode in ((143,) if signum == signal.SIGTERM else (-signal.SIGINT, 1)), errors
            assert (
                f"Training interrupted at step 3 and saved; go on with resume_from='latest' (output_dir '{folder}'"
                in errors
            )
            assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
            assert equal(Run(NAME, folder, seed=4).train(resume_from="latest").state(), whole)
    finally:
        for _, process in running.values():
            process.kill()


def interrupting(number, signum=signal.SIGTERM, times=1):
    """Return a post-processor that sends this process a signal in the given batch."""
    batches = []

    def postprocess(batch):
        batches.append(batch)
        if len(batches) == number:
            for _ in range(times):
                signal.raise_signal(signum)
        return batch

    return postprocess


@pytest.mark.parametrize(
    ("name", "batch", "step"),
    [
        ("basic, epochs, shuffled", 8, 8),
        ("general, projections, accumulation", 2, 1),
        ("general, projections, accumulation", 10, 3),
        ("general, steps, exact accumulation", 6, 2),
        ("general, cached", 3, 1),
        ("multi-teacher", 2, 2),
        ("trainer", 12, 12),
        ("without a length", 5, 5),
        ("without a length", 6, 6),
    ],
)
def test_the_step_is_finished_and_saved(name, batch, step, tmp_path):
    whole = Run(name, tmp_path / "whole", every_step=False).train().state()
    run = Run(name, tmp_path / "run", every_step=False)
    with pytest.raises(SystemExit) as stopped:
        run.train(batch_postprocessor=interrupting(batch))
    assert stopped.value.code == 143
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step}"
    assert (tmp_path / "run" / f"gs{step}.pkl").exists()
    assert equal(Run(name, tmp_path / "run", seed=7, every_step=False).train(resume_from="latest").state(), whole)


def test_interrupted_twice(tmp_path):
    whole = Run(NAME, tmp_path / "whole", every_step=False).train().state()
    for resume_from, batch in ((None, 2), ("latest", 2)):
        with pytest.raises(KeyboardInterrupt, match="interrupted at step"):
            Run(NAME, tmp_path / "run", every_step=False).train(
                resume_from=resume_from, batch_postprocessor=interrupting(batch, signal.SIGINT)
            )
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-4"
    assert equal(Run(NAME, tmp_path / "run", seed=7).train(resume_from="latest").state(), whole)


def test_a_second_signal_acts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        Run(NAME, tmp_path, every_step=False).train(batch_postprocessor=interrupting(2, signal.SIGINT, times=2))
    assert "saved" not in str(stopped.value)
    assert not checkpoints(tmp_path)


def test_an_interrupted_callback_is_not_called_again(tmp_path):
    """It was finished before the training stopped."""
    calls = []

    def callback(model, step):
        calls.append(step)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)

    whole = Run(NAME, tmp_path / "whole", every_step=False).train().state()
    with pytest.raises(SystemExit):
        Run(NAME, tmp_path / "run", every_step=False).train(callback=callback)
    resumed = Run(NAME, tmp_path / "run", every_step=False, seed=7).train(resume_from="latest", callback=callback)
    assert equal(resumed.state(), whole)
    assert calls == [6, 12]


@contextlib.contextmanager
def handler(signum, action):
    before = signal.signal(signum, action)
    try:
        yield
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_put_back(signum):
    def own(number, frame):
        """The user's handler."""

    with handler(signum, own):
        with interrupts.caught() as interruption:
            assert signal.getsignal(signum) is not own
            assert not interruption
            signal.raise_signal(signum)
            assert interruption
            assert interruption.signum == signum
        assert signal.getsignal(signum) is own


def test_what_was_ignored_stays_ignored():
    with handler(signal.SIGINT, signal.SIG_IGN), interrupts.caught() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert not interruption


def test_outside_the_main_thread_nothing_is_caught(tmp_path):
    """Python allows no handlers there; the training works all the same."""
    states, before = [], signal.getsignal(signal.SIGTERM)

    def work():
        states.append(Run(NAME, tmp_path / "thread", every_step=False).train().state())
        states.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    whole = Run(NAME, tmp_path / "whole", every_step=False).train().state()
    assert equal(states[0], whole)
    assert states[1] == before
