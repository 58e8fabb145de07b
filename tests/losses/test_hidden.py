"""Losses between hidden states: against loops over positions, and TextBrewer's numbers."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import cos_loss, hid_mse_loss, pkd_loss

STUDENT, TEACHER = wave(3, 4, 6), wave(3, 4, 6, phase=1.0)


def kept_vectors(mask):
    for row in range(3):
        for position in range(4):
            weight = 1.0 if mask is None else float(mask[row, position])
            yield STUDENT[row, position].tolist(), TEACHER[row, position].tolist(), weight


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize(
    "mask", [None, MASK, MASK * 0.25, 1 + wave(3, 4).abs()], ids=["none", "mask", "0.25", "weights"]
)
def test_hidden_mse_is_the_loop_and_weighs_by_the_mask(mask):
    total = weight_sum = 0.0
    for s, t, weight in kept_vectors(mask):
        total += weight * sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 6
        weight_sum += weight
    assert hid_mse_loss(STUDENT, TEACHER, mask).item() == pytest.approx(total / weight_sum, rel=1e-10)


@pytest.mark.parametrize("mask", [None, MASK, MASK * torch.arange(1, 5)])
def test_cos_is_the_loop(mask):
    losses = [1 - cosine(s, t) for s, t, weight in kept_vectors(mask) if weight]
    assert cos_loss(STUDENT, TEACHER, mask).item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_pkd_is_two_minus_two_cosines_of_the_first_position():
    expected = sum(2 - 2 * cosine(STUDENT[row, 0].tolist(), TEACHER[row, 0].tolist()) for row in range(3)) / 3
    assert pkd_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-10)


# Printed by TextBrewer 0.2.1.post1 for the same inputs.
PUBLISHED = [
    (hid_mse_loss, STUDENT, TEACHER, None, 1.82867314041),
    (hid_mse_loss, STUDENT, TEACHER, MASK, 1.75892632676),
    (cos_loss, STUDENT, TEACHER, None, 0.457594242405),
    (cos_loss, STUDENT, TEACHER, MASK, 0.443739220226),
    (pkd_loss, STUDENT, TEACHER, None, 0.617890129961),
    (pkd_loss, STUDENT, TEACHER, MASK, 0.617890129961),
    (pkd_loss, STUDENT[:, 1], TEACHER[:, 1], None, 1.4121434277),
    (pkd_loss, STUDENT, TEACHER[:, 1], None, 1.67484207216),
]


@pytest.mark.parametrize(("loss", "student", "teacher", "mask", "published"), PUBLISHED)
def test_is_textbrewers_number(loss, student, teacher, mask, published):
    assert loss(student, teacher, mask).item() == pytest.approx(published, rel=1e-10)


def test_hidden_mse_takes_states_without_a_length():
    expected = sum((a - b) ** 2 for a, b in zip(STUDENT[:, 0].flatten(), TEACHER[:, 0].flatten(), strict=True)) / 18
    assert hid_mse_loss(STUDENT[:, 0], TEACHER[:, 0]).item() == pytest.approx(expected.item(), rel=1e-10)


def test_hidden_mse_in_float16_does_not_overflow():
    student = torch.full((2, 3, 4), 300.0, dtype=torch.float16)
    assert hid_mse_loss(student, -student).item() == 600.0**2
    assert hid_mse_loss(student, -student, torch.ones(2, 3)).item() == 600.0**2


@pytest.mark.parametrize("mask", [None, MASK])
def test_cos_takes_states_that_are_not_contiguous(mask):
    student, teacher = STUDENT.transpose(0, 1).contiguous().transpose(0, 1), TEACHER[:, :, ::1].flip(2).flip(2)
    assert not student.is_contiguous()
    assert cos_loss(student, teacher, mask).item() == pytest.approx(cos_loss(STUDENT, TEACHER, mask).item(), rel=1e-12)


@pytest.mark.parametrize(("loss", "worth"), [(cos_loss, 1.0), (pkd_loss, 1.0)])
@pytest.mark.parametrize("zero_side", ["student", "teacher", "both"])
def test_a_zero_vector_has_no_direction_but_a_finite_loss_and_gradient(loss, worth, zero_side):
    student, teacher = STUDENT[:, :1].clone(), TEACHER[:, :1].clone()
    if zero_side in ("student", "both"):
        student[1] = 0.0
    if zero_side in ("teacher", "both"):
        teacher[1] = 0.0
        worth = 0.0 if loss is pkd_loss and zero_side == "both" else worth
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    others = [1 - cosine(student[row, 0].tolist(), teacher[row, 0].tolist()) for row in (0, 2)]
    others = [2 * other if loss is pkd_loss else other for other in others]
    assert value.item() == pytest.approx((sum(others) + worth) / 3, rel=1e-10)
    for leaf in (student, teacher):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max().item() < 10


def test_a_zero_vector_of_the_student_is_pulled_towards_the_teacher():
    student, teacher = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True), wave(1, 4)
    pkd_loss(student, teacher).backward()
    assert cosine(student.grad[0].tolist(), teacher[0].tolist()) == pytest.approx(-1.0)


@pytest.mark.parametrize("loss", [cos_loss, pkd_loss])
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e15])
def test_gradient_of_very_short_and_long_vectors_is_finite(loss, scale):
    student = (wave(2, 1, 6, dtype=torch.float32) * scale).requires_grad_()
    value = loss(student, wave(2, 1, 6, phase=1.0, dtype=torch.float32))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_pkd_does_not_count_rows_without_a_kept_position():
    mask = MASK.clone()
    mask[1] = 0
    spoilt = STUDENT.clone()
    spoilt[1] = math.nan
    expected = pkd_loss(STUDENT[[0, 2]], TEACHER[[0, 2]]).item()
    assert pkd_loss(spoilt, TEACHER, mask).item() == pytest.approx(expected, rel=1e-12)
    assert pkd_loss(spoilt[:, 0], TEACHER[:, 0], mask).item() == pytest.approx(expected, rel=1e-12)


def test_pkd_does_not_ask_whether_the_first_position_is_masked():
    left_padded = MASK.flip(1)
    assert left_padded[0, 0] == 0
    # Printed by TextBrewer 0.2.1.post1, which does not use the mask.
    assert pkd_loss(STUDENT, TEACHER, left_padded).item() == pytest.approx(0.617890129961, rel=1e-10)


def test_pkd_compares_models_that_read_sequences_of_different_length():
    assert pkd_loss(STUDENT, TEACHER[:, :2]).item() == pytest.approx(pkd_loss(STUDENT, TEACHER).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [hid_mse_loss, cos_loss, pkd_loss])
def test_different_widths_name_the_projection(loss):
    with pytest.raises(ValueError, match=r"name a projection in the match: 'proj': \['linear', 6, 8\]"):
        loss(STUDENT, wave(3, 4, 8))


def test_pkd_refuses_states_of_other_ranks():
    with pytest.raises(ValueError, match=r"hidden state of the student must have the shape .* got \(3, 4, 6, 1\)"):
        pkd_loss(STUDENT.unsqueeze(-1), TEACHER)


@pytest.mark.parametrize("loss", [hid_mse_loss, cos_loss, pkd_loss])
def test_refuses_a_list_of_layers(loss):
    with pytest.raises(TypeError, match=r"hidden states? of the student must be one tensor, got list"):
        loss([STUDENT, STUDENT], [TEACHER, TEACHER])
