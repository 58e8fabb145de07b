"""Batches pass after pass: the same as a plain ``for`` loop would give, and found again at any place."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.conftest import IGNORED, Rows, make_loader, seed_all
from tests.engine.runs import EpochOrder, NumPyOrder, Stream, equal, hide_tokens
from textbrewer import engine
from textbrewer.engine import loaders, rng
from textbrewer.engine.batches import task_weights

PASSES = 3


def generator():
    return torch.Generator().manual_seed(int(torch.randint(10**9, ())))


def with_replacement(**options):
    sampler = RandomSampler(range(20), replacement=True, num_samples=70, generator=generator())
    return make_loader(20, sampler=sampler, **options)


class Doubled(DataLoader):
    """A loader with an iteration of its own, which its row numbers do not tell."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield {**batch, "labels": batch["labels"].roll(1)}

    def __len__(self):
        return 2 * super().__len__()


class CountsPasses:
    """A loader that does something after its last batch."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 2

    def __iter__(self):
        yield {"pass": torch.tensor([self.passes])}
        yield {"pass": torch.tensor([self.passes])}
        self.passes += 1


LOADERS = {
    "in order": lambda: make_loader(20),
    "shuffled": lambda: make_loader(20, shuffle=True),
    "shuffled, last batch smaller": lambda: make_loader(22, shuffle=True),
    "shuffled, last batch dropped": lambda: make_loader(22, shuffle=True, drop_last=True),
    "own generator": lambda: make_loader(20, shuffle=True, generator=generator()),
    "own generator, last batch smaller": lambda: make_loader(22, shuffle=True, generator=generator()),
    "sampler's generator": lambda: make_loader(20, sampler=RandomSampler(range(20), generator=generator())),
    "batch sampler": lambda: DataLoader(
        Rows(20), batch_sampler=BatchSampler(RandomSampler(range(20), generator=generator()), 4, False)
    ),
    "drawn again and again": with_replacement,
    "drawn again and again by workers": lambda: with_replacement(num_workers=2),
    "workers": lambda: make_loader(20, shuffle=True, num_workers=2),
    "workers that stay": lambda: make_loader(20, shuffle=True, num_workers=1, persistent_workers=True),
    "no batching": lambda: make_loader(5, batch_size=None, shuffle=True),
    "random collate": lambda: make_loader(20, shuffle=True, collate_fn=hide_tokens),
    "told the epoch": lambda: make_loader(20, sampler=EpochOrder(20)),
    "without a length": lambda: DataLoader(Stream(18), batch_size=4),
    "a list": lambda: list(make_loader(20)),
    "one's own": NumPyOrder,
    "one's own, with an end": CountsPasses,
    "a subclass": lambda: Doubled(Rows(12), batch_size=4, shuffle=True),
}


def plain(loader):
    """All batches of a few passes, as a ``for`` loop gives them, and the random numbers drawn in between."""
    batches = []
    for epoch in range(PASSES):
        loaders.tell_epoch(loader, epoch)
        for batch in loader:
            batches.append((epoch, batch, torch.rand(2)))
    return batches, rng.take(loaders.generators_of(loader))


def by_engine(loader):
    """The same through the engine's source, ending a pass as the loop does."""
    source, batches = engine.LoaderBatches(loader), []
    while source.epoch < PASSES:
        epoch = source.epoch
        try:
            batch = source.next_in_pass()
        except StopIteration:
            continue
        batches.append((epoch, batch, torch.rand(2)))
        if source.taken == source.size:
            source.end_pass()
    return batches, rng.take(loaders.generators_of(loader))


@pytest.mark.parametrize("name", LOADERS)
def test_passes_are_those_of_a_for_loop(name):
    results = []
    for read in (plain, by_engine):
        seed_all(3)
        results.append(read(LOADERS[name]()))
    assert len(results[0][0]) > PASSES
    assert equal(*results)


@pytest.mark.parametrize("name", LOADERS)
def test_next_forever_is_a_for_loop_without_passes(name):
    seed_all(3)
    expected = [batch for _, batch, _ in plain(LOADERS[name]())[0]]
    seed_all(3)
    source, batches = engine.LoaderBatches(LOADERS[name]()), []
    for _ in expected:
        batches.append(source.next_forever())
        torch.rand(2)
    assert equal(batches, expected)


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "one's own, with an end"])
def test_a_place_is_found_again(name, tmp_path):
    """After any number of batches; with another seed, and with random numbers drawn by others in between."""
    seed_all(3)
    expected = [batch for _, batch, _ in plain(LOADERS[name]())[0]]
    for taken in random.Random(name).sample(range(1, len(expected) - 1), 3):
        seed_all(3)
        source = engine.LoaderBatches(LOADERS[name]())
        for _ in range(taken):
            source.next_forever()
            torch.rand(2)
        torch.save((source.state_dict(), rng.take()), tmp_path / "place.pt")
        seed_all(99)
        found = engine.LoaderBatches(LOADERS[name]())
        place, state = torch.load(tmp_path / "place.pt", weights_only=True)
        found.load_state_dict(place)
        rng.put(state)
        assert (found.epoch, found.taken) == (source.epoch, source.taken)
        batches = []
        for _ in expected[taken:]:
            batches.append(found.next_forever())
            torch.rand(2)
        assert equal(batches, expected[taken:]), taken


def test_a_place_costs_no_rows():
    loader = make_loader(20, shuffle=True)
    source = engine.LoaderBatches(loader)
    for _ in range(3):
        source.next_in_pass()
    again = make_loader(20, shuffle=True)
    found = engine.LoaderBatches(again)
    found.load_state_dict(source.state_dict())
    assert again.dataset.reads == []
    found.next_in_pass()
    source.next_in_pass()
    assert again.dataset.reads == loader.dataset.reads[-4:]


