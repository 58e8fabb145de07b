"""A model of two linear maps and its training, small enough to be written out by hand."""

import torch
from torch import nn

from tests.conftest import make_config
from textbrewer import BasicTrainer

INPUTS, INNER, OUTPUTS, ROWS = 6, 8, 4, 5


class Maps(nn.Module):
    """Two linear maps, and the mean squared error of what comes out."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(INPUTS, INNER), nn.Linear(INNER, OUTPUTS, bias=False)

    def forward(self, inputs, targets):
        return self.loss(inputs, targets, self.first.weight, self.second.weight)

    def loss(self, inputs, targets, first, second):
        inner = torch.tanh(inputs @ first.T + self.first.bias)
        return ((inner @ second.T - targets) ** 2).mean()


def adaptor(batch, loss):
    return {"losses": loss}


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs": torch.randn(ROWS, INPUTS, generator=generator),
            "targets": torch.randn(ROWS, OUTPUTS, generator=generator),
        }
        for _ in range(count)
    ]


def train(folder, model, callbacks, data, optimizer=None, length=None, **options):
    """Train a model in place and return it."""
    settings = options.pop("settings", {})
    trainer = BasicTrainer(make_config(folder, **settings), model, adaptor)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.train(optimizer, data, **(length or {"num_epochs": 1}), step_callbacks=callbacks, **options)
    return model
