"""Trainings of tiny models with callbacks that prune them."""

import copy

import torch
from torch.utils.data import DataLoader, Dataset

from tests.compression.families import with_labels
from tests.conftest import make_config, seed_all
from tests.students.models import ROWS, make
from textbrewer import BasicTrainer
from textbrewer.callbacks import StepCallback

BATCHES = 4


class LabelledRows(Dataset):
    """Rows with labels for a model."""

    def __init__(self, model, batches=BATCHES):
        self.batches = [with_labels(model, seed) for seed in range(batches)]

    def __len__(self):
        return ROWS * len(self.batches)

    def __getitem__(self, number):
        batch = self.batches[number // ROWS]
        return {name: values[number % ROWS] for name, values in batch.items()}


def loader_for(model, shuffle=False):
    return DataLoader(LabelledRows(model), batch_size=ROWS, shuffle=shuffle)


class Snapshots(StepCallback):
    """Keeps a copy of the model and its gradients before the callbacks behind it see them, by steps done."""

    def begin(self, run):
        self.run = run
        self.models, self.gradients, self.before = {}, {}, {}

    def after_backward(self, step):
        parameters = dict(self.run.student.named_parameters())
        self.gradients[step + 1] = {
            name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
        }
        self.before[step + 1] = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def after_step(self, step):
        self.models[step] = copy.deepcopy(self.run.student.state_dict())


class Watch(StepCallback):
    """Calls a function after every step, behind the callbacks before it."""

    def __init__(self, function):
        self.function = function

    def after_step(self, step):
        self.function(step)


def train(folder, model, callbacks, steps, lr=0.05, seed=0, settings=None, shuffle=False, optimizer=None, **options):
    """Train a model in place, and return it."""
    seed_all(seed)
    trainer = BasicTrainer(make_config(folder, **(settings or {})), model, "auto")
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    trainer.train(optimizer, loader_for(model, shuffle=shuffle), num_steps=steps, step_callbacks=callbacks, **options)
    return model.eval()


def still(name, **settings):
    """Return a model without dropout."""
    dropouts = {
        "bert-classifier": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "t5": {"dropout_rate": 0.0},
        "llama": {},
    }[name]
    return make(name, **dropouts, **settings)
