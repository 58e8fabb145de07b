"""Runs with a teacher cache: resumed, interrupted, killed, out of space, with damaged rows, with rows that change."""

import dataclasses
import os
import random
import resource
import signal
import time
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from tests import processes
from tests.conftest import VOCABULARY, Encoder, Rows, adaptor, make_loader
from tests.engine.runs import SCENARIOS, Run, checkpoints, equal
from tests.teacher_cache.jobs import SAME, Job, apart, cache_at, lines, watch, weights
from textbrewer.teacher_cache import TeacherCache
from textbrewer.teacher_cache.store import Store

__all__ = ["lines"]
# Those of other scenarios are resumed alike: what matters here is how a loader draws its random numbers.
RESUMED = [
    "basic, steps, shuffled",
    "general, projections, accumulation",
    "multi-teacher",
    "multi-task",
    "own generator, steps",
    "workers, own generator",
    "without a length",
    "random collate",
    "a loader of one's own",
]
KILLED = "general, projections, accumulation"


def use_cache(name, folder):
    """Let the scenario of a name have a teacher cache."""
    scenario = SCENARIOS[name]
    return dataclasses.replace(scenario, distill={**scenario.distill, "teacher_cache": str(folder)})


def caching(name, folder, cache, seed=0, **settings):
    """A run of a scenario with a teacher cache."""
    plain = SCENARIOS[name]
    SCENARIOS[name] = use_cache(name, cache)
    try:
        return Run(name, folder, seed, **settings)
    finally:
        SCENARIOS[name] = plain


# ---- resumed


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_runs_end_the_same(name, tmp_path):
    """Batches are read one ahead of the step; the random numbers drawn for them are not lost in a checkpoint."""
    whole = caching(name, tmp_path / "whole", tmp_path / "cache").train().state()
    found = checkpoints(tmp_path / "whole")[:-1]
    for path in (found[0], random.Random(name).choice(found)):
        resumed = caching(name, tmp_path / path.name, tmp_path / "cache", seed=7).train(resume_from=path).state()
        wrong = [key for key in whole if not equal(whole[key], resumed[key])]
        assert not wrong, f"{path.name}: {wrong}"


def test_resumed_where_the_cache_is_gone(tmp_path):
    """Rows that nobody has stored are no sign of augmentation; they are stored as in a first pass."""
    data = make_loader(96, 4, shuffle=True)
    training = {"ckpt_frequency": 2, "save_total_limit": None}
    whole = Job(tmp_path / "whole", cache=cache_at(tmp_path), training=training).train(data, num_epochs=4)
    for step in (48, 60):
        job = Job(tmp_path / f"job {step}", cache=cache_at(tmp_path / f"new {step}"))
        job.train(data, num_epochs=4, resume_from=tmp_path / "whole" / f"checkpoint-{step}")
        assert apart(job, whole) < SAME
        # The first batch is looked at beforehand, and may belong to the part that is done.
        assert job.rows == 96 if step == 48 else 96 <= job.rows <= 100


def test_stopped_by_sigterm(tmp_path):
    name, batches = "basic, steps, shuffled", []
    whole = caching(name, tmp_path / "whole", tmp_path / "cache", every_step=False).train().state()

    def postprocess(batch):
        batches.append(batch)
        if len(batches) == 4:
            signal.raise_signal(signal.SIGTERM)
        return batch

    with pytest.raises(SystemExit, match="143"):
        caching(name, tmp_path / "run", tmp_path / "other", every_step=False).train(batch_postprocessor=postprocess)
    assert len(checkpoints(tmp_path / "run")) == 1
    again = caching(name, tmp_path / "run", tmp_path / "other", seed=3, every_step=False)
    assert equal(again.train(resume_from="latest").state(), whole)


