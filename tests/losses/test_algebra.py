"""What losses between features share: against loops over rows and positions."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses.algebra import POOLED, above_zero, both_pooled, pooled, product, row_weights, unit

WEIGHTS = 0.5 + wave(3, 4).abs()


@pytest.mark.parametrize("mask", [None, MASK, WEIGHTS], ids=["none", "mask", "weights"])
def test_pooled_is_the_weighted_mean_of_each_row(mask):
    states = wave(3, 4, 5)
    found = pooled(states, mask, "student")
    for b in range(3):
        weights = [1.0] * 4 if mask is None else mask[b].tolist()
        for k in range(5):
            expected = sum(w * states[b, n, k].item() for n, w in enumerate(weights)) / sum(weights)
            assert found[b, k].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(POOLED.reduce(states, mask), found)


def test_vectors_are_taken_as_they_are_and_empty_rows_are_zero():
    assert torch.equal(pooled(wave(3, 5), MASK, "student"), wave(3, 5))
    mask = MASK * torch.tensor([[1], [0], [1]])
    student, teacher, rows = both_pooled(torch.full((3, 4, 5), math.nan), wave(3, 2), mask * 0)
    assert not torch.cat([student.flatten(), teacher.flatten(), rows]).any()
    student, teacher, rows = both_pooled(wave(3, 4, 5), wave(3, 2), mask)
    assert rows.tolist() == [1, 0, 1]
    assert torch.equal(teacher, wave(3, 2) * torch.tensor([[1], [0], [1]]))
    assert row_weights(None, student) is None


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5, 6)])
def test_states_of_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"hidden state of the student must have the shape .*got \(3"):
        pooled(torch.zeros(shape), None, "student")


def test_a_list_of_states_is_refused():
    with pytest.raises(TypeError, match="hidden state of the teacher must be one tensor, got list"):
        both_pooled(wave(3, 5), [wave(3, 5)], None)


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    vectors = torch.cat([wave(4, 3), torch.zeros(1, 3)])
    for vector, found in zip(vectors.tolist(), unit(vectors).tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in vector)) or 1.0
        assert found == pytest.approx([x / length for x in vector])


def test_products_are_not_rounded_by_autocast():
    left, right = wave(2, 3, 40, dtype=torch.float32), wave(2, 40, 3, phase=1.0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(left, right), left @ right) is False
        found = product(left, right)
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_what_is_divided_by_zero_stays():
    assert above_zero(torch.tensor([0.0, 2.0, 1e-30])).tolist() == [1.0, 2.0, pytest.approx(1e-30)]
