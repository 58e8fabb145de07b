"""Keys of rows: equal exactly where the rows are equal without their padding."""

import random

import numpy as np
import pytest
import torch

from textbrewer.teacher_cache.keys import KEY_BYTES, entries_of, mask_of, row_count, rows_of

SEEDS = range(6)


def plain_rows(generator, count):
    """Rows as plain lists; short and of few values, so that some are equal, or equal but for their length."""
    rows = []
    for _ in range(count):
        length = generator.randint(0, 4)
        rows.append(
            {
                "input_ids": [generator.randint(0, 1) for _ in range(length)],
                "types": [generator.randint(0, 1) for _ in range(length)],
                "extra": generator.randint(0, 1),
                "left": generator.choice([0, 0, 1, 2]),
            }
        )
    return rows


def batch_of(rows, length, generator, dtype=torch.int64):
    """The rows as tensors of some length; what stands at the padding is drawn at random."""
    shape = (len(rows), length)
    batch = {
        name: torch.tensor([[generator.randint(0, 9) for _ in range(length)] for _ in rows], dtype=dtype).reshape(shape)
        for name in ("input_ids", "types")
    }
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    batch["extra"] = torch.tensor([row["extra"] for row in rows])
    for number, row in enumerate(rows):
        place = slice(row["left"], row["left"] + len(row["input_ids"]))
        batch["attention_mask"][number, place] = 1
        for name in ("input_ids", "types"):
            batch[name][number, place] = torch.tensor(row[name], dtype=dtype)
    return batch


def plain_key(row):
    left = row["left"] if row["input_ids"] else 0
    return tuple(row["input_ids"]), tuple(row["types"]), row["extra"], left


def in_batches(rows, generator, make=batch_of):
    """Keys by row number, with the rows in a new order, in batches of random sizes and lengths."""
    order, keys = generator.sample(range(len(rows)), len(rows)), {}
    while order:
        size = generator.randint(1, 7)
        chosen, order = order[:size], order[size:]
        batch = make([rows[number] for number in chosen], generator.randint(6, 9), generator)
        keys.update(zip(chosen, rows_of(batch, None, False).keys, strict=True))
    return [keys[number] for number in range(len(rows))]


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_are_equal_exactly_where_plain_keys_are(seed):
    generator = random.Random(seed)
    rows = plain_rows(generator, 120)
    keys, again = in_batches(rows, generator), in_batches(rows, generator)
    assert keys == again
    assert {len(key) for key in keys} == {KEY_BYTES}
    expected = [plain_key(row) for row in rows]
    assert len(set(expected)) < len(expected), "the sample has no equal rows"
    # As many keys as pairs of key and plain key as plain keys: one to one.
    assert len(set(keys)) == len(set(expected)) == len(set(zip(keys, expected, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_position_ids_the_padding_on_the_left_does_not_count(seed):
    generator = random.Random(seed)
    rows = plain_rows(generator, 120)

    def make(rows, length, generator):
        batch = batch_of(rows, length, generator)
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        return {**batch, "position_ids": positions}

    keys = in_batches(rows, generator, make)
    expected = [plain_key({**row, "left": 0}) for row in rows]
    assert len(set(keys)) == len(set(expected)) == len(set(zip(keys, expected, strict=True)))


def base(dtype=torch.int64):
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]], dtype=dtype)
    return {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), "input_ids": ids}


def keys_of(batch, mask=None, keep_padding=False):
    return rows_of(batch, mask, keep_padding).keys


def changed(name, row, *place):
    batch = {key: value.clone() for key, value in base().items()}
    batch[name][(row, *place)] += 1
    return batch


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_one_changed_token_changes_the_key_of_its_row_alone(row, position):
    before, after = keys_of(base()), keys_of(changed("input_ids", row, position))
    is_kept = position < 3 - row
    assert [old == new for old, new in zip(before, after, strict=True)] == [
        not (is_kept and row == 0),
        not (is_kept and row == 1),
    ]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("position", range(4))
def test_with_keep_padding_every_position_counts(row, position):
    before = keys_of(base(), keep_padding=True)
    after = keys_of(changed("input_ids", row, position), keep_padding=True)
    assert [old == new for old, new in zip(before, after, strict=True)] == [row != 0, row != 1]


