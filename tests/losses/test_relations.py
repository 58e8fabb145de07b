"""Losses between relations: against loops over positions and channels, and TextBrewer's numbers."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import fsp_loss, mmd_loss

STUDENT = [wave(3, 4, 6), wave(3, 4, 6, phase=2.0)]
TEACHER = [wave(3, 4, 6, phase=1.0), wave(3, 4, 6, phase=3.0)]
WIDE_TEACHER = [wave(3, 4, 8, phase=1.0), wave(3, 4, 8, phase=3.0)]


def loop_fsp(student, teacher, mask):
    rows = []
    for b in range(3):
        weights = [1.0] * 4 if mask is None else mask[b].tolist()
        if not any(weights):
            continue
        squares = []
        for i in range(student[0].shape[2]):
            for j in range(student[1].shape[2]):
                gaps = [
                    m * m * (student[0][b, n, i] * student[1][b, n, j] - teacher[0][b, n, i] * teacher[1][b, n, j])
                    for n, m in enumerate(weights)
                ]
                squares.append((sum(gaps).item() / sum(weights)) ** 2)
        rows.append(sum(squares) / len(squares))
    return sum(rows) / len(rows)


def loop_nst(student, teacher, mask):
    total = count = 0.0
    for b in range(3):
        weights = [1.0] * 4 if mask is None else mask[b].tolist()
        for i in range(4):
            for j in range(4):
                products = [
                    sum(x * y for x, y in zip(first[b, i].tolist(), second[b, j].tolist(), strict=True))
                    / first.shape[2]
                    for first, second in (student, teacher)
                ]
                total += weights[i] * weights[j] * (products[0] - products[1]) ** 2
                count += weights[i] * weights[j]
    return total / count


@pytest.mark.parametrize("mask", [None, MASK, 0.5 + wave(3, 4).abs()], ids=["none", "mask", "weights"])
def test_fsp_is_the_loop_over_channels_and_positions(mask):
    assert fsp_loss(STUDENT, TEACHER, mask).item() == pytest.approx(loop_fsp(STUDENT, TEACHER, mask), rel=1e-10)


@pytest.mark.parametrize("mask", [None, MASK])
def test_fsp_layers_may_have_different_widths(mask):
    student, teacher = [STUDENT[0], WIDE_TEACHER[0]], [TEACHER[0], WIDE_TEACHER[1]]
    assert fsp_loss(student, teacher, mask).item() == pytest.approx(loop_fsp(student, teacher, mask), rel=1e-10)


@pytest.mark.parametrize("mask", [None, MASK, 0.5 + wave(3, 4).abs()], ids=["none", "mask", "weights"])
@pytest.mark.parametrize("teacher", [TEACHER, WIDE_TEACHER], ids=["same width", "wider"])
def test_nst_is_the_loop_over_pairs_of_positions(teacher, mask):
    assert mmd_loss(STUDENT, teacher, mask).item() == pytest.approx(loop_nst(STUDENT, teacher, mask), rel=1e-10)


# Printed by TextBrewer 0.2.1.post1 for the same inputs. That version divides a masked gram matrix by the length, 4,
# where its later main branch divides by the width, 6, as without a mask: hence the last factor.
PUBLISHED = [
    (fsp_loss, TEACHER, None, 1.49639035782),
    (fsp_loss, TEACHER, MASK, 2.26513407463),
    (mmd_loss, WIDE_TEACHER, None, 0.795343740867),
    (mmd_loss, TEACHER, MASK, 2.88942796557 * (4 / 6) ** 2),
]


@pytest.mark.parametrize(("loss", "teacher", "mask", "published"), PUBLISHED)
def test_is_textbrewers_number(loss, teacher, mask, published):
    assert loss(STUDENT, teacher, mask).item() == pytest.approx(published, rel=1e-10)
    assert loss(tuple(STUDENT), tuple(teacher), mask).item() == pytest.approx(published, rel=1e-10)


def test_fsp_does_not_count_rows_without_a_kept_position():
    mask = MASK.clone()
    mask[1] = 0
    expected = loop_fsp(STUDENT, TEACHER, mask)
    spoilt = [state.clone() for state in STUDENT]
    spoilt[0][1] = math.nan
    for states in (STUDENT, spoilt):
        assert fsp_loss(states, TEACHER, mask).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [fsp_loss, mmd_loss])
def test_autocast_does_not_round_the_products(loss):
    student, teacher = ([state.float() for state in side] for side in (STUDENT, TEACHER))
    expected = loss(student, teacher, MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(student, teacher, MASK)
    assert actual.item() == expected.item()


def test_fsp_models_may_read_different_lengths_without_a_mask():
    longer = [torch.cat([state, state], dim=1) for state in TEACHER]
    assert fsp_loss(STUDENT, longer).item() == pytest.approx(fsp_loss(STUDENT, TEACHER).item(), rel=1e-12)
    with pytest.raises(ValueError, match="with a mask one length"):
        fsp_loss(STUDENT, longer, MASK)


def test_fsp_with_different_widths_names_the_projection():
    with pytest.raises(ValueError, match=r"got 6 and 8; name a projection in the match: 'proj': \['linear', 6, 8\]"):
        fsp_loss(STUDENT, WIDE_TEACHER)


def test_nst_with_layers_of_different_widths_is_an_error():
    with pytest.raises(ValueError, match="both states of the teacher must have the same width for 'nst', got 6 and 8"):
        mmd_loss(STUDENT, [TEACHER[0], WIDE_TEACHER[1]])


def test_nst_with_different_lengths_is_an_error():
    with pytest.raises(ValueError, match=r"same batch and length, got \(3, 4, 6\) and \(3, 3, 6\)"):
        mmd_loss(STUDENT, [state[:, :3] for state in TEACHER])


@pytest.mark.parametrize("loss", [fsp_loss, mmd_loss])
def test_takes_a_list_of_two_tensors_a_side(loss):
    with pytest.raises(TypeError, match=r"states of the student must be a list of two tensors, got Tensor.*'layer_S'"):
        loss(STUDENT[0], TEACHER)
    with pytest.raises(ValueError, match=r"states of the teacher must be a list of two tensors, got 1.*'layer_T'"):
        loss(STUDENT, TEACHER[:1])
    with pytest.raises(ValueError, match=r"shapes \(batch, length, hidden\), with one batch and length"):
        loss([STUDENT[0], STUDENT[1][:, :2]], TEACHER)
