"""Weight and temperature schedules: against loops over positions, and TextBrewer's numbers."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer import DistillationConfig
from textbrewer.distillers import terms
from textbrewer.losses import kd_ce_loss
from textbrewer.registry import TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER
from textbrewer.schedulers import (
    LOWEST_TEMPERATURE,
    constant_temperature_scheduler,
    cwsm_temperature_scheduler_builder,
    flsw_temperature_scheduler_builder,
    linear_decay_weight_scheduler,
    linear_growth_weight_scheduler,
)

TWO = wave(3, 5), wave(3, 5, phase=1.0)
THREE = wave(3, 4, 5), wave(3, 4, 5, phase=1.0)
FLSW, CWSM = TEMPERATURE_SCHEDULER[["flsw", 1, 2]], TEMPERATURE_SCHEDULER[["cwsm", 1]]
both = pytest.mark.parametrize("schedule", [FLSW, CWSM], ids=["flsw", "cwsm"])


def flsw_weight(student, teacher, gamma, eps):
    dot = sum(s * t for s, t in zip(student, teacher, strict=True))
    return (1 - dot / ((math.hypot(*student) + eps) * (math.hypot(*teacher) + eps))) ** gamma


def cwsm_weight(student):
    exponentials = [math.exp(s) for s in student]
    return 1 / (max(exponentials) / sum(exponentials) + 1e-3)


def temperatures(weights, base, beta):
    return [base + beta * (sum(weights) / len(weights) - weight) for weight in weights]


def rows(logits, mask=None):
    return (logits.reshape(-1, logits.shape[-1]) if mask is None else logits[mask.bool()]).tolist()


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool()])
@pytest.mark.parametrize(("beta", "gamma", "eps"), [(1, 2, 1e-4), (0.5, 0, 1e-4), (3.0, 0.5, 0.1), (0, 1, 1e-4)])
def test_flsw_is_the_loop_over_positions(beta, gamma, eps, mask):
    tau = flsw_temperature_scheduler_builder(beta, gamma, eps)(*THREE, 6.0, mask=mask)
    weights = [flsw_weight(s, t, gamma, eps) for s, t in zip(rows(THREE[0], mask), rows(THREE[1], mask), strict=True)]
    kept = tau.flatten() if mask is None else tau[mask.bool()]
    assert tau.shape == (3, 4)
    assert kept.tolist() == pytest.approx(temperatures(weights, 6.0, beta), rel=1e-10)
    assert mask is None or (tau[~mask.bool()] == 6.0).all()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("beta", [1, 0.25, 0])
def test_cwsm_is_the_loop_over_positions(beta, mask):
    tau = cwsm_temperature_scheduler_builder(beta)(*THREE, 6.0, mask=mask)
    weights = [cwsm_weight(s) for s in rows(THREE[0], mask)]
    kept = tau.flatten() if mask is None else tau[mask.bool()]
    assert kept.tolist() == pytest.approx(temperatures(weights, 6.0, beta), rel=1e-10)
    assert mask is None or (tau[~mask.bool()] == 6.0).all()


# fmt: off
# Printed by TextBrewer 0.2.1.post1 for the same inputs; where there is a mask, it was given the selected positions.
PUBLISHED = [
    (FLSW, TWO, 4, None, [4.25935050335, 4.26660973024, 3.4740397664]),
    (FLSW, THREE, 4, MASK, [4.22107843502, 4.22833766191, 3.43576769807, 4.2061925596, 4.26166041776,
                           4.24157737608, 3.93224311584, 4.12698869454, 3.34615404118]),
    (flsw_temperature_scheduler_builder(2, 1.5, 1e-2), TWO, 8, None, [8.47932398794, 8.49959124026, 7.0210847718]),
    (CWSM, TWO, 4, None, [4.53567826707, 3.33016053749, 4.13416119544]),
    (CWSM, THREE, 4, MASK, [4.72602804798, 3.5205103184, 4.32451097635, 4.91808578253, 4.38013062748,
                           3.54463807708, 3.56212176376, 3.24690379333, 3.77707061308]),
]
# fmt: on


@pytest.mark.parametrize(("schedule", "logits", "base", "mask", "published"), PUBLISHED)
def test_is_textbrewers_number(schedule, logits, base, mask, published):
    tau = schedule(*logits, base, mask=mask)
    kept = tau if mask is None else tau[mask.bool()]
    assert kept.tolist() == pytest.approx(published, rel=1e-10)


@both
@pytest.mark.parametrize("base", [0.5, torch.tensor(0.5), torch.full((2,), 0.5)], ids=["number", "0-dim", "tensor"])
def test_no_temperature_reaches_zero(schedule, base):
    """One position agrees and is sure, the other is not: TextBrewer's temperatures are 1.5 below and above the base."""
    student = torch.tensor([[50.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    teacher = torch.tensor([[50.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    tau = schedule(student, teacher, base)
    assert tau[1].item() == pytest.approx(LOWEST_TEMPERATURE)
    assert tau[0].item() > 1.9
    assert kd_ce_loss(student, teacher, tau).isfinite()


@both
def test_a_low_base_temperature_is_respected(schedule):
    beta_0 = TEMPERATURE_SCHEDULER[["flsw", 0, 2] if schedule is FLSW else ["cwsm", 0]]
    for base in (0.05, torch.tensor(0.05), torch.full((3,), 0.05)):
        assert beta_0(*TWO, base).tolist() == pytest.approx([0.05] * 3)
        assert schedule(*TWO, base).min().item() == pytest.approx(0.05)


@both
def test_a_class_that_neither_model_has_changes_nothing(schedule):
    absent = torch.full((3, 4, 1), -math.inf, dtype=torch.float64)
    wide = [torch.cat([logits, absent], dim=-1) for logits in THREE]
    assert schedule(*wide, 4, mask=MASK).tolist() == schedule(*THREE, 4, mask=MASK).tolist()


@both
def test_positions_without_any_class_and_one_sided_infinities_stay_finite(schedule):
    student, teacher = THREE[0].clone(), THREE[1].clone()
    student[0, 0], teacher[0, 0], student[1, 0, 2], teacher[1, 1, 3] = -math.inf, -math.inf, -math.inf, -math.inf
    tau = schedule(student, teacher, 4.0)
    assert tau.isfinite().all()
    assert (tau >= LOWEST_TEMPERATURE).all()


@both
@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
def test_the_content_of_masked_positions_does_not_matter(schedule, content):
    spoilt = [logits.masked_fill(MASK.unsqueeze(-1) == 0, content) for logits in THREE]
    assert schedule(*spoilt, 4, mask=MASK).tolist() == schedule(*THREE, 4, mask=MASK).tolist()


@both
def test_an_empty_mask_gives_the_base_temperature(schedule):
    assert schedule(*THREE, 4, mask=torch.zeros(3, 4)).tolist() == [[4.0] * 4] * 3


@both
def test_zero_logits_stay_finite(schedule):
    zeros = torch.zeros(3, 5)
    assert schedule(zeros, zeros, 4).tolist() == pytest.approx([4.0] * 3)


def test_rounding_of_the_cosine_does_not_make_a_fractional_power_nan():
    """The cosine of equal vectors may round to just above 1, and (1 - cosine) ** 0.5 would then be NaN."""
    logits = wave(500, 37, dtype=torch.float32) * 1e4
    unit = logits / (logits.norm(dim=-1, keepdim=True) + 1e-12)
    assert ((unit * unit).sum(dim=-1) > 1).any()
    assert flsw_temperature_scheduler_builder(1, 0.5, 1e-12)(logits, logits, 4).isfinite().all()


@both
def test_gradient_does_not_flow_through_the_temperature(schedule):
    student, teacher = (logits.clone().requires_grad_() for logits in TWO)
    assert not schedule(student, teacher, 4).requires_grad


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_give_float32_temperatures(schedule, dtype):
    low = [200 * logits.to(dtype) for logits in TWO]
    tau = schedule(*low, 8)
    assert tau.dtype == torch.float32
    assert tau.tolist() == pytest.approx(schedule(*(logits.double() for logits in low), 8).tolist(), rel=1e-5)


@both
def test_nothing_is_read_back_from_the_device(schedule):
    """Under vmap, reading a value or selecting by a mask is an error."""
    stacked = [torch.stack([logits, 0.5 * logits]) for logits in THREE]
    masks = torch.stack([MASK, MASK.flip(0)])
    taus = torch.func.vmap(lambda s, t, m: schedule(s, t, 4.0, mask=m))(*stacked, masks)
    for i in range(2):
        expected = schedule(stacked[0][i], stacked[1][i], 4.0, mask=masks[i])
        assert torch.allclose(taus[i], expected, rtol=1e-12)


@pytest.mark.parametrize("base", [4, torch.tensor([1.0, 2.0])])
def test_constant_is_the_base_temperature_itself(base):
    assert TEMPERATURE_SCHEDULER["constant"] is constant_temperature_scheduler
    assert constant_temperature_scheduler(*TWO, base) is base
    assert constant_temperature_scheduler(*THREE, base, mask=MASK) is base


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_weights_are_linear_in_the_progress(progress):
    assert WEIGHT_SCHEDULER["linear_growth"] is linear_growth_weight_scheduler
    assert WEIGHT_SCHEDULER["linear_decay"] is linear_decay_weight_scheduler
    assert linear_growth_weight_scheduler(progress) == progress
    assert linear_decay_weight_scheduler(progress) == 1 - progress


@pytest.mark.parametrize(("name", "ends"), [("cosine_growth", (0, 1)), ("cosine_decay", (1, 0))])
def test_cosine_weights_go_along_the_circle(name, ends):
    """The factor is the height, on a circle of diameter 1, after the same share of half its circumference."""
    schedule = WEIGHT_SCHEDULER[name]
    for progress in (0.0, 0.1, 1 / 3, 0.5, 0.8, 1.0):
        height = (complex(-1, 0) ** progress).real
        assert schedule(progress) == pytest.approx(0.5 + 0.5 * (height if name.endswith("decay") else -height))
    assert (schedule(0.0), schedule(1.0)) == pytest.approx(ends)
    assert schedule(0.01) == pytest.approx(schedule(0.0), abs=1e-3)
    assert schedule(0.99) == pytest.approx(schedule(1.0), abs=1e-3)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1])
def test_warmup_grows_linearly_and_stays(fraction):
    schedule = WEIGHT_SCHEDULER.make(["warmup", fraction])
    steps = [schedule(step / 1000) for step in range(1001)]
    growing = round(1000 * fraction)
    assert steps[: growing + 1] == pytest.approx([step / growing for step in range(growing + 1)])
    assert steps[growing:] == [1.0] * (1001 - growing)


POINTS = [[0.2, 0.5], [0.4, 1.0], [0.4, 0.25], [0.9, 0.0]]


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0, 0.5), (0.2, 0.5), (0.25, 0.625), (0.3, 0.75), (0.3999999, 1.0), (0.4, 0.25), (0.65, 0.125), (0.9, 0), (1, 0)],
)
def test_piecewise_goes_through_its_points(progress, factor):
    assert WEIGHT_SCHEDULER.make(["piecewise", POINTS])(progress) == pytest.approx(factor, abs=1e-5)


def test_piecewise_of_two_points_is_linear_and_of_one_constant():
    whole, one = (
        WEIGHT_SCHEDULER.make(["piecewise", [[0, 0], [1, 1]]]),
        WEIGHT_SCHEDULER.make(["piecewise", [(0.3, 2)]]),
    )
    for progress in (0.0, 0.17, 0.5, 1.0):
        assert whole(progress) == pytest.approx(linear_growth_weight_scheduler(progress))
        assert one(progress) == 2.0


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_teacher_annealing_is_the_cross_entropy_with_a_mixed_target(progress):
    """BAM: lam * onehot + (1 - lam) * p, by two schedules that every configuration can name."""
    config = DistillationConfig(
        temperature=1,
        kd_loss_type="ce",
        kd_loss_weight_scheduler="linear_decay",
        hard_label_weight=1,
        hard_label_weight_scheduler="linear_growth",
    )
    student, teacher, labels = wave(3, 5).requires_grad_(), wave(3, 5, phase=1.0), torch.tensor([4, 0, 2])
    now = terms.scheduled(config, progress, None)
    hard = torch.nn.functional.cross_entropy(student, labels)
    loss = now.kd_weight * kd_ce_loss(student, teacher, config.temperature) + now.hard_label_weight * hard
    loss.backward()
    expected, gradients = 0.0, []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        q, p = (([math.exp(x) / sum(map(math.exp, row)) for x in row]) for row in (s, t))
        target = [progress * (c == label) + (1 - progress) * p[c] for c in range(5)]
        expected -= sum(goal * math.log(x) for goal, x in zip(target, q, strict=True)) / 3
        gradients.append([(x - goal) / 3 for goal, x in zip(target, q, strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(student.grad, torch.tensor(gradients, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (["linear", 1], [8.0, 6.25, 4.5, 1.0]),
        (["linear", {"end": 10}], [8.0, 8.5, 9.0, 10.0]),
        (["cosine", 2], [8.0, 8 - 6 * (1 - math.sqrt(0.5)) / 2, 5.0, 2.0]),
        (["warmup", 0.5], [1.0, 4.5, 8.0, 8.0]),
        (["warmup", 1, 2], [2.0, 3.5, 5.0, 8.0]),
    ],
)
@pytest.mark.parametrize("mask", [None, MASK])
def test_temperatures_by_progress(spec, expected, mask):
    schedule = TEMPERATURE_SCHEDULER.make(spec)
    logits = TWO if mask is None else THREE
    actual = [schedule(*logits, 8, mask=mask, progress=progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert actual == pytest.approx(expected)
    assert all(isinstance(tau, float) for tau in actual)
    assert schedule(*logits, 8) == expected[0]
    tensor = schedule(*logits, torch.tensor([8.0, 4.0]), progress=1.0)
    assert tensor[0].item() == pytest.approx(expected[-1])
    assert kd_ce_loss(*logits, actual[1], mask=mask).isfinite()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["flsw", "1", 2], TypeError, "beta must be a number, got '1'"),
        (["flsw", math.nan, 2], ValueError, "beta must be finite"),
        (["flsw", 1, -1], ValueError, "gamma must be at least 0, got -1"),
        (["flsw", 1, 2, 0], ValueError, "eps must be greater than 0, got 0"),
        (["flsw", 1], TypeError, "gamma"),
        (["cwsm", True], TypeError, "beta must be a number"),
        (["cwsm", 1, 2], TypeError, "cwsm"),
        (["linear", 0], ValueError, "end must be greater than 0, got 0"),
        (["cosine", "low"], TypeError, "end must be a number"),
        (["warmup", 0], ValueError, "fraction must be greater than 0, got 0"),
        (["warmup", 1.5], ValueError, "fraction must be at most 1, a part of the training, got 1.5"),
        (["warmup", 0.5, -1], ValueError, "start must be greater than 0, got -1"),
    ],
)
def test_builders_check_their_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TEMPERATURE_SCHEDULER[arguments]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["warmup", -0.1], ValueError, "fraction must be greater than 0"),
        (["warmup", 2], ValueError, "fraction must be at most 1"),
        (["piecewise", []], ValueError, r"points must be a list of pairs \[progress, factor\], at least one, got \[\]"),
        (["piecewise", "linear"], ValueError, "points must be a list of pairs"),
        (["piecewise", [0.5, 1]], TypeError, "a point must be a pair .progress, factor., got 0.5"),
        (["piecewise", [[0, 1, 2]]], TypeError, "a point must be a pair"),
        (["piecewise", [[0, "1"]]], TypeError, "factor of a point must be a number"),
        (["piecewise", [[0, -1]]], ValueError, "factor of a point must be at least 0"),
        (["piecewise", [[-0.5, 1]]], ValueError, "progress of a point must be at least 0"),
        (["piecewise", [[0.5, 1], [0.2, 0]]], ValueError, r"in order of their progress, from 0 to 1, got \[0.5, 0.2\]"),
        (["piecewise", [[0, 1], [2, 0]]], ValueError, "in order of their progress, from 0 to 1"),
    ],
)
def test_weight_builders_check_their_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        WEIGHT_SCHEDULER.make(arguments)


