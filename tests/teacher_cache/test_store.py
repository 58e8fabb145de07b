"""The file of a cache under what can happen to it: killed and concurrent writers, a full disk, damage."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests import processes
from textbrewer.teacher_cache import CacheError
from textbrewer.teacher_cache import store as store_module
from textbrewer.teacher_cache.store import FORMAT, Store, import_lmdb

lmdb = pytest.importorskip("lmdb")
MB = 1 << 20
REMEDY = r"delete the folder|name another|name a new or empty folder"


def key_of(number):
    return number.to_bytes(16, "big")


def value_of(number, largest=9000):
    """Bytes of an entry, told by its number alone; some of them longer than a page."""
    generator = random.Random(number)
    return generator.randbytes(generator.randint(1, largest))


def entries_of(numbers):
    return {key_of(number): value_of(number) for number in numbers}


def assert_there(store, numbers, space="rows"):
    numbers = list(numbers)
    assert store.get(space, [key_of(number) for number in numbers]) == [value_of(number) for number in numbers]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def opened():
    """``opened(path, max_bytes)``: a store that is closed at the end."""
    stores = []

    def make(path, max_bytes=64 * MB):
        stores.append(Store(path, max_bytes))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def files_of(folder):
    """Everything in a folder but LMDB's lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock.mdb"
    }


# ---- plain use -----------------------------------------------------------------------------------------------------


def test_what_was_put_is_got_in_order_and_the_rest_is_none(opened, folder):
    store = opened(folder / "new" / "deep")
    store.put("rows", entries_of(range(50)))
    assert store.get("rows", [key_of(7), key_of(99), key_of(3)]) == [value_of(7), None, value_of(3)]
    assert store.get("others", [key_of(7)]) == [None]
    assert (store.entries("rows"), store.entries("others")) == (50, 0)
    store.put("others", {key_of(7): b"other"})
    assert store.get("others", [key_of(7)]) == [b"other"]
    assert_there(store, range(50))
    store.put("rows", {key_of(7): b"anew"})
    assert store.get("rows", [key_of(7)]) == [b"anew"]
    assert store.get("rows", []) == []


def test_notes_are_first_come_first_served(opened, folder):
    store = opened(folder)
    assert store.spaces() == {}
    assert store.describe("a") is None
    assert store.describe("a", lambda: {"x": [1]}) == {"x": [1]}
    assert store.describe("a", lambda: {"x": [2]}) == {"x": [1]}
    store.note("a", {"x": [3]})
    assert store.describe("a") == {"x": [3]}
    assert store.describe("b", dict) == {}
    assert store.spaces() == {"a": {"x": [3]}, "b": {}}


def test_of_two_notes_at_once_the_first_counts(opened, folder):
    """Another process notes something while this one makes its own."""
    store = opened(folder)
    assert store.describe("a", lambda: (store.note("a", {"x": 1}), {"x": 2})[1]) == {"x": 1}
    assert store.describe("a") == {"x": 1}


def test_reading_writes_nothing(opened, folder):
    store = opened(folder)
    before = (folder / "data.mdb").read_bytes()
    store.get("rows", [key_of(1)])
    store.describe("rows")
    store.spaces()
    store.entries("rows")
    assert (folder / "data.mdb").read_bytes() == before


def test_a_store_is_found_again(opened, folder):
    store = opened(folder)
    store.put("rows", entries_of(range(100)))
    store.note("rows", {"x": 1})
    used = store.used()
    store.close()
    again = opened(folder)
    assert_there(again, range(100))
    assert again.describe("rows") == {"x": 1}
    assert again.used() == used == (folder / "data.mdb").stat().st_size


def test_the_file_is_mapped_anew_now_and_then_without_a_trace(opened, folder, monkeypatch):
    monkeypatch.setattr(store_module, "_MAPPED", 30_000)
    store = opened(folder)
    store.put("rows", entries_of(range(100)))
    opens, plain = [], store._open
    monkeypatch.setattr(store, "_open", lambda: (opens.append(1), plain()))
    for start in range(0, 100, 10):
        assert_there(store, range(start, start + 10))
        store.put("rows", entries_of([1000 + start]))
        assert store.spaces() == {}
    assert_there(store, range(1000, 1100, 10))
    assert len(opens) >= 5


