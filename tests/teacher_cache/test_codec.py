"""Rows of tensors as bytes and back, against plain NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

from textbrewer.teacher_cache import codec
from textbrewer.teacher_cache.items import DTYPES, Item, bytes_of

B, L, A, C, H = 4, 7, 3, 5, 6
SHAPES = {
    "a number": (),
    "classes": (C,),
    "classes by position": (0, C),
    "states": (0, H),
    "attention": (A, 0, 0),
    "products": (0, 0),
    "by position": (0,),
}
MASKS = {
    "full": [[1] * L] * B,
    "padded": [[1] * 4 + [0] * 3, [1] * L, [1] + [0] * 6, [1] * 6 + [0]],
    "an empty row": [[0] * L, [1] * 3 + [0] * 4, [1] * L, [0] * L],
    "all empty": [[0] * L] * B,
    "holes": [[1, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * L, [0, 1, 0, 0, 0, 0, 0]],
}
ERROR = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of a number stored in a type: half a step."""


def places_of(mask):
    """Kept positions as a slice where they are a start of the row, else as numbers; by hand."""
    places = []
    for row in mask:
        numbers = [place for place, kept in enumerate(row) if kept]
        dense = numbers == list(range(len(numbers)))
        places.append(slice(0, len(numbers)) if dense else np.array(numbers))
    return places


def kept_of(mask, shape):
    """Where an item of a batch is not padding: at places whose every position is kept."""
    kept = np.ones((B, *(L if size == 0 else size for size in shape)), dtype=bool)
    for row, own in enumerate(mask):
        for dimension, size in enumerate(shape):
            for place in range(L if size == 0 else 0):
                if not own[place]:
                    kept[row][(slice(None),) * dimension + (place,)] = False
    return kept


def sample(shape, dtype=torch.float32, scale=3.0):
    full = [L if size == 0 else size for size in shape]
    return (scale * torch.randn(B, *full, dtype=torch.float64)).to(dtype)


