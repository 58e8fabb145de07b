"""What every registered loss promises, whatever it computes; a new loss is tested here by being registered."""

import inspect
import math

import pytest
import torch

from tests.losses.samples import MASK, PAIRS, feature_of, wave
from textbrewer.losses import denominator_of
from textbrewer.registry import KD_LOSS_MAP, MATCH_LOSS_MAP

KD_NAMES, MATCH_NAMES = list(KD_LOSS_MAP), list(MATCH_LOSS_MAP)
NAMES = KD_NAMES + MATCH_NAMES
# The weights of wsld depend on the logits, but no gradient flows through them.
CONSTANT_WEIGHTS = ("wsld",)
every_loss = pytest.mark.parametrize("name", NAMES)
masked_or_not = pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])


def loss_of(name):
    return KD_LOSS_MAP[name] if name in KD_LOSS_MAP else MATCH_LOSS_MAP[name]


def positions_of(name):
    """The dimensions of the loss's input that run over positions."""
    return {"attention": (2, 3), "scores": (2, 3), "value": (2,), "hidden": (1,)}[feature_of(name)]


def shape_of(name, batch=3, length=4):
    """The shape of one tensor of the loss's input."""
    pairs = len(positions_of(name)) == 2
    return (batch, length, 5) if feature_of(name) == "hidden" else (batch, 2, length, length if pairs else 5)


def sample(name, phase, dtype=torch.float64):
    """One side's input: as a list of tensors, also where there is but one. Scores are positive: see attention.py."""
    shift = 2.5 if name.startswith("attention") else 0.0
    count = 2 if name in PAIRS else 1
    return [(wave(*shape_of(name), phase=phase + 5 * i) + shift).to(dtype) for i in range(count)]


def both_sides(name, dtype=torch.float64):
    student, teacher = sample(name, 0.0, dtype), sample(name, 1.0, dtype)
    if name == "vid":  # the student's means, and variances: positive
        student = [torch.cat([x, x.abs() + 0.5], dim=-1) for x in student]
    return student, teacher


def call(name, student, teacher, mask=None):
    if name in PAIRS:
        return loss_of(name)(student, teacher, mask=mask)
    return loss_of(name)(student[0], teacher[0], mask=mask, **labels_for(name, teacher[0]))


def labels_for(name, logits_T):
    """The true classes where the loss reads them, made of the logits so that they move with their rows; mixed ranks."""
    if "labels" not in inspect.signature(loss_of(name)).parameters:
        return {}
    return {"labels": (logits_T.argmax(dim=-1) + logits_T.argmin(dim=-1)) % logits_T.shape[-1]}


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def masked_places(name, mask, like):
    """Where the content of a tensor of the loss's input does not matter, as a bool tensor of its shape."""
    places = torch.zeros_like(like, dtype=torch.bool)
    for dimension in positions_of(name):
        shape = [len(mask), *(size if d == dimension else 1 for d, size in enumerate(like.shape) if d > 0)]
        places |= (mask == 0).reshape(shape)
    return places


def value_and_gradients(name, student, teacher, mask):
    """The value and all gradients; an error if NaN arises anywhere on the way, even if it is hidden again."""
    student, teacher = leaves(student), leaves(teacher)
    with torch.autograd.set_detect_anomaly(True):
        value = call(name, student, teacher, mask)
        value.backward()
    return value.item(), [leaf.grad for leaf in student + teacher]


def test_all_names_of_textbrewer_are_there():
    assert {"mse", "ce", "kl", "sigmoid"} <= set(KD_NAMES)
    published = "attention_mse attention_mse_sum attention_ce attention_ce_mean hidden_mse cos pkd fsp gram nst mmd"
    assert set(published.split()) <= set(MATCH_NAMES)
    assert MATCH_LOSS_MAP["fsp"] is MATCH_LOSS_MAP["gram"]
    assert MATCH_LOSS_MAP["nst"] is MATCH_LOSS_MAP["mmd"]


@every_loss
@masked_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_computed_in_float32_or_wider(name, mask, dtype):
    student, teacher = both_sides(name, dtype)
    value = call(name, student, teacher, mask)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = call(name, [x.double() for x in student], [x.double() for x in teacher], mask)
    assert value.item() == pytest.approx(exact.item(), rel=2e-6, abs=3e-8)