def train_to_death(folder, cache, resume, fatal):
    """Train in a process of its own that dies within its ``fatal``-th transaction, if there is one."""
    put, done = Store.put, []

    def dying(self, space, entries):
        done.append(space)
        if len(done) == fatal:
            half = dict(list(entries.items())[: len(entries) // 2])

            class Deadly(dict):
                def items(self):
                    yield from half.items()
                    os.kill(os.getpid(), signal.SIGKILL)

            entries = Deadly(entries)
        put(self, space, entries)

    Store.put = dying
    run = caching(KILLED, folder, cache, seed=len(os.listdir(folder)))
    torch.save(run.train(resume_from="latest" if resume else None).state(), folder / "end.pt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return caching(KILLED, folder / "run", folder / "cache").train().state()


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(seed, undisturbed, tmp_path):
    """Killed from outside between its first checkpoint and its end, again and again."""
    folder, cache, clock = tmp_path / "run", tmp_path / "cache", random.Random(seed)
    folder.mkdir()
    for number in range(3):
        before = len(checkpoints(folder))
        process = processes.start(train_to_death, folder, cache, number > 0, None)
        while process.is_alive() and len(checkpoints(folder)) == before:
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.03))
        process.kill()
        assert processes.finish(process) in (0, -signal.SIGKILL)
    assert processes.run(train_to_death, folder, cache, True, None) == 0
    assert equal(torch.load(folder / "end.pt", weights_only=True), undisturbed)
    assert TeacherCache(cache).info().entries == 22


@pytest.mark.parametrize("fatal", [1, 3])
def test_killed_within_a_transaction(fatal, undisturbed, tmp_path):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    folder.mkdir()
    # Seeds differ after a death without a checkpoint, but not the first one's.
    assert processes.run(train_to_death, folder, cache, False, fatal) == -signal.SIGKILL
    entries = TeacherCache(cache).info().entries
    assert entries == 4 * (fatal - 1)
    for path in folder.iterdir():
        assert path.name.startswith(("checkpoint", "gs"))
    resume = bool(checkpoints(folder))
    if not resume:
        for path in list(folder.iterdir()):
            path.unlink()
    assert processes.run(train_to_death, folder, cache, resume, None) == 0
    assert equal(torch.load(folder / "end.pt", weights_only=True), undisturbed)


# ---- rows found in part


def test_only_missing_rows_are_run(tmp_path):
    data = Rows(24)
    plain = Job(tmp_path / "plain").train(DataLoader(data, 4, shuffle=True))
    Job(tmp_path / "first", cache=cache_at(tmp_path)).train(DataLoader(Subset(data, range(0, 24, 3)), 4), num_epochs=1)
    job = Job(tmp_path / "job", cache=cache_at(tmp_path)).train(DataLoader(data, 4, shuffle=True))
    assert apart(job, plain) < SAME
    assert job.rows == 16
    assert set(job.calls[0]) <= {1, 2, 3, 4}
    assert min(job.calls[0]) < 4


def test_max_bytes_with_room_for_some_rows(tmp_path, lines):
    plain = Job(tmp_path / "plain").train(make_loader(96, 4))
    job = Job(tmp_path / "job", cache=cache_at(tmp_path, max_bytes="100KB")).train(make_loader(96, 4))
    (line,) = lines()
    assert "of the rows (max_bytes), the others are recomputed" in line
    info = job.cache.info()
    assert 8 < info.entries < 90
    assert info.bytes <= 100_000
    # The first pass runs all rows, the other two those that did not fit.
    assert job.rows == 96 + 2 * (96 - info.entries)
    assert apart(job, plain) < SAME
    again = Job(tmp_path / "again", cache=cache_at(tmp_path, max_bytes="100KB")).train(make_loader(96, 4))
    assert again.rows == 3 * (96 - info.entries)
    assert torch.equal(again.end, job.end)


def deep(seed=1):
    return Encoder(5, 48, seed=seed)


def test_max_bytes_with_room_for_some_features(tmp_path, lines):
    """The shallow states are recomputed, and the teacher stops behind them."""
    shallow = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    config = {
        "intermediate_matches": [
            {**shallow, "proj": ["linear", 32, 48]},
            {**shallow, "layer_T": 5, "loss": "pkd", "proj": ["linear", 32, 48]},
        ]
    }
    options = {"config": config, "teachers": None}

    def job(name, cache):
        options["teachers"] = [deep()]
        found = Job(tmp_path / name, cache=cache, **options)
        found.deepest = watch(found.teachers[0].layers[-1])
        found.shallowest = watch(found.teachers[0].layers[0])
        return found.train(make_loader(96, 4))

    plain, first = job("plain", None), job("first", cache_at(tmp_path, max_bytes="140KB"))
    (line,) = lines()
    assert "stores logits; first position of hidden 5 as float32" in line
    assert "recomputes hidden 1" in line
    assert first.cache.info().entries == 96
    assert first.cache.info().bytes <= 140_000
    assert apart(first, plain) < SAME
    # The second pass starts with a batch on which it is tried out how far the teacher has to run.
    assert sum(first.deepest) <= 96 + 8
    assert sum(first.shallowest) >= 3 * 96
    again = job("again", cache_at(tmp_path, max_bytes="140KB"))
    assert sum(again.deepest) <= 12
    assert apart(again, first) < SAME


# ---- rows that change


class Augmented(Dataset):
    """Rows of which other tokens are replaced in every pass."""

    def __init__(self, share=1.0):
        self.rows, self.epoch, self.share = Rows(96), 0, share

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = dict(self.rows[number])
        if number < self.share * len(self):
            generator = torch.Generator().manual_seed(1000 * self.epoch + number)
            others = torch.randint(1, VOCABULARY, row["input_ids"].shape, generator=generator)
            row["input_ids"] = others * row["attention_mask"]
        return row


def test_rows_that_change_in_every_pass(tmp_path):
    sizes, rows = [], []

    def callback(model, step):
        sizes.append((tmp_path / "cache" / "data.mdb").stat().st_size)
        rows.append(job.rows)

    plain = Job(tmp_path / "plain").train(DataLoader(Augmented(), 4), num_epochs=5)
    job = Job(tmp_path / "job", cache=cache_at(tmp_path))
    with pytest.warns(UserWarning, match="teacher cache") as record:
        job.train(DataLoader(Augmented(), 4), num_epochs=5, callback=callback)
    (warning,) = [str(item.message) for item in record]
    assert "no row of the second pass was seen in the first" in warning
    assert apart(job, plain) < SAME
    assert sizes[1] == sizes[2] == sizes[3] == sizes[4]
    assert rows == [96, 192, 288, 384, 480]


def test_some_rows_that_stay_keep_the_cache_in_use(tmp_path):
    job = Job(tmp_path / "job", cache=cache_at(tmp_path))
    job.train(DataLoader(Augmented(share=0.75), 4, shuffle=True), num_epochs=4)
    assert job.rows == 96 + 3 * 72


# ---- nothing can be written


def quietly(job, data, *wanted):
    """Train and return the job; the warnings must be the wanted ones, once each."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        job.train(data)
    texts = [str(item.message) for item in record if "teacher cache" in str(item.message)]
    assert len(texts) == len(wanted), texts
    for text, part in zip(texts, wanted, strict=True):
        assert part in text
    return job


@pytest.mark.parametrize("good", [0, 1, 4, 6])
def test_a_disk_that_is_full(good, tmp_path, monkeypatch):
    """After some transactions nothing can be written; what is in the cache is used."""
    put, done = Store.put, []

    def full(self, space, entries):
        done.append(space)
        if len(done) > good:
            raise OSError("No space left on device")
        put(self, space, entries)

    plain = Job(tmp_path / "plain").train(make_loader(24, 4))
    monkeypatch.setattr(Store, "put", full)
    wanted = ["cannot be written any more (No space left on device)"] if good < 6 else []
    job = quietly(Job(tmp_path / "job", cache=cache_at(tmp_path)), make_loader(24, 4), *wanted)
    assert apart(job, plain) < SAME
    assert job.rows == 24 + 2 * 4 * (6 - good)
    assert len(done) == min(good + 1, 6)
    assert job.cache.info().entries == 4 * good


def train_with_a_small_disk(folder, limit):
    """Until the last batch is read, files may not grow beyond the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    job, batches = Job(folder / "job", cache=TeacherCache(folder / "cache", "float32")), []

    def postprocess(batch):
        batches.append(batch)
        if len(batches) == 18:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        return batch

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1]))
        job.train(make_loader(24, 4), num_steps=18, batch_postprocessor=postprocess)
    texts = [str(item.message) for item in record]
    torch.save((weights(job.student), texts, job.cache.info().entries, job.rows), folder / "end.pt")


