"""Batches made ready on a thread: those of a plain loop, in its order, and found again at any place."""

import gc
import multiprocessing
import random
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.conftest import make_loader, seed_all
from tests.engine.runs import equal
from tests.engine.test_batches import LOADERS, PASSES, plain
from textbrewer import engine
from textbrewer.engine import loaders, rng

AHEAD = ("random collate",)
"""Loaders that draw random numbers for each batch in this process: they draw them one step earlier."""


def prepared(loader, prepare=lambda batch, passes: batch, postprocess=None, waited=lambda seconds: None):
    return engine.PreparedBatches(loader, postprocess, "dataloader", prepare, waited)


def passes_of(source, draw=True, count=PASSES):
    """All batches of a few passes, ending a pass as the loop does, with random numbers drawn by each step."""
    batches = []
    while source.epoch < count:
        epoch = source.epoch
        try:
            batch = source.next_in_pass()
        except StopIteration:
            continue
        batches.append((epoch, batch, torch.rand(2) if draw else None))
        if source.taken == source.size:
            source.end_pass()
    return batches, rng.take(loaders.generators_of(source.loader))


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in AHEAD])
def test_passes_are_those_of_a_for_loop(name):
    seed_all(3)
    expected = plain(LOADERS[name]())
    seed_all(3)
    source = prepared(LOADERS[name]())
    assert equal(passes_of(source), expected)
    source.close()


@pytest.mark.parametrize("name", AHEAD)
def test_where_the_loader_draws_for_each_batch_passes_are_the_same_as_long_as_no_one_else_draws(name):
    seed_all(3)
    loader, expected = LOADERS[name](), []
    for epoch in range(PASSES):
        expected += [(epoch, batch, None) for batch in loader]
    seed_all(3)
    source = prepared(LOADERS[name]())
    assert equal(passes_of(source, draw=False)[0], expected)
    source.close()


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "one's own, with an end"])
def test_a_place_is_found_again(name, tmp_path):
    """After any number of batches, also where the batch that was read ahead was drawn at random."""
    seed_all(3)
    whole = prepared(LOADERS[name]())
    expected = [batch for _, batch, _ in passes_of(whole)[0]]
    whole.close()
    for taken in random.Random(name).sample(range(1, len(expected) - 1), 3):
        seed_all(3)
        source = prepared(LOADERS[name]())
        for _ in range(taken):
            source.next_forever()
            torch.rand(2)
        torch.save((source.state_dict(), rng.take()), tmp_path / "place.pt")
        source.close()
        seed_all(99)
        again = prepared(LOADERS[name]())
        state, numbers = torch.load(tmp_path / "place.pt", weights_only=True)
        again.load_state_dict(state)
        rng.put(numbers)
        rest = []
        for _ in expected[taken:]:
            rest.append(again.next_forever())
            torch.rand(2)
        assert equal(rest, expected[taken:])
        again.close()


def test_a_place_at_the_end_of_a_pass():
    """Saved after the last batch of a pass, before it was ended; and after that."""
    for ended in (False, True):
        seed_all(3)
        source = prepared(make_loader(20, shuffle=True))
        for _ in range(5):
            source.next_in_pass()
        if ended:
            source.end_pass()
        state, numbers = source.state_dict(), rng.take()
        expected = source.next_forever()
        source.close()
        seed_all(8)
        again = prepared(make_loader(20, shuffle=True))
        again.load_state_dict(state)
        rng.put(numbers)
        assert equal(again.next_forever(), expected)
        again.close()


class Counted:
    """Numbers, noting each read; refuses to be read past its end."""

    def __init__(self, count=4, sized=True):
        self.count, self.reads, self.passes = count, [], 0
        if sized:
            self.__class__ = type("Sized", (Counted,), {"__len__": lambda own: own.count})

    def __iter__(self):
        self.passes += 1
        for number in range(self.count):
            self.reads.append(number)
            yield number
        self.reads.append("end")


@pytest.mark.parametrize("sized", [True, False])
def test_the_loader_is_read_one_batch_ahead_and_never_past_the_end_of_a_pass(sized):
    loader = Counted(3, sized)
    source = prepared(loader)
    seen = []
    for _ in range(3):
        source.next_in_pass()
        seen.append(list(loader.reads))
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2, "end"]]
    assert loader.passes == 1
    if sized:
        source.end_pass()
    with pytest.raises(StopIteration) if not sized else pytest.raises(AssertionError):
        # Where the length is known the pass has ended already, and this begins the next one.
        source.next_in_pass()
        assert loader.passes == 1
    assert loader.passes == 1 + sized
    assert source.epoch == 1
    source.close()


