"""What users make: its arguments, its figures, and what it does when nothing can be written."""

import os
import threading
import time
import warnings

import pytest

from textbrewer import CacheError, CacheInfo, TeacherCache
from textbrewer.teacher_cache import cache as cache_module

pytest.importorskip("lmdb")


def key_of(number):
    return number.to_bytes(16, "big")


def entries_of(numbers, size=100):
    return {key_of(number): bytes([number % 251]) * size for number in numbers}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"path": None}, TypeError, "path of a teacher cache must be a folder, got None"),
        ({"path": 3}, TypeError, "path of a teacher cache must be a folder"),
        ({"dtype": "float8"}, ValueError, "dtype of a teacher cache must be one of the known names, got 'float8'"),
        ({"dtype": None}, TypeError, "dtype of a teacher cache must be a name"),
        ({"max_bytes": "much"}, ValueError, "max_bytes must be a number of bytes"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ({"max_bytes": True}, TypeError, "max_bytes must be a number of bytes"),
        ({"top_k": 0}, ValueError, "top_k of a teacher cache must be at least 1, got 0"),
        ({"top_k": 1.5}, ValueError, "top_k of a teacher cache must be a whole number"),
        ({"top_k": "8"}, TypeError, "top_k of a teacher cache must be a whole number"),
        ({"mask": 1.0}, TypeError, "mask of a teacher cache must be a key or number"),
        ({"mask": True}, TypeError, "mask of a teacher cache must be a key or number"),
        ({"keep_padding": 1}, TypeError, "keep_padding must be True, False or None, got 1"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, error, says, tmp_path):
    with pytest.raises(error) as found:
        TeacherCache(**{"path": tmp_path / "cache", **arguments})
    assert says in str(found.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("fp32", "float32"), ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("int8", "int8")],
)
def test_short_names_of_types(given, dtype, tmp_path):
    cache = TeacherCache(str(tmp_path), given)
    assert cache.dtype == dtype
    assert repr(cache) == f"TeacherCache({str(tmp_path)!r}, dtype={dtype!r}, max_bytes=None)"


def test_arguments_are_kept(tmp_path):
    cache = TeacherCache(tmp_path, max_bytes="2GB", top_k=8.0, mask=1, keep_padding=False)
    assert (cache.dtype, cache.max_bytes, cache.top_k, cache.mask, cache.keep_padding) == (
        "float16",
        2 * 10**9,
        8,
        "1",
        False,
    )
    assert isinstance(cache.top_k, int)


def test_nothing_is_made_before_it_is_opened(tmp_path):
    cache = TeacherCache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(RuntimeError, match="a teacher cache must be opened first"):
        _ = cache.store
    with cache.opened() as same:
        assert same is cache
        assert (tmp_path / "cache" / "data.mdb").exists()
    with pytest.raises(RuntimeError, match="must be opened first"):
        _ = cache.store


def test_info_counts_what_happened(tmp_path):
    cache = TeacherCache(tmp_path / "cache")
    assert cache.info() == CacheInfo(str(tmp_path / "cache"), 0, cache.info().bytes, 0, 0, 0, 0.0, 0.0)
    assert cache.info().hit_rate == 0.0
    with cache.opened():
        for name, count in (("a", 30), ("b", 12)):
            cache.store.describe(name, dict)
            cache.write(name, entries_of(range(count)))
        cache.count(3, 1, 6.5)
        cache.count(6, 0, 2.0)
        cache.waited(0.25)
        cache.waited(1.25)
        cache.flush()
        inside = cache.info()
    info = cache.info()
    assert info == inside
    assert (info.entries, info.spaces, info.rows_found, info.rows_missing) == (42, 2, 9, 1)
    assert info.bytes == os.path.getsize(tmp_path / "cache" / "data.mdb") > 42 * 100
    assert info.hit_rate == 0.9
    # Waiting for the writes counts as well, and was short.
    assert info.seconds_waited == pytest.approx(1.5, abs=0.4)
    assert info.seconds_saved + info.seconds_waited == pytest.approx(8.5)
    assert str(info) == (
        f"Teacher cache {str(tmp_path / 'cache')!r}: 42 rows, {info.bytes / 1000:.1f} KB; found 90.0% of 10 look-ups, "
        f"saved {info.seconds_saved:.0f} s, steps waited {info.seconds_waited:.1f} s"
    )
    cache.waited(100.0)
    assert cache.info().seconds_saved == 0.0


def test_what_was_written_is_there_when_the_context_ends(tmp_path):
    with TeacherCache(tmp_path).opened() as cache:
        for start in range(0, 100, 10):
            cache.write("a", entries_of(range(start, start + 10)))
    with TeacherCache(tmp_path).opened() as cache:
        assert cache.read("a", [key_of(number) for number in range(101)]) == [*entries_of(range(100)).values(), None]


def test_two_caches_of_one_folder_in_one_process(tmp_path):
    """By two names of the folder; LMDB itself must not have a file open twice."""
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    first, second = TeacherCache(tmp_path / "cache"), TeacherCache(tmp_path / "link", dtype="int8")
    with first.opened():
        first.write("a", entries_of(range(5)))
        first.flush()
        with second.opened():
            assert second.store is first.store
            assert second.read("a", [key_of(4)]) == [entries_of([4])[key_of(4)]]
            second.write("a", entries_of(range(5, 9)))
        first.write("a", entries_of(range(9, 12)))
        first.flush()
        assert first.info().entries == 0, "rows of spaces that are noted count, and none is"
        assert first.store.entries("a") == 12
        with second.opened():
            assert second.store.entries("a") == 12
    assert not cache_module._open_stores
    with second.opened():
        assert second.store.entries("a") == 12


