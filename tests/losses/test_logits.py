"""Losses between logits: against loops over positions and classes, closed-form gradients and TextBrewer's numbers."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import kd_ce_loss, kd_kl_loss, kd_mse_loss, kd_sigmoid_loss

LOSSES = [kd_mse_loss, kd_ce_loss, kd_kl_loss, kd_sigmoid_loss]
TAU_2D = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4
INF = math.inf


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def sigmoid(score):
    return 1 / (1 + math.exp(-score))


def one_position(loss, student, teacher, tau):
    """The loss of one position, written out class by class."""
    s, t = [value / tau for value in student], [value / tau for value in teacher]
    classes = range(len(s))
    q, p = softmax(s), softmax(t)
    if loss is kd_mse_loss:
        return sum((s[c] - t[c]) ** 2 for c in classes) / len(s)
    if loss is kd_ce_loss:
        return -sum(p[c] * math.log(q[c]) for c in classes)
    if loss is kd_kl_loss:
        return tau**2 * sum(p[c] * math.log(p[c] / q[c]) for c in classes)
    yes_T, yes_S = [sigmoid(t[c]) for c in classes], [sigmoid(s[c]) for c in classes]
    terms = [yes_T[c] * math.log(yes_S[c]) + (1 - yes_T[c]) * math.log(1 - yes_S[c]) for c in classes]
    return -(tau**2) * sum(terms) / len(s)


def loop_loss(loss, logits_S, logits_T, temperature=1.0, mask=None):
    classes = logits_S.shape[-1]
    rows_S, rows_T = logits_S.reshape(-1, classes).tolist(), logits_T.reshape(-1, classes).tolist()
    taus = torch.as_tensor(temperature, dtype=torch.float64).expand(logits_S.shape[:-1]).flatten().tolist()
    kept = [True] * len(rows_S) if mask is None else mask.bool().flatten().tolist()
    losses = [one_position(loss, s, t, tau) for s, t, tau, keep in zip(rows_S, rows_T, taus, kept, strict=True) if keep]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shape", "temperature", "mask"),
    [
        ((3, 5), 1.0, None),
        ((3, 5), 8, torch.tensor([1, 0, 1])),
        ((3, 5), TAU_2D, None),
        ((3, 4, 5), torch.tensor(2.5), None),
        ((3, 4, 5), torch.tensor([2.5]), MASK),
        ((3, 4, 5), 0.5, MASK),
        ((3, 4, 5), TAU_3D, MASK),
        ((2, 3, 2, 5), 2.0, torch.tensor([[[1, 0], [1, 1], [0, 0]], [[0, 0], [1, 0], [1, 1]]])),
    ],
)
def test_is_the_loop_over_positions_and_classes(loss, shape, temperature, mask):
    student, teacher = wave(*shape), wave(*shape, phase=1.0)
    actual = loss(student, teacher, temperature, mask=mask)
    assert actual.item() == pytest.approx(loop_loss(loss, student, teacher, temperature, mask), rel=1e-10)


# Printed by TextBrewer 0.2.1.post1 for the same inputs; where there is a mask, it was given the selected positions.
PUBLISHED = [
    (kd_mse_loss, (3, 5), 1, None, 1.97620096237),
    (kd_mse_loss, (3, 5), 4, None, 0.123512560148),
    (kd_mse_loss, (3, 5), TAU_2D, None, 0.794898218281),
    (kd_mse_loss, (3, 4, 5), 2, None, 0.473748054828),
    (kd_mse_loss, (3, 4, 5), TAU_3D, None, 0.524926490889),
    (kd_mse_loss, (3, 4, 5), 2, MASK, 0.482115607695),
    (kd_mse_loss, (3, 4, 5), TAU_3D, MASK, 0.586268361851),
    (kd_ce_loss, (3, 5), 1, None, 1.92985053739),
    (kd_ce_loss, (3, 5), 4, None, 1.62287834187),
    (kd_ce_loss, (3, 5), TAU_2D, None, 1.72670783898),
    (kd_ce_loss, (3, 4, 5), 2, None, 1.62712931441),
    (kd_ce_loss, (3, 4, 5), TAU_3D, None, 1.66539077119),
    (kd_ce_loss, (3, 4, 5), 2, MASK, 1.64330864948),
    (kd_ce_loss, (3, 4, 5), TAU_3D, MASK, 1.68597370001),
]


@pytest.mark.parametrize(("loss", "shape", "temperature", "mask", "published"), PUBLISHED)
def test_is_textbrewers_number(loss, shape, temperature, mask, published):
    student, teacher = wave(*shape), wave(*shape, phase=1.0)
    assert loss(student, teacher, temperature, mask=mask).item() == pytest.approx(published, rel=1e-10)


def closed_form_gradient(loss, student, teacher, tau):
    """The derivative of the loss of one position with respect to the student's logits."""
    s, t = [value / tau for value in student], [value / tau for value in teacher]
    q, p, classes = softmax(s), softmax(t), range(len(s))
    if loss is kd_mse_loss:
        return [2 * (s[c] - t[c]) / tau / len(s) for c in classes]
    if loss is kd_ce_loss:
        return [(q[c] - p[c]) / tau for c in classes]
    if loss is kd_kl_loss:
        return [tau * (q[c] - p[c]) for c in classes]
    return [tau * (sigmoid(s[c]) - sigmoid(t[c])) / len(s) for c in classes]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_closed_form(loss):
    student, teacher = wave(3, 4, 5).requires_grad_(), wave(3, 4, 5, phase=1.0)
    loss(student, teacher, TAU_3D, mask=MASK).backward()
    for row in range(3):
        for position in range(4):
            tau = TAU_3D[row, position].item()
            expected = closed_form_gradient(loss, student[row, position].tolist(), teacher[row, position].tolist(), tau)
            expected = [value / 9 if MASK[row, position] else 0.0 for value in expected]
            assert student.grad[row, position].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_with_respect_to_teacher_and_temperature(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0).requires_grad_()
    temperature = TAU_3D.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, tau: loss(student, t, tau, mask=MASK), (teacher, temperature))


