"""Standardised logits: against the statistics module, what they are blind to, and with every loss between logits."""

import functools
import inspect
import math
import statistics

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import LOGIT_TRANSFORMS, kd_kl_loss, standardize
from textbrewer.registry import KD_LOSS_MAP

INF = math.inf
LABELS = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 3, 4, 4]])


def by_hand(row, ddof=1, eps=1e-7):
    deviation = (statistics.stdev if ddof else statistics.pstdev)(row)
    return [(value - statistics.mean(row)) / (deviation + eps) for value in row]


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-7), (0, 1e-7), (1, 0.1)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_is_the_standard_score_of_each_position(ddof, eps, scale):
    logits = scale * wave(3, 4, 5)
    actual = standardize(logits, eps=eps, ddof=ddof)
    for row, expected in zip(actual.reshape(-1, 5).tolist(), logits.reshape(-1, 5).tolist(), strict=True):
        assert row == pytest.approx(by_hand(expected, ddof, eps), rel=1e-9)


def test_is_registered():
    assert LOGIT_TRANSFORMS["standardize"] is standardize
    with pytest.raises(KeyError, match=r"unknown logit transform 'standardise'; .*'standardize'"):
        LOGIT_TRANSFORMS["standardise"]


def labels_for(name):
    return {"labels": LABELS} if "labels" in inspect.signature(KD_LOSS_MAP[name]).parameters else {}


def standardized_loss(name, student, teacher, mask):
    return KD_LOSS_MAP[name](standardize(student, mask), standardize(teacher, mask), 2.0, mask=mask, **labels_for(name))


@pytest.mark.parametrize("name", list(KD_LOSS_MAP))
@pytest.mark.parametrize("mask", [None, MASK])
def test_with_any_loss_the_logits_may_be_shifted_and_stretched(name, mask):
    """Position by position, on either side."""
    student, teacher = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
    stretch, shift = 1 + wave(3, 4, 1).abs(), 10 * wave(3, 4, 1, phase=2.0)
    expected = standardized_loss(name, student, teacher, mask).item()
    assert expected != 0.0
    assert standardized_loss(name, student * stretch + shift, teacher, mask).item() == pytest.approx(expected, rel=1e-5)
    assert standardized_loss(name, student, teacher * stretch + shift, mask).item() == pytest.approx(expected, rel=1e-5)


# nkd and annealing have a gradient where the student is the teacher, total_variation a jump of it.
SMOOTH_AT_THE_TEACHER = [name for name in KD_LOSS_MAP if name not in ("nkd", "annealing", "total_variation")]


@pytest.mark.parametrize("name", SMOOTH_AT_THE_TEACHER)
def test_with_any_loss_a_student_of_another_scale_has_nothing_to_learn(name):
    teacher = wave(3, 4, 5)
    student = (0.1 * teacher + 3).requires_grad_()
    standardized_loss(name, student, teacher, None).backward()
    assert student.grad.abs().max().item() < 1e-4
    plain = (0.1 * teacher + 3).requires_grad_()
    KD_LOSS_MAP[name](plain, teacher, 2.0, **labels_for(name)).backward()
    assert plain.grad.abs().max().item() > 1e-3


@pytest.mark.parametrize("mask", [None, MASK])
def test_gradient_is_the_derivative(mask):
    student, teacher = wave(3, 4, 5).requires_grad_(), wave(3, 4, 5, phase=1.0).requires_grad_()
    pair = functools.partial(standardized_loss, "kl", mask=mask)
    assert torch.autograd.gradcheck(pair, (student, teacher))


@pytest.mark.parametrize("content", [math.nan, INF, -INF])
def test_the_content_of_masked_positions_becomes_zero(content):
    places = (MASK == 0).unsqueeze(-1)
    logits = wave(3, 4, 5).masked_fill(places, content).requires_grad_()
    actual = standardize(logits, MASK)
    actual.square().sum().backward()
    assert (actual[MASK == 0] == 0).all()
    assert torch.equal(actual[MASK == 1], standardize(wave(3, 4, 5))[MASK == 1])
    assert logits.grad.isfinite().all()
    assert (logits.grad[MASK == 0] == 0).all()


def test_an_absent_class_stays_absent_and_is_not_counted():
    logits = wave(3, 5)
    logits[0, 1], logits[1] = -INF, -INF
    logits[2, 1:] = -INF
    leaf = logits.clone().requires_grad_()
    actual = standardize(leaf)
    assert actual.isneginf().tolist() == logits.isneginf().tolist()
    assert actual[0, [0, 2, 3, 4]].tolist() == pytest.approx(by_hand(logits[0, [0, 2, 3, 4]].tolist()), rel=1e-9)
    assert actual[2, 0].item() == 0.0  # of one class there is no spread
    actual.masked_fill(logits.isneginf(), 0.0).sum().backward()
    assert leaf.grad.isfinite().all()
    other = wave(3, 5, phase=1.0)
    assert kd_kl_loss(actual.detach(), standardize(other), 2.0).isfinite()


def test_equal_logits_stay_finite():
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    actual = standardize(logits)
    assert (actual == 0).all()
    kd_kl_loss(actual, standardize(wave(2, 5, dtype=torch.float32))).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_computed_in_float32_or_wider(dtype):
    logits = (200 * wave(3, 5)).to(dtype).requires_grad_()
    actual = standardize(logits)
    actual[0, 0].backward()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(actual.double(), standardize(logits.detach().double()), rtol=1e-5)
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


def test_nothing_is_read_back_from_the_device():
    logits, masks = torch.stack([wave(3, 4, 5), wave(3, 4, 5, phase=1.0)]), torch.stack([MASK, MASK.flip(0)])
    actual = torch.func.vmap(standardize)(logits, masks)
    for i in range(2):
        assert torch.allclose(actual[i], standardize(logits[i], masks[i]), rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3, 2), {}, "at least 3 classes to be standardized, got 2: .*use logit_transform='none'"),
        ((3, 4, 5), {"mask": torch.ones(3, 5)}, r"mask must have the shape \(3, 4\)"),
        ((3, 5), {"eps": 0}, "eps must be greater than 0"),
        ((3, 5), {"ddof": 2}, "ddof must be 0 or 1, got 2"),
    ],
)
def test_arguments_are_checked(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        standardize(wave(*shape), **arguments)
