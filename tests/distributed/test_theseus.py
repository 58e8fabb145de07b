"""Module replacement by two gloo processes on the CPU: the draws of one, and the student of one."""

import pytest
import torch

from tests import processes
from tests.conftest import Encoder, adaptor, make_config, make_loader
from textbrewer.distillers import TheseusDistiller

pytestmark = pytest.mark.distributed
STEPS = 12


def train(folder, times, **settings):
    """Train with half of the data each, or all of it; return the successor's weights, and what was drawn."""
    predecessor = Encoder(layers=4, dropout=0.0, seed=1)
    distiller = TheseusDistiller(make_config(folder, **settings), predecessor, 2, adaptor, "constant", seed=2)
    drawn, listen = [], distiller.mixture.drawn

    def listened(choice):
        drawn.append(list(choice))
        return listen(choice)

    distiller.mixture.drawn = listened
    generator = torch.Generator().manual_seed(5)
    loader = make_loader(24, 2 * times, full=True, shuffle=True, generator=generator)
    distiller.train(torch.optim.SGD(distiller.trainable_parameters(), lr=0.1, momentum=0.5), loader, num_steps=STEPS)
    weights = torch.cat([value.detach().flatten() for value in distiller.successor.parameters()])
    return weights, drawn


SETTINGS = {"plain": {"find_unused_parameters": False}, "looking": {"find_unused_parameters": True}}


def both(rank, folder):
    for name, settings in SETTINGS.items():
        torch.save(train(folder / name, 1, **settings), folder / f"{name}-{rank}.pt")


def test_two_processes_draw_and_train_as_one(tmp_path):
    """With a step in it where only the predecessor's blocks run, and one where only the successor's do."""
    processes.run_ranks(2, tmp_path, both, tmp_path)
    expected, drawn = train(tmp_path / "alone", 2)
    start = TheseusDistiller(make_config(tmp_path), Encoder(layers=4, dropout=0.0, seed=1), 2, adaptor).successor
    before = torch.cat([value.detach().flatten() for value in start.parameters()])
    assert len(drawn) == STEPS
    assert {tuple(choice) for choice in drawn} == {(False, False), (False, True), (True, False), (True, True)}
    assert (expected - before).abs().max() > 1e-2
    for name in SETTINGS:
        ends = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for weights, choices in ends:
            assert choices == drawn
            assert torch.equal(weights, ends[0][0])
            assert torch.allclose(weights, expected, rtol=0, atol=1e-5), (weights - expected).abs().max()