def test_kl_is_ce_without_the_teachers_entropy_times_tau_squared():
    student, teacher, tau = wave(3, 5), wave(3, 5, phase=1.0), 3.0
    entropy = -sum(p * math.log(p) for row in teacher.tolist() for p in softmax([t / tau for t in row])) / 3
    expected = tau**2 * (kd_ce_loss(student, teacher, tau).item() - entropy)
    assert kd_kl_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-10)


def test_kl_at_high_temperature_is_the_squared_error_of_centred_logits():
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        gaps = [a - b for a, b in zip(s, t, strict=True)]
        total += sum((gap - sum(gaps) / 5) ** 2 for gap in gaps) / (2 * 5)
    assert kd_kl_loss(student, teacher, 1e4).item() == pytest.approx(total / 3, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_that_neither_model_has_changes_nothing(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    absent = torch.full((3, 4, 1), -INF, dtype=torch.float64)
    wide_S, wide_T = (torch.cat([x[..., :2], absent, x[..., 2:]], -1).requires_grad_() for x in (student, teacher))
    value = loss(wide_S, wide_T, TAU_3D, mask=MASK)
    value.backward()
    narrow = student.clone().requires_grad_()
    expected = loss(narrow, teacher, TAU_3D, mask=MASK)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert wide_S.grad[..., 2].abs().max().item() == 0.0
    assert torch.allclose(wide_S.grad[..., [0, 1, 3, 4, 5]], narrow.grad, rtol=1e-12, atol=0)
    assert wide_T.grad.isfinite().all()


def test_a_class_that_only_the_student_lacks_is_taken_out_of_the_teachers_distribution():
    student, teacher = [0.3, -INF, 1.1], [0.2, 2.0, -0.7]
    for loss in LOSSES:
        logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
        value = loss(logits, torch.tensor([teacher], dtype=torch.float64), 2.0)
        value.backward()
        expected = one_position(loss, [0.3, 1.1], [0.2, -0.7], 2.0)
        gradient = closed_form_gradient(loss, [0.3, 1.1], [0.2, -0.7], 2.0)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        assert logits.grad[0].tolist() == pytest.approx([gradient[0], 0.0, gradient[1]], rel=1e-10)


def test_a_class_that_only_the_teacher_lacks_has_the_target_zero():
    student, teacher = [0.3, 0.9, 1.1], [0.2, -INF, -0.7]
    q, p = softmax([value / 2 for value in student]), softmax([0.1, -0.35])
    cross_entropy = -(p[0] * math.log(q[0]) + p[1] * math.log(q[2]))
    entropy = -sum(value * math.log(value) for value in p)
    for loss, expected, scale in ((kd_ce_loss, cross_entropy, 0.5), (kd_kl_loss, 4 * (cross_entropy - entropy), 2.0)):
        logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
        value = loss(logits, torch.tensor([teacher], dtype=torch.float64), 2.0)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-10)
        gradient = [scale * (q[0] - p[0]), scale * q[1], scale * (q[2] - p[1])]
        assert logits.grad[0].tolist() == pytest.approx(gradient, rel=1e-10)


@pytest.mark.parametrize("loss", [kd_mse_loss, kd_sigmoid_loss])
def test_a_class_that_only_the_teacher_lacks_is_left_out_where_classes_are_independent(loss):
    logits = torch.tensor([[0.3, 0.9, 1.1]], dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.tensor([[0.2, -INF, -0.7]], dtype=torch.float64), 2.0)
    value.backward()
    gradient = closed_form_gradient(loss, [0.3, 1.1], [0.2, -0.7], 2.0)
    assert value.item() == pytest.approx(one_position(loss, [0.3, 1.1], [0.2, -0.7], 2.0), rel=1e-10)
    assert logits.grad[0].tolist() == pytest.approx([gradient[0], 0.0, gradient[1]], rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_position_without_any_common_class_is_worth_zero(loss, dtype):
    student = torch.tensor([[-INF, -INF], [1.0, -INF], [0.5, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-INF, -INF], [-INF, 1.0], [0.25, 2.0]], dtype=dtype, requires_grad=True)
    temperature = torch.ones(3, requires_grad=True)
    value = loss(student, teacher, temperature)
    value.backward()
    expected = one_position(loss, [0.5, 1.0], [0.25, 2.0], 1.0) / 3
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for leaf in (student, teacher, temperature):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].abs().max().item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_float16_logits_stay_finite(loss):
    student = torch.tensor([[65504.0, -65504.0, 0.0]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[-65504.0, 65504.0, -INF]], dtype=torch.float16)
    value = loss(student, teacher, 0.5)
    value.backward()
    gap = 2 * 65504 / 0.5
    expected = {kd_mse_loss: gap**2, kd_ce_loss: gap, kd_kl_loss: gap / 4, kd_sigmoid_loss: gap / 8}[loss]
    assert value.item() == pytest.approx(expected, rel=1e-6)
    # The gradient comes back in float16, where that of the squared error itself is too large a number.
    if loss is not kd_mse_loss:
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [kd_ce_loss, kd_kl_loss])
def test_a_class_that_both_lack_next_to_a_huge_logit_has_finite_gradients(loss):
    student = torch.tensor([[1e38, 0.0, -INF]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0, -INF]], requires_grad=True)
    loss(student, teacher).backward()
    assert student.grad[0].tolist() == pytest.approx([0.5, -0.5, 0.0])
    assert teacher.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spoilt", [math.nan, 0.0, math.inf])