@pytest.mark.parametrize("limit", [12_288, 24_576, 40_960, 65_536])
def test_files_that_may_not_grow(limit, tmp_path):
    """The system refuses the writing, as on a full disk, at once or after some rows."""
    plain = Job(tmp_path / "plain").train(make_loader(24, 4), num_steps=18)
    assert processes.run(train_with_a_small_disk, tmp_path, limit) == 0
    end, texts, entries, rows = torch.load(tmp_path / "end.pt", weights_only=True)
    (text,) = texts
    assert "cannot be written any more (" in text
    assert "and the training goes on" in text
    moved = (weights(plain.student) - plain.start).abs().max()
    assert (end - weights(plain.student)).abs().max() < SAME * moved
    assert (entries > 0) == (limit > 30_000)
    assert rows == 72 - 2 * entries + (4 if entries == 0 else 0)
    assert TeacherCache(tmp_path / "cache").info().entries == entries


# ---- damaged rows


def test_rows_damaged_while_training(tmp_path):
    """Half of the rows are overwritten after the first pass: they are computed again, and stored anew."""
    rows = []

    def damage(model, step):
        rows.append(job.rows)
        if len(rows) > 1:
            return
        store = job.cache.store
        (space,) = store.spaces()
        keys = all_keys(store, space)
        for number, key in enumerate(keys[::2]):
            (entry,) = store.get(space, [key])
            place = random.Random(number).randrange(len(entry))
            store.put(space, {key: entry[:place] + bytes([entry[place] ^ 0xFF]) + entry[place + 1 :]})

    plain = Job(tmp_path / "plain").train(make_loader(24, 4))
    job = Job(tmp_path / "job", cache=cache_at(tmp_path))
    with pytest.warns(UserWarning, match="teacher cache") as record:
        job.train(make_loader(24, 4), callback=damage)
    (warning,) = [str(item.message) for item in record]
    assert "has damaged rows" in warning
    assert apart(job, plain) < SAME
    # A batch is looked up before the damage.
    assert rows[0] == 24
    assert 24 + 12 - 4 <= rows[1] <= 24 + 12
    assert rows[2] - rows[1] <= 4


