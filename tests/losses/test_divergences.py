"""Divergences by position: against loops and scipy, closed-form gradients, limits and bounds."""

import functools
import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from tests.losses.samples import MASK, wave
from textbrewer.losses import (
    jsd_loss,
    kd_kl_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    symmetric_kl_loss,
    total_variation_loss,
)
from textbrewer.registry import KD_LOSS_MAP

INF = math.inf
TAU_3D = 1 + torch.arange(12, dtype=torch.float64).reshape(3, 4) / 4


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(share, p, q):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def gjsd(p, q, beta):
    return beta * kl(p, mix(beta, p, q)) + (1 - beta) * kl(q, mix(beta, p, q))


# The loss, its formula for one position (p teacher, q student), and the power of the temperature.
CASES = {
    "reverse_kl": (reverse_kl_loss, lambda p, q: kl(q, p), 2),
    "symmetric_kl": (symmetric_kl_loss, lambda p, q: 0.5 * kl(p, q) + 0.5 * kl(q, p), 2),
    "symmetric_kl 0.2": (
        functools.partial(symmetric_kl_loss, ratio=0.2),
        lambda p, q: 0.2 * kl(p, q) + 0.8 * kl(q, p),
        2,
    ),
    "jsd": (jsd_loss, lambda p, q: gjsd(p, q, 0.5), 2),
    "jsd 0.1": (functools.partial(jsd_loss, beta=0.1), lambda p, q: gjsd(p, q, 0.1), 2),
    "jsd 0.7 normalize": (
        functools.partial(jsd_loss, beta=0.7, normalize=True),
        lambda p, q: gjsd(p, q, 0.7) / (0.7 * 0.3),
        2,
    ),
    "jsd 0": (functools.partial(jsd_loss, beta=0), lambda p, q: kl(p, q), 2),
    "jsd 1": (functools.partial(jsd_loss, beta=1.0), lambda p, q: kl(q, p), 2),
    "skew_kl": (skew_kl_loss, lambda p, q: kl(p, mix(0.1, p, q)), 2),
    "skew_kl 0.6": (functools.partial(skew_kl_loss, alpha=0.6), lambda p, q: kl(p, mix(0.6, p, q)), 2),
    "skew_reverse_kl": (skew_reverse_kl_loss, lambda p, q: kl(q, mix(0.1, q, p)), 2),
    "total_variation": (
        total_variation_loss,
        lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        1,
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def loop_loss(case, logits_S, logits_T, temperature=1.0, mask=None):
    _, formula, power = CASES[case]
    classes, shape = logits_S.shape[-1], logits_S.shape[:-1]
    taus = torch.as_tensor(temperature, dtype=torch.float64).expand(shape).flatten().tolist()
    kept = [True] * len(taus) if mask is None else mask.bool().flatten().tolist()
    rows = zip(logits_S.reshape(-1, classes).tolist(), logits_T.reshape(-1, classes).tolist(), taus, kept, strict=True)
    losses = [
        tau**power * formula(softmax([t / tau for t in teacher]), softmax([s / tau for s in student]))
        for student, teacher, tau, keep in rows
        if keep
    ]
    return sum(losses) / len(losses)


@every_case
@pytest.mark.parametrize(
    ("shape", "temperature", "mask"),
    [
        ((3, 5), 1.0, None),
        ((3, 5), 3, torch.tensor([1, 0, 1])),
        ((3, 4, 5), torch.tensor(2.5), None),
        ((3, 4, 5), 0.5, MASK),
        ((3, 4, 5), TAU_3D, MASK),
    ],
)
def test_is_the_loop_over_positions_and_classes(case, shape, temperature, mask):
    student, teacher = wave(*shape), wave(*shape, phase=1.0)
    actual = CASES[case][0](student, teacher, temperature, mask=mask)
    assert actual.item() == pytest.approx(loop_loss(case, student, teacher, temperature, mask), rel=1e-10)


def test_reverse_kl_and_jsd_are_scipys():
    student, teacher = wave(6, 5), wave(6, 5, phase=1.0)
    q, p = torch.softmax(student, -1).numpy(), torch.softmax(teacher, -1).numpy()
    assert reverse_kl_loss(student, teacher).item() == pytest.approx(rel_entr(q, p).sum(axis=1).mean(), rel=1e-10)
    distance = jensenshannon(p, q, axis=1)
    assert jsd_loss(student, teacher).item() == pytest.approx((distance**2).mean(), rel=1e-10)


def closed_form_gradient(case, p, q):
    """The derivative of one position with respect to the student's logits, at the temperature 1."""
    both = list(zip(p, q, strict=True))
    if case == "reverse_kl":
        return [b * (math.log(b / a) - kl(q, p)) for a, b in both]
    if case == "symmetric_kl":
        return [0.5 * (b - a) + 0.5 * b * (math.log(b / a) - kl(q, p)) for a, b in both]
    if case == "jsd 0.1":
        m = mix(0.1, p, q)
        return [0.9 * b * (math.log(b / c) - kl(q, m)) for b, c in zip(q, m, strict=True)]
    signs = [math.copysign(1, b - a) for a, b in both]
    mean = sum(b * sign for b, sign in zip(q, signs, strict=True))
    return [0.5 * b * (sign - mean) for b, sign in zip(q, signs, strict=True)]


@pytest.mark.parametrize("case", ["reverse_kl", "symmetric_kl", "jsd 0.1", "total_variation"])
def test_gradient_is_the_closed_form(case):
    student, teacher = wave(3, 4, 5).requires_grad_(), wave(3, 4, 5, phase=1.0)
    CASES[case][0](student, teacher, mask=MASK).backward()
    for row in range(3):
        for position in range(4):
            p, q = (softmax(x[row, position].tolist()) for x in (teacher, student))
            expected = [value / 9 if MASK[row, position] else 0.0 for value in closed_form_gradient(case, p, q)]
            assert student.grad[row, position].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@every_case
def test_gradient_with_respect_to_teacher_and_temperature(case):
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0).requires_grad_()
    temperature = TAU_3D.clone().requires_grad_()
    loss = CASES[case][0]
    assert torch.autograd.gradcheck(lambda t, tau: loss(student, t, tau, mask=MASK), (teacher, temperature))


def test_kl_is_also_named_forward_kl():
    assert KD_LOSS_MAP["forward_kl"] is KD_LOSS_MAP["kl"] is kd_kl_loss


def test_symmetric_kl_passes_from_reverse_to_forward():
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    ends = reverse_kl_loss(student, teacher, 2.0).item(), kd_kl_loss(student, teacher, 2.0).item()
    for ratio in (0, 0.25, 1):
        expected = ratio * ends[1] + (1 - ratio) * ends[0]
        assert symmetric_kl_loss(student, teacher, 2.0, ratio=ratio).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("beta", "end"), [(1e-5, kd_kl_loss), (1 - 1e-5, reverse_kl_loss)])
