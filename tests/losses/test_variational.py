"""The Gaussian likelihood of the teacher's states: torch's own, loops, and the variance that is best."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import vid_loss
from textbrewer.registry import PROJ_MAP

MEAN, VARIANCE, TEACHER = wave(3, 4, 6), wave(3, 4, 6, phase=2.0).abs() + 0.1, wave(3, 4, 6, phase=1.0)
STUDENT = torch.cat([MEAN, VARIANCE], dim=-1)


@pytest.mark.parametrize("mask", [None, MASK, 0.5 + wave(3, 4).abs()], ids=["none", "mask", "weights"])
def test_is_the_loop_over_channels(mask):
    weights = torch.ones(3, 4) if mask is None else mask
    total = 0.0
    for b in range(3):
        for n in range(4):
            for m, v, t in zip(MEAN[b, n].tolist(), VARIANCE[b, n].tolist(), TEACHER[b, n].tolist(), strict=True):
                total += weights[b, n].item() * ((m - t) ** 2 / v + math.log(v)) / 2
    expected = total / (6 * weights.sum().item())
    assert vid_loss(STUDENT, TEACHER, mask).item() == pytest.approx(expected, rel=1e-10)


def test_is_the_likelihood_less_its_constant():
    likelihood = torch.distributions.Normal(MEAN, VARIANCE.sqrt()).log_prob(TEACHER).mean()
    expected = -likelihood.item() - math.log(2 * math.pi) / 2
    assert vid_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-10)
    assert vid_loss(STUDENT[:, 0], TEACHER[:, 0], MASK[:, 0]).item() == pytest.approx(
        vid_loss(STUDENT[:, :1], TEACHER[:, :1], MASK[:, :1]).item()
    )


def test_the_best_variance_is_the_mean_squared_error():
    gap = (MEAN - TEACHER).square().mean(dim=(0, 1))

    def value(variance):
        return vid_loss(torch.cat([MEAN, variance.expand_as(MEAN)], dim=-1), TEACHER)

    variance = gap.clone().requires_grad_()
    value(variance).backward()
    assert variance.grad.abs().max().item() < 1e-12
    assert value(gap).item() < min(value(0.9 * gap).item(), value(1.1 * gap).item())


def test_gradient_of_the_mean_is_the_error_over_the_variance():
    student = STUDENT.clone().requires_grad_()
    vid_loss(student, TEACHER).backward()
    torch.testing.assert_close(student.grad[..., :6], (MEAN - TEACHER) / VARIANCE / TEACHER.numel())


def test_with_its_projection_it_learns_mean_and_variance():
    """A teacher that is the student's state plus noise of one deviation a channel."""
    torch.manual_seed(0)
    projection, deviation = PROJ_MAP["gaussian"](4, 3), torch.tensor([0.5, 1.0, 2.0])
    states = torch.randn(4000, 4)
    teacher = states[:, :3] + deviation * torch.randn(4000, 3)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        vid_loss(projection(states), teacher).backward()
        optimizer.step()
    found = projection(states[:1])[0, 3:].detach()
    torch.testing.assert_close(found, deviation.square(), rtol=0.06, atol=0)
    torch.testing.assert_close(projection.mean.weight.detach(), torch.eye(3, 4), rtol=0, atol=0.15)


@pytest.mark.parametrize("student", [MEAN, STUDENT[..., :11], STUDENT[:, :3]])
def test_what_is_not_twice_as_wide_is_refused(student):
    with pytest.raises(ValueError, match=r"twice the teacher's width, got .*'gaussian'"):
        vid_loss(student, TEACHER)
