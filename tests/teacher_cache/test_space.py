"""The rows of one teacher: stored once, found under any padding, and what is told of damage and of no use."""

import random
import warnings

import pytest
import torch

from textbrewer import TeacherCache
from textbrewer.adaptors import Views
from textbrewer.configurations import IntermediateMatch
from textbrewer.teacher_cache import CacheError, Contents, Space

pytest.importorskip("lmdb")
WIDTH, CLASSES, LAYERS = 16, 3, 3
MATCHES = [
    IntermediateMatch(layer_T=1, layer_S=1, feature="hidden", loss="hidden_mse", weight=1),
    IntermediateMatch(layer_T=[0, 2], layer_S=[0, 2], feature="hidden", loss="nst", weight=1),
]
REQUEST = {
    "teacher": "a teacher",
    "adaptor": "an adaptor",
    "precision": "no, None",
    "arguments": "[]",
    "matches": [[0, "hidden", 1, None]],
    "dtype": "float32",
    "temperature": None,
}


def batch_of(numbers, length=7):
    """Rows told by their numbers: of 1 to 6 tokens, padded; what stands at the padding is drawn at random."""
    ids = torch.randint(0, 1000, (len(numbers), length))
    mask = torch.zeros(len(numbers), length, dtype=torch.int64)
    for row, number in enumerate(numbers):
        own = random.Random(number)
        count = own.randint(1, 6)
        ids[row, :count] = torch.tensor([own.randrange(10**6) for _ in range(count)])
        mask[row, :count] = 1
    return {"input_ids": ids, "attention_mask": mask}


def teacher(batch):
    """What the teacher says: a formula of each token and, at every position, of its place."""
    ids, mask = batch["input_ids"].double(), batch["attention_mask"]
    place = torch.arange(ids.shape[1]) + 1.0
    hidden = [
        torch.sin(ids[..., None] * (layer + 1) + place[:, None] * torch.arange(1.0, WIDTH + 1)).float()
        for layer in range(LAYERS)
    ]
    logits = hidden[-1][:, 0, :CLASSES]
    return Views({"logits": [logits], "hidden": hidden, "inputs_mask": mask})


def student(batch):
    return Views({"inputs_mask": batch["attention_mask"]})


def contents(*matches, everything=False):
    return Contents(list(enumerate(matches)), everything)


@pytest.fixture
def cache(tmp_path):
    cache = TeacherCache(tmp_path / "cache", "float32")
    with cache.opened():
        yield cache


def space_of(cache, request=REQUEST, matches=MATCHES, role="", rows=100, settle=True, **changes):
    space = Space(cache, {**request, **changes}, contents(*matches), role)
    if not space.open() and settle:
        batch = batch_of([0, 1, 2])
        space.settle(batch, teacher(batch), student(batch), rows)
    return space


def step(space, numbers, length=7, passes=0):
    """One step as a distiller takes it: look up, run the teacher for what is missing; return what the losses get."""
    batch = batch_of(numbers, length)
    found = space.lookup(batch, passes)
    missing = found.missing
    if missing:
        rows = {name: value[missing] for name, value in batch.items()}
        space.add(found, space.contents.tensors(teacher(rows)), missing, 0.5 * len(missing))
    return batch, missing, space.views(space.tensors(found, list))