@pytest.mark.parametrize(
    ("table", "name"),
    [(WEIGHT_SCHEDULER, "warmup"), (WEIGHT_SCHEDULER, "piecewise")]
    + [(TEMPERATURE_SCHEDULER, name) for name in ("flsw", "cwsm", "linear", "cosine", "warmup")],
)
def test_a_builder_without_its_parameters_says_how_to_write_it(table, name):
    with pytest.raises(ValueError, match=rf"{name}' needs its parameters: write \['{name}', "):
        table.make(name)


@both
def test_schedules_check_their_arguments(schedule):
    with pytest.raises(ValueError, match=r"logits of student and teacher must have the same shape"):
        schedule(TWO[0], THREE[0], 4)
    with pytest.raises(ValueError, match=r"mask must have the shape \(3, 4\), one value a position, got \(3, 5\)"):
        schedule(*THREE, 4, mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        schedule(*THREE, 0)


@pytest.mark.parametrize("spec", [["linear", 2], ["cosine", 2], ["warmup", 0.5]])
def test_schedules_by_progress_refuse_a_base_temperature_that_is_not_positive(spec):
    with pytest.raises(ValueError, match="temperature must be greater than 0, got -1"):
        TEMPERATURE_SCHEDULER.make(spec)(*TWO, -1, progress=0.5)