def test_jsd_divided_by_its_factor_tends_to_the_kl_divergences(beta, end):
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    expected = end(student, teacher, 2.0).item()
    assert jsd_loss(student, teacher, 2.0, beta=beta, normalize=True).item() == pytest.approx(expected, rel=1e-3)
    plain = jsd_loss(student, teacher, 2.0, beta=beta).item()
    assert plain / (beta * (1 - beta)) == pytest.approx(expected, rel=1e-3)
    assert jsd_loss(student, teacher, 2.0, beta=round(beta)).item() == expected


def test_jsd_of_a_half_does_not_tell_the_sides_apart():
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    assert jsd_loss(student, teacher).item() == pytest.approx(jsd_loss(teacher, student).item(), rel=1e-12)
    assert jsd_loss(student, teacher, beta=0.2).item() == pytest.approx(jsd_loss(teacher, student, beta=0.8).item())


WORST = torch.tensor([[80.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 80.0, 0.0]], dtype=torch.float64)
BOUNDS = [
    (functools.partial(skew_kl_loss, alpha=0.1), -math.log(0.1)),
    (functools.partial(skew_kl_loss, alpha=0.5), math.log(2)),
    (functools.partial(skew_reverse_kl_loss, alpha=0.1), -math.log(0.1)),
    (jsd_loss, math.log(2)),
    (functools.partial(jsd_loss, beta=0.2), -0.2 * math.log(0.2) - 0.8 * math.log(0.8)),
    (total_variation_loss, 1.0),
]


@pytest.mark.parametrize(("loss", "bound"), BOUNDS)
def test_has_the_bound_that_it_reaches_where_nothing_is_shared(loss, bound):
    assert loss(*WORST).item() == pytest.approx(bound, rel=1e-10)
    for scale in (0.1, 1.0, 10.0, 100.0):
        assert 0 < loss(scale * wave(8, 5), scale * wave(8, 5, phase=1.0)).item() < bound


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_skew_kl_is_below_its_share_of_the_kl_divergence(alpha):
    """KL is convex in its second argument: KL(p || a p + (1 - a) q) <= (1 - a) KL(p || q)."""
    student, teacher = wave(3, 5), wave(3, 5, phase=1.0)
    forward, reverse = kd_kl_loss(student, teacher).item(), reverse_kl_loss(student, teacher).item()
    assert 0 < skew_kl_loss(student, teacher, alpha=alpha).item() < (1 - alpha) * forward
    assert 0 < skew_reverse_kl_loss(student, teacher, alpha=alpha).item() < (1 - alpha) * reverse


