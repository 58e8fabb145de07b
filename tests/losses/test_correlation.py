"""DIST: against a loop with scipy's correlation, what it is blind to, and batches too small for it."""

import math

import pytest
import torch
from scipy.stats import pearsonr

from tests.losses.samples import MASK, wave
from textbrewer.losses import dist_loss

INF = math.inf
TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def loop_dist(logits_S, logits_T, temperature=1.0, mask=None, beta=1.0, gamma=1.0):
    classes, shape = logits_S.shape[-1], logits_S.shape[:-1]
    taus = torch.as_tensor(temperature, dtype=torch.float64).expand(shape).flatten().tolist()
    kept = [True] * len(taus) if mask is None else mask.bool().flatten().tolist()
    rows = zip(logits_S.reshape(-1, classes).tolist(), logits_T.reshape(-1, classes).tolist(), taus, kept, strict=True)
    pairs = [
        (tau, softmax([s / tau for s in student]), softmax([t / tau for t in teacher]))
        for student, teacher, tau, keep in rows
        if keep
    ]
    inter = sum(tau**2 * (1 - pearsonr(q, p).statistic) for tau, q, p in pairs) / len(pairs)
    squared = sum(tau**2 for tau, _, _ in pairs) / len(pairs)
    intra = sum(
        1 - pearsonr([q[c] for _, q, _ in pairs], [p[c] for _, _, p in pairs]).statistic for c in range(classes)
    )
    return beta * inter + gamma * squared * intra / classes


@pytest.mark.parametrize("constants", [{}, {"beta": 2, "gamma": 0.5}, {"gamma": 0}, {"beta": 0.0}])
@pytest.mark.parametrize(
    ("shape", "temperature", "mask"),
    [
        ((6, 5), 1.0, None),
        ((6, 5), 4, torch.tensor([1, 0, 1, 1, 0, 1])),
        ((3, 4, 5), torch.tensor(2.5), None),
        ((3, 4, 5), 1.0, MASK),
        ((3, 4, 5), TAU_3D, MASK),
    ],
)
def test_is_the_loop_with_scipys_correlation(constants, shape, temperature, mask):
    student, teacher = wave(*shape), wave(*shape, phase=1.0)
    expected = loop_dist(student, teacher, temperature, mask, **constants)
    assert dist_loss(student, teacher, temperature, mask, **constants).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("slope", [0.25, 0.8])
def test_an_affine_change_of_the_probabilities_is_invisible(slope):
    """A student with q = a p + (1 - a) / C has both correlations 1: it may be less sure, in the same proportions."""
    teacher = wave(3, 4, 5)
    student = (slope * torch.softmax(teacher, -1) + (1 - slope) / 5).log().requires_grad_()
    value = dist_loss(student, teacher, mask=MASK)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.abs().max().item() < 1e-12


def test_lies_between_zero_and_two_for_each_part():
    teacher = wave(6, 5)
    mirrored = (0.4 - torch.softmax(teacher, -1) * 0.2 - 0.16).log()  # q = 0.24 - p / 5: both correlations are -1
    assert dist_loss(mirrored, teacher).item() == pytest.approx(4.0, rel=1e-10)
    assert dist_loss(mirrored, teacher, gamma=0).item() == pytest.approx(2.0, rel=1e-10)
    for phase in range(5):
        assert 0 < dist_loss(wave(6, 5, phase=phase), teacher.flip(0)).item() < 4


def test_gradient_of_the_part_over_classes_is_the_closed_form():
    r"""With b the centred, unit-length teacher and a the student: dr/dq = (b - r a) / |q - mean|, then the softmax."""
    student, teacher = wave(1, 5).requires_grad_(), wave(1, 5, phase=1.0)
    dist_loss(student, teacher, gamma=0).backward()
    q, p = softmax(student[0].tolist()), softmax(teacher[0].tolist())
    length = math.dist(q, [0.2] * 5)
    a = [(value - 0.2) / length for value in q]
    b = [(value - 0.2) / math.dist(p, [0.2] * 5) for value in p]
    r = sum(x * y for x, y in zip(a, b, strict=True))
    by_q = [-(y - r * x) / length for x, y in zip(a, b, strict=True)]
    mean = sum(x * y for x, y in zip(q, by_q, strict=True))
    expected = [x * (y - mean) for x, y in zip(q, by_q, strict=True)]
    assert student.grad[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_gradient_with_respect_to_teacher_and_temperature():
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0).requires_grad_()
    temperature = TAU_3D.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, tau: dist_loss(student, t, tau, MASK), (teacher, temperature))


