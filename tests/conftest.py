"""Tiny models, data and settings shared by all tests; everything is made from a seed given by name."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from textbrewer import TrainingConfig

# A job in the background is started without SIGINT, and so would be every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread: the same sums in the same order in every process, and no fight over the cores.
torch.set_num_threads(1)

# No waiting for the disk: what is written outlives a killed process, only a power cut would lose it.
os.fsync = lambda descriptor: None

VOCABULARY, LENGTH, CLASSES, IGNORED = 40, 8, 3, -100


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Layer(nn.Module):
    """Self-attention with one head and a feed-forward part; returns hidden states and attention scores."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden, mask):
        scores = self.query(hidden) @ self.key(hidden).transpose(-1, -2) / hidden.shape[-1] ** 0.5
        weights = scores.masked_fill(mask[:, None, :] == 0, -1e4).softmax(dim=-1)
        return self.norm(hidden + self.feed(weights @ self.value(hidden))), scores.unsqueeze(1)


class Encoder(nn.Module):
    """A small encoder that classifies rows, or with ``by_token`` every token.

    Returns a dict: logits, loss (the mean over labels other than -100), hidden
    (the embedding and each layer), attention (scores).
    """

    def __init__(self, layers=2, width=32, dropout=0.1, by_token=False, seed=0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.dropout = nn.Dropout(dropout)
            self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
            self.classifier = nn.Linear(width, CLASSES)
        self.by_token = by_token

    def forward(self, input_ids, attention_mask, labels=None):
        hidden, attention = [self.dropout(self.embedding(input_ids))], []
        for layer in self.layers:
            state, scores = layer(hidden[-1], attention_mask)
            hidden.append(state)
            attention.append(scores)
        top = hidden[-1]
        if not self.by_token:
            weight = attention_mask.unsqueeze(-1).to(top.dtype)
            top = (top * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)
        logits = self.classifier(top)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        return {"logits": logits, "loss": loss, "hidden": hidden, "attention": attention}


def adaptor(batch, outputs):
    """Tell what the outputs of :class:`Encoder` mean, for a dict batch."""
    views = {
        "logits": outputs["logits"],
        "hidden": outputs["hidden"],
        "attention": outputs["attention"],
        "inputs_mask": batch["attention_mask"],
        "labels": batch.get("labels"),
        "losses": outputs["loss"],
    }
    if outputs["logits"].dim() == 3:
        views["logits_mask"] = batch["labels"] != IGNORED
    return views


class Rows(Dataset):
    """Rows of 2 to 8 tokens padded to 8, with masks and labels; counts which rows were read.

    The label follows from the first token, so that there is something to learn.
    """

    def __init__(self, count=24, by_token=False, full=False, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator)
        lengths = torch.full_like(lengths, LENGTH) if full else lengths
        self.attention_mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
        self.input_ids = self.input_ids * self.attention_mask
        classes = self.input_ids % CLASSES
        # Half of the tokens have no label, never the first: the positions with logits are not those with states.
        unlabelled = (self.input_ids % 2 == 0) & (torch.arange(LENGTH) > 0)
        self.labels = classes.masked_fill(unlabelled, IGNORED) if by_token else classes[:, 0]
        self.reads: list[int] = []

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, number):
        self.reads.append(int(number))
        return {
            "input_ids": self.input_ids[number],
            "attention_mask": self.attention_mask[number],
            "labels": self.labels[number],
        }


def make_loader(count=24, batch_size=4, by_token=False, full=False, seed=0, **options) -> DataLoader:
    """Return a loader of :class:`Rows`."""
    return DataLoader(Rows(count, by_token, full, seed), batch_size=batch_size, **options)


def make_config(folder, **settings) -> TrainingConfig:
    """Return settings for a quiet run on the CPU."""
    return TrainingConfig(output_dir=str(folder), device="cpu", progress_bar=False, **settings)


@pytest.fixture
def config(tmp_path):
    """``config(**settings)``: settings for a quiet run on the CPU, in a folder of its own."""

    def make(**settings):
        return make_config(tmp_path / "out", **settings)

    return make


@pytest.fixture(autouse=True)
def _seeded():
    seed_all(0)
