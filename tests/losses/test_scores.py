"""Squared error between attention scores, against loops over heads and pairs of positions."""

import math

import pytest
import torch

from textbrewer.losses import scores_mse_loss

MASKS = {"none": None, "right": [[1, 1, 1, 1], [1, 1, 0, 0]], "left": [[0, 1, 1, 1], [1, 1, 1, 1]]}


def scores():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_is_the_loop_over_the_pairs(name, causal):
    student, teacher = scores()
    mask = None if MASKS[name] is None else torch.tensor(MASKS[name])
    kept = torch.ones(2, 4) if mask is None else mask
    total, pairs = 0.0, 0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                if not (kept[b, i] and kept[b, j]):
                    continue
                pairs += 3
                if j <= i or not causal:
                    total += sum(float(student[b, h, i, j] - teacher[b, h, i, j]) ** 2 for h in range(3))
    assert float(scores_mse_loss(student, teacher, mask, causal=causal)) == pytest.approx(total / pairs, rel=1e-12)


@pytest.mark.parametrize("worst", [math.nan, -math.inf, torch.finfo(torch.float64).min])
def test_later_keys_never_matter(worst):
    student, teacher = scores()
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    spoilt = [item.masked_fill(later, worst) for item in (student, teacher)]
    spoilt[0].requires_grad_()
    loss = scores_mse_loss(*spoilt, causal=True)
    loss.backward()
    assert loss.item() == scores_mse_loss(student, teacher, causal=True).item()
    assert torch.isfinite(spoilt[0].grad).all()
    assert not spoilt[0].grad[..., later].any()
