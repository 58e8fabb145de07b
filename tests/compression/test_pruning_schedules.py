"""Schedules against values worked out by hand, and against the recurrences that they come from."""

import itertools
import math

import pytest

from textbrewer.compression.pruning_schedules import PruningSchedule, pruning_due, sparsity_at, step_of


# TF-MOT, PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.9, begin_step=1000, end_step=2000), with its usual
# power of 3: final + (initial - final) * (1 - p) ** 3.
@pytest.mark.parametrize(
    ("step", "expected"),
    [(999, 0.0), (1000, 0.5), (1250, 0.73125), (1500, 0.85), (1750, 0.89375), (2000, 0.9), (5000, 0.9)],
)
def test_cubic_is_the_polynomial_decay(step, expected):
    assert sparsity_at("cubic", step, 1000, 2000, 0.5, 0.9) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("power", "expected"), [(1, 0.4), (2, 0.6), (3, 0.7), (0.5, 0.8 * (1 - math.sqrt(0.5)))])
def test_other_powers(power, expected):
    assert sparsity_at("cubic", 0.3, 0.0, 0.6, 0.0, 0.8, power) == pytest.approx(expected)


def test_linear_grows_by_the_same_amount():
    values = [sparsity_at("linear", step, 10, 20, 0.2, 0.7) for step in range(10, 21)]
    assert [after - before for before, after in itertools.pairwise(values)] == pytest.approx([0.05] * 10)
    assert (values[0], values[-1]) == (0.2, 0.7)


def test_cubic_falls_off_as_its_derivative_says():
    """ds/dt = 3 (s_f - s_i) (1 - p)^2 / (t_1 - t_0), by Euler's method."""
    share, pieces = 0.1, 20000
    for number in range(pieces):
        share += 3 * (0.8 - 0.1) * (1 - number / pieces) ** 2 / pieces
        if number + 1 == pieces // 3:
            assert sparsity_at("cubic", number + 1, 0, pieces, 0.1, 0.8) == pytest.approx(share, abs=1e-4)
    assert share == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cubic", "one_shot"])
def test_the_end_is_exact_and_nothing_comes_back(schedule):
    values = [sparsity_at(schedule, step, 3, 17, 0.0, 0.7) for step in range(30)]
    assert values[:3] == [0.0] * 3
    assert values[17:] == [0.7] * 13
    assert values == sorted(values)


def test_one_shot_and_no_time_between():
    assert [sparsity_at("one_shot", step, 3, 9, 0.0, 0.7) for step in (2, 3, 4)] == [0.0, 0.7, 0.7]
    assert [sparsity_at("linear", step, 3, 3, 0.1, 0.7) for step in (2, 3)] == [0.0, 0.7]


def test_turns():
    assert [step for step in range(40) if pruning_due(step, 5, 22, 6)] == [5, 11, 17, 22]
    assert [step for step in range(40) if pruning_due(step, 0, 0, 6)] == [0]


@pytest.mark.parametrize(
    ("moment", "total", "expected"), [(0.0, None, 0), (0.25, 10, 2), (1.0, 7, 7), (1, 7, 1), (5, None, 5)]
)
def test_moments(moment, total, expected):
    assert step_of(moment, total, "end") == expected


def test_steps_of_a_run():
    assert PruningSchedule("cubic", 0.1, 0.6).steps(200) == (20, 120)
    assert PruningSchedule("linear", 7, 0.5).steps(30) == (7, 15)
    assert PruningSchedule("one_shot", 0.5).steps(30) == (15, 15)


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        ({"begin": 0.1}, None, r"begin must be a number of steps \(an int\) where the dataloader has no length"),
        ({"end": 31}, 30, "end must be at most the 30 steps of the run, got 31"),
        ({"begin": 20, "end": 0.5}, 30, "end must be at least begin, got 0.5 and 20: steps 15 and 20"),
    ],
)
def test_moments_that_do_not_fit_the_run(settings, total, message):
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**settings).steps(total)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": "cubics"}, ValueError, "did you mean 'cubic'"),
        ({"name": 3}, TypeError, "schedule must be a name"),
        ({"begin": -1}, ValueError, "begin must be at least 0"),
        ({"end": 1.5}, ValueError, "end must be a share of the run from 0.0 to 1.0, or an int"),
        ({"begin": 0.7}, ValueError, "end must be at least begin=0.7, got 0.6"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 0.5}, TypeError, "every must be a whole number"),
        ({"initial": 1.0}, ValueError, "initial must be less than 1"),
        ({"power": 0}, ValueError, "power must be greater than 0"),
        ({"name": "linear", "power": 2}, ValueError, "power must be left at 3 for schedule='linear'"),
        ({"name": "one_shot", "initial": 0.1}, ValueError, "initial must be left at 0 for schedule='one_shot'"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        PruningSchedule(**settings)
