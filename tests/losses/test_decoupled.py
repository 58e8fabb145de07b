"""Losses that take the true class apart: against loops, KL's decomposition, closed-form gradients."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import dkd_loss, kd_kl_loss, nkd_loss, wsld_loss

INF = math.inf
LABELS_2D = torch.tensor([4, 0, 2])
LABELS = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 3, 4, 4]])
TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4
LOSSES = [dkd_loss, nkd_loss]
WITH_LABELS = [*LOSSES, wsld_loss]


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def without(values, label):
    return [value for c, value in enumerate(values) if c != label]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def one_dkd(student, teacher, label, tau, alpha=1.0, beta=8.0):
    s, t = [value / tau for value in student], [value / tau for value in teacher]
    q, p = softmax(s), softmax(t)
    target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = kl(softmax(without(t, label)), softmax(without(s, label)))
    return tau**2 * (alpha * target + beta * others)


def one_nkd(student, teacher, label, tau, gamma=1.5):
    others_S = softmax([value / tau for value in without(student, label)])
    others_T = softmax([value / tau for value in without(teacher, label)])
    others = sum(p * math.log(q) for p, q in zip(others_T, others_S, strict=True))
    return -softmax(teacher)[label] * math.log(softmax(student)[label]) - gamma * tau**2 * others


def loop_loss(loss, logits_S, logits_T, labels, temperature=1.0, mask=None, **constants):
    classes, shape = logits_S.shape[-1], logits_S.shape[:-1]
    taus = torch.as_tensor(temperature, dtype=torch.float64).expand(shape).flatten().tolist()
    kept = [True] * len(taus) if mask is None else mask.bool().flatten().tolist()
    rows = zip(logits_S.reshape(-1, classes).tolist(), logits_T.reshape(-1, classes).tolist(), strict=True)
    one = one_dkd if loss is dkd_loss else one_nkd
    losses = [
        one(student, teacher, label, tau, **constants)
        for (student, teacher), label, tau, keep in zip(rows, labels.flatten().tolist(), taus, kept, strict=True)
        if keep and label >= 0
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("loss", "constants"),
    [(dkd_loss, {}), (dkd_loss, {"alpha": 0.5, "beta": 2}), (nkd_loss, {}), (nkd_loss, {"gamma": 0.25})],
)
@pytest.mark.parametrize(
    ("labels", "temperature", "mask"),
    [
        (LABELS_2D, 1.0, None),
        (LABELS_2D, 4, torch.tensor([1, 0, 1])),
        (LABELS_2D.masked_fill(torch.tensor([False, True, False]), -100), torch.tensor([1.0, 2.0, 3.0]), None),
        (LABELS, torch.tensor(2.5), None),
        (LABELS, 0.5, MASK),
        (LABELS.masked_fill(LABELS == 3, -1), TAU_3D, MASK),
    ],
)
def test_is_the_loop_over_positions_and_classes(loss, constants, labels, temperature, mask):
    student, teacher = wave(*labels.shape, 5), wave(*labels.shape, 5, phase=1.0)
    actual = loss(student, teacher, temperature, mask, labels, **constants)
    expected = loop_loss(loss, student, teacher, labels, temperature, mask, **constants)
    assert actual.item() == pytest.approx(expected, rel=1e-10)


def test_kl_is_the_sum_of_the_parts_of_dkd():
    """KL(p || q) = TCKD + (1 - p_y) NCKD, position by position."""
    for row, label in enumerate(LABELS_2D.tolist()):
        student, teacher = wave(3, 5)[row : row + 1], wave(3, 5, phase=1.0)[row : row + 1]
        labels, rest = torch.tensor([label]), 1 - softmax([t / 3 for t in teacher[0].tolist()])[label]
        value = dkd_loss(student, teacher, 3.0, labels=labels, alpha=1, beta=rest).item()
        assert value == pytest.approx(kd_kl_loss(student, teacher, 3.0).item(), rel=1e-10)


def test_with_two_classes_dkd_is_kl_and_nkd_the_weighted_cross_entropy():
    student, teacher, labels = wave(4, 2), wave(4, 2, phase=1.0), torch.tensor([0, 1, 1, 0])
    assert dkd_loss(student, teacher, 2.0, labels=labels).item() == pytest.approx(
        kd_kl_loss(student, teacher, 2.0).item(), rel=1e-10
    )
    q, p = ([softmax(row)[y] for row, y in zip(x.tolist(), labels, strict=True)] for x in (student, teacher))
    expected = -sum(b * math.log(a) for a, b in zip(q, p, strict=True)) / 4
    assert nkd_loss(student, teacher, 2.0, labels=labels).item() == pytest.approx(expected, rel=1e-10)


def test_gradient_of_dkd_is_the_closed_form():
    """Each part's gradient is a difference of two distributions; the first one is shared out among the others by q."""
    student, teacher = wave(3, 5).requires_grad_(), wave(3, 5, phase=1.0)
    dkd_loss(student, teacher, 2.0, labels=LABELS_2D, alpha=0.5, beta=3.0).backward()
    for row, y in enumerate(LABELS_2D.tolist()):
        s, t = [v / 2 for v in student[row].tolist()], [v / 2 for v in teacher[row].tolist()]
        q, p = softmax(s), softmax(t)
        expected = []
        for c in range(5):
            if c == y:
                expected.append(2 / 3 * 0.5 * (q[y] - p[y]))
                continue
            hat_q, hat_p = q[c] / (1 - q[y]), p[c] / (1 - p[y])
            expected.append(2 / 3 * (0.5 * (p[y] - q[y]) * hat_q + 3.0 * (hat_q - hat_p)))
        assert student.grad[row].tolist() == pytest.approx(expected, rel=1e-9)


