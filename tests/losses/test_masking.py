"""The mask, the precision, the shape errors and the one mean: against plain loops."""

import functools
import math

import pytest
import torch

from tests.losses.samples import MASK, SHAPE, wave
from textbrewer.losses import averaged_over, denominator_of
from textbrewer.losses.masking import (
    clear_masked,
    full_precision,
    one_tensor,
    pair_weights,
    position_weights,
    same_shape,
    same_states,
    weighted_mean,
)
from textbrewer.registry import Registry


def loop_mean(values, weights):
    pairs = list(zip(values.flatten().tolist(), weights.expand_as(values).flatten().tolist(), strict=True))
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else 0.0


@pytest.mark.parametrize(
    "weights",
    [MASK.double(), torch.zeros(3, 4).double(), torch.ones(3, 4).double(), wave(3, 4).abs(), 0.01 * wave(3, 4).abs()],
    ids=["mask", "zeros", "ones", "fractions", "small fractions"],
)
def test_weighted_mean_is_the_loop(weights):
    values = wave(3, 4)
    assert weighted_mean(values, weights).item() == pytest.approx(loop_mean(values, weights), rel=1e-12, abs=1e-15)


def test_weighted_mean_counts_a_weight_as_often_as_it_is_repeated():
    values, weights = wave(3, 2, 4), MASK.double().unsqueeze(1)
    assert weighted_mean(values, weights).item() == pytest.approx(loop_mean(values, weights), rel=1e-12)


def test_weighted_mean_without_weights_is_the_mean_and_zero_of_nothing():
    values = wave(3, 4)
    assert weighted_mean(values, None).item() == pytest.approx(sum(values.flatten().tolist()) / 12, rel=1e-12)
    assert weighted_mean(values[:0], None).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weighted_mean_ignores_values_of_weight_zero(bad):
    values, weights = wave(3, 4), MASK.double()
    spoilt = torch.where(MASK.bool(), values, bad).requires_grad_()
    mean = weighted_mean(spoilt, weights)
    mean.backward()
    assert mean.item() == pytest.approx(loop_mean(values, weights), rel=1e-12)
    assert torch.equal(spoilt.grad, weights / 9)


def test_clear_masked_zeroes_masked_positions_only():
    values = wave(3, 4, 2)
    spoilt = values.masked_fill(~MASK.bool().unsqueeze(-1), math.nan)
    cleared = clear_masked(spoilt, MASK.double())
    for row in range(3):
        for position in range(4):
            expected = values[row, position].tolist() if MASK[row, position] else [0.0, 0.0]
            assert cleared[row, position].tolist() == expected
    assert clear_masked(values, None) is values


def test_pair_weights_is_the_outer_product_of_each_row():
    weights = wave(3, 4)
    pairs = pair_weights(weights)
    for row in range(3):
        for i in range(4):
            for j in range(4):
                assert pairs[row, i, j] == weights[row, i] * weights[row, j]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_position_weights_have_the_dtype_of_the_values(dtype):
    weights = position_weights(MASK.to(dtype), wave(1, dtype=torch.float32), SHAPE)
    assert weights.dtype == torch.float32
    assert weights.tolist() == MASK.tolist()


def test_position_weights_without_a_mask_are_none():
    assert position_weights(None, wave(1), SHAPE) is None


@pytest.mark.parametrize("shape", [(3, 5), (1, 4), (4,), (3, 4, 1)])
def test_position_weights_refuse_another_shape(shape):
    with pytest.raises(ValueError, match=r"mask must have the shape \(3, 4\)"):
        position_weights(torch.ones(shape), wave(1), SHAPE)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.int64], torch.float32),
    ],
)
def test_full_precision_is_float32_or_the_widest(dtypes, expected):
    widened = full_precision(*(torch.ones(2, dtype=dtype) for dtype in dtypes))
    assert [tensor.dtype for tensor in widened] == [expected] * len(dtypes)


def test_same_shape_ends_with_the_remedy():
    with pytest.raises(ValueError, match=r"scores of student and teacher .* got \(2,\) and \(3,\); do this$"):
        same_shape(torch.ones(2), torch.ones(3), "scores", "do this")
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)$"):
        same_shape(torch.ones(2), torch.ones(3), "scores")
    same_shape(torch.ones(2), torch.zeros(2), "scores", "do this")


def test_one_tensor_names_the_losses_on_two_layers():
    with pytest.raises(TypeError, match="state must be one tensor, got list; the losses on two layers are 'fsp'"):
        one_tensor([torch.ones(2)], "state")


def test_same_states_names_the_projection_only_where_the_widths_differ():
    with pytest.raises(ValueError, match=r"'proj': \['linear', 5, 7\]"):
        same_states(torch.ones(2, 3, 5), torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=r"same shape") as caught:
        same_states(torch.ones(2, 3, 5), torch.ones(2, 4, 7))
    assert "proj" not in str(caught.value)


@pytest.mark.parametrize("unit", ["rows", "positions", "pairs"])
def test_averaged_over_is_read_back_in_either_order_with_the_registry(unit):
    table = Registry("loss")

    @table.add("first")
    @averaged_over(unit)
    def first(a, b):
        return a

    @averaged_over(unit)
    @table.add("second")
    def second(a, b):
        return a

    assert denominator_of(table["first"]) == denominator_of(table["second"]) == unit
    assert first(1, 2) == second(1, 2) == 1


def test_denominator_of_sees_through_partials_and_wraps_and_knows_when_nothing_was_noted():
    @averaged_over("pairs")
    def loss(a, b, scale=1):
        return scale

    @functools.wraps(loss)
    def wrapped(*args):
        return loss(*args)

    assert denominator_of(functools.partial(loss, scale=2)) == "pairs"
    assert denominator_of(averaged_over("rows")(functools.partial(loss, scale=2))) == "rows"
    assert denominator_of(wrapped) == "pairs"
    assert denominator_of(lambda a, b: a) is None


def test_averaged_over_refuses_an_unknown_unit():
    with pytest.raises(ValueError, match=r"unit must be one of the known names, got 'position'; did you mean"):
        averaged_over("position")
