"""Two gloo processes on the CPU that share one folder of teacher outputs."""

import pytest
import torch

import textbrewer
from tests import processes
from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.distributed.worker import MATCHES
from tests.engine.runs import STUDENT_SEED, TEACHER_SEED, checkpoints, equal, weights
from tests.teacher_cache.jobs import watch
from tests.teacher_cache.test_runs import caching
from textbrewer import DistillationConfig, GeneralDistiller, TeacherCache

pytestmark = pytest.mark.distributed
ROWS = 24


def teacher():
    return Encoder(width=48, seed=TEACHER_SEED)


def load(path):
    return torch.load(path, weights_only=True)


def train(folder, name, cache, times=1, epochs=3, **options):
    """Distil, and return the weights with the teacher's rows at the end of each epoch."""
    model, student = teacher(), Encoder(dropout=0.0, seed=STUDENT_SEED)
    calls, rows = watch(model), []
    generator = torch.Generator().manual_seed(5)
    loader = make_loader(ROWS, 4 * times, full=True, shuffle=True, generator=generator)
    torch.manual_seed(0)
    distiller = GeneralDistiller(
        make_config(folder / name, **options), DistillationConfig(**MATCHES), model, student, adaptor, adaptor,
        teacher_cache=None if cache is None else TeacherCache(folder / cache, "float32"),
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.train(optimizer, loader, num_epochs=epochs, callback=lambda model, step: rows.append(sum(calls)))
    return weights(distiller), rows


def both(rank, folder):
    """Train without a cache, with a new one, and with what is then in it."""
    for name, cache in (("plain", None), ("first", "cache"), ("again", "cache")):
        torch.save(train(folder, name, cache), folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    processes.run_ranks(2, folder, both, folder)
    return folder


def test_two_processes_with_one_cache(trained):
    plain, first, again = (
        [load(trained / f"{name}-{rank}.pt") for rank in range(2)] for name in ("plain", "first", "again")
    )
    for ends in (plain, first, again):
        assert torch.equal(ends[0][0], ends[1][0])
    start = weights_of_a_start()
    moved = (plain[0][0][: len(start)] - start).abs().max()
    assert (first[0][0] - plain[0][0]).abs().max() < 1e-5 * moved
    # Rows were stored in either process's batches, with other neighbours: the last bit may differ.
    assert (again[0][0] - plain[0][0]).abs().max() < 1e-5 * moved
    assert [rows for _, rows in plain] == [[12, 24, 36]] * 2
    # The first batch is run beforehand in both processes, and is one process's share later: each finds it then.
    assert sum(rows[0] for _, rows in first) <= ROWS + 4
    # What the other process stores last may still be on its way to the disk when the next pass begins.
    assert all(rows[1] - rows[0] <= 4 for _, rows in first)
    assert all(rows[1] == rows[2] for _, rows in first)
    assert [rows for _, rows in again] == [[0, 0, 0]] * 2
    assert TeacherCache(trained / "cache").info().entries == ROWS


def weights_of_a_start():
    return torch.cat([value.flatten() for value in Encoder(dropout=0.0, seed=STUDENT_SEED).parameters()]).detach()


def test_one_process_goes_on_with_what_two_stored(trained, tmp_path):
    """With batches of twice the size, it trains the same student, and needs no teacher."""
    (tmp_path / "cache").symlink_to(trained / "cache")
    end, rows = train(tmp_path, "alone", "cache", times=2)
    expected = load(trained / "plain-0.pt")[0]
    assert torch.allclose(end, expected, rtol=0, atol=1e-5)
    assert rows == [0, 0, 0]


# ---- precompute


def store(rank, folder):
    """Store what the teacher says of this process's share, then all train without a teacher."""
    model = teacher()
    calls = watch(model)
    for _ in range(2):
        textbrewer.precompute(
            model, make_loader(ROWS, 4, full=True), adaptor, TeacherCache(folder / "cache", "float32"),
            DistillationConfig(**MATCHES), make_config(folder / "out"),
        )  # fmt: skip
        torch.save(calls, folder / f"calls-{rank}.pt")
    student = Encoder(dropout=0.0, seed=STUDENT_SEED)
    torch.manual_seed(0)
    distiller = GeneralDistiller(
        make_config(folder / "run"), DistillationConfig(**MATCHES), None, student, adaptor, adaptor,
        teacher_cache=TeacherCache(folder / "cache", "float32"),
    )  # fmt: skip
    loader = make_loader(ROWS, 4, full=True, shuffle=True, generator=torch.Generator().manual_seed(5))
    distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), loader, num_epochs=3)
    torch.save(weights(distiller), folder / f"end-{rank}.pt")


def test_storing_is_shared(trained, tmp_path):
    processes.run_ranks(2, tmp_path, store, tmp_path)
    assert [load(tmp_path / f"calls-{rank}.pt") for rank in range(2)] == [[4, 4, 4]] * 2
    assert TeacherCache(tmp_path / "cache").info().entries == ROWS
    ends = [load(tmp_path / f"end-{rank}.pt") for rank in range(2)]
    assert torch.equal(*ends)
    assert torch.allclose(ends[0], load(trained / "plain-0.pt")[0], rtol=0, atol=1e-5)


# ---- resuming, two at once


def resume(rank, folder, name):
    state = caching(name, folder / "whole", folder / "cache").train().state()
    path = checkpoints(folder / "whole")[1]
    torch.distributed.barrier()
    again = caching(name, folder / "again", folder / "cache", seed=3).train(resume_from=path).state()
    assert equal(again, state)


@pytest.mark.parametrize("name", ["general, projections, accumulation", "multi-task", "own generator"])
def test_resumed_runs_end_the_same(name, tmp_path):
    processes.run_ranks(2, tmp_path, resume, tmp_path, name)


def fill(folder, number):
    """One of two trainings that know nothing of each other."""
    end, rows = train(folder, f"run-{number}", "cache", epochs=2)
    torch.save((end, rows), folder / f"{number}.pt")


def test_two_trainings_fill_one_cache(tmp_path):
    running = [processes.start(fill, tmp_path, number) for number in range(2)]
    assert [processes.finish(process) for process in running] == [0, 0]
    ends, rows = zip(*(load(tmp_path / f"{number}.pt") for number in range(2)), strict=True)
    expected = train(tmp_path, "plain", None, epochs=2)[0]
    for end in ends:
        assert torch.allclose(end, expected, rtol=0, atol=1e-6)
    assert all(counts[0] <= ROWS and counts[0] == counts[1] for counts in rows)
    assert TeacherCache(tmp_path / "cache").info().entries == ROWS
