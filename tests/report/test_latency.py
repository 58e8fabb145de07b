import itertools
import time

import pytest
import torch

from textbrewer.report.latency import limited_threads, quartiles, time_in_turns


def recorder(name, calls):
    return lambda batch: calls.append((name, batch))


@pytest.mark.parametrize(("rounds", "warmup"), [(1, 0), (4, 0), (5, 2), (7, 3)])
def test_models_take_turns_on_the_same_batches(rounds, warmup):
    calls, names, batches = [], ["a", "b", "c"], ["x", "y"]
    found = time_in_turns({name: (recorder(name, calls), batches) for name in names}, rounds, warmup)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(names, rounds)
    groups = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(groups) == rounds + warmup
    for group in groups:
        assert sorted(name for name, _ in group) == names  # each once a round
        assert len({batch for _, batch in group}) == 1
    if rounds >= 3:
        assert {group[0][0] for group in groups} == set(names)  # each begins
        assert {batch for _, batch in calls} == {"x", "y"}


def test_seconds_are_those_of_the_clock_without_warm_up():
    ticks = itertools.accumulate(itertools.count(), initial=0)  # each span is longer by 2 than the one before
    clock = lambda: float(next(ticks))  # noqa: E731
    found = time_in_turns({"a": (lambda batch: None, [0])}, rounds=3, warmup=0, clock=clock)
    assert found == {"a": [0.0, 2.0, 4.0]}


def test_what_costs_ten_times_takes_longer():
    found = time_in_turns({"slow": (lambda _: time.sleep(0.06), [0]), "fast": (lambda _: time.sleep(0.001), [0])}, 5, 1)
    assert sorted(found["fast"])[2] * 3 < sorted(found["slow"])[2]
    assert min(found["slow"]) >= 0.06


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 2.0, 3.0, 4.0, 5.0], (2, 3, 4)), ([10.0, 0.0], (2.5, 5, 7.5))],
)
def test_quartiles(values, expected):
    assert quartiles(values) == pytest.approx(expected)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with limited_threads(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with limited_threads(None) as used:
        assert used == before
