"""Two gloo processes on the CPU give the same student as one process with batches of twice the size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.conftest import Encoder
from tests.distributed import worker
from tests.engine.runs import Run, checkpoints, equal
from tests.engine.test_tracking import scalars

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All students of two processes, trained one after the other."""
    folder = tmp_path_factory.mktemp("trained")
    processes.run_ranks(2, folder, worker.run_all, folder, list(worker.SAME))
    return folder


@pytest.mark.parametrize("name", worker.SAME)
def test_two_processes_are_one_with_twice_the_batch(name, trained, tmp_path):
    ends = [load(trained / f"{name}-{rank}.pt") for rank in range(2)]
    assert torch.equal(*ends)
    expected = worker.SAME[name](tmp_path / "alone", 2)
    assert torch.allclose(ends[0], expected, rtol=0, atol=1e-5), (ends[0] - expected).abs().max()


def test_the_students_differ(trained):
    """What is compared tells one kind of training from another."""
    ends = {name: load(trained / f"{name}-0.pt") for name in worker.SAME}
    names = list(ends)
    for number, first in enumerate(names):
        for second in names[:number]:
            alike = ends[first].shape == ends[second].shape and torch.allclose(ends[first], ends[second], atol=1e-4)
            assert not alike, (first, second)


def test_started_by_torchrun(trained, tmp_path):
    """As a script is started; the launcher's variables are all that tells the library."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["-m", "tests.distributed.worker", str(tmp_path), "general", "tasks"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            errors = launcher.communicate(timeout=120)[1]
        finally:
            launcher.terminate()  # Ends the processes too, if they still run.
    assert launcher.returncode == 0, errors
    for name in ("general", "tasks"):
        for rank in range(2):
            assert torch.equal(load(tmp_path / f"{name}-{rank}.pt"), load(trained / f"{name}-{rank}.pt"))


def test_a_group_of_the_users_own(trained, tmp_path):
    processes.run_ranks(2, tmp_path, worker.start_group_myself, tmp_path)
    ends = [load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ends)
    # Other rows share a round's batches, but each round has the same rows.
    assert torch.allclose(ends[0], load(trained / "general-0.pt"), rtol=0, atol=1e-5)


def test_every_process_trains_rank_0s_student(trained, tmp_path):
    processes.run_ranks(2, tmp_path, worker.different_starts, tmp_path)
    ends = [load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ends)
    assert torch.equal(ends[0], load(trained / "general-0.pt"))


def test_every_process_draws_rank_0s_tasks(trained, tmp_path):
    processes.run_ranks(2, tmp_path, worker.draw_tasks, tmp_path)
    (drawn, first), (other, second) = (load(tmp_path / f"drawn-{rank}.pt") for rank in range(2))
    assert drawn == other
    assert set(drawn) == {"a", "b"}
    assert torch.equal(first, second)
    assert torch.allclose(first, worker.tasks(tmp_path / "alone", 2, seed=100), rtol=0, atol=1e-5)


def test_every_row_is_read_once_a_pass(tmp_path):
    """Shuffled, though the processes were seeded differently."""
    processes.run_ranks(2, tmp_path, worker.read_rows, tmp_path)
    first, second = (load(tmp_path / f"rows-{rank}.pt") for rank in range(2))
    passes = [[*first[start : start + 12], *second[start : start + 12]] for start in (0, 12, 24)]
    assert [sorted(rows) for rows in passes] == [list(range(24))] * 3
    assert passes[0] != passes[1] != passes[2] != list(range(24))


def test_gradients_are_exchanged_once_a_window(tmp_path):
    processes.run_ranks(2, tmp_path, worker.count_exchanges, tmp_path)
    first, second = (load(tmp_path / f"hooked-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)


def test_precisions_follow_each_other(tmp_path):
    processes.run_ranks(2, tmp_path, worker.precisions, tmp_path)
    assert equal(load(tmp_path / "0.pt"), load(tmp_path / "1.pt"))


def test_only_one_process_writes(tmp_path):
    processes.run_ranks(2, tmp_path, worker.files_and_logs, tmp_path)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"gs3.pkl", "gs6.pkl", "checkpoint-3", "checkpoint-6"}
    ranks = {f"rank-{rank}{end}.pt" for rank in range(2) for end in ("", "-after-callback")}
    assert {path.name for path in (out / "checkpoint-6").iterdir()} == {
        "model.safetensors",
        "training.pt",
        "state.json",
        *ranks,
    }
    plain = Encoder()
    plain.load_state_dict(load(out / "gs6.pkl"))
    for rank in range(2):
        assert equal(plain.state_dict(), load(tmp_path / f"student-{rank}.pt"))
    assert len(list((tmp_path / "log").iterdir())) == 1
    assert list(scalars(tmp_path / "log")["scalar/total_loss"]) == list(range(6))


# Resuming


@pytest.mark.parametrize(
    "name",
    [
        "general, projections, accumulation",
        "general, cached",
        "multi-task",
        "multi-teacher, sample",
        "multi-teacher, gate",
        "own generator",
        "trainer",
    ],
)
def test_resumed_runs_end_the_same(name, tmp_path):
    processes.run_ranks(2, tmp_path, worker.resume, tmp_path, name)
    path = checkpoints(tmp_path / "whole")[-3]
    processes.run_ranks(2, tmp_path, worker.resume_elsewhere, tmp_path, name, path)
    for rank in range(2):
        assert equal(load(tmp_path / f"state-{rank}.pt"), load(tmp_path / f"again-{rank}.pt"))
    # The processes had dropout of their own, and one student.
    first, second = (load(tmp_path / f"state-{rank}.pt") for rank in range(2))
    assert equal(first["student"], second["student"])
    assert not equal(first["random"], second["random"])


def test_another_number_of_processes_is_refused(tmp_path):
    name = "basic, epochs, shuffled"
    Run(name, tmp_path / "alone", every_step=False).train()
    processes.run_ranks(2, tmp_path, worker.expect_refusal, tmp_path / "out", tmp_path / "alone" / "checkpoint-12")
    processes.run_ranks(2, tmp_path, worker.resume, tmp_path, name)
    with pytest.raises(ValueError, match="written by 2 processes and must be resumed with as many, got 1"):
        Run(name, tmp_path / "out").train(resume_from=tmp_path / "whole" / "checkpoint-3")


def test_a_callback_that_not_all_had_done_is_done_again(tmp_path):
    processes.run_ranks(2, tmp_path, worker.callback_of_one_rank, tmp_path)


def test_a_signal_stops_all_after_the_same_step(tmp_path):
    processes.run_ranks(2, tmp_path, worker.interrupted, tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_process_ends_all(where, tmp_path):
    with pytest.raises(RuntimeError) as failed:
        processes.run_ranks(2, tmp_path / "ranks", worker.not_finite, tmp_path / "out", where)
    report = str(failed.value)
    assert re.search(r"rank 1:.*NonFiniteError: step 3: (the gradient of )?unweighted_hard_label_loss", report, re.S)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
