"""One loader's batches shared among processes: here by calling it as each of them, one after the other."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from tests.conftest import Rows, make_loader, seed_all
from tests.engine.runs import NumPyOrder, Stream
from textbrewer import engine

AGREED = 1234


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def read_as(rank, world, make, passes=1, seed=None):
    """Return the row numbers that one of several processes reads, pass by pass, batch by batch."""
    seed_all(rank if seed is None else seed)  # Users often seed each process differently.
    loader = engine.shard(make(), SimpleNamespace(rank=rank, world=world, agree=lambda own: AGREED))
    found = []
    for _ in range(passes):
        found.append([])
        for batch in loader:
            size = len(batch["labels"])
            found[-1].append(loader.dataset.reads[-size:])
    return found


def rounds(world, make, passes=1):
    """Return the rows read in each round: by all processes at the same time."""
    ranks = [read_as(rank, world, make, passes) for rank in range(world)]
    assert len({tuple(map(len, found)) for found in ranks}) == 1, "all processes take as many steps"
    return [[flat(parts) for parts in zip(*batches)] for batches in zip(*ranks)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_is_read_once(world, shuffle):
    for read in rounds(world, lambda: make_loader(24, batch_size=2, shuffle=shuffle), passes=2):
        assert sorted(flat(read)) == list(range(24))
        assert len(read) == 12 // world
    assert (flat(read) == list(range(24))) is not shuffle


def test_a_round_is_a_batch_of_twice_the_size():
    def make(size):
        return make_loader(24, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(3))

    (alone,) = read_as(0, 1, lambda: make(8))
    (together,) = rounds(2, lambda: make(4))
    assert together == alone


def test_passes_have_different_orders():
    first, second = rounds(2, lambda: make_loader(24, shuffle=True), passes=2)
    assert first == second, "the agreed seed is the same in this test"
    seeds = iter(range(10))
    loader = engine.shard(
        make_loader(24, shuffle=True), SimpleNamespace(rank=0, world=2, agree=lambda own: next(seeds))
    )
    orders = [[batch["input_ids"].tolist() for batch in loader] for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("count", "world", "expected"), [(22, 2, 3), (21, 3, 2), (9, 4, 1), (3, 2, 1)])
def test_an_incomplete_round_is_filled_up(count, world, expected):
    (read,) = rounds(world, lambda: make_loader(count, batch_size=4))
    assert len(read) == expected
    rows = flat(read)
    assert set(rows) == set(range(count))
    # What is read twice are the first batches, in their order.
    assert rows[:count] == list(range(count))
    assert len(rows) - count < 4 * (world - 1) + 1


@pytest.mark.parametrize(("count", "world", "expected"), [(22, 2, 2), (23, 3, 1), (7, 2, 0)])
def test_an_incomplete_round_is_dropped_with_drop_last(count, world, expected):
    (read,) = rounds(world, lambda: make_loader(count, batch_size=4, drop_last=True))
    assert len(read) == expected
    rows = flat(read)
    assert rows == list(range(4 * world * expected))


@pytest.mark.parametrize("count", [20, 22, 24, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_is_what_is_read(count, drop_last):
    for world in (2, 3):
        runtime = SimpleNamespace(rank=world - 1, world=world, agree=lambda own: AGREED)
        loader = engine.shard(make_loader(count, drop_last=drop_last), runtime)
        assert engine.size_of(loader) == len(list(loader))


def test_a_process_keeps_its_own_random_numbers():
    """Dropout differs by process; only one number is drawn from its generator, to agree on the order."""
    seed_all(5)
    torch.empty((), dtype=torch.int64).random_()  # What every DataLoader draws for its workers.
    torch.empty((), dtype=torch.int64).random_()
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    read_as(1, 2, lambda: make_loader(8, shuffle=True), seed=5)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_the_loaders_settings_are_kept():
    def seed_worker(number):
        """A function of the user's."""

    def collate(rows):
        return rows

    loader = DataLoader(
        Rows(8),
        batch_size=2,
        num_workers=2,
        collate_fn=collate,
        worker_init_fn=seed_worker,
        timeout=7,
        prefetch_factor=3,
        persistent_workers=True,
        generator=torch.Generator(),
        multiprocessing_context="fork",
    )
    shared = engine.shard(loader, SimpleNamespace(rank=0, world=2, agree=lambda own: AGREED))
    assert shared is not loader
    names = ["num_workers", "collate_fn", "worker_init_fn", "timeout", "prefetch_factor", "persistent_workers"]
    for name in [*names, "dataset", "generator", "pin_memory", "multiprocessing_context"]:
        assert getattr(shared, name) is getattr(loader, name), name


def test_alone_nothing_changes():
    loader = make_loader(8)
    assert engine.shard(loader, SimpleNamespace(rank=0, world=1)) is loader


@pytest.mark.parametrize("where", ["sampler", "batch sampler", "inside a batch sampler"])
def test_the_users_own_sharding_is_left_alone(where):
    sampler = DistributedSampler(Rows(8), num_replicas=2, rank=0)
    if where == "sampler":
        loader = make_loader(8, sampler=sampler)
    elif where == "batch sampler":
        loader = DataLoader(Rows(8), batch_sampler=sampler)
    else:
        loader = DataLoader(Rows(8), batch_sampler=BatchSampler(sampler, 2, False))
    assert engine.shard(loader, SimpleNamespace(rank=0, world=2)) is loader


class Endless(Sampler):
    """Row numbers without an end."""

    def __iter__(self):
        while True:
            yield random.randrange(8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(8), batch_size=2),
        lambda: make_loader(8, batch_size=None),
        lambda: make_loader(8, sampler=Endless()),
        NumPyOrder,
    ],
)
def test_a_loader_that_cannot_be_shared_warns(make):
    loader = make()
    with pytest.warns(UserWarning, match="it must yield other rows, and as many batches, in every process"):
        assert engine.shard(loader, SimpleNamespace(rank=0, world=2)) is loader


def test_epochs_reach_the_users_batch_sampler():
    class Told(BatchSampler):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    loader = DataLoader(Rows(8), batch_sampler=Told(RandomSampler(range(8)), 2, False))
    shared = engine.shard(loader, SimpleNamespace(rank=0, world=2, agree=lambda own: AGREED))
    source = engine.LoaderBatches(shared)
    for _ in range(5):
        source.next_forever()
    assert Told.epochs == [0, 1, 2]