def test_the_temperature_of_a_masked_position_does_not_matter(loss, spoilt):
    student, teacher = wave(3, 4, 5).requires_grad_(), wave(3, 4, 5, phase=1.0)
    temperature = TAU_3D.masked_fill(MASK == 0, spoilt).requires_grad_()
    value = loss(student, teacher, temperature, mask=MASK)
    value.backward()
    assert value.item() == pytest.approx(loop_loss(loss, student.detach(), teacher, TAU_3D, MASK), rel=1e-10)
    assert student.grad.isfinite().all()
    assert temperature.grad[MASK == 0].abs().max().item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_any_value_of_the_mask_but_zero_counts_as_one(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    expected = loss(student, teacher, mask=MASK)
    assert loss(student, teacher, mask=MASK * torch.arange(1, 5)).item() == expected.item()
    assert loss(student, teacher, mask=MASK * torch.tensor([0.25, 0.5, 1.0, -1.0])).item() == expected.item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_refuses_a_temperature_that_is_not_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        loss(wave(3, 5), wave(3, 5), temperature)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(4,), (3, 4, 1), (3, 5)])
def test_refuses_a_temperature_of_another_shape(loss, shape):
    with pytest.raises(ValueError, match=r"temperature must be a number or a tensor of shape \(3, 4\)"):
        loss(wave(3, 4, 5), wave(3, 4, 5), torch.ones(shape))


def test_temperature_may_not_be_a_string():
    with pytest.raises(TypeError, match="temperature must be a number, got '4'"):
        kd_ce_loss(wave(3, 5), wave(3, 5), "4")
