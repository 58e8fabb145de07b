"""Losses between similarities of rows: loops over pairs and triples, and what they do not change with."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import cka_loss, linear_cka, rkd_angle_loss, rkd_distance_loss, sp_loss

ROWS = 5
# Rows that are not alike, also on average over their positions.
STUDENT = wave(ROWS, 4, 6) + 2 * wave(ROWS, 1, 6, phase=4.0)
TEACHER = wave(ROWS, 4, 8, phase=1.0) + 2 * wave(ROWS, 1, 8, phase=5.0)
LENGTHS = torch.cat([MASK, torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])])
MASKS = [None, LENGTHS, LENGTHS * torch.tensor([[1], [0], [1], [1], [1]]), 0.5 + wave(ROWS, 4).abs()]
LOSSES = [sp_loss, rkd_distance_loss, rkd_angle_loss, cka_loss]
masks = pytest.mark.parametrize("mask", MASKS, ids=["none", "mask", "a row less", "weights"])


def weights_of(mask):
    return torch.ones(ROWS, 4).tolist() if mask is None else mask.tolist()


def kept_rows(mask):
    return [b for b, weights in enumerate(weights_of(mask)) if any(weights)]


def means(states, mask):
    """The weighted mean of each kept row, as lists."""
    result = []
    for b in kept_rows(mask):
        weights = weights_of(mask)[b]
        total = [0.0] * states.shape[2]
        for n, w in enumerate(weights):
            total = [t + w * x for t, x in zip(total, states[b, n].tolist(), strict=True)]
        result.append([t / sum(weights) for t in total])
    return result


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def loop_sp(student, teacher, mask):
    weights, rows = weights_of(mask), kept_rows(mask)
    normal = []
    for states in (student, teacher):
        gram = [
            [
                sum(weights[b][n] * weights[c][n] * dot(states[b, n].tolist(), states[c, n].tolist()) for n in range(4))
                for c in rows
            ]
            for b in rows
        ]
        normal.append([[g / math.sqrt(dot(row, row)) for g in row] for row in gram])
    gaps = [(s - t) ** 2 for row_S, row_T in zip(*normal, strict=True) for s, t in zip(row_S, row_T, strict=True)]
    return sum(gaps) / len(rows) ** 2


def loop_distance(student, teacher, mask):
    relative = []
    for states in (student, teacher):
        vectors = means(states, mask)
        distances = [math.dist(a, b) for a in vectors for b in vectors]
        positive = [d for d in distances if d > 0]
        relative.append([d / (sum(positive) / len(positive)) for d in distances])
    return sum(huber(s - t) for s, t in zip(*relative, strict=True)) / len(relative[0])


def loop_angle(student, teacher, mask):
    cosines = []
    for states in (student, teacher):
        vectors, found = means(states, mask), []
        for j in vectors:
            for i in vectors:
                for k in vectors:
                    a, b = minus(i, j), minus(k, j)
                    lengths = math.sqrt(dot(a, a) * dot(b, b))
                    found.append(dot(a, b) / lengths if lengths else 0.0)
        cosines.append(found)
    return sum(huber(s - t) for s, t in zip(*cosines, strict=True)) / len(cosines[0])


def loop_cka(student, teacher, mask):
    """By the kernels of the items, the other way to write it: tr(K L) / sqrt(tr(K K) tr(L L)), with weights."""
    weights = [w for row in weights_of(mask) for w in row]
    kernels = []
    for states in (student, teacher):
        items = states.flatten(0, 1).tolist()
        centre = [math.fsum(w * x for w, x in zip(weights, axis, strict=True)) / sum(weights) for axis in zip(*items)]
        moved = [minus(item, centre) for item in items]
        kernels.append(
            [
                [math.sqrt(v * w) * dot(a, b) for b, w in zip(moved, weights, strict=True)]
                for a, v in zip(moved, weights, strict=True)
            ]
        )

    def inner(one, other):
        return math.fsum(dot(a, b) for a, b in zip(one, other, strict=True))

    k, l = kernels  # noqa: E741
    return 1 - inner(k, l) / math.sqrt(inner(k, k) * inner(l, l))


LOOPS = {sp_loss: loop_sp, rkd_distance_loss: loop_distance, rkd_angle_loss: loop_angle, cka_loss: loop_cka}


@masks
@pytest.mark.parametrize("loss", LOSSES)
def test_is_the_loop(loss, mask):
    expected = LOOPS[loss](STUDENT, TEACHER, mask)
    assert expected > 1e-3
    assert loss(STUDENT, TEACHER, mask).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_vectors_instead_of_positions(loss):
    student, teacher = STUDENT[:, :1], TEACHER[:, :1]
    expected = LOOPS[loss](student.expand(-1, 4, -1), teacher.expand(-1, 4, -1), None)
    assert loss(student[:, 0], teacher[:, 0]).item() == pytest.approx(expected, rel=1e-10)
    # A masked row is not there.
    kept, padded = torch.ones(ROWS, 4), torch.cat([student[:, 0], torch.full((1, 6), math.nan, dtype=torch.float64)])
    mask = torch.cat([kept, torch.zeros(1, 4)])
    other = torch.cat([teacher[:, 0], torch.full((1, 8), math.nan, dtype=torch.float64)])
    assert loss(padded, other, mask).item() == pytest.approx(expected, rel=1e-10)


def rotation(width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


@masks
@pytest.mark.parametrize("loss", LOSSES)
def test_rotation_and_scale_of_a_side_change_nothing(loss, mask):
    expected = loss(STUDENT, TEACHER, mask).item()
    turned = loss(3 * STUDENT @ rotation(6, 0), 0.1 * TEACHER @ rotation(8, 1), mask)
    assert turned.item() == pytest.approx(expected, rel=1e-9)


@masks
@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss, cka_loss])
def test_a_shift_of_a_side_changes_nothing(loss, mask):
    shift = wave(6, phase=3.0)
    expected = loss(STUDENT, TEACHER, mask).item()
    assert loss(STUDENT + shift, TEACHER, mask).item() == pytest.approx(expected, rel=1e-9)


@masks
@pytest.mark.parametrize("loss", LOSSES)
def test_a_rotated_and_scaled_teacher_is_matched_perfectly(loss, mask):
    assert loss(2 * TEACHER @ rotation(8, 2), TEACHER, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert loss(TEACHER.square(), TEACHER, mask).item() > 1e-3


def test_linear_cka_of_other_widths_and_of_itself():
    x, y = wave(20, 3), wave(20, 7, phase=2.0)
    assert linear_cka(x, x).item() == pytest.approx(1.0)
    assert linear_cka(x, y).item() == pytest.approx(linear_cka(y, x).item())
    assert 0 < linear_cka(x, y).item() < 1
    centred = x - x.mean(dim=0)
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(20, 1, dtype=torch.float64), centred], 1), mode="complete")[0]
    assert linear_cka(x, orthogonal[:, 4:8]).item() == pytest.approx(0.0, abs=1e-12)


def test_states_that_are_all_the_same_are_like_nothing():
    same = torch.ones(ROWS, 4, 6, dtype=torch.float64, requires_grad=True)
    loss = cka_loss(same, TEACHER)
    loss.backward()
    assert loss.item() == 1.0
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("loss", [sp_loss, rkd_distance_loss, rkd_angle_loss])
def test_one_row_has_nothing_to_be_compared_with(loss):
    student = STUDENT[:1].clone().requires_grad_()
    value = loss(student, TEACHER[:1])
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_equal_rows_have_a_finite_gradient(loss):
    student = torch.stack([STUDENT[0], *STUDENT[:4]]).requires_grad_()
    loss(student, TEACHER).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max().item() > 0


def test_states_of_other_positions_are_refused():
    with pytest.raises(ValueError, match=r"must have the same batch and length, got \(5, 4, 6\) and \(5, 3, 8\)"):
        cka_loss(STUDENT, TEACHER[:, :3])