@every_case
def test_summing_classes_up_makes_no_divergence_larger(case):
    """The log-sum inequality, which all f-divergences share: two classes that became one are told apart no more."""
    student, teacher = wave(7, 5), wave(7, 5, phase=1.0)
    coarse = [torch.cat([x[:, :3], x[:, 3:].logsumexp(-1, keepdim=True)], -1) for x in (student, teacher)]
    loss = CASES[case][0]
    assert 0 < loss(*coarse).item() <= loss(student, teacher).item()


def test_pinskers_inequality():
    for row in range(12):
        student, teacher = wave(12, 5)[row : row + 1], wave(12, 5, phase=1.0)[row : row + 1]
        distance = total_variation_loss(student, teacher).item()
        assert distance**2 <= kd_kl_loss(student, teacher).item() / 2
        assert distance**2 <= reverse_kl_loss(student, teacher).item() / 2


@every_case
def test_the_temperature_keeps_the_size_of_the_gradient(case):
    """Towards high temperatures the gradient tends to a limit that is neither zero nor infinite."""
    sizes = []
    for tau in (1e3, 1e4):
        student = wave(3, 5).requires_grad_()
        CASES[case][0](student, wave(3, 5, phase=1.0), tau).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] > 1e-3
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)


@every_case
def test_a_class_that_the_student_lacks_changes_nothing(case):
    """Neither where both lack it nor where the teacher has it: it is taken out of the teacher's distribution."""
    loss = CASES[case][0]
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    absent = torch.full((3, 4, 1), -INF, dtype=torch.float64)
    expected = loss(student, teacher, TAU_3D, mask=MASK).item()
    for of_teacher in (absent, torch.ones_like(absent)):
        wide_S, wide_T = torch.cat([student, absent], -1).requires_grad_(), torch.cat([teacher, of_teacher], -1)
        value = loss(wide_S, wide_T, TAU_3D, mask=MASK)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert wide_S.grad.isfinite().all()
        assert wide_S.grad[..., 5].abs().max().item() == 0.0


@every_case
def test_a_class_that_only_the_teacher_lacks(case):
    """Its probability is 0 there, where the formula allows that; where it would be infinite the class is left out."""
    loss, formula, power = CASES[case]
    student, p = [0.3, 0.9, 1.1], softmax([0.1, -0.35])
    left_out = case == "reverse_kl" or case.startswith("symmetric") or case == "jsd 1"
    q = softmax([0.15, 0.55]) if left_out else softmax([value / 2 for value in student])
    expected = 2**power * (formula(p, q) if left_out else formula([p[0], 0.0, p[1]], q))
    logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.tensor([[0.2, -INF, -0.7]], dtype=torch.float64), 2.0)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 1].item() == 0) == left_out


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_position_without_any_common_class_is_worth_zero(case, dtype):
    loss, formula, power = CASES[case]
    student = torch.tensor([[-INF, -INF], [1.0, -INF], [0.5, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-INF, -INF], [-INF, 1.0], [0.25, 2.0]], dtype=dtype, requires_grad=True)
    temperature = torch.full((3,), 2.0, requires_grad=True)
    value = loss(student, teacher, temperature)
    value.backward()
    expected = 2**power * formula(softmax([0.125, 1.0]), softmax([0.25, 0.5])) / 3
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for leaf in (student, teacher, temperature):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].abs().max().item() == 0.0


@every_case
def test_saturated_probabilities_have_finite_gradients(case):
    student = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 0.0, 65504.0]], requires_grad=True)
    teacher = torch.tensor([[-65504.0, 65504.0, 0.0], [-65504.0, 0.0, 65504.0]])
    value = CASES[case][0](student, teacher, 0.5)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "constants", "error", "message"),
    [
        (symmetric_kl_loss, {"ratio": 1.5}, ValueError, "ratio must be from 0 to 1, got 1.5"),
        (symmetric_kl_loss, {"ratio": "1"}, TypeError, "ratio must be a number"),
        (jsd_loss, {"beta": -0.1}, ValueError, "beta must be from 0 to 1, got -0.1"),
        (jsd_loss, {"beta": math.nan}, ValueError, "beta must be finite"),
        (skew_kl_loss, {"alpha": 0}, ValueError, "between 0 and 1, got 0; the loss without a mixture is 'kl'"),
        (skew_kl_loss, {"alpha": 1}, ValueError, "alpha must be between 0 and 1, got 1"),
        (skew_reverse_kl_loss, {"alpha": 0}, ValueError, "the loss without a mixture is 'reverse_kl'"),
    ],
)
def test_constants_are_checked(loss, constants, error, message):
    with pytest.raises(error, match=message):
        loss(wave(3, 5), wave(3, 5), **constants)


@every_case
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_positive(case, temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        CASES[case][0](wave(3, 5), wave(3, 5), temperature)