@every_loss
@masked_or_not
def test_float16_does_not_overflow(name, mask):
    student, teacher = ([200 * x for x in side] for side in both_sides(name, torch.float16))
    exact = call(name, [x.double() for x in student], [x.double() for x in teacher], mask)
    assert exact.isfinite()
    assert call(name, student, teacher, mask).item() == pytest.approx(exact.item(), rel=1e-5, abs=3e-8)


@every_loss
@masked_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradient_comes_back_finite_in_the_dtype_of_the_input(name, mask, dtype):
    _, gradients = value_and_gradients(name, *both_sides(name, dtype), mask)
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        assert gradient.abs().max().item() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONSTANT_WEIGHTS])
@masked_or_not
def test_gradient_is_the_derivative(name, mask):
    student, teacher = (leaves(side) for side in both_sides(name))
    count = len(student)
    assert torch.autograd.gradcheck(lambda *x: call(name, x[:count], x[count:], mask), (*student, *teacher))


NOT_LEAST_AT_THE_TEACHER = ("vid", "crd", "nkd", "annealing")
"""A variance that could be smaller still; negatives that could be further away; nkd pulls the true class to 1, and
annealing, at the start of the training, to a share of the teacher's logits."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_LEAST_AT_THE_TEACHER])
@masked_or_not
def test_gradient_vanishes_where_the_student_is_the_teacher(name, mask):
    student, teacher = leaves(sample(name, 0.0)), sample(name, 0.0)
    call(name, student, teacher, mask).backward()
    for leaf in student:
        assert leaf.grad.abs().max().item() < 1e-12


def gradient_needs_finite_states(name, content):
    """hidden_mse, for its speed, promises a finite gradient only where the masked states are finite."""
    return name == "hidden_mse" and content is not None and not math.isfinite(content)


@every_loss
@pytest.mark.parametrize("content", [None, math.nan, math.inf, -math.inf])
def test_an_empty_mask_gives_zero_and_gradients_of_zero(name, content):
    student, teacher = both_sides(name)
    if content is not None:
        student, teacher = ([torch.full_like(x, content) for x in side] for side in (student, teacher))
    if gradient_needs_finite_states(name, content):
        assert call(name, student, teacher, torch.zeros(3, 4)).item() == 0.0
        return
    value, gradients = value_and_gradients(name, student, teacher, torch.zeros(3, 4))
    assert value == 0.0
    for gradient in gradients:
        assert gradient.abs().max().item() == 0.0


@every_loss
@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 7.0])
def test_the_content_of_masked_positions_does_not_matter(name, content):
    mask = MASK.clone()
    mask[1] = 0  # a whole row too: padding rows of a batch
    student, teacher = both_sides(name)
    value, gradients = value_and_gradients(name, student, teacher, mask)
    spoilt_S, spoilt_T = (
        [x.masked_fill(masked_places(name, mask, x), content) for x in side] for side in (student, teacher)
    )
    if gradient_needs_finite_states(name, content):
        assert call(name, spoilt_S, spoilt_T, mask).item() == pytest.approx(value, rel=1e-12)
        return
    spoilt_value, spoilt_gradients = value_and_gradients(name, spoilt_S, spoilt_T, mask)
    assert spoilt_value == pytest.approx(value, rel=1e-12)
    for expected, actual in zip(gradients, spoilt_gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-15)
        assert actual[masked_places(name, mask, actual)].abs().max().item() == 0.0


@every_loss
def test_padding_changes_nothing(name):
    def padded(x):
        shape = [5, *(6 if d in positions_of(name) else size for d, size in enumerate(x.shape) if d > 0)]
        wide = torch.full(shape, math.nan, dtype=x.dtype)
        wide[tuple(slice(0, size) for size in x.shape)] = x
        return wide

    student, teacher = both_sides(name)
    mask = torch.zeros(5, 6)
    mask[:3, :4] = MASK
    actual = call(name, [padded(x) for x in student], [padded(x) for x in teacher], mask)
    assert actual.item() == pytest.approx(call(name, student, teacher, MASK).item(), rel=1e-10)


@every_loss
def test_a_full_mask_is_no_mask(name):
    student, teacher = both_sides(name)
    expected = call(name, student, teacher).item()
    assert call(name, student, teacher, torch.ones(3, 4)).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_the_dtype_of_the_mask_does_not_matter(name, dtype):
    student, teacher = both_sides(name, torch.float32)
    expected = call(name, student, teacher, MASK.float())
    assert call(name, student, teacher, MASK.to(dtype)).item() == expected.item()


@every_loss
@masked_or_not
def test_strides_do_not_matter(name, mask):
    student, teacher = both_sides(name)
    strided_S, strided_T = (
        [x.transpose(0, -1).contiguous().transpose(0, -1) for x in side] for side in (student, teacher)
    )
    assert not strided_S[0].is_contiguous()
    expected = call(name, student, teacher, mask).item()
    assert call(name, strided_S, strided_T, mask).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@masked_or_not
def test_inputs_are_left_as_they_are(name, mask):
    student, teacher = both_sides(name)
    before = [x.clone() for x in student + teacher]
    kept = None if mask is None else mask.clone()
    call(name, student, teacher, kept)
    assert all(torch.equal(x, y) for x, y in zip(before, student + teacher, strict=True))
    assert mask is None or torch.equal(mask, kept)


@every_loss
def test_nothing_is_read_back_from_the_device(name):
    """Under vmap, reading a value or selecting by a mask is an error: no shape may depend on the data."""
    student, teacher = both_sides(name)
    count = len(student)
    stacked = [torch.stack([x, 0.5 * x]) for x in student + teacher]
    masks = torch.stack([MASK, MASK.flip(0)])
    values = torch.func.vmap(lambda mask, *x: call(name, x[:count], x[count:], mask))(masks, *stacked)
    for i in range(2):
        rows = [x[i] for x in stacked]
        expected = call(name, rows[:count], rows[count:], masks[i])
        assert values[i].item() == pytest.approx(expected.item(), rel=1e-12)


BY_BATCH = [name for name in NAMES if denominator_of(loss_of(name)) == "batch"]


def five_rows(name):
    """Both sides with two rows more, and a mask that keeps nothing of one of these."""
    mask = torch.cat([MASK, torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]])]).double()
    rows_S, rows_T = (
        [torch.cat([x, x[:2] * 0.5 if name == "vid" else -x[:2] + 5 * name.startswith("attention")]) for x in side]
        for side in both_sides(name)
    )
    return rows_S, rows_T, mask


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_BATCH])
def test_micro_batches_add_up_by_the_denominator_it_names(name):
    """The mean over a batch is the mean over its parts, each weighing what the loss says that it counts."""
    parts_S, parts_T, mask = five_rows(name)
    kept = mask.sum(dim=1)
    counts = {"rows": (kept > 0).double(), "positions": kept, "pairs": kept**2}[denominator_of(loss_of(name))]
    total = sum(
        counts[part].sum() * call(name, [x[part] for x in parts_S], [x[part] for x in parts_T], mask[part])
        for part in (slice(0, 1), slice(1, 4), slice(4, 5))
    )
    whole = call(name, parts_S, parts_T, mask)
    assert whole.item() == pytest.approx((total / counts.sum()).item(), rel=1e-10)


@pytest.mark.parametrize("name", BY_BATCH)
def test_the_rows_of_a_batch_matter_to_each_other(name):
    """No weights make the losses of the parts that of the whole: in some way to part it, it is not between theirs."""
    rows_S, rows_T, mask = five_rows(name)

    def value(part):
        return call(name, [x[part] for x in rows_S], [x[part] for x in rows_T], mask[part]).item()

    whole = value([0, 1, 2, 4])
    ways = [[[0], [1], [2], [4]], [[1], [0, 2, 4]], [[0, 1], [2, 4]]]
    parts = [[value(part) for part in way] for way in ways]
    assert not all(min(values) <= whole <= max(values) for values in parts)
    # A row of which nothing is kept is not there, and the order of the rows does not matter.
    assert value([0, 3, 1, 2, 4]) == pytest.approx(whole, rel=1e-12)
    assert value([2, 0, 4, 1]) == pytest.approx(whole, rel=1e-12)


@every_loss
def test_different_batches_are_an_error(name):
    student, teacher = both_sides(name)
    with pytest.raises(ValueError, match=r"student and teacher must have .*got \("):
        call(name, student, [x[:2] for x in teacher])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pkd"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (3,), (1, 4)])
def test_a_mask_of_another_shape_is_an_error(name, shape):
    with pytest.raises(ValueError, match=r"mask must have the shape \(3, 4\)"):
        call(name, *both_sides(name), torch.ones(shape))


def test_pkd_needs_a_mask_of_the_same_rows():
    with pytest.raises(ValueError, match=r"mask must have the shape \(3,\)"):
        call("pkd", *both_sides("pkd"), torch.ones(2, 4))
