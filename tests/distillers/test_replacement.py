"""Which blocks make a group, the replacing rate, and what is drawn."""

import itertools
import random

import pytest
import torch
from scipy import stats

from textbrewer.distillers.replacement import Rate, draw, grouped


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (12, 6, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (4, 1, [[0, 1, 2, 3]]),
        (3, 3, [[0], [1], [2]]),
    ],
)
def test_groups(total, count, expected):
    assert [list(group) for group in grouped(total, count)] == expected


def test_groups_hold_every_block_once_in_order_and_differ_by_one_at_most():
    for total in range(1, 14):
        for count in range(1, total + 1):
            groups = grouped(total, count)
            assert list(itertools.chain(*groups)) == list(range(total))
            assert len(groups) == count
            sizes = {len(group) for group in groups}
            assert max(sizes) - min(sizes) <= (total % count != 0)


# ---- the rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"step": 0.0006}, 0, 0.3),
        ({"step": 0.0006}, 500, 0.6),
        ({"step": 0.0006}, 1166, 0.9996),
        ({"step": 0.0006}, 1167, 1),
        ({"step": 0.1, "base": 0}, 3, 0.3),
        ({}, 0, 0.3),
        ({}, 350, 0.65),  # half of the way to 700 of 1,000 steps
        ({}, 700, 1),
        ({}, 999, 1),
        ({"base": 0.5, "full_at": 1}, 500, 0.75),
        ({"base": 0.1, "full_at": 0.25}, 125, 0.55),
        ({"base": 0.1, "full_at": 0.25}, 250, 1),
        ({"schedule": "constant"}, 0, 0.5),
        ({"schedule": "constant"}, 999, 0.5),
        ({"schedule": "constant", "base": 0.7}, 999, 0.7),
    ],
)
def test_rate(settings, step, expected):
    assert Rate(**settings).at(step, 1000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", [{}, {"base": 0.9, "full_at": 0.31}, {"step": 0.003}, {"base": 0.123}])
def test_a_linear_rate_grows_to_exactly_one(settings):
    rates = [Rate(**settings).at(step, 997) for step in range(997)]
    assert all(first <= second for first, second in itertools.pairwise(rates))
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[-1] == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": "cosine"}, ValueError, "schedule must be one of the known names, got 'cosine'"),
        ({"base": 1.5}, ValueError, "base_rate must be at most 1"),
        ({"base": -0.1}, ValueError, "base_rate must be at least 0"),
        ({"base": "high"}, TypeError, "base_rate must be a number"),
        ({"schedule": "constant", "base": 0}, ValueError, "no block would ever be trained"),
        ({"schedule": "constant", "step": 0.1}, ValueError, "rate_step must be None with schedule='constant'"),
        ({"schedule": "constant", "full_at": 0.1}, ValueError, "full_at must be None with schedule='constant'"),
        ({"step": 0.1, "full_at": 0.5}, ValueError, "rate_step and full_at exclude each other"),
        ({"step": 0}, ValueError, "rate_step must be greater than 0"),
        ({"full_at": 0}, ValueError, "full_at must be greater than 0"),
        ({"full_at": 1.1}, ValueError, "full_at must be at most 1"),
    ],
)
def test_rates_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        Rate(**settings)


# ---- draws -------------------------------------------------------------------------------------------------------

STEPS, COUNT = 4000, 3


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.85])
def test_successors_are_drawn_as_often_as_the_rate_says(rate):
    """Each module, every pair of modules, and a module in two steps that follow each other.

    Within what a binomial distribution leaves out once in a million.
    """
    draws = [draw(7, step, 0, rate, COUNT) for step in range(STEPS)]
    events = [(rate, [item[place] for item in draws]) for place in range(COUNT)]
    for first, second in itertools.combinations(range(COUNT), 2):
        events.append((rate**2, [item[first] and item[second] for item in draws]))
    events.append((rate**2, [one[0] and other[0] for one, other in zip(draws[::2], draws[1::2], strict=True)]))
    for probability, happened in events:
        low, high = stats.binom.interval(1 - 1e-6, len(happened), probability)
        assert low <= sum(happened) <= high


def test_at_the_ends_nothing_is_left_to_chance():
    for step in range(200):
        assert draw(0, step, 0, 1.0, COUNT) == (True,) * COUNT
        assert draw(0, step, 0, 0.0, COUNT) == (False,) * COUNT


def test_a_draw_follows_from_its_arguments_and_from_all_of_them():
    def sequence(seed=0, first=0, micro_batch=0):
        return [draw(seed, first + step, micro_batch, 0.5, COUNT) for step in range(50)]

    before = random.getstate(), torch.get_rng_state()
    expected = sequence()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(5)
    torch.manual_seed(5)
    assert sequence() == expected
    assert sequence(first=1)[:-1] == expected[1:]
    assert all(other != expected for other in (sequence(seed=1), sequence(first=1), sequence(micro_batch=1)))


def test_a_higher_rate_only_adds_successors():
    for step in range(100):
        low, high = (draw(3, step, 0, rate, 5) for rate in (0.4, 0.6))
        assert all(more for less, more in zip(low, high, strict=True) if less)