def assert_as_computed(batch, views):
    """At the kept positions the teacher's numbers, elsewhere zero."""
    expected, mask = teacher(batch), batch["attention_mask"]
    assert torch.equal(views["logits"][0], expected["logits"][0])
    assert torch.equal(views["hidden"][1], expected["hidden"][1] * mask[..., None])
    assert torch.equal(views["inputs_mask"], mask)
    product = torch.bmm(expected["hidden"][0], expected["hidden"][2].transpose(1, 2)) / WIDTH
    pairs = mask[:, :, None] * mask[:, None, :]
    torch.testing.assert_close(views.reduced[1], product * pairs)
    assert views["hidden"][0] is None


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_computed_once_and_then_found_in_any_batch(cache):
    space, seen, asked = space_of(cache), set(), 0
    generator = random.Random(1)
    for number in range(40):
        numbers = generator.sample(range(30), generator.randint(1, 6))
        batch, missing, views = step(space, numbers, generator.randint(6, 11), passes=number // 10)
        assert [numbers[row] for row in missing] == [item for item in numbers if item not in seen]
        assert_as_computed(batch, views)
        seen |= set(numbers)
        asked += len(numbers)
        cache.flush()
    info = cache.info()
    assert info.entries == len(seen)
    assert (info.rows_found, info.rows_missing) == (asked - len(seen), len(seen))
    assert not space.aside


def test_another_run_finds_the_rows_and_what_they_cost(cache):
    space = space_of(cache)
    step(space, range(10))
    cache.flush()
    space.finish()
    before = cache.info()
    again = space_of(cache, settle=False)
    assert again.layout == space.layout
    batch, missing, views = step(again, [9, 3, 5], 9)
    assert missing == []
    assert_as_computed(batch, views)
    # Half a second a row, as noted by the run before.
    assert cache.info().seconds_saved - before.seconds_saved == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_first_pass_sees_the_numbers_that_later_ones_will(tmp_path, dtype):
    cache = TeacherCache(tmp_path, dtype)
    with cache.opened():
        space = space_of(cache)
        torch.manual_seed(1)
        _, missing, first = step(space, range(5))
        cache.flush()
        torch.manual_seed(1)
        batch, again, second = step(space, range(5))
    assert (len(missing), again) == (5, [])
    for key in ("logits", "hidden"):
        for one, other in zip(first[key], second[key], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    assert not torch.equal(second["logits"][0], teacher(batch)["logits"][0])
    torch.testing.assert_close(second["logits"][0], teacher(batch)["logits"][0], atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "another"},
        {"adaptor": "another"},
        {"precision": "bf16, None"},
        {"arguments": "[('a', 1)]"},
        {"dtype": "float16"},
        {"temperature": 4.0},
    ],
)
def test_rows_of_another_request_are_never_found(cache, changes):
    step(space_of(cache), range(10))
    cache.flush()
    other = space_of(cache, settle=False, **changes)
    assert other.layout is None
    other = space_of(cache, **changes)
    assert step(other, range(10))[1] == list(range(10))


def test_a_space_must_be_settled_before_it_is_used(cache):
    space = space_of(cache, settle=False)
    with pytest.raises(RuntimeError, match="must be opened or settled"):
        space.lookup(batch_of([1]))


def test_rows_that_were_found_keep_their_numbers_where_all_are_computed_again(cache):
    space = space_of(cache)
    step(space, range(3))
    cache.flush()
    batch = batch_of(range(5))
    found = space.lookup(batch)
    assert found.missing == [3, 4]
    tensors = space.contents.tensors(teacher(batch))
    tensors["logits/0"] = tensors["logits/0"] + torch.tensor([9.0, 9.0, 9.0, 0.0, 0.0])[:, None]
    space.add(found, tensors, range(5), None)
    assert_as_computed(batch, space.views(space.tensors(found, list)))
    cache.flush()
    assert_as_computed(batch, space.views(space.tensors(space.lookup(batch), list)))


# ---- what is stored ------------------------------------------------------------------------------------------------


def test_the_plan_is_said_in_one_line(cache):
    line = space_of(cache).plan_line
    # By hand, of the first three rows: their mean length, the bytes of each tensor, and of a page what is filled.
    length = sum(random.Random(number).randint(1, 6) for number in range(3)) / 3
    row = 4 * CLASSES + 8 * length + 4 * WIDTH * length + 4 * length * length
    assert line.startswith(
        f"Teacher cache {str(cache.path)!r}: stores logits; hidden 1; position product of hidden 0-2 as float32"
    )
    assert line.endswith(f", about {100 * (row + 40) / 0.7 / 1000:.1f} KB for 100 rows")


@pytest.mark.parametrize("views_S", [Views({}), Views({"inputs_mask": torch.ones(3, 7)})])
def test_padding_is_stored_where_the_losses_count_it(cache, views_S):
    space = space_of(cache, settle=False)
    batch = batch_of([0, 1, 2])
    space.settle(batch, teacher(batch), views_S, 10)
    assert space.layout.keep_padding
    assert "with padding" in space.plan_line
    found = space.lookup(batch)
    space.add(found, space.contents.tensors(teacher(batch)), found.missing, None)
    assert torch.equal(space.tensors(found, list)["hidden/1"], teacher(batch)["hidden"][1])
    cache.flush()
    assert space.lookup(batch).missing == []
    longer = {name: torch.nn.functional.pad(value, (0, 1)) for name, value in batch.items()}
    assert space.lookup(longer).missing == [0, 1, 2]


@pytest.mark.parametrize(("setting", "kept"), [(True, True), (False, False)])
def test_keep_padding_as_the_user_says(tmp_path, setting, kept):
    cache = TeacherCache(tmp_path, "float32", keep_padding=setting)
    with cache.opened():
        space = space_of(cache, settle=False)
        batch = batch_of([0, 1, 2])
        space.settle(batch, teacher(batch), Views({}), 10)
        assert space.layout.keep_padding is kept