def all_keys(store, space):
    handle = store._env.open_db(space.encode())
    with store._env.begin(db=handle) as transaction:
        return [bytes(key) for key, _ in transaction.cursor()]


# ---- what else a batch may hold


def test_batches_with_the_teachers_outputs(tmp_path):
    """Half of the batches bring what the teacher would say: it is neither asked nor stored for them."""
    teacher = Encoder(2, 48, seed=1).eval()
    batches = []
    for number, batch in enumerate(make_loader(24, 4)):
        with torch.no_grad():
            outputs = teacher(**batch)
        own = {"teacher_cache": outputs} if number % 2 else {}
        batches.append({"teacher": batch, "student": batch, **own})
    jobs = [Job(tmp_path / str(number), cache=cache) for number, cache in enumerate([None, cache_at(tmp_path)])]
    for job in jobs:
        job.train(batches)
    plain = Job(tmp_path / "plain").train(list(make_loader(24, 4)))
    assert apart(jobs[0], plain) < SAME
    assert apart(jobs[1], plain) < SAME
    assert [job.rows for job in jobs] == [36, 12]
    assert jobs[1].cache.info().entries == 12


def test_other_batches_for_the_teacher(tmp_path):
    """The key is of the teacher's part alone: the student's may change."""

    def sides(batch):
        other = {**batch, "input_ids": (batch["input_ids"] * 7 + random.randrange(3)) % VOCABULARY}
        return {"teacher": {name: batch[name] for name in ("input_ids", "attention_mask")}, "student": other}

    def views(batch, outputs):
        return {name: value for name, value in adaptor(batch, outputs).items() if name != "labels"}

    jobs = [
        Job(tmp_path / str(number), cache=cache, adaptor_T=views, student=Encoder(1, 32, dropout=0.0, seed=2))
        for number, cache in enumerate([None, cache_at(tmp_path)])
    ]
    for job in jobs:
        random.seed(3)
        job.train(make_loader(24, 4), batch_postprocessor=sides)
    assert jobs[1].rows == 24
    assert jobs[0].rows == 72


# ---- the waiting


def test_rows_on_their_way_to_the_disk_are_found(tmp_path, monkeypatch):
    """The last rows of a pass may be among the first of the next, which are looked up at once."""
    put = Store.put

    def late(*arguments):
        time.sleep(0.02)
        put(*arguments)

    monkeypatch.setattr(Store, "put", late)
    for number in range(4):
        job = Job(tmp_path / str(number), cache=cache_at(tmp_path / f"cache {number}"))
        job.train(make_loader(8, 4, shuffle=True, seed=number), num_epochs=5)
        # The rows of the first batch are stored before the training, and the other four in the first pass.
        assert job.rows == 8


@pytest.mark.parametrize("slow", ["get", "put"])
def test_waiting_for_a_slow_disk_is_counted(slow, tmp_path, monkeypatch):
    pause, original = 0.1, getattr(Store, slow)

    def late(*arguments):
        time.sleep(pause)
        return original(*arguments)

    monkeypatch.setattr(Store, slow, late)
    job = Job(tmp_path / "job", cache=cache_at(tmp_path))
    started = time.perf_counter()
    job.train(make_loader(24, 4), num_epochs=1)
    took, waited = time.perf_counter() - started, job.cache.info().seconds_waited
    # Six batches are looked up and six times rows are stored; a step's work goes on during each pause.
    assert 2 * pause < waited < took


def test_a_fast_disk_is_hardly_waited_for(tmp_path):
    job = Job(tmp_path / "job", cache=cache_at(tmp_path)).train(make_loader(24, 4))
    assert 0 <= job.cache.info().seconds_waited < 1
