"""Weighted soft labels: against a loop, its gradient with constant weights, and the weights' limits."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import kd_ce_loss, wsld_loss

LABELS_2D = torch.tensor([4, 0, 2])
LABELS = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 3, 4, 4]])
TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def weight_of(student, teacher, label):
    return 1 - math.exp(-math.log(softmax(student)[label]) / math.log(softmax(teacher)[label]))


def one_position(student, teacher, label, tau):
    q, p = softmax([s / tau for s in student]), softmax([t / tau for t in teacher])
    return weight_of(student, teacher, label) * -(tau**2) * sum(b * math.log(a) for a, b in zip(q, p, strict=True))


@pytest.mark.parametrize(
    ("labels", "temperature", "mask"),
    [
        (LABELS_2D, 1.0, None),
        (LABELS_2D, 2, torch.tensor([1, 0, 1])),
        (LABELS, 0.5, MASK),
        (LABELS.masked_fill(LABELS == 3, -100), TAU_3D, MASK),
    ],
)
def test_is_the_loop_over_positions_and_classes(labels, temperature, mask):
    student, teacher = wave(*labels.shape, 5), wave(*labels.shape, 5, phase=1.0)
    taus = torch.as_tensor(temperature, dtype=torch.float64).expand(labels.shape).flatten().tolist()
    kept = labels >= 0 if mask is None else mask.bool() & (labels >= 0)
    rows = (student.reshape(-1, 5).tolist(), teacher.reshape(-1, 5).tolist(), labels.flatten().tolist(), taus)
    losses = [
        one_position(*row) for row, keep in zip(zip(*rows, strict=True), kept.flatten().tolist(), strict=True) if keep
    ]
    actual = wsld_loss(student, teacher, temperature, mask, labels).item()
    assert actual == pytest.approx(sum(losses) / len(losses), rel=1e-6)  # 1e-7 is added to the teacher's part


def test_gradient_is_that_of_the_soft_cross_entropy_times_the_weight():
    student, teacher = wave(3, 5).requires_grad_(), wave(3, 5, phase=1.0)
    wsld_loss(student, teacher, 2.0, labels=LABELS_2D).backward()
    for row, label in enumerate(LABELS_2D.tolist()):
        s, t = student[row].tolist(), teacher[row].tolist()
        q, p = softmax([v / 2 for v in s]), softmax([v / 2 for v in t])
        factor = 2 * weight_of(s, t, label) / 3
        assert student.grad[row].tolist() == pytest.approx(
            [factor * (a - b) for a, b in zip(q, p, strict=True)], rel=1e-6
        )


def test_gradient_with_respect_to_the_temperature():
    student, teacher, temperature = wave(3, 4, 5), wave(3, 4, 5, phase=1.0), TAU_3D.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda tau: wsld_loss(student, teacher, tau, MASK, LABELS), (temperature,))


def test_a_position_that_the_student_knows_and_the_teacher_does_not_weighs_nothing():
    """And one that the teacher knows and the student does not weighs all: there the loss is the plain one."""
    knows, not_yet = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    labels = torch.tensor([0])
    assert wsld_loss(knows, not_yet, 2.0, labels=labels).item() == pytest.approx(0.0, abs=1e-10)
    plain = 4 * kd_ce_loss(not_yet, knows, 2.0).item()
    assert wsld_loss(not_yet, knows, 2.0, labels=labels).item() == pytest.approx(plain, rel=1e-6)


def test_where_both_know_as_much_the_weight_is_one_less_one_over_e():
    student = wave(3, 5)
    plain = 4 * kd_ce_loss(student, student, 2.0).item()
    actual = wsld_loss(student, student.clone(), 2.0, labels=LABELS_2D).item()
    assert actual == pytest.approx((1 - 1 / math.e) * plain, rel=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_saturated_logits_stay_finite(scale):
    for student, teacher in ((wave(3, 5), -wave(3, 5)), (wave(3, 5), wave(3, 5))):
        leaf = (scale * student).float().requires_grad_()
        value = wsld_loss(leaf, (scale * teacher).float(), labels=LABELS_2D)
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()