def test_with_too_little_room_the_deepest_is_stored(tmp_path):
    """Of 1000 rows: the logits, and layer 2 of the layers 0 and 2; found again by the same limit."""
    matches = [
        IntermediateMatch(layer_T=layer, layer_S=layer, feature="hidden", loss="hidden_mse", weight=1)
        for layer in (0, 2)
    ]
    length = sum(random.Random(number).randint(1, 6) for number in range(3)) / 3
    one_layer = 1000 * (4 * CLASSES + 8 * length + 4 * WIDTH * length + 40) / 0.7
    # And what the file takes before any row is in it.
    cache = TeacherCache(tmp_path, "float32", max_bytes=int(one_layer) + 40_000)
    with cache.opened():
        space = space_of(cache, matches=matches, rows=1000)
        assert [item.name for item in space.layout.items] == ["logits/0", "inputs_mask", "hidden/2"]
        assert space.layout.recomputed == ("hidden/0",)
        assert "recomputes hidden 0 (max_bytes)" in space.plan_line
        again = space_of(cache, matches=matches, settle=False)
        assert (again.name, again.layout) == (space.name, space.layout)
        unlimited = Space(TeacherCache(tmp_path, "float32"), REQUEST, contents(*matches))
        with unlimited.cache.opened():
            assert not unlimited.open()


def test_with_too_little_room_for_layers_some_rows_are_stored_whole_and_that_is_no_news(tmp_path):
    cache, batches = (
        TeacherCache(tmp_path, "float32", max_bytes=800_000),
        [range(n, n + 20) for n in range(0, 4000, 20)],
    )
    with cache.opened(), warnings.catch_warnings():
        warnings.simplefilter("error")
        space = space_of(cache, matches=MATCHES[:1], rows=4000)
        share = space.layout.share_of_rows
        assert 0.3 < share < 0.7
        assert f"that is {share:.0%} of the rows (max_bytes)" in space.plan_line
        for numbers in batches:
            batch, missing, views = step(space, numbers)
            assert len(missing) == 20
            assert torch.equal(views["logits"][0], teacher(batch)["logits"][0])
        cache.flush()
        assert cache.stopped == "max_bytes is reached"
        stored = cache.info().entries
        assert 20 * len(batches) - sum(len(step(space, numbers, passes=1)[1]) for numbers in batches) == stored
        # A file this small holds fewer: pages that a transaction frees are only used by the one after the next.
        assert share / 2 < stored / 4000 < share * 1.2
        assert not space.aside


# ---- without a teacher ---------------------------------------------------------------------------------------------

NO_TEACHER = {**REQUEST, **dict.fromkeys(("teacher", "adaptor", "precision", "arguments"))}


def test_without_a_teacher_the_only_rows_for_these_losses_are_used(cache):
    step(space_of(cache), range(5))
    space_of(cache, temperature=9.0)
    cache.flush()
    space = Space(cache, NO_TEACHER, contents(*MATCHES))
    assert space.open()
    batch, missing, views = step(space, range(5))
    assert missing == []
    assert_as_computed(batch, views)


def test_without_a_teacher_roles_tell_the_rows_apart(cache):
    first = space_of(cache, role="main/0")
    second = space_of(cache, role="main/1", teacher="another")
    for role, expected in (("main/0", first), ("main/1", second)):
        space = Space(cache, NO_TEACHER, contents(*MATCHES), role)
        assert space.open()
        assert space.name == expected.name
    with pytest.raises(CacheError, match=r"does not have what these losses read \(stored: .*run textbrewer.precompute"):
        Space(cache, NO_TEACHER, contents(*MATCHES), "main/2").open()


def test_without_a_teacher_rows_of_several_or_of_none_are_refused(cache):
    with pytest.raises(CacheError, match=r"does not have what these losses read \(stored: nothing\).*precompute"):
        Space(cache, NO_TEACHER, contents(*MATCHES)).open()
    space_of(cache)
    with pytest.raises(CacheError, match=r"stored: logits; hidden 1; position product of hidden 0-2\)"):
        Space(cache, {**NO_TEACHER, "temperature": 2.0}, contents(*MATCHES)).open()
    space_of(cache, teacher="another")
    with pytest.raises(CacheError, match="has the outputs of 2 teachers"):
        Space(cache, NO_TEACHER, contents(*MATCHES)).open()


