"""The arithmetic of steps and checkpoints against a simulation that counts them one by one."""

import itertools

import pytest
import torch
from torch import nn

from tests.conftest import make_config
from textbrewer import engine


def counted(size, accumulation, epochs, frequency, epoch_frequency):
    """Walk through the batches; return the number of steps, and after which of them a checkpoint lies.

    An epoch is cut into ``frequency`` parts as equal as whole steps allow, each ending with a checkpoint; a part
    without a step ends with the epoch.
    """
    total, saved = 0, []
    for epoch in range(1, epochs + 1):
        ends, waiting = [], 0
        for batch in range(1, size + 1):
            waiting += 1
            if waiting == accumulation or batch == size:
                total, waiting = total + 1, 0
                ends.append(total)
        if epoch % epoch_frequency and epoch != epochs:
            continue
        parts = {len(ends) * part // frequency for part in range(1, frequency + 1)} - {0}
        saved += [ends[part - 1] for part in sorted(parts)]
        if len(ends) < frequency:
            assert ends[-1] in saved
    return total, saved


@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 12])
def test_epochs(size, accumulation):
    for epochs, frequency, epoch_frequency in itertools.product([1, 2, 5], [1, 2, 3, 5, 20], [1, 2, 3]):
        config = make_config(
            "unused",
            gradient_accumulation_steps=accumulation,
            ckpt_frequency=frequency,
            ckpt_epoch_frequency=epoch_frequency,
        )
        plan = engine.plan_steps(config, epochs, None, [size])
        total, saved = counted(size, accumulation, epochs, frequency, epoch_frequency)
        assert plan.total_steps == total
        an_epoch = total // epochs
        due = [
            step
            for step in range(1, total + 1)
            if plan.checkpoint_due(step, (step - 1) // an_epoch, step % an_epoch == 0, step == total)
        ]
        assert due == saved, (epochs, frequency, epoch_frequency)
        assert plan.progress(0) == 0
        assert plan.progress(total) == 1


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"),
    [
        (10, 3, [3, 6, 9, 10]),
        (10, 5, [5, 10]),
        (10, None, [10]),
        (10, 20, [10]),
        (1, 1, [1]),
        (7.0, 4, [4, 7]),
    ],
)
def test_steps(num_steps, every, expected):
    plan = engine.plan_steps(make_config("unused", ckpt_steps=every, ckpt_frequency=9), None, num_steps, [None, 3])
    total = int(num_steps)
    assert plan.total_steps == total
    assert [step for step in range(1, total + 1) if plan.checkpoint_due(step, 0, False, step == total)] == expected


@pytest.mark.parametrize(
    ("settings", "epochs", "steps", "size", "words"),
    [
        ({}, None, None, 4, "num_epochs or num_steps must be given"),
        ({}, 0, None, 4, "num_epochs must be"),
        ({}, None, 0, 4, "num_steps must be"),
        ({}, None, 2.5, 4, "num_steps must be"),
        ({}, 1.5, None, 4, "num_epochs must be"),
        ({}, 1, None, 0, "at least one batch"),
        ({"ckpt_frequency": 2}, 1, None, None, "needs a dataloader with a length"),
    ],
)
def test_refused(settings, epochs, steps, size, words):
    with pytest.raises((ValueError, TypeError), match=words):
        engine.plan_steps(make_config("unused", **settings), epochs, steps, [size])


def test_steps_count_before_epochs():
    with pytest.warns(UserWarning, match="num_steps counts"):
        plan = engine.plan_steps(make_config("unused"), 3, 5, [4])
    assert (plan.num_epochs, plan.total_steps) == (None, 5)


class Counting(nn.Module):
    """One weight that counts the steps: its gradient is always -1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return -self.weight


class ShortLoader:
    """Says that it has more batches than it yields."""

    def __len__(self):
        return 6

    def __iter__(self):
        return iter(range(5))


def loop(folder, batches, epochs=None, steps=None, **settings):
    """Run the engine alone; return the final count of steps, and after which a checkpoint and callback came."""
    module, seen = Counting(), []
    config = make_config(folder, **settings)
    job = engine.Job(
        module,
        module,
        torch.optim.SGD(module.parameters(), lr=1.0),
        engine.LoaderBatches(batches),
        lambda model, batch, progress, share: (model(batch), {}),
        callback=lambda model, step: seen.append((step, model.weight.item())),
    )
    plan = engine.plan_steps(config, epochs, steps, [engine.size_of(batches)])
    return engine.run(job, config, engine.Runtime(config), plan), seen


@pytest.mark.parametrize(
    ("size", "epochs", "settings"),
    [
        (7, 2, {"gradient_accumulation_steps": 2, "ckpt_frequency": 2}),
        (3, 3, {"gradient_accumulation_steps": 5, "ckpt_epoch_frequency": 2}),
        (5, 5, {"ckpt_frequency": 3, "ckpt_epoch_frequency": 3}),
    ],
)
def test_the_loop_keeps_the_plan(size, epochs, settings, tmp_path):
    total, saved = counted(
        size,
        settings.get("gradient_accumulation_steps", 1),
        epochs,
        settings.get("ckpt_frequency", 1),
        settings.get("ckpt_epoch_frequency", 1),
    )
    done, seen = loop(tmp_path, range(size), epochs, save_total_limit=None, **settings)
    assert done == total
    assert [step for step, _ in seen] == saved
    # The weight moved once a step: nothing was left out, nothing done twice.
    assert [weight for _, weight in seen] == saved
    assert {path.name for path in tmp_path.glob("gs*.pkl")} == {f"gs{step}.pkl" for step in saved}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in saved}


def test_a_loader_that_yields_less_than_its_length_is_saved_all_the_same(tmp_path):
    assert loop(tmp_path, ShortLoader(), epochs=1) == (5, [(5, 5.0)])


def test_a_loader_that_yields_more_than_its_length_warns(tmp_path):
    class LongLoader(ShortLoader):
        def __len__(self):
            return 4

    with pytest.warns(UserWarning, match=r"more than len\(dataloader\) = 4"):
        assert loop(tmp_path, LongLoader(), epochs=1) == (4, [(4, 4.0)])


def test_steps_go_round_the_loader(tmp_path):
    done, seen = loop(tmp_path, range(3), steps=8, gradient_accumulation_steps=2, ckpt_steps=3)
    assert done == 8
    assert seen == [(3, 3.0), (6, 6.0), (8, 8.0)]
