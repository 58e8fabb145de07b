"""Losses between embeddings and between scores of candidates: loops over rows."""

import math
import statistics

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import embed_distill_loss, margin_mse_loss

STUDENT, TEACHER = wave(5, 6), wave(5, 6, phase=1.0)
SCORES_S, SCORES_T = wave(5, 4), wave(5, 4, phase=1.0)
ROWS = torch.tensor([1, 0, 1, 1, 0])


def distance(kind, s, t):
    if kind == "mse":
        return statistics.fmean((x - y) ** 2 for x, y in zip(s, t, strict=True))
    if kind == "l2":
        return math.dist(s, t)
    return 1 - sum(x * y for x, y in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t)


@pytest.mark.parametrize("kind", ["mse", "l2", "cosine"])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_embeddings_row_by_row(kind, rows):
    kept = range(5) if rows is None else [0, 2, 3]
    expected = statistics.fmean(distance(kind, STUDENT[b].tolist(), TEACHER[b].tolist()) for b in kept)
    mask = None if rows is None else rows[:, None] * torch.ones(1, 3)
    assert embed_distill_loss(STUDENT, TEACHER, mask, kind).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["mse", "l2", "cosine"])
def test_states_are_averaged_over_their_positions_first(kind):
    student, teacher = wave(3, 4, 6), wave(3, 4, 6, phase=1.0)
    means = []
    for states in (student, teacher):
        means.append([states[b, : int(MASK[b].sum())].mean(dim=0).tolist() for b in range(3)])
    expected = statistics.fmean(distance(kind, s, t) for s, t in zip(*means, strict=True))
    assert embed_distill_loss(student, teacher, MASK, kind).item() == pytest.approx(expected, rel=1e-10)
    mixed = embed_distill_loss(student, torch.tensor(means[1], dtype=torch.float64), MASK, kind)
    assert mixed.item() == pytest.approx(expected, rel=1e-10)


def test_the_default_is_mse():
    assert embed_distill_loss(STUDENT, TEACHER).item() == embed_distill_loss(STUDENT, TEACHER, None, "mse").item()


def test_embeddings_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"distance must be one of .*got 'l1'"):
        embed_distill_loss(STUDENT, TEACHER, None, "l1")
    with pytest.raises(ValueError, match=r"'proj': \['linear', 6, 8\]"):
        embed_distill_loss(STUDENT, wave(5, 8))


@pytest.mark.parametrize("mask", [None, ROWS])
@pytest.mark.parametrize("temperature", [1.0, 2.0, torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0])])
def test_margins_of_the_first_candidate(mask, temperature):
    taus = temperature.tolist() if isinstance(temperature, torch.Tensor) else [temperature] * 5
    gaps = []
    for b in range(5):
        if mask is not None and not mask[b]:
            continue
        s, t = SCORES_S[b].tolist(), SCORES_T[b].tolist()
        gaps += [(((s[0] - s[c]) - (t[0] - t[c])) / taus[b]) ** 2 for c in (1, 2, 3)]
    found = margin_mse_loss(SCORES_S, SCORES_T, temperature, mask)
    assert found.item() == pytest.approx(statistics.fmean(gaps), rel=1e-10)


def test_the_height_of_the_scores_does_not_matter():
    shifted = margin_mse_loss(SCORES_S + wave(5, 1), SCORES_T - 3)
    assert shifted.item() == pytest.approx(margin_mse_loss(SCORES_S, SCORES_T).item(), rel=1e-10)
    assert margin_mse_loss(SCORES_T + 7, SCORES_T).item() == pytest.approx(0.0, abs=1e-20)


def test_candidates_that_are_not_there_do_not_count():
    student, teacher = SCORES_S[:1].clone(), SCORES_T[:1].clone()
    expected = margin_mse_loss(student[:, :3], teacher[:, :3]).item()
    student[0, 3] = -math.inf
    teacher[0, 3] = -math.inf
    assert margin_mse_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_a_single_candidate_has_no_margin():
    with pytest.raises(ValueError, match=r"at least two candidates for 'margin_mse', got \(5, 1\)"):
        margin_mse_loss(SCORES_S[:, :1], SCORES_T[:, :1])