def round_trip(items, tensors, dtype, mask):
    places = places_of(mask)
    entries = codec.pack(items, tensors, dtype, places)
    return entries, codec.unpack(items, entries, places, L)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_within_the_precision_of_the_type(dtype, shape, mask):
    value = sample(SHAPES[shape])
    item = Item("x", "float32", SHAPES[shape])
    entries, found = round_trip([item], {"x": value}, dtype, MASKS[mask])
    kept = kept_of(MASKS[mask], SHAPES[shape])
    expected = np.where(kept, value.numpy(), 0.0)
    result = found["x"].numpy()
    assert found["x"].dtype == torch.float32
    assert result.shape == expected.shape
    assert (result[~kept] == 0).all()
    if dtype == "int8" and shape in ("a number",):
        bound = np.zeros_like(expected)
    elif dtype == "int8":
        # Half a step, of the kept part of the vector; a little more for the rounding of the step itself.
        bound = np.abs(expected).max(axis=-1, keepdims=True) / 127 / 2 * (1 + 1e-5)
        bound = np.broadcast_to(bound, expected.shape)
    else:
        bound = ERROR[dtype] * np.abs(expected)
    error = np.abs(result - expected)
    assert (error <= bound).all(), float((error - bound).max())
    if dtype not in ("float32",) and kept.sum() > 4 and bound.any():
        # Stored no better than the type, or the bound would say nothing.
        assert error.max() > 0.1 * bound.max()
    assert all(codec.is_intact(entry) for entry in entries)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_is_the_length_of_an_entry(dtype, shape, mask):
    """By hand: elements kept, times the bytes of one, and for int8 four bytes a vector."""
    item = Item("x", "float32", SHAPES[shape])
    entries = codec.pack([item], {"x": sample(SHAPES[shape])}, dtype, places_of(MASKS[mask]))
    for entry, row in zip(entries, MASKS[mask], strict=True):
        length = sum(row)
        sizes = [length if size == 0 else size for size in SHAPES[shape]]
        stored = "float32" if dtype == "int8" and not sizes else dtype
        by_hand = math.prod(sizes) * {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[stored]
        if stored == "int8":
            by_hand += 4 * math.prod(sizes[:-1])
        assert len(entry) == 8 + 1 + by_hand
        if not (dtype == "int8" and shape in ("a number", "by position")):
            assert bytes_of(item, stored, length) == by_hand


def test_bytes_of_an_average_length_and_of_top_k():
    assert bytes_of(Item("x", "float32", (0, H)), "float16", 2.5) == 2.5 * H * 2
    # Two values of two bytes and their classes of four, and one level of four, for each of three positions.
    assert bytes_of(Item("logits/0", "float32", (0, C), 2, 1.0), "float16", 3) == 3 * (2 * 2 + 2 * 4 + 4)


@pytest.mark.parametrize("mask", ["padded", "holes", "an empty row"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_come_back_as_they_were(dtype, mask):
    value = (
        torch.randint(-100, 2**31 - 1, (B, L)) if dtype in (torch.int64, torch.int32) else torch.randint(0, 2, (B, L))
    ).to(dtype)
    item = Item("x", str(dtype).removeprefix("torch."), (0,))
    for stored in DTYPES:
        _, found = round_trip([item], {"x": value}, stored, MASKS[mask])
        expected = np.where(kept_of(MASKS[mask], (0,)), value.numpy(), 0)
        assert found["x"].dtype == dtype
        assert (found["x"].numpy() == expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_real_types_come_back_as_they_came(dtype):
    value = sample((0, H), dtype)
    item = Item("x", str(dtype).removeprefix("torch."), (0, H))
    _, found = round_trip([item], {"x": value}, "float32", MASKS["full"])
    assert found["x"].dtype == dtype
    expected = value.float().to(dtype)
    assert torch.equal(found["x"], expected)


@pytest.mark.parametrize("mask", MASKS)
def test_many_items_at_once_and_with_their_padding(mask):
    tensors = {"a": sample((0, H)), "b": sample(()), "c": torch.randint(0, 9, (B, L)), "d": sample((A, 0, 0))}
    items = [
        Item("a", "float32", (0, H)),
        Item("b", "float32", ()),
        Item("c", "int64", (0,)),
        Item("d", "float32", (A, 0, 0)),
    ]
    items.append(Item("whole", "float32", (L, H)))
    tensors["whole"] = sample((L, H))
    _, found = round_trip(items, tensors, "float32", MASKS[mask])
    for item in items:
        kept = kept_of(MASKS[mask], item.shape)
        assert (found[item.name].numpy() == np.where(kept, tensors[item.name].numpy(), 0)).all()


def test_rows_without_a_mask_keep_everything():
    items, value = [Item("x", "float32", (L, H))], sample((L, H))
    places = [slice(0, 0)] * B
    found = codec.unpack(items, codec.pack(items, {"x": value}, "float32", places), places, 0)
    assert torch.equal(found["x"], value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_found_under_another_padding(dtype):
    """What was stored of a batch of 7 positions is put into one of 9, and after padding on the left."""
    items, value = [Item("x", "float32", (0, 0))], sample((0, 0))
    entries = codec.pack(items, {"x": value}, dtype, places_of(MASKS["padded"]))
    near = codec.unpack(items, entries, places_of(MASKS["padded"]), L)["x"]
    lengths = [sum(row) for row in MASKS["padded"]]
    far = codec.unpack(items, entries, [np.arange(9 - length, 9) for length in lengths], 9)["x"]
    assert far.shape == (B, 9, 9)
    for row, length in enumerate(lengths):
        assert torch.equal(far[row, 9 - length :, 9 - length :], near[row, :length, :length])
        assert float(far[row].abs().sum()) == pytest.approx(float(near[row].abs().sum()))


@pytest.mark.parametrize("odd", [70000.0, -70000.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", ["classes", "states", "attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beyond_a_type_survive(dtype, shape, odd):
    value = sample(SHAPES[shape])
    value.view(B, -1)[1, 2] = odd
    _, found = round_trip([Item("x", "float32", SHAPES[shape])], {"x": value}, dtype, MASKS["full"])
    tolerance = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    if dtype == "int8" and math.isfinite(odd):
        # It takes the precision of its own vector alone.
        bound = np.abs(value.numpy()).max(axis=-1, keepdims=True) / 127 / 2 * (1 + 1e-5)
        assert (np.abs(found["x"].numpy() - value.numpy()) <= bound).all()
        return
    np.testing.assert_allclose(found["x"].numpy(), value.numpy(), rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("odd", [-1e4, -3e38, math.inf, math.nan])
def test_what_stands_at_the_padding_changes_neither_type_nor_precision(dtype, odd):
    """Scores of masked positions are often a large negative number."""
    mask, value = MASKS["holes"], sample((A, 0, 0))
    item, kept = Item("x", "float32", (A, 0, 0)), torch.from_numpy(kept_of(mask, (A, 0, 0)))
    spoilt = value.masked_fill(~kept, odd)
    assert codec.pack([item], {"x": spoilt}, dtype, places_of(mask)) == codec.pack(
        [item], {"x": value.masked_fill(~kept, 0.0)}, dtype, places_of(mask)
    )


def test_rows_of_different_types_come_back_together():
    """A batch that float16 could not hold was stored in float32; its rows meet those of others."""
    item, places = Item("x", "float32", (0, H)), places_of(MASKS["padded"])
    after = Item("y", "float32", (C,))
    tensors = [{"x": sample((0, H)), "y": sample((C,))} for _ in range(2)]
    tensors[1]["x"] = tensors[1]["x"] * 1e6
    packed = [codec.pack([item, after], one, "float16", places) for one in tensors]
    mixed = [packed[0][0], packed[1][1], packed[0][2], packed[1][3]]
    found = codec.unpack([item, after], mixed, places, L)
    for name, shape in (("x", (0, H)), ("y", (C,))):
        kept = kept_of(MASKS["padded"], shape)
        expected = np.stack([tensors[row % 2][name][row].numpy() for row in range(B)]) * kept
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=2.0**-11)


# ---- top-k ---------------------------------------------------------------------------------------------------------


def top_item(shape, few, temperature):
    return Item("logits/0", "float32", shape, few, temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("few", [1, 2, 7])
def test_top_k_keeps_the_probabilities_of_the_largest_and_the_mass_of_the_others(few, temperature):
    logits = 3 * torch.randn(B, 20, dtype=torch.float64).float()
    _, found = round_trip([top_item((20,), few, temperature)], {"logits/0": logits}, "float32", MASKS["full"])
    full = softmax(logits.double().numpy() / temperature, axis=-1)
    stored = softmax(found["logits/0"].double().numpy() / temperature, axis=-1)
    for row in range(B):
        top = np.argsort(-logits[row].numpy())[:few]
        np.testing.assert_allclose(stored[row][top], full[row][top], rtol=1e-5)
        np.testing.assert_allclose(found["logits/0"][row].numpy()[top], logits[row].numpy()[top])
        others = np.delete(np.arange(20), top)
        assert stored[row][others].sum() == pytest.approx(full[row][others].sum(), rel=1e-5)
        assert np.ptp(stored[row][others]) < 1e-7


def test_top_k_is_exact_at_its_temperature_only():
    """At another one the kept logits are as they were, but the others' mass is that of equal logits: a bound."""
    logits = 3 * torch.randn(B, 20)
    found = round_trip([top_item((20,), 3, 2.0)], {"logits/0": logits}, "float32", MASKS["full"])[1]["logits/0"].numpy()
    others = np.sort(logits.double().numpy(), axis=-1)[:, :-3]
    level = 2.0 * (logsumexp(others / 2.0, axis=-1) - math.log(17))
    for row in range(B):
        top = np.argsort(-logits[row].numpy())[:3]
        np.testing.assert_allclose(np.delete(found[row], top), level[row], rtol=1e-5)
        assert logsumexp(np.delete(found[row], top)) < logsumexp(others[row])
        assert logsumexp(np.delete(found[row], top) / 8) > logsumexp(others[row] / 8)


@pytest.mark.parametrize("mask", ["padded", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_by_position_under_each_type(dtype, mask):
    logits = 3 * torch.randn(B, L, 20)
    _, found = round_trip([top_item((0, 20), 4, 1.0)], {"logits/0": logits}, dtype, MASKS[mask])
    kept = kept_of(MASKS[mask], (0, 20))
    result = found["logits/0"].numpy()
    assert (result[~kept] == 0).all()
    full, stored = (log_softmax(values.astype(np.float64), axis=-1) for values in (logits.numpy(), result))
    largest = np.argsort(-logits.numpy(), axis=-1)[..., :4]
    at = kept[..., :4]
    tolerance = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.08, "int8": 0.1}[dtype]
    difference = np.take_along_axis(stored - full, largest, axis=-1)
    assert np.abs(difference[at]).max() < tolerance


def test_top_k_with_infinite_logits_of_the_others():
    """Classes that are ruled out stay ruled out."""
    logits = torch.full((B, 10), -math.inf)
    logits[:, :2] = torch.tensor([1.0, 2.0])
    found = round_trip([top_item((10,), 3, 1.0)], {"logits/0": logits}, "float16", MASKS["full"])[1]["logits/0"]
    assert torch.equal(found, logits)


# ---- damage --------------------------------------------------------------------------------------------------------


def test_every_changed_byte_is_noticed():
    (entry,) = codec.pack([Item("x", "float32", (0, 2))], {"x": torch.randn(1, 3, 2)}, "float16", [slice(0, 3)])
    assert codec.is_intact(entry)
    for place in range(len(entry)):
        assert not codec.is_intact(entry[:place] + bytes([entry[place] ^ 16]) + entry[place + 1 :])
    for length in range(len(entry)):
        assert not codec.is_intact(entry[:length])
    assert not codec.is_intact(entry + b"\0")


@pytest.mark.parametrize("change", [lambda entry: entry[:-1], lambda entry: entry + b"\0", lambda entry: entry[:9]])
def test_an_entry_of_another_size_is_refused(change):
    items, places = [Item("x", "float32", (0, 2))], [slice(0, 3)]
    (entry,) = codec.pack(items, {"x": torch.randn(1, 3, 2)}, "float16", places)
    with pytest.raises(ValueError):
        codec.unpack(items, [change(entry)], places, 3)


def test_items_as_plain_values():
    item = Item("logits/0", "float32", (0, 5), 2, 4.0)
    assert Item.from_dict({**item.to_dict(), "shape": list(item.shape)}) == item
    assert item.row_shape(9) == (9, 5)