def test_opening_again_within_is_the_same(tmp_path):
    cache = TeacherCache(tmp_path)
    with cache.opened():
        store = cache.store
        with cache.opened():
            assert cache.store is store
        cache.write("a", entries_of(range(3)))
        cache.flush()
        assert store.entries("a") == 3


def test_an_error_within_closes_the_file(tmp_path):
    cache = TeacherCache(tmp_path)
    with pytest.raises(ZeroDivisionError), cache.opened():  # noqa: PT012
        cache.write("a", entries_of(range(3)))
        raise ZeroDivisionError
    assert not cache_module._open_stores
    with cache.opened():
        assert cache.store.entries("a") == 3


def test_a_folder_that_cannot_be_used_leaves_nothing_open(tmp_path):
    (tmp_path / "file.txt").write_text("of the user")
    cache = TeacherCache(tmp_path)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"is no teacher cache, it holds file.txt"), cache.opened():
            pass
        with pytest.raises(CacheError):
            cache.info()
    assert not cache_module._open_stores
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_writing_does_not_keep_the_caller_waiting(tmp_path):
    """It happens in a thread of its own; the next one waits for it."""
    with TeacherCache(tmp_path).opened() as cache:
        plain, seen, gate = cache.store.put, [], threading.Event()

        def slow(space, entries):
            seen.append(threading.current_thread())
            assert gate.wait(30)
            plain(space, entries)

        cache.store.put = slow
        mine = entries_of(range(3))
        cache.write("a", mine)
        mine.clear()
        assert cache.store.entries("a") == 0
        gate.set()
        cache.write("a", entries_of(range(3, 5)))
        assert cache.store.entries("a") >= 3
        cache.flush()
        assert cache.store.entries("a") == 5
        assert all(thread is not threading.main_thread() for thread in seen)


def test_a_failed_write_warns_once_and_reading_goes_on(tmp_path):
    with TeacherCache(tmp_path).opened() as cache:
        cache.write("a", entries_of(range(3)))
        cache.flush()
        tries = []

        def fail(space, entries):
            tries.append(space)
            raise OSError("the disk is on fire")

        cache.store.put = fail
        cache.write("a", entries_of([7]))
        with pytest.warns(
            UserWarning, match=r"cannot be written any more \(the disk is on fire\).*the training goes on"
        ):
            cache.write("a", entries_of([8]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.write("a", entries_of([9]))
            cache.flush()
            assert cache.read("a", [key_of(1), key_of(7)]) == [entries_of([1])[key_of(1)], None]
        assert tries == ["a"]
        assert cache.stopped == "the disk is on fire"
    with cache.opened():
        assert cache.stopped is None


def test_a_failed_write_is_told_of_at_the_end_at_the_latest(tmp_path):
    cache = TeacherCache(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot be written any more"), cache.opened():  # noqa: PT031
        cache.store.put = lambda space, entries: (_ for _ in ()).throw(OSError("no"))
        cache.write("a", entries_of([7]))


@pytest.mark.parametrize("quietly", [True, False])
def test_max_bytes_is_kept(tmp_path, quietly):
    """Told once, or not at all where it was planned."""
    cache, limit = TeacherCache(tmp_path, max_bytes="300kB"), 300_000
    with cache.opened(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for start in range(0, 2000, 10):
            cache.write("a", entries_of(range(start, start + 10), size=1000), quietly)
        cache.flush()
        done = cache.store.entries("a")
        assert cache.stopped == "max_bytes is reached"
        assert cache.room() < 10_000
    assert [str(item.message).count("max_bytes is reached") for item in told] == ([] if quietly else [1])
    assert 100 < done < 300
    # What is written in one transaction may take some more pages for the tree.
    assert limit / 2 < os.path.getsize(tmp_path / "data.mdb") < limit + 20_000
    with cache.opened():
        assert cache.read("a", [key_of(number) for number in range(done)]) == list(
            entries_of(range(done), size=1000).values()
        )


def test_the_smaller_limit_of_two_counts_for_its_own(tmp_path):
    large, small = TeacherCache(tmp_path, max_bytes="10MB"), TeacherCache(tmp_path, max_bytes="100kB")
    with large.opened(), small.opened():
        assert small.room() <= 100_000 < large.room()
        large.write("a", entries_of(range(300), size=1000))
        large.flush()
        assert small.room() == 0
        with pytest.warns(UserWarning, match=r"max_bytes is reached"):
            small.write("a", entries_of([1000], size=1000))
        large.write("a", entries_of([1001], size=1000))
        large.flush()
        assert large.read("a", [key_of(1000), key_of(1001)]) == [None, bytes([1001 % 251]) * 1000]


def test_threads_open_and_close_one_folder(tmp_path):
    errors = []

    def work(own):
        try:
            for number in range(15):
                with TeacherCache(tmp_path).opened() as cache:
                    cache.write("a", entries_of([100 * own + number]))
                    time.sleep(0.001)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not cache_module._open_stores
    with TeacherCache(tmp_path).opened() as cache:
        assert cache.store.entries("a") == 45
