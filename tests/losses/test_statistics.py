"""Losses between statistics of states: loops over positions and channels."""

import math
import statistics

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import at_loss, layer_norm_mse_loss, state_mean_loss, state_variance_loss

STUDENT, TEACHER, WIDE = wave(3, 4, 6), wave(3, 4, 6, phase=1.0), wave(3, 4, 8, phase=1.0)
masks = pytest.mark.parametrize("mask", [None, MASK, 0.5 + wave(3, 4).abs()], ids=["none", "mask", "weights"])


def places(mask):
    """Row, position and weight of each kept position."""
    weights = torch.ones(3, 4) if mask is None else mask
    return [(b, n, weights[b, n].item()) for b in range(3) for n in range(4) if weights[b, n]]


def mean_over(values, mask):
    kept = places(mask)
    return sum(w * values(b, n) for b, n, w in kept) / sum(w for _, _, w in kept)


@masks
@pytest.mark.parametrize("teacher", [TEACHER, WIDE], ids=["same width", "wider"])
def test_attention_transfer_is_the_loop(teacher, mask):
    def energy(states, b, n):
        return sum(x * x for x in states[b, n].tolist())

    def part(states, b, n):
        row = [energy(states, b, k) for c, k, _ in places(mask) if c == b]
        return energy(states, b, n) / math.sqrt(sum(x * x for x in row))

    expected = mean_over(lambda b, n: (part(STUDENT, b, n) - part(teacher, b, n)) ** 2, mask)
    assert at_loss(STUDENT, teacher, mask).item() == pytest.approx(expected, rel=1e-10)


def test_attention_transfer_does_not_change_with_scale_and_rotation():
    turn = torch.linalg.qr(wave(6, 6))[0]
    expected = at_loss(STUDENT, TEACHER, MASK).item()
    assert at_loss(7 * STUDENT @ turn, 0.1 * TEACHER, MASK).item() == pytest.approx(expected, rel=1e-10)


def test_attention_transfer_of_large_states_does_not_overflow():
    big = at_loss(1e12 * STUDENT.float(), 1e12 * TEACHER.float(), MASK)
    assert big.item() == pytest.approx(at_loss(STUDENT, TEACHER, MASK).item(), rel=1e-5)


@masks
def test_normalised_states_are_compared_channel_by_channel(mask):
    def normal(states, b, n):
        values = states[b, n].tolist()
        return [(x - statistics.fmean(values)) / statistics.pstdev(values) for x in values]

    def gap(b, n):
        pairs = zip(normal(STUDENT, b, n), normal(TEACHER, b, n), strict=True)
        return statistics.fmean((s - t) ** 2 for s, t in pairs)

    assert layer_norm_mse_loss(STUDENT, TEACHER, mask).item() == pytest.approx(mean_over(gap, mask), rel=1e-9)
    assert layer_norm_mse_loss(3 * TEACHER + 2, TEACHER, mask).item() == pytest.approx(0.0, abs=1e-20)


@masks
@pytest.mark.parametrize("teacher", [TEACHER, WIDE], ids=["same width", "wider"])
def test_means_and_variances(teacher, mask):
    def gap(statistic, b, n):
        return statistic(STUDENT[b, n].tolist()) - statistic(teacher[b, n].tolist())

    expected = mean_over(lambda b, n: gap(statistics.fmean, b, n) ** 2, mask)
    assert state_mean_loss(STUDENT, teacher, mask).item() == pytest.approx(expected, rel=1e-10)
    expected = mean_over(lambda b, n: abs(gap(statistics.pvariance, b, n)), mask)
    assert state_variance_loss(STUDENT, teacher, mask).item() == pytest.approx(expected, rel=1e-10)


def test_what_normalising_takes_away_is_what_means_and_variances_see():
    """The teacher doubled and shifted: the first loss is blind to it, the others tell by how much."""
    student = 2 * TEACHER + 3
    assert layer_norm_mse_loss(student, TEACHER).item() == pytest.approx(0.0, abs=1e-20)
    means, variances = TEACHER.mean(dim=-1), TEACHER.var(dim=-1, correction=0)
    assert state_mean_loss(student, TEACHER).item() == pytest.approx((means + 3).square().mean().item())
    assert state_variance_loss(student, TEACHER).item() == pytest.approx((3 * variances).mean().item())


@pytest.mark.parametrize("loss", [at_loss, state_mean_loss, state_variance_loss])
def test_other_positions_are_refused(loss):
    with pytest.raises(ValueError, match=r"the same batch and length, got \(3, 4, 6\) and \(3, 3, 6\).*same tokens"):
        loss(STUDENT, TEACHER[:, :3])


def test_other_widths_are_refused_with_the_projection_to_name():
    with pytest.raises(ValueError, match=r"'proj': \['linear', 6, 8\]"):
        layer_norm_mse_loss(STUDENT, WIDE)


def test_attention_transfer_needs_states():
    with pytest.raises(ValueError, match=r"must have the shape \(batch, length, width\), got \(3,\)"):
        at_loss(torch.zeros(3), torch.zeros(3))
