"""Killed at any moment, also while a checkpoint is being written, a run is resumed and ends as if nothing had been."""

import functools
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.engine.runs import Run, checkpoints, equal
from textbrewer.engine import checkpoint, saving

NAME = "general, cached"
PLACES = {
    "step": "an optimiser step is about to be done",
    "student": "the student's file is half written",
    "begin": "the temporary folder is made and empty",
    "rank": "the process's own file is half written",
    "model": "the model is written, the optimiser not",
    "training": "the optimiser's file is half written",
    "state": "state.json is half written",
    "whole": "all is written and the folder still has its temporary name",
    "between": "the folder of before is set aside, the new one not yet in its place",
    "renamed": "the new folder is in its place, the one set aside not yet deleted",
    "drop": "an old checkpoint is half deleted",
    "callback": "the callback is about to be noted",
    "after": "the file that notes the callback is half written",
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Notes the places that this process passes, and kills it at the ``fatal``-th of those it is to look at.

    Args:
        fatal: which one, from 1; ``None``: none.
        places: the places that count.
    """

    def __init__(self, fatal, places):
        self.fatal, self.places, self.passed = fatal, places, []

    def is_end(self, place):
        """Note a place and return whether it is the last."""
        self.passed.append(place)
        return place in self.places and sum(item in self.places for item in self.passed) == self.fatal

    def pass_by(self, place):
        if self.is_end(place):
            die()

    def install(self):
        """Put the places into torch, into the system's calls, and into this library where neither is called."""
        self._before(torch.optim.AdamW, "step", "step")
        self._before(saving.Saver, "callback_done", "callback")
        self._before(checkpoint, "_flush", "whole")
        self._after(checkpoint.Writer, "begin", "begin")
        self._after(checkpoint, "save_model", "model")
        torch.save = functools.partial(self.save, torch.save)
        os.replace = functools.partial(self.rename, os.replace)
        shutil.rmtree = functools.partial(self.remove, shutil.rmtree)
        write = Path.write_text
        Path.write_text = lambda path, text, **options: self.write(write, path, text, **options)

    def _before(self, owner, name, place):
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*arguments, **options):
            self.pass_by(place)
            return original(*arguments, **options)

        setattr(owner, name, call)

    def _after(self, owner, name, place):
        original = getattr(owner, name)

        def call(*arguments, **options):
            result = original(*arguments, **options)
            self.pass_by(place)
            return result

        setattr(owner, name, call)

    def save(self, original, content, file):
        path = Path(file if isinstance(file, (str, Path)) else file.name)
        kinds = {".gs": "student", "training": "training", ".rank-0-after": "after", ".rank-0": "rank"}
        if self.is_end(next(place for start, place in kinds.items() if path.name.startswith(start))):
            whole = io.BytesIO()
            original(content, whole)
            path.write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        original(content, file)

    def write(self, original, path, text, **options):
        if self.is_end("state"):
            original(path, text[: len(text) // 2], **options)
            die()
        original(path, text, **options)

    def rename(self, original, source, target):
        original(source, target)
        if str(target).endswith(".old"):
            self.pass_by("between")

    def remove(self, original, path, **options):
        if str(path).endswith(".old") and Path(path).exists():
            self.pass_by("renamed")
        elif Path(path).name.startswith("checkpoint-") and self.is_end("drop"):
            Path(path, "model.safetensors").unlink()
            die()
        original(path, **options)


def train(folder, resume_from, fatal=None, places=(), settings=None):
    """Train in a process of its own, to the end or to death."""
    killer, state_file, passed_file = Killer(fatal, places), folder / "end.pt", folder / "passed.json"
    save, write = torch.save, Path.write_text
    killer.install()
    # A seed of its own for each process: all that matters must come from the checkpoint.
    seed = 0 if resume_from is None else 1 + len(os.listdir(folder))
    state = Run(NAME, folder, seed=seed, **(settings or {})).train(resume_from=resume_from).state()
    save(state, state_file)
    write(passed_file, json.dumps(killer.passed))


def die_once(folder, resume_from, fatal, places, **settings):
    assert processes.run(train, folder, resume_from, fatal, places, settings) == -signal.SIGKILL


def end(folder, resume_from="latest"):
    """Let a run come to its end, and return that."""
    assert processes.run(train, folder, resume_from) == 0
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of the uninterrupted run, and the places it passed."""
    folder = tmp_path_factory.mktemp("whole")
    return end(folder, None), json.loads((folder / "passed.json").read_text())


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.mark.parametrize("seed", [1, 2])
def test_five_deaths_at_random_places(seed, whole, folder):
    """Each start goes on where the last one died, and dies again a random number of places later."""
    expected, passed = whole
    moments = random.Random(seed)
    # The first death lies after the first checkpoint: before, there is nothing to resume, and the seeds differ.
    die_once(folder, None, passed.index("callback") + moments.randint(1, 20), tuple(PLACES))
    for _ in range(4):
        die_once(folder, "latest", moments.randint(1, 20), tuple(PLACES))
    assert equal(end(folder), expected)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("between", "renamed", "drop")])
def test_death_at_each_place(place, whole, folder):
    die_once(folder, None, 6, (place,))
    taken = checkpoint.find_checkpoint("latest", folder)
    checkpoint.read_state(taken)
    assert taken.name == ("checkpoint-6" if place in ("callback", "after") else "checkpoint-5")
    assert equal(end(folder), whole[0])
    assert not [path.name for path in folder.glob(".*")]


@pytest.mark.parametrize(("place", "name"), [("between", ".checkpoint-6.old"), ("renamed", "checkpoint-6")])
def test_death_while_a_checkpoint_is_replaced(place, name, whole, folder):
    """It is where a run goes on from an earlier checkpoint, named by hand."""
    die_once(folder, None, 7, ("step",))
    die_once(folder, folder / "checkpoint-5", 1, (place,))
    taken = checkpoint.find_checkpoint("latest", folder)
    assert taken.name == name
    checkpoint.read_state(taken)
    assert equal(end(folder), whole[0])
    assert not [path.name for path in folder.glob(".*")]


def test_death_while_an_old_checkpoint_is_deleted(whole, folder):
    die_once(folder, None, 2, ("drop",), save_total_limit=2)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert checkpoint.find_checkpoint("latest", folder).name == "checkpoint-4"
    with pytest.raises(ValueError, match=r"is damaged \(model.safetensors"):
        checkpoint.read_state(folder / "checkpoint-2")
    assert equal(end(folder), whole[0])


def test_five_deaths_by_the_clock(whole, folder):
    """Killed from outside: where it dies is left to chance, the end is not."""
    clock = random.Random(7)
    for number in range(5):
        before = len(checkpoints(folder))
        process = processes.start(train, folder, "latest" if number else None)
        while process.is_alive() and len(checkpoints(folder)) == before:
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.05))
        process.kill()
        assert processes.finish(process) in (0, -signal.SIGKILL)
    assert equal(end(folder), whole[0])