def test_gradient_of_nkd_is_the_closed_form():
    student, teacher = wave(3, 5).requires_grad_(), wave(3, 5, phase=1.0)
    nkd_loss(student, teacher, 2.0, labels=LABELS_2D, gamma=0.75).backward()
    for row, y in enumerate(LABELS_2D.tolist()):
        s, t = student[row].tolist(), teacher[row].tolist()
        q, p_y = softmax(s), softmax(t)[y]
        hat_q, hat_p = (softmax([v / 2 for v in without(x, y)]) for x in (s, t))
        others = [2 * 0.75 * (a - b) for a, b in zip(hat_q, hat_p, strict=True)]
        others.insert(y, 0.0)
        expected = [(p_y * (q[c] - (c == y)) + others[c]) / 3 for c in range(5)]
        assert student.grad[row].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_with_respect_to_teacher_and_temperature(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0).requires_grad_()
    temperature = TAU_3D.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, tau: loss(student, t, tau, MASK, LABELS), (teacher, temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dkd_with_a_saturated_true_class_still_compares_the_others(dtype):
    """1 - p rounds to 0 in float32 from a gap of 17 on: the second part must come from the logits."""
    others_S, others_T = [0.5, -1.0, 2.0], [1.5, 0.25, -0.5]
    student = torch.tensor([[200.0, *others_S]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[300.0, *others_T]], dtype=dtype)
    value = dkd_loss(student, teacher, labels=torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(8 * kl(softmax(others_T), softmax(others_S)), rel=1e-5)
    gaps = [8 * (q - p) for q, p in zip(softmax(others_S), softmax(others_T), strict=True)]
    assert student.grad[0, 1:].tolist() == pytest.approx(gaps, rel=1e-3)


def test_dkd_with_a_true_class_that_the_student_rules_out_stays_finite():
    """The log-probabilities are hundreds apart; those of 1 - p and 1 - q are near 0 and keep their digits."""
    student = torch.tensor([[-300.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[250.0, 0.5, 0.25]])
    value = dkd_loss(student, teacher, labels=torch.tensor([0]))
    value.backward()
    expected = 300 + math.log(1 + math.e) + 8 * kl(softmax([0.5, 0.25]), softmax([0.0, 1.0]))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad.isfinite().all()
    assert student.grad[0, 0].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("loss", WITH_LABELS)
def test_positions_without_a_label_are_those_that_a_mask_leaves_out(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    expected = loss(student, teacher, 2.0, MASK, LABELS).item()
    ignored = LABELS.masked_fill(MASK == 0, -100)
    assert loss(student, teacher, 2.0, None, ignored).item() == pytest.approx(expected, rel=1e-12)
    half = MASK.clone()
    half[:, 0] = 1
    ignored[:, 0] = LABELS[:, 0]
    assert loss(student, teacher, 2.0, half, ignored).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", WITH_LABELS)
@pytest.mark.parametrize("content", [math.nan, INF, -INF])
def test_the_content_of_a_position_without_a_label_does_not_matter(loss, content):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    ignored = LABELS.masked_fill(MASK == 0, -100)
    expected = loss(student, teacher, 2.0, labels=ignored).item()
    spoilt_S, spoilt_T = (x.masked_fill(MASK.unsqueeze(-1) == 0, content) for x in (student, teacher))
    spoilt_S.requires_grad_()
    value = loss(spoilt_S, spoilt_T, 2.0, labels=ignored)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert spoilt_S.grad[MASK == 0].abs().max().item() == 0.0
    assert spoilt_S.grad.isfinite().all()


@pytest.mark.parametrize("loss", WITH_LABELS)
def test_no_label_at_all_gives_zero(loss):
    student = wave(3, 5).requires_grad_()
    value = loss(student, wave(3, 5, phase=1.0), labels=torch.full((3,), -100))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("loss", WITH_LABELS)
@pytest.mark.parametrize("label", [-7, 99])
def test_the_label_of_a_masked_position_may_be_any_number(loss, label):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    expected = loss(student, teacher, 2.0, MASK, LABELS).item()
    assert loss(student, teacher, 2.0, MASK, LABELS.masked_fill(MASK == 0, label)).item() == expected


@pytest.mark.parametrize("loss", WITH_LABELS)
def test_a_class_that_the_student_lacks_changes_nothing(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    absent = torch.full((3, 4, 1), -INF, dtype=torch.float64)
    expected = loss(student, teacher, TAU_3D, MASK, LABELS).item()
    for of_teacher in (absent, torch.ones_like(absent)):
        wide_S, wide_T = torch.cat([student, absent], -1).requires_grad_(), torch.cat([teacher, of_teacher], -1)
        value = loss(wide_S, wide_T, TAU_3D, MASK, LABELS)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert wide_S.grad.isfinite().all()
        assert wide_S.grad[..., 5].abs().max().item() == 0.0


@pytest.mark.parametrize("loss", WITH_LABELS)
@pytest.mark.parametrize("lacks", ["student", "teacher", "both"])
def test_a_model_without_the_true_class_stays_finite(loss, lacks):
    student, teacher = wave(3, 5, dtype=torch.float32), wave(3, 5, phase=1.0, dtype=torch.float32)
    if lacks != "teacher":
        student[0, LABELS_2D[0]] = -INF
    if lacks != "student":
        teacher[0, LABELS_2D[0]] = -INF
    student.requires_grad_()
    value = loss(student, teacher, 2.0, labels=LABELS_2D)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_dkd_without_the_true_class_on_the_teachers_side_is_kl_with_the_probability_zero():
    student, teacher = wave(1, 5), wave(1, 5, phase=1.0)
    teacher[0, 4] = -INF
    q, q_others, p_others = (
        softmax(x) for x in (student[0].tolist(), student[0, :4].tolist(), teacher[0, :4].tolist())
    )
    expected = -math.log(1 - q[4]) + 8 * kl(p_others, q_others)
    assert dkd_loss(student, teacher, labels=torch.tensor([4])).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", WITH_LABELS)
def test_a_position_without_any_common_class_is_worth_zero(loss):
    student = torch.tensor([[-INF, -INF, -INF], [1.0, -INF, -INF], [0.5, 1.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[-INF, -INF, -INF], [-INF, 1.0, 0.0], [0.25, 2.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    value = loss(student, teacher, 2.0, labels=labels)
    value.backward()
    alone = loss(student[2:].detach(), teacher[2:].detach(), 2.0, labels=labels[2:])
    assert value.item() == pytest.approx(alone.item() / 3, rel=1e-5)
    for leaf in (student, teacher):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].abs().max().item() == 0.0


@pytest.mark.parametrize("loss", WITH_LABELS)
def test_the_labels_are_checked(loss):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    with pytest.raises(ValueError, match="needs labels, the true classes: return 'labels' from the student's adaptor"):
        loss(student, teacher)
    with pytest.raises(ValueError, match=r"labels must have the shape \(3, 4\), one class a position, got \(3,\)"):
        loss(student, teacher, labels=LABELS_2D)
    with pytest.raises(TypeError, match=r"whole numbers.*use 'sigmoid' where a position has several classes"):
        loss(student, teacher, labels=LABELS.double())
    with pytest.raises(ValueError, match=r"logits of student and teacher must have the same shape"):
        loss(student, teacher[:2], labels=LABELS)


def test_the_labels_may_be_of_any_whole_dtype():
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    expected = dkd_loss(student, teacher, labels=LABELS).item()
    for dtype in (torch.int32, torch.uint8):
        assert dkd_loss(student, teacher, labels=LABELS.to(dtype)).item() == expected


@pytest.mark.parametrize(
    ("loss", "constants", "message"),
    [
        (dkd_loss, {"alpha": -1}, "alpha must be at least 0"),
        (dkd_loss, {"beta": math.inf}, "beta must be finite"),
        (nkd_loss, {"gamma": -0.5}, "gamma must be at least 0"),
        (nkd_loss, {"temperature": 0}, "temperature must be greater than 0"),
    ],
)
def test_constants_are_checked(loss, constants, message):
    with pytest.raises(ValueError, match=message):
        loss(wave(3, 5), wave(3, 5), labels=LABELS_2D, **constants)


def test_nkd_still_pulls_the_true_class_up_where_the_student_is_the_teacher():
    """Its first part is a cross-entropy with the label, weighed by the teacher's probability of it."""
    student = wave(3, 5).requires_grad_()
    nkd_loss(student, wave(3, 5), labels=LABELS_2D).backward()
    for row, y in enumerate(LABELS_2D.tolist()):
        p = softmax(wave(3, 5)[row].tolist())
        assert student.grad[row].tolist() == pytest.approx([p[y] * (p[c] - (c == y)) / 3 for c in range(5)], rel=1e-9)