def test_with_keep_padding_the_length_counts():
    longer = {name: torch.nn.functional.pad(value, (0, 1)) for name, value in base().items()}
    assert keys_of(longer) == keys_of(base())
    assert not set(keys_of(longer, keep_padding=True)) & set(keys_of(base(), keep_padding=True))
    rows = rows_of(base(), None, True)
    assert rows.kept is None
    assert not rows.padded


def test_holes_in_the_mask_count_by_their_place():
    """Tokens 5 and 7 at the positions 0 and 2 are not those at 0 and 1."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    ids = torch.tensor([[5, 9, 7], [5, 7, 9]])
    first, second = keys_of({"attention_mask": mask, "input_ids": ids})
    assert first != second
    padded = {"attention_mask": torch.tensor([[1, 0, 1, 0]]), "input_ids": torch.tensor([[5, 1, 7, 4]])}
    assert keys_of(padded) == [first]


@pytest.mark.parametrize("first", ["a", None, 3, 0.5, (1, 2), {"a": 1}, torch.tensor(3), torch.arange(5), np.arange(3)])
@pytest.mark.parametrize("second", ["b", None, 4, "3", (2, 1), {"a": 2}, {"b": 1}, torch.tensor(4), torch.arange(6)])
def test_entries_that_are_not_of_rows_count_for_all_rows(first, second):
    if first is None and second is None:
        return
    keys = [keys_of({**base(), "setting": value}) for value in (first, second, first)]
    assert keys[0] == keys[2]
    assert not set(keys[0]) & set(keys[1])
    assert not set(keys[0]) & set(keys_of(base()))


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"x": value}, lambda value: ("a", [value])])
@pytest.mark.parametrize("kind", [torch.arange, np.arange])
def test_values_within_lists_count_to_the_last(wrap, kind):
    """The text of a long tensor leaves out its middle."""
    other = kind(5000)
    other[2500] += 1
    assert keys_of({**base(), "more": wrap(kind(5000))}) == keys_of({**base(), "more": wrap(kind(5000))})
    assert keys_of({**base(), "more": wrap(kind(5000))}) != keys_of({**base(), "more": wrap(other)})


def test_the_names_of_the_entries_count_but_not_their_order():
    batch = base()
    assert keys_of(dict(reversed(batch.items()))) == keys_of(batch)
    renamed = {"attention_mask": batch["attention_mask"], "inputs": batch["input_ids"]}
    assert not set(keys_of(renamed)) & set(keys_of(batch))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_counts(dtype):
    assert not set(keys_of(base(dtype))) & set(keys_of(base()))
    assert keys_of(base(dtype)) == keys_of(base(dtype))


def test_the_same_bytes_of_another_dtype_are_another_row():
    numbers = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert not set(keys_of(numbers)) & set(keys_of(numbers.view(torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_rows_of_any_kind_of_number(dtype):
    """Images, say: rows without positions, told apart by their last value."""
    first = torch.zeros(3, 2, 5, dtype=dtype)
    first[1, 1, 4] = 1
    keys = keys_of(first)
    assert keys[0] == keys[2] != keys[1]
    assert keys_of(first[1:]) == keys[1:]


def test_entries_with_more_dimensions_lose_their_padding_too():
    boxes = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    other = boxes.clone()
    other[0, 3], other[1, 2:] = -1, -1
    assert keys_of({**base(), "boxes": boxes}) == keys_of({**base(), "boxes": other})
    other[1, 1, 2] = -1
    assert [a == b for a, b in zip(keys_of({**base(), "boxes": boxes}), keys_of({**base(), "boxes": other}))] == [
        True,
        False,
    ]


def test_tuples_lists_and_single_tensors():
    batch = base()
    pair = (batch["input_ids"], batch["attention_mask"])
    assert keys_of(pair) == keys_of(list(pair)) == keys_of({"0": pair[0], "1": pair[1]})
    assert keys_of(pair[0]) == keys_of((pair[0],)) == keys_of({"0": pair[0]})
    # Without a name there is no mask: padding counts, unless its number is told.
    assert rows_of(pair, None, False).kept is None
    assert torch.equal(rows_of(pair, "1", False).kept, pair[1] == 1)
    changed = (pair[0] + 7 * (1 - pair[1]), pair[1])
    assert keys_of(changed, "1") == keys_of(pair, "1")
    assert not set(keys_of(changed)) & set(keys_of(pair))


def test_a_mask_by_its_name():
    batch = base()
    renamed = {"input_ids": batch["input_ids"], "present": batch["attention_mask"]}
    other = {**renamed, "input_ids": renamed["input_ids"] + 7 * (1 - renamed["present"])}
    assert keys_of(renamed, "present") == keys_of(other, "present")
    assert keys_of(renamed) != keys_of(other)
    with pytest.raises(
        KeyError, match=r"mask 'absent' of the teacher cache is not in the batch; it has: input_ids, present"
    ):
        keys_of(renamed, "absent")


@pytest.mark.parametrize("mask", [torch.ones(2, 4, 4), torch.ones(2), "no tensor", torch.ones(3, 4)])
def test_a_mask_of_another_shape_is_an_entry_like_others(mask):
    rows = rows_of({"input_ids": base()["input_ids"], "attention_mask": mask}, None, False)
    assert rows.kept is None
    assert len(set(rows.keys)) == 2


@pytest.mark.parametrize("name", ["decoder_input_ids", "decoder_attention_mask", "attention_mask_b"])
def test_of_a_batch_with_a_second_sequence_the_whole_rows_count(name):
    """Two rows that differ only where the mask has padding."""
    same = {"input_ids": torch.tensor([[5, 6, 0, 0]] * 2), "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)}
    rows = rows_of({**same, name: torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, None, False)
    assert rows.kept is None
    assert rows.keys[0] != rows.keys[1]


@pytest.mark.parametrize("name", ["global_attention_mask", "labels", "special_tokens_mask"])
def test_other_entries_are_of_the_masks_own_positions(name):
    one = {**base(), name: torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]])}
    other = {**base(), name: torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1]])}
    assert keys_of(one) == keys_of(other)


def test_padded_tells_of_padding():
    assert rows_of(base(), None, False).padded
    assert not rows_of({**base(), "attention_mask": torch.ones(2, 4)}, None, False).padded


def test_any_value_but_zero_in_the_mask_keeps_its_position():
    mask = mask_of({"attention_mask": torch.tensor([[2.0, -1.0, 0.0]])}, None)
    assert mask.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "batch", [{}, {"a": "b"}, (), ["a"], "text", {"a": torch.tensor(3)}, {"a": {"b": torch.ones(2)}}]
)
def test_a_batch_without_rows_is_refused_with_the_remedy(batch):
    with pytest.raises(
        TypeError, match=r"a teacher cache needs batches of tensors with one row.*train without teacher_cache"
    ):
        rows_of(batch, None, False)


def test_row_count_is_that_of_the_first_tensor_with_rows():
    assert row_count(entries_of({"a": "x", "b": torch.tensor(2), "c": torch.ones(3, 2), "d": torch.ones(5)})) == 3


def test_the_batch_is_not_changed():
    batch = base(torch.bfloat16)
    before = {name: value.clone() for name, value in batch.items()}
    keys_of(batch)
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_texts_belong_to_their_row():
    """A list of one text a row: the row's own text counts, and no other's."""
    ids = torch.tensor([[5, 6], [7, 8]])
    first = rows_of({"input_ids": ids, "text": ["a", "b"]}, None, False).keys
    other = rows_of({"input_ids": ids, "text": ["a", "c"]}, None, False).keys
    alone = rows_of({"input_ids": ids[:1], "text": ["a"]}, None, False).keys
    assert first[0] == other[0] == alone[0]
    assert first[1] != other[1]


def test_real_numbers_beside_the_tokens_count_whole():
    """As many as the row has tokens, by chance: the mask is not theirs."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 0]] * 2),
        "attention_mask": torch.tensor([[1, 1, 0]] * 2),
        "features": torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 9.0]]),
    }
    keys = rows_of(batch, None, False).keys
    assert keys[0] != keys[1]
