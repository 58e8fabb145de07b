"""Annealing-KD's first phase: against a loop, its steps, and "mse" at the end."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import annealing_loss, kd_mse_loss

TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4


def share_of(progress, maximum):
    """The formula of the paper, with the temperature counted down: ``maximum`` phases of equal length."""
    temperature = maximum
    for phase in range(1, maximum):
        if progress >= phase / maximum:
            temperature = maximum - phase
    return 1 - (temperature - 1) / maximum


@pytest.mark.parametrize(("progress", "maximum"), [(0.0, 10), (0.31, 10), (0.5, 4), (0.99, 7), (1.0, 7), (0.4, 1)])
@pytest.mark.parametrize(
    ("shape", "tau", "mask"), [((3, 5), 1.0, None), ((3, 4, 5), TAU_3D, MASK), ((3, 4, 5), 2, MASK)]
)
def test_is_the_loop_over_positions_and_classes(shape, tau, mask, progress, maximum):
    student, teacher = wave(*shape), wave(*shape, phase=1.0)
    share = share_of(progress, maximum)
    taus = torch.as_tensor(tau, dtype=torch.float64).expand(shape[:-1]).flatten().tolist()
    kept = [True] * len(taus) if mask is None else mask.bool().flatten().tolist()
    rows = zip(student.reshape(-1, 5).tolist(), teacher.reshape(-1, 5).tolist(), taus, kept, strict=True)
    losses = [
        sum(((s - share * t) / tau) ** 2 for s, t in zip(row_S, row_T, strict=True)) / 5
        for row_S, row_T, tau, keep in rows
        if keep
    ]
    actual = annealing_loss(student, teacher, tau, mask, progress=progress, max_temperature=maximum).item()
    assert actual == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_each_temperature_has_an_equal_part_of_the_training():
    steps, maximum = 700, 7
    student, teacher = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    shares = [
        round(annealing_loss(student, teacher, progress=step / steps, max_temperature=maximum).item() ** 0.5 * maximum)
        for step in range(steps)
    ]
    assert shares == sorted(shares)
    assert [shares.count(share) for share in range(1, maximum + 1)] == [100] * 7


@pytest.mark.parametrize("progress", [0.9, 1.0, 1.2])
def test_ends_as_the_squared_error(progress):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    expected = kd_mse_loss(student, teacher, 2.0, MASK).item()
    assert annealing_loss(student, teacher, 2.0, MASK, progress=progress).item() == expected


def test_gradient_is_the_closed_form_and_vanishes_at_the_share_of_the_teacher():
    student, teacher = wave(3, 5).requires_grad_(), wave(3, 5, phase=1.0)
    annealing_loss(student, teacher, 2.0, progress=0.5, max_temperature=4).backward()
    expected = [
        [2 * (s - 0.75 * t) / 4 / 15 for s, t in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert torch.allclose(student.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    there = (0.75 * teacher).requires_grad_()
    annealing_loss(there, teacher, progress=0.5, max_temperature=4).backward()
    assert there.grad.abs().max().item() == 0.0


def test_a_class_that_one_model_lacks_is_left_out():
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    expected = annealing_loss(student, teacher, progress=0.3).item()
    absent, there = (torch.full((3, 1), value, dtype=torch.float64) for value in (-math.inf, 1.0))
    for extra in ((absent, absent), (absent, there), (there, absent)):
        wide = [torch.cat([x, y], -1) for x, y in zip((student, teacher), extra, strict=True)]
        assert annealing_loss(*wide, progress=0.3).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"max_temperature": 0}, "max_temperature must be at least 1, got 0"),
        ({"max_temperature": 2.5}, "max_temperature must be a whole number, got 2.5"),
        ({"progress": -0.1}, "progress must be at least 0"),
        ({"progress": math.nan}, "progress must be finite"),
        ({"temperature": -1}, "temperature must be greater than 0"),
    ],
)
def test_constants_are_checked(constants, message):
    with pytest.raises(ValueError, match=message):
        annealing_loss(wave(3, 5), wave(3, 5), **constants)