# ---- damage, and no use --------------------------------------------------------------------------------------------


def test_damaged_rows_are_computed_anew_and_told_of_once(cache):
    space = space_of(cache)
    step(space, range(10))
    cache.flush()
    batch = batch_of(range(10))
    keys = space.lookup(batch).rows.keys
    for row in (2, 5):
        entry = bytearray(cache.read(space.name, [keys[row]])[0])
        entry[len(entry) // 2] ^= 1 << row
        cache.store.put(space.name, {keys[row]: bytes(entry)})
    before = cache.info()
    batch, missing, views = step(space, range(10))
    assert missing == [2, 5]
    assert_as_computed(batch, views)
    assert cache.info().rows_missing - before.rows_missing == 2
    cache.flush()
    with pytest.warns(UserWarning, match=r"has damaged rows; they are left out.*delete the folder to store anew"):
        space.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(space, range(10))[1] == []
        space.tell()


@pytest.mark.parametrize("content", [{}, {"layout": {}}, {"layout": {"items": [{"name": "x"}]}}, {"layout": 3}])
def test_a_damaged_note_of_the_rows_is_refused(cache, content):
    space = space_of(cache)
    cache.store.note(space.name, content)
    with pytest.raises(CacheError, match=r"what it notes of its rows is damaged.*delete the folder"):
        space_of(cache, settle=False)


def test_rows_that_never_come_again_make_it_step_aside_after_the_second_pass_began(cache):
    space = space_of(cache)
    fresh = iter(range(10**6))
    for _ in range(20):
        step(space, [next(fresh) for _ in range(10)])
    assert not space.aside
    steps = 0
    while not space.aside:
        step(space, [next(fresh) for _ in range(10)], passes=1)
        steps += 1
        assert steps < 20
    # 64 rows are enough to tell, of 200.
    assert steps == 7
    with pytest.warns(UserWarning, match=r"no row of the second pass was seen in the first.*steps aside"):
        space.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.tell()


def test_of_a_long_pass_a_twentieth_is_looked_at(cache):
    space = space_of(cache)
    fresh = iter(range(10**6))
    for _ in range(40):
        space.lookup(batch_of([next(fresh) for _ in range(50)]))
    for number in range(1, 4):
        space.lookup(batch_of([next(fresh) for _ in range(50)]), 1)
        assert space.aside is (number >= 2)


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_it_stays_where_rows_come_again(cache, share):
    """Also where most of them are new."""
    space = space_of(cache)
    for start in range(0, 200, 10):
        step(space, range(start, start + 10))
    cache.flush()
    fresh = iter(range(1000, 10**6))
    for start in range(0, 200, 20):
        count = int(20 * share)
        step(space, [*range(start, start + count), *[next(fresh) for _ in range(20 - count)]], passes=1)
    assert not space.aside
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.tell()


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_noted_the_training_goes_on_without_storing(cache):
    def fail(*arguments):
        raise OSError("the disk is full")

    space, plain = space_of(cache, settle=False), cache.store._change
    cache.store._change = fail
    batch = batch_of([0, 1, 2])
    with pytest.warns(UserWarning, match=r"cannot be written any more \(the disk is full\)"):
        space.settle(batch, teacher(batch), student(batch), 10)
    for _ in range(2):
        batch, missing, views = step(space, range(4))
        assert missing == [0, 1, 2, 3]
        assert_as_computed(batch, views)
    cache.store._change = plain
    space.finish()
    assert cache.store.spaces() == {}
    assert cache.info().entries == 0


def test_a_note_of_the_cost_that_fails_is_no_error(cache):
    space = space_of(cache)
    step(space, range(4))
    cache.flush()

    def fail(*arguments):
        raise OSError("the disk is full")

    cache.store.note = fail
    space.finish()
    assert "seconds_a_row" not in cache.store.describe(space.name)


def test_the_plan_tells_of_rows_that_do_not_serve(tmp_path):
    """A teacher that was not meant to change may have: the second teacher's line says that there is another's rows."""
    lines = []
    with TeacherCache(tmp_path / "cache").opened() as cache:
        for name in ("one", "other"):
            space = Space(cache, {"teacher": name, "temperature": None}, Contents([], everything=False))
            space.open()
            batch = {"x": torch.arange(6.0).reshape(3, 2)}
            space.settle(batch, Views({"logits": [torch.zeros(3, 2)]}), None, 3)
            lines.append(space.plan_line)
    assert "also has rows" not in lines[0]
    assert lines[1].endswith("the folder also has rows of 1 other teachers, adaptors or choices of losses")