def test_without_lmdb_the_error_has_the_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'textbrewer\[cache\]'"):
        Store(folder, None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        import_lmdb()
    assert not folder.exists()


# ---- threads -------------------------------------------------------------------------------------------------------


def test_threads_read_and_write_at_once(opened, folder, monkeypatch):
    monkeypatch.setattr(store_module, "_MAPPED", 200_000)
    store, errors = opened(folder), []
    store.put("rows", entries_of(range(50)))

    def work(own):
        try:
            generator = random.Random(own)
            for number in range(own, own + 60):
                store.put("rows", entries_of([number]))
                assert_there(store, [number, generator.randrange(50), generator.randint(own, number)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.entries("rows") == 50 + 3 * 60


# ---- processes -----------------------------------------------------------------------------------------------------


def write_on(path, report, start, batches, batch=5):
    """Write entries batch by batch; note the next number after each commit."""
    store = Store(Path(path), 512 * MB)
    with open(report, "a") as acknowledged:
        for number in range(start, start + batches * batch, batch):
            store.put("rows", entries_of(range(number, number + batch)))
            acknowledged.write(f"{number + batch}\n")
            acknowledged.flush()


def acknowledged_by(report):
    lines = report.read_text().split("\n")[:-1] if report.exists() else []
    return int(lines[-1]) if lines else 0


def wait_for(condition):
    end = time.monotonic() + processes.LIMIT
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def test_a_killed_writer_loses_no_batch_that_was_acknowledged(opened, folder, tmp_path):
    """Killed ten times at random moments, from before the first batch on; each time another goes on with the file."""
    generator, report, done = random.Random(5), tmp_path / "report", 0
    for kill in range(10):
        process = processes.start(write_on, str(folder), report, done, 10**6)
        if kill:
            wait_for(lambda: acknowledged_by(report) > done or not process.is_alive())
        time.sleep(generator.random() * 0.05)
        assert process.is_alive(), "the writer failed"
        process.kill()
        process.join()
        written, done = done, acknowledged_by(report)
        assert kill == 0 or done > written
        store = opened(folder)
        assert_there(store, range(done))
        # At most the batch whose acknowledgement the kill came before; never a part of one.
        assert store.entries("rows") in (done, done + 5)
        store.put("others", entries_of([kill]))
        assert_there(store, [kill], "others")
        store.close()
    assert done >= 50


def test_two_processes_fill_one_store(opened, folder, tmp_path):
    """Each its own rows, and some that both have."""
    starts = [(0, 40), (100, 40)]
    writers = [
        processes.start(write_on, str(folder), tmp_path / str(start), start, batches) for start, batches in starts
    ]
    assert [processes.finish(writer) for writer in writers] == [0, 0]
    store = opened(folder)
    assert_there(store, range(300))
    assert store.entries("rows") == 300


@pytest.mark.parametrize("known", [True, False])
def test_another_process_lets_the_file_grow_beyond_this_ones_map(opened, folder, tmp_path, known):
    """This one has a map of 2 MB, the other writes 6 MB; ``known``: this one has used the space before."""
    store = opened(folder, 1 * MB)
    if known:
        store.put("rows", entries_of([10**6]))
    assert processes.run(write_on, str(folder), tmp_path / "report", 0, 280) == 0
    assert (folder / "data.mdb").stat().st_size > 4 * MB
    assert_there(store, range(1400))
    assert store.entries("rows") == 1400 + known
    assert store.room() == 0
    store.note("rows", {"x": 1})
    assert store.describe("rows") == {"x": 1}


def test_writing_after_another_process_let_the_file_grow(opened, folder, tmp_path):
    store = opened(folder, 1 * MB)
    assert processes.run(write_on, str(folder), tmp_path / "report", 0, 280) == 0
    store.put("others", entries_of(range(3)))
    assert_there(store, range(3), "others")
    assert_there(store, range(1400))


# ---- limits --------------------------------------------------------------------------------------------------------


def test_the_limit_is_kept_and_what_is_there_stays(opened, folder):
    store = opened(folder, 2 * MB)
    done = 0
    with pytest.raises(OSError, match="the limit of 2,097,152 bytes is reached"):  # noqa: PT012
        while True:
            store.put("rows", entries_of(range(done, done + 5)))
            done += 5
    # One MB more for the tree itself.
    assert 2 * MB < (folder / "data.mdb").stat().st_size <= 3 * MB
    assert store.room() == 0
    for again in (store, None):
        again = again or opened(folder, 2 * MB)
        assert_there(again, range(done))
        assert again.entries("rows") == done
        with pytest.raises(OSError, match="limit"):
            again.put("rows", entries_of(range(done, done + 500)))
        assert_there(again, range(done))
        again.close()
    larger = opened(folder, 8 * MB)
    larger.put("rows", entries_of(range(done, done + 500)))
    assert_there(larger, range(done + 500))


def test_without_a_limit_the_disk_keeps_a_gigabyte(opened, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parent)._replace(free=(1 << 30) + 5 * MB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store = opened(folder, None)
    assert store.room() == 5 * MB - store.used()


def fill_up_to_a_limit(path, report):
    """Under RLIMIT_FSIZE a write beyond some size of a file fails half way, as on a full disk."""
    path, found = Path(path), {}
    store = Store(path, 512 * MB)
    store.put("rows", entries_of(range(100)))
    limit = (path / "data.mdb").stat().st_size + 300_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    done = 100
    try:
        while done < 10_000:
            store.put("rows", entries_of(range(done, done + 5)))
            done += 5
    except OSError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    assert_there(store, range(done))
    found["entries"] = store.entries("rows")
    for _ in range(3):
        try:
            store.put("rows", entries_of(range(done, done + 500)))
            found["second"] = "no error"
        except OSError:
            pass
    assert_there(store, range(done))
    store.close()
    again = Store(path, 512 * MB)
    assert_there(again, range(done))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again.put("rows", entries_of(range(done, done + 500)))
    assert_there(again, range(done + 500))
    Path(report).write_text(json.dumps({**found, "done": done}))


def test_a_write_that_fails_half_way_is_an_oserror_and_loses_nothing(opened, folder, tmp_path):
    report = tmp_path / "report"
    assert processes.run(fill_up_to_a_limit, str(folder), str(report)) == 0
    found = json.loads(report.read_text())
    assert 100 < found["done"] == found["entries"] < 10_000
    assert "second" not in found
    assert found["error"].startswith("OSError: mdb_txn_commit")
    assert_there(opened(folder), range(found["done"] + 500))


FULL_DISK = """
    import faulthandler, json, pathlib, sys
    faulthandler.enable()
    from tests.teacher_cache.test_store import *
    disk = pathlib.Path(sys.argv[1])
    found, done = {}, 0
    store = Store(disk / "cache", 512 * MB)
    store.describe("rows", lambda: {"x": 1})
    try:
        while done < 10_000:
            store.put("rows", entries_of(range(done, done + 5)))
            done += 5
    except OSError as error:
        found["put"] = str(error)
    assert_there(store, range(done))
    # Nothing is left for the smallest of files.
    try:
        with open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    except OSError:
        pass
    for name, work in {
        "note": lambda: store.note("rows", {"x": "y" * 20_000}),
        "describe": lambda: store.describe("other", lambda: {"x": "y" * 20_000}),
        "new space": lambda: store.put("other", entries_of(range(30))),
    }.items():
        try:
            work()
            found[name] = "no error"
        except OSError as error:
            found[name] = str(error)
    assert store.describe("rows") == {"x": 1}
    assert store.spaces() == {"rows": {"x": 1}}
    assert (store.entries("rows"), store.entries("other")) == (done, 0)
    store.close()
    again = Store(disk / "cache", 512 * MB)
    assert_there(again, range(done))
    try:
        Store(disk / "second", 512 * MB)
    except CacheError as error:
        found["new store"] = str(error)
    (disk / "filler").unlink()
    again.put("rows", entries_of(range(done, done + 1)))
    assert_there(again, range(done + 1))
    print(json.dumps({**found, "done": done}))
"""


def test_a_full_disk(tmp_path):
    """A disk of 4 MB in memory, mounted for one process alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs {disk}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no disk of one's own can be mounted here (unshare -rm)")
    command = f'{mount} && exec "$0" "$@"'
    script = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(disk)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, *script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["done"] > 100
    for name in ("put", "note", "describe", "new space"):
        assert found[name].startswith("the disk is full: mdb_")
    assert "No space left on device" in found["new store"]
    assert "free the disk" in found["new store"]
    assert "damaged" not in found["new store"]


# ---- damage --------------------------------------------------------------------------------------------------------


def cut(size):
    def damage(file):
        os.truncate(file, int(file.stat().st_size * size))

    return damage


def overwritten(start, count, filler=None):
    def damage(file):
        with open(file, "r+b") as stream:
            stream.seek(start)
            stream.write(random.Random(1).randbytes(count) if filler is None else bytes([filler]) * count)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut(0.5),
        cut(0.9),
        lambda file: os.truncate(file, 8192),
        lambda file: os.truncate(file, 5000),
        lambda file: os.truncate(file, 100),
        overwritten(0, 8192),
        overwritten(0, 100),
        overwritten(0, 8192, 0),
        lambda file: file.write_text("something else " * 5000),
    ],
)
def test_a_damaged_file_is_refused_and_left_as_it_is(opened, folder, damage):
    store = opened(folder)
    store.put("rows", entries_of(range(300)))
    store.close()
    damage(folder / "data.mdb")
    (folder / "note.txt").write_text("of the user")
    before = files_of(folder)
    for _ in range(2):
        with pytest.raises(CacheError, match=REMEDY) as error:
            opened(folder)
        assert repr(str(folder)) in str(error.value)
        assert "damaged" in str(error.value)
    assert files_of(folder) == before


def foreign(named):
    def make(folder):
        with lmdb.open(str(folder), max_dbs=4) as env:
            space = env.open_db(b"images") if named else None
            with env.begin(write=True) as txn:
                txn.put(b"key", b"value", db=space)

    return make


def with_header(text):
    def make(folder):
        Store(folder, MB).close()
        with lmdb.open(str(folder)) as env, env.begin(write=True) as txn:
            txn.put(store_module._HEADER, text)

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (foreign(False), "is an LMDB file, but no teacher cache"),
        (foreign(True), "is an LMDB file, but no teacher cache"),
        (with_header(json.dumps({"format": FORMAT + 1}).encode()), f"has the format {FORMAT + 1}, this version reads"),
        (with_header(b"no json"), "its header is not readable"),
        (with_header(b"[1]"), "its header is not readable"),
        (with_header(b"{}"), "its header is not readable"),
        (with_header(b"\xff\xfe"), "its header is not readable"),
        (
            lambda folder: (folder / "weights.bin").write_text("of the user"),
            "is no teacher cache, it holds weights.bin",
        ),
        (lambda folder: (folder / "a" / "b").mkdir(parents=True), "is no teacher cache, it holds a"),
    ],
)
def test_what_is_no_cache_is_refused_and_left_as_it_is(opened, folder, make, says):
    folder.mkdir()
    make(folder)
    before, names = files_of(folder), {path.name for path in folder.iterdir()}
    with pytest.raises(CacheError, match=REMEDY) as error:
        opened(folder)
    assert says in str(error.value)
    assert repr(str(folder)) in str(error.value)
    assert files_of(folder) == before
    assert {path.name for path in folder.iterdir()} == names


def test_a_file_instead_of_a_folder_is_refused(opened, tmp_path):
    file = tmp_path / "cache"
    file.write_text("of the user")
    with pytest.raises(CacheError, match=r"a teacher cache is a folder, '.*' is a file; name another path"):
        opened(file)
    assert file.read_text() == "of the user"


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_what_a_writer_killed_at_the_very_start_leaves_is_taken_as_new(opened, folder, lock, data):
    folder.mkdir()
    for name, there in (("lock.mdb", lock), ("data.mdb", data)):
        if there:
            (folder / name).touch()
    store = opened(folder)
    store.put("rows", entries_of(range(10)))
    assert_there(store, range(10))


def test_changed_bytes_of_a_value_come_back_as_they_are(opened, folder):
    """The file has no checksums of its own: entries have."""
    store = opened(folder)
    marker = b"m" * 20_000
    store.put("rows", {key_of(1): marker, **entries_of(range(2, 30))})
    store.close()
    content = (folder / "data.mdb").read_bytes()
    place = content.index(marker)
    overwritten(place + 100, 50)(folder / "data.mdb")
    store = opened(folder)
    (found,) = store.get("rows", [key_of(1)])
    assert found[:100] == marker[:100]
    assert found[100:150] != marker[100:150]
    assert found[150:] == marker[150:]
    assert_there(store, range(2, 30))


def read_a_damaged_tree(path):
    store = Store(Path(path), 64 * MB)
    for work in (
        lambda: store.get("rows", [key_of(number) for number in range(300)]),
        lambda: assert_there(store, [77]),
    ):
        with pytest.raises(CacheError, match=r"cannot be read, its file is damaged .*delete the folder"):
            work()


@pytest.mark.parametrize("filler", [0, None])
def test_a_damaged_page_of_the_tree_is_told_when_it_is_read(opened, folder, filler):
    store = opened(folder)
    store.put("rows", entries_of(range(300)))
    store.close()
    place = (folder / "data.mdb").read_bytes().index(key_of(77)) // 4096
    overwritten(place * 4096, 4096, filler)(folder / "data.mdb")
    before = files_of(folder)
    assert processes.run(read_a_damaged_tree, str(folder)) == 0
    assert files_of(folder) == before


def test_a_file_that_another_process_makes_meanwhile_is_no_strangers(tmp_path, monkeypatch):
    """The folder is new, and LMDB's file appears just before it is listed."""

    def appear(folder, listed=Path.iterdir):
        Store(tmp_path / "other", None).close()
        shutil.copy(tmp_path / "other" / "data.mdb", folder)
        return listed(folder)

    (tmp_path / "cache").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda folder: appear(folder) if folder.name == "cache" else iter(()))
        Store(tmp_path / "cache", None).close()
    assert (tmp_path / "cache" / "data.mdb").exists()
