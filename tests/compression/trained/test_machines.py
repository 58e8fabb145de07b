"""Two processes and other precisions: all callbacks do the same on every rank, and learn in half precision too."""

import pytest
import torch

from tests import processes
from tests.compression.pruned_runs import loader_for, still
from tests.compression.pruned_runs import train as train_family
from tests.conftest import make_config, seed_all
from tests.engine.runs import equal
from textbrewer import BasicTrainer
from textbrewer.compression.trained import ADMMPruning, HardConcretePruning, MovementPruning, SlimPenalty

CALLBACKS = {
    "movement": lambda: MovementPruning(0.5, structure="units", end=5),
    "hard concrete": lambda: HardConcretePruning(0.4, lr=0.3, drop_rate=0.4, ramp=3, end=5),
    "admm": lambda: ADMMPruning(0.5, every=2, end=5),
    "slim": lambda: SlimPenalty(1e-2),
}


def on_ranks(rank, folder):
    results = {}
    for name, make in CALLBACKS.items():
        seed_all(rank)  # whatever is drawn by the ranks' own generators differs
        model, callback = still("bert-classifier", num_hidden_layers=2), make()
        trainer = BasicTrainer(make_config(folder / name), model, "auto")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer.train(optimizer, loader_for(model), num_steps=6, step_callbacks=[callback])
        results[name] = {"model": model.state_dict(), "state": callback.state_dict()}
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_end_alike(tmp_path):
    processes.run_ranks(2, tmp_path, on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in CALLBACKS:
        assert equal(first[name], second[name]), name


@pytest.mark.parametrize("name", CALLBACKS)
def test_bf16(tmp_path, name):
    model, callback = still("bert-classifier", num_hidden_layers=2), CALLBACKS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_family(tmp_path, model, [callback], 6, lr=1e-3, settings={"precision": "bf16"})
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert not equal(before, model.state_dict())
    if name in ("movement", "hard concrete"):
        assert any(not mask.all() for mask in callback.masks().values())
