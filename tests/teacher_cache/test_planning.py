"""What is stored where not everything fits, against figures worked out by hand."""

import random

import pytest

from textbrewer.teacher_cache.contents import depth_of
from textbrewer.teacher_cache.planning import bytes_on_disk, plan_storage

# Rows above half a page take whole pages of 4096 bytes: 8176 bytes and 16 of a header fill two.
PAGES = 8176
ONE_ENTRY = 40 / 0.7


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (0, 40 / 0.7),
        (100, 200.0),
        (2047, 2087 / 0.7),
        (2048, 4096 + ONE_ENTRY),
        (4080, 4096 + ONE_ENTRY),
        (4081, 8192 + ONE_ENTRY),
        (PAGES, 8192 + ONE_ENTRY),
    ],
)
def test_bytes_on_disk(row, expected):
    assert bytes_on_disk(row) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("inputs_mask", 0),
        ("labels/0", 0),
        ("hidden/0", 0),
        ("hidden/5", 5),
        ("attention/0", 1),
        ("attention/5", 6),
        *((f"{feature}/5", 6) for feature in ("query", "key", "value", "scores")),
        ("form/layer_product/hidden/3,7", 7),
        ("form/sum_of_heads/attention/2", 3),
        ("form/sum_of_heads/scores/2", 3),
        ("logits/0", float("inf")),
        ("logits_mask/0", float("inf")),
        ("captured/0", float("inf")),
        ("other/2", float("inf")),
    ],
)
def test_depth_is_how_far_the_teacher_runs(name, depth):
    assert depth_of(name) == depth


SIZES = {"logits/0": 8, "hidden/2": 3000, "hidden/4": 3000, "hidden/12": 3000, "inputs_mask": 12}


def on_disk(*names, rows=100):
    return rows * bytes_on_disk(sum(SIZES[name] for name in names))


ORDER = ("logits/0", "hidden/12", "hidden/4", "hidden/2", "inputs_mask")


def test_everything_is_stored_where_it_fits():
    room = int(on_disk(*ORDER)) + 1
    plan = plan_storage(SIZES, 100, room)
    assert (plan.stored, plan.recomputed, plan.rows, plan.share_of_rows) == (ORDER, (), 100, 1.0)
    assert plan.bytes == pytest.approx(on_disk(*ORDER))


def test_logits_and_the_deepest_layers_come_first():
    """With the logits and the layer 12 stored, the teacher stops after 4 of 12 layers: two thirds are saved."""
    room = int(on_disk("logits/0", "hidden/12")) + 1
    assert room / on_disk(*ORDER) < 2 / 3
    plan = plan_storage(SIZES, 100, room)
    assert plan.stored == ORDER[:2]
    assert plan.recomputed == ORDER[2:]
    assert plan.share_of_rows == 1.0
    assert plan.bytes == pytest.approx(on_disk(*ORDER[:2]))


def test_one_byte_less_and_the_layer_is_left_out():
    """Then the logits alone would save nothing, since the teacher runs to layer 12: some rows, whole, save more."""
    room = int(on_disk("logits/0", "hidden/12")) - 1
    plan = plan_storage(SIZES, 100, room)
    assert plan.stored == ORDER
    assert plan.recomputed == ()
    assert plan.share_of_rows == pytest.approx(room / on_disk(*ORDER))
    assert plan.bytes == room


def test_as_many_rows_as_fit_where_that_saves_more():
    """Layers 11 and 12: all but one layer stored saves a twelfth, half of the rows save half."""
    sizes = {"hidden/11": 5000, "hidden/12": 5000}
    plan = plan_storage(sizes, 10, int(10 * bytes_on_disk(5000)) + 1)
    assert plan.stored == ("hidden/12", "hidden/11")
    assert 0.5 < plan.share_of_rows < 0.7
    deep = plan_storage({"hidden/1": 5000, "hidden/12": 5000}, 10, int(10 * bytes_on_disk(5000)) + 1)
    assert deep.stored == ("hidden/12",)
    assert deep.recomputed == ("hidden/1",)


def test_whole_rows_only_where_a_teacher_that_stops_is_of_no_use():
    room = int(on_disk("logits/0", "hidden/12")) + 1
    plan = plan_storage(SIZES, 100, room, whole_rows=True)
    assert plan.stored == ORDER
    assert plan.share_of_rows == pytest.approx(room / on_disk(*ORDER))


@pytest.mark.parametrize("whole_rows", [False, True])
def test_nothing_fits(whole_rows):
    plan = plan_storage(SIZES, 100, 0, whole_rows)
    assert (plan.recomputed, plan.share_of_rows, plan.bytes) == ((), 0.0, 0.0)


def test_with_an_unknown_number_of_rows_everything_is_stored():
    plan = plan_storage(SIZES, None, 1)
    assert (plan.stored, plan.recomputed, plan.bytes, plan.rows, plan.share_of_rows) == (ORDER, (), None, None, 1.0)


def test_of_one_depth_the_smaller_comes_first():
    sizes = {
        "hidden/6": 900,
        "attention/5": 800,
        "form/first_position/hidden/6": 30,
        "logits/0": 50,
        "logits_mask/0": 9,
    }
    assert plan_storage(sizes, None, 0).stored == (
        "logits_mask/0",
        "logits/0",
        "form/first_position/hidden/6",
        "attention/5",
        "hidden/6",
    )


def test_no_rows_at_all():
    assert plan_storage(SIZES, 0, 0).stored == ORDER


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_takes_more_than_the_room(seed):
    generator = random.Random(seed)
    sizes = {f"hidden/{layer}": generator.choice([30, 500, 4000]) for layer in generator.sample(range(13), 4)}
    sizes["logits/0"] = generator.choice([6, 60000])
    for _ in range(30):
        room = generator.randint(0, 10**7)
        plan = plan_storage(sizes, 100, room)
        assert set(plan.stored) | set(plan.recomputed) == set(sizes)
        assert not set(plan.stored) & set(plan.recomputed)
        assert plan.bytes <= room
        if plan.share_of_rows == 1:
            assert plan.bytes == pytest.approx(100 * bytes_on_disk(sum(sizes[name] for name in plan.stored)))
        # What is recomputed is never deeper than what is stored.
        deepest = max(map(depth_of, plan.recomputed), default=0)
        assert all(depth_of(name) >= deepest for name in plan.stored)