@pytest.mark.parametrize("mask", [None, torch.tensor([1]), torch.tensor([1, 0, 0])])
def test_one_position_has_no_other_to_be_compared_with(mask):
    size = 1 if mask is None else len(mask)
    student, teacher = wave(size, 5).requires_grad_(), wave(size, 5, phase=1.0)
    value = dist_loss(student, teacher, mask=mask)
    value.backward()
    gap = 1 - pearsonr(softmax(student[0].tolist()), softmax(teacher[0].tolist())).statistic
    assert value.item() == pytest.approx(gap, rel=1e-9)
    assert student.grad.isfinite().all()


def test_of_two_classes_only_the_part_over_positions_teaches():
    student, teacher = wave(6, 2).requires_grad_(), wave(6, 2, phase=1.0)
    dist_loss(student, teacher, gamma=0).backward()
    assert student.grad.abs().max().item() < 1e-12
    dist_loss(student, teacher, beta=0).backward()
    assert student.grad.abs().max().item() > 1e-3


@pytest.mark.parametrize("logits", [torch.zeros(3, 5), torch.tensor([[200.0, 0, 0], [0, 200.0, 0], [0, 200.0, 0]])])
def test_probabilities_without_spread_and_saturated_ones_stay_finite(logits):
    for teacher in (logits, torch.zeros_like(logits)):
        student = logits.clone().requires_grad_()
        value = dist_loss(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_a_class_that_a_model_lacks_is_left_out():
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    absent = torch.full((3, 4, 1), -INF, dtype=torch.float64)
    expected = dist_loss(student, teacher, TAU_3D, MASK).item()
    for of_teacher in (absent, torch.ones_like(absent)):
        wide_S, wide_T = torch.cat([student, absent], -1).requires_grad_(), torch.cat([teacher, of_teacher], -1)
        value = dist_loss(wide_S, wide_T, TAU_3D, MASK)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert wide_S.grad.isfinite().all()
        assert wide_S.grad[..., 5].abs().max().item() == 0.0


def test_a_class_that_is_absent_at_some_positions_is_compared_over_the_others():
    """Choices of different number, padded: the last class exists at three positions of five."""
    student, teacher = wave(5, 4), wave(5, 4, phase=1.0)
    student[:2, 3], teacher[:2, 3] = -INF, -INF
    sizes = [3, 3, 4, 4, 4]
    pairs = [
        (softmax(s[:n]), softmax(t[:n])) for s, t, n in zip(student.tolist(), teacher.tolist(), sizes, strict=True)
    ]
    inter = sum(1 - pearsonr(q, p).statistic for q, p in pairs) / 5
    columns = [[(q[c], p[c]) for q, p in pairs if len(q) > c] for c in range(4)]
    intra = sum(1 - pearsonr(*zip(*column, strict=True)).statistic for column in columns) / 4
    assert dist_loss(student, teacher).item() == pytest.approx(inter + intra, rel=1e-9)


def test_a_position_without_any_common_class_is_worth_zero():
    student = torch.tensor([[-INF] * 3, [1.0, -INF, -INF], [0.5, 1.0, -1.0], [0.1, 0.2, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-INF] * 3, [-INF, 1.0, 0.0], [0.25, 2.0, 0.0], [0.0, -1.0, 0.0]], requires_grad=True)
    value = dist_loss(student, teacher)
    value.backward()
    inter = dist_loss(student[2:].detach(), teacher[2:].detach(), gamma=0).item()
    intra = dist_loss(student[2:].detach(), teacher[2:].detach(), beta=0).item()
    assert value.item() == pytest.approx(inter / 2 + intra, rel=1e-5)
    for leaf in (student, teacher):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].abs().max().item() == 0.0


@pytest.mark.parametrize("constants", [{"beta": -1}, {"gamma": math.nan}, {"temperature": 0}])
def test_constants_are_checked(constants):
    with pytest.raises(ValueError, match=f"{next(iter(constants))} must be"):
        dist_loss(wave(3, 5), wave(3, 5), **constants)
