"""A resumed run ends where the uninterrupted one does, bit for bit, whatever checkpoint it is resumed from."""

import random

import pytest
import torch

from tests import processes
from tests.engine.runs import SCENARIOS, Run, checkpoints, equal

TRIED = 3
"""Checkpoints of a run that it is resumed from, picked at random, the last one left out."""


def some_of(name, folder):
    """Return the checkpoints to resume from: others for each scenario, the same each time."""
    found = checkpoints(folder)[:-1]
    assert found
    return random.Random(name).sample(found, min(TRIED, len(found)))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_checkpoint_leads_to_the_same_end(name, tmp_path):
    whole = Run(name, tmp_path / "whole").train().state()
    for path in some_of(name, tmp_path / "whole"):
        resumed = Run(name, tmp_path / path.name, seed=7).train(resume_from=path).state()
        wrong = [key for key in whole if not equal(whole[key], resumed[key])]
        assert not wrong, f"{path.name}: {wrong}"


def test_what_is_compared_differs_between_runs(tmp_path):
    """Two runs of different seeds share nothing; a comparison that always held would show here."""
    name = "general, projections, accumulation"
    first, second = (Run(name, tmp_path / str(seed), seed=seed).train().state() for seed in (0, 7))
    assert not any(equal(first[key], second[key]) for key in first)


def resume_all(jobs):
    for name, path, folder in jobs:
        state = Run(name, folder, seed=11).train(resume_from=path).state()
        torch.save(state, folder / "state.pt")


def test_a_fresh_process_resumes(tmp_path):
    names = ["general, projections, accumulation", "general, cached", "multi-task", "workers", "own generator"]
    whole = {name: Run(name, tmp_path / name).train().state() for name in names}
    jobs = [(name, some_of(name, tmp_path / name)[0], tmp_path / f"{name} resumed") for name in names]
    assert processes.run(resume_all, jobs) == 0
    for name, _, folder in jobs:
        resumed = torch.load(folder / "state.pt", weights_only=True)
        assert equal(whole[name], resumed), name


@pytest.mark.parametrize("name", ["basic, epochs, shuffled", "own generator, steps", "trainer"])
def test_rows_before_the_place_are_not_read_again(name, tmp_path):
    whole = Run(name, tmp_path / "whole").train()
    for path in some_of(name, tmp_path / "whole"):
        resumed = Run(name, tmp_path / path.name, seed=7).train(resume_from=path)
        reads = resumed.loader.dataset.reads
        assert reads == whole.loader.dataset.reads[-len(reads) :]
        steps = int(path.name.split("-")[1])
        assert len(reads) <= len(whole.loader.dataset.reads) - 2 * steps


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path):
    name = "basic, epochs, shuffled"
    whole = Run(name, tmp_path / "whole").train(num_epochs=4).state()
    Run(name, tmp_path / "half").train(num_epochs=2)
    resumed = Run(name, tmp_path / "half", seed=7).train(num_epochs=4, resume_from="latest").state()
    assert equal(whole, resumed)


class CallbackFailedError(Exception):
    """Stops a run within its callback."""


@pytest.mark.parametrize("name", ["random callback", "general, cached"])
def test_a_callback_that_did_not_end_is_called_again(name, tmp_path):
    seen = []

    def callback(model, step):
        SCENARIOS[name].train["callback"](model, step)
        seen.append((step, model.training))
        model.eval()
        if len(seen) == 3:
            raise CallbackFailedError

    whole = Run(name, tmp_path / "whole").train().state()
    run = Run(name, tmp_path / "failed")
    with pytest.raises(CallbackFailedError):
        run.train(callback=callback)
    resumed = Run(name, tmp_path / "failed", seed=7).train(resume_from="latest", callback=callback).state()
    assert equal(whole, resumed)
    steps = [step for step, _ in seen]
    assert steps[:4] == [1, 2, 3, 3]
    assert steps[4:] == list(range(4, 4 + len(steps) - 4))
    assert all(training for _, training in seen)


def test_a_callback_that_ended_is_not_called_again(tmp_path):
    name, calls = "random callback", []
    whole = Run(name, tmp_path / "whole").train().state()

    def callback(model, step):
        calls.append(step)
        SCENARIOS[name].train["callback"](model, step)

    run = Run(name, tmp_path / "resumed", seed=7)
    run.train(resume_from=tmp_path / "whole" / "checkpoint-9", callback=callback)
    assert calls == [10, 11, 12]
    assert equal(whole, run.state())


def test_a_schedule_made_beforehand_is_resumed(tmp_path):
    name = "basic, epochs, shuffled"

    def with_schedule(folder, seed, **arguments):
        run = Run(name, tmp_path / folder, seed=seed)
        schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, gamma=0.5)
        run.train(scheduler=schedule, **arguments)
        return {**run.state(), "schedule": schedule.state_dict()}

    whole = with_schedule("whole", 0)
    assert equal(whole, with_schedule("resumed", 7, resume_from=tmp_path / "whole" / "checkpoint-5"))
    assert whole["schedule"]["last_epoch"] == 12