def test_a_loader_that_lost_its_generator_is_refused():
    source = engine.LoaderBatches(make_loader(20, shuffle=True, generator=generator()))
    source.next_in_pass()
    with pytest.raises(ValueError):
        engine.LoaderBatches(make_loader(20, shuffle=True)).load_state_dict(source.state_dict())


class Told:
    """Notes the epochs it is told."""

    def __init__(self, rows):
        self.rows, self.epochs = rows, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(range(len(self.rows)))

    def __getitem__(self, number):
        return self.rows[number]


def test_all_parts_are_told_the_epoch_once():
    dataset, sampler = Told(Rows(8)), Told(Rows(8))
    batch_sampler = BatchSampler(sampler, 4, False)
    batch_sampler.set_epoch = (batch_epochs := []).append
    source = engine.LoaderBatches(DataLoader(dataset, batch_sampler=batch_sampler))
    for _ in range(5):
        source.next_forever()
    assert dataset.epochs == sampler.epochs == batch_epochs == [0, 1, 2]


@pytest.mark.parametrize("loader", [[], (batch for batch in ())])
def test_an_empty_loader_is_refused(loader):
    source = engine.LoaderBatches(loader, name="dataloaders['a']")
    for read in (source.next_in_pass, source.next_forever):
        with pytest.raises(ValueError, match=r"dataloaders\['a'\] yielded no batch in pass 1"):
            read()


def test_a_loader_that_is_used_up_is_refused():
    source = engine.LoaderBatches(batch for batch in range(2))
    assert [source.next_forever() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"no batch in pass 2.*iterable again"):
        source.next_forever()


def test_batches_are_postprocessed_once():
    source = engine.LoaderBatches([1, 2], lambda batch: batch + 10)
    assert [source.next_forever() for _ in range(5)] == [11, 12, 11, 12, 11]
    assert source.size == 2


def test_the_first_batch_is_read_without_a_trace():
    loader = make_loader(20, shuffle=True, generator=generator(), collate_fn=hide_tokens)
    expected = plain(loader)
    seed_all(0)
    loader = make_loader(20, shuffle=True, generator=generator(), collate_fn=hide_tokens)
    first = engine.first_batch(loader, lambda batch: {"rows": batch["labels"]})
    assert first.keys() == {"rows"}
    assert equal(plain(loader), expected)
    with pytest.raises(ValueError, match="read only once"):
        engine.first_batch(iter(loader))
    with pytest.raises(ValueError, match="it is empty"):
        engine.first_batch([])


# Tasks


def tasks(tau, sizes=None, picker=None):
    sources = {
        name: engine.LoaderBatches([f"{name}{number}" for number in range(size)]) for name, size in sizes.items()
    }
    return engine.TaskBatches(sources, tau, lambda task, batch: (task, batch), picker)


@pytest.mark.parametrize("tau", [0, 0.5, 1, 2])
def test_tasks_are_drawn_by_their_sizes(tau):
    sizes = {"a": 9, "b": 1, "c": 4}
    source = tasks(tau, sizes)
    seed_all(1)
    drawn = [source.next_forever()[0] for _ in range(3000)]
    total = sum(size**tau for size in sizes.values())
    for name, size in sizes.items():
        share = size**tau / total
        # Four standard errors of a share of 3000 draws.
        assert abs(drawn.count(name) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    seed_all(1)
    weights = [size**tau / total for size in sizes.values()]
    assert drawn == [np.random.choice(list(sizes), p=weights) for _ in range(3000)]


def test_an_unknown_size_makes_all_tasks_alike():
    assert task_weights([3, None, 5], 1) is None
    assert task_weights([3, 1], 1) == [0.75, 0.25]
    sources = {"a": engine.LoaderBatches(list(range(90))), "b": engine.LoaderBatches(DataLoader(Stream(4)))}
    source = engine.TaskBatches(sources, 1, lambda task, batch: task)
    share = [source.next_forever() for _ in range(1000)].count("a") / 1000
    assert abs(share - 0.5) < 4 * 0.5 / 1000**0.5


def test_every_tasks_batches_come_in_their_order():
    source = tasks(1, {"a": 3, "b": 2})
    drawn = [source.next_in_pass() for _ in range(40)]
    for name, size in (("a", 3), ("b", 2)):
        own = [batch for task, batch in drawn if task == name]
        assert own == [f"{name}{number % size}" for number in range(len(own))]


@pytest.mark.parametrize("picker", [None, np.random.RandomState])
def test_the_place_of_all_tasks_is_found_again(picker):
    def make():
        return tasks(1, {"a": 3, "b": 2}, picker() if picker else None)

    source = make()
    for _ in range(7):
        source.next_forever()
    place, state = source.state_dict(), rng.take()
    expected = [source.next_forever() for _ in range(30)]
    seed_all(50)
    found = make()
    found.load_state_dict(place)
    rng.put(state)
    assert [found.next_forever() for _ in range(30)] == expected


def test_rows_are_what_the_other_tests_take_them_for():
    rows = Rows(40, by_token=True)
    lengths = rows.attention_mask.sum(dim=1)
    assert lengths.min() >= 2
    assert len(lengths.unique()) > 3
    assert torch.equal(rows.labels != IGNORED, (rows.labels != IGNORED) & (rows.attention_mask == 1))
    assert (rows.labels[:, 0] != IGNORED).all()