def test_preparation_is_in_order_on_one_thread_with_the_passes_begun():
    threads, told = set(), []

    def prepare(batch, passes):
        threads.add(threading.current_thread())
        time.sleep(0.002 * (batch % 3))
        told.append((batch, passes))
        return batch, passes

    source = prepared(Counted(4), prepare, postprocess=lambda batch: batch + 10)
    expected = [(number + 10, passes) for passes in range(3) for number in range(4)]
    # Within each pass the next is prepared while one is used, so the last pass begins with two.
    assert [batch for _, batch, _ in passes_of(source)[0]] == expected == told
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    source.close()


def test_the_post_processor_is_in_the_main_thread():
    seen = []
    source = prepared(Counted(3), postprocess=lambda batch: seen.append(threading.current_thread()) or batch)
    assert [batch for _, batch, _ in passes_of(source, count=1)[0]] == [0, 1, 2]
    assert set(seen) == {threading.main_thread()}
    source.close()


def test_the_rest_of_a_pass_after_resuming_counts_as_no_pass():
    """A cache steps aside when the second pass finds nothing: a rest is no first pass."""
    source = prepared(Counted(4), lambda batch, passes: (batch, passes))
    source.load_state_dict({"epoch": 5, "taken": 3, "pass_start": rng.take(), "generators": []})
    assert [source.next_forever() for _ in range(9)] == [
        (3, 0),
        *[(n, 0) for n in range(4)],
        *[(n, 1) for n in range(4)],
    ]
    assert (source.epoch, source.taken) == (7, 4)
    source.close()


class Fails(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, number):
        if number == 3:
            raise KeyError("row 3 is broken")
        return number


def test_an_error_of_the_loader_surfaces():
    source, seen = prepared(DataLoader(Fails(), batch_size=1)), []
    with pytest.raises(KeyError, match="row 3 is broken"):  # noqa: PT012
        while True:
            seen.append(int(source.next_in_pass()))
    assert seen in ([0, 1], [0, 1, 2])
    source.close()


def test_an_error_of_the_post_processor_surfaces():
    source = prepared(Counted(3), postprocess=lambda batch: 1 // (batch - 1))
    with pytest.raises(ZeroDivisionError):
        passes_of(source)
    source.close()


def test_an_error_of_the_thread_surfaces_with_its_own_batch():
    def prepare(batch, passes):
        if batch == 2:
            raise OSError("nothing to be read")
        return batch

    source, seen = prepared(Counted(4), prepare), []
    with pytest.raises(OSError, match="nothing to be read"):  # noqa: PT012
        while True:
            seen.append(source.next_in_pass())
    assert seen == [0, 1]
    source.close()


def test_an_empty_loader_is_refused():
    source = prepared([])
    with pytest.raises(ValueError, match="dataloader yielded no batch in pass 1"):
        source.next_in_pass()
    source.close()


def test_waits_are_counted():
    """Only what a step waits: a preparation that ends while a step is at work costs nothing."""
    sums = []
    for step in (0.0, 0.15):
        waits = []
        source = prepared(Counted(5), lambda batch, passes: time.sleep(0.05), waited=waits.append)
        for _ in range(5):
            source.next_in_pass()
            time.sleep(step)
        assert len(waits) == 5
        sums.append(sum(waits[1:]))
        source.close()
    assert sums[0] > 0.1
    assert sums[1] < sums[0] / 2


def test_preparation_goes_on_while_a_step_is_at_work():
    ready = threading.Event()
    source = prepared(Counted(3), lambda batch, passes: batch == 1 and ready.set())
    source.next_in_pass()
    assert ready.wait(30)
    source.close()


def test_a_closed_source_has_no_thread():
    source = prepared(Counted(3), lambda batch, passes: threading.current_thread())
    thread = source.next_in_pass()
    assert thread.is_alive()
    source.close()
    thread.join(30)
    assert not thread.is_alive()


def test_workers_are_ended_with_their_source():
    """Not by the garbage collection, which leaves them waiting for 5 seconds each."""
    source = prepared(make_loader(20, num_workers=2))
    source.next_in_pass()
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    started = time.perf_counter()
    gc.disable()
    source.close()
    gc.enable()
    assert time.perf_counter() - started < 4
    assert not any(worker.is_alive() for worker in workers)
