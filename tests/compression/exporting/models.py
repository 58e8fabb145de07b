"""What the tests of exports share: the nine families with two layers, batches with padding, models of one's own."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tests.students.models import VOCABULARY, make

ROOT = Path(__file__).parents[3]

_TWO = {"num_hidden_layers": 2}
NINE = {
    "bert-classifier": _TWO,
    "roberta": _TWO,
    "distilbert": {"n_layers": 2},
    "electra": _TWO,
    "gpt2": {"n_layer": 2},
    "llama": _TWO,
    "bart": {"encoder_layers": 2, "decoder_layers": 2},
    "t5": {"num_layers": 2, "num_decoder_layers": 2},
    "vit": _TWO,
}


def small(name, **settings):
    """Return a tiny model of a family; weights halved, so that rounding is not magnified by its attention."""
    model = make(name, **{**NINE[name], **settings})
    for parameter in model.parameters():
        parameter.data *= 0.5
    return model


def padded(model, rows=3, length=9, seed=0):
    """Return a batch; the second row, if there is one, ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1:2, max(1, length - 2) :] = 0
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, max(1, length - 3)), generator=generator)
    return batch


def expected(model, batch):
    """Return the tensors of a model's output, without caches."""
    with torch.no_grad():
        outputs = model(**batch)
    return {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}


def agree(found, wanted, batch, atol):
    """Check outputs, but for what stands at padding."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mask = batch.get("attention_mask")
        if tensor.dim() == 3 and mask is not None and tensor.shape[:2] == mask.shape:
            tensor, other = tensor[mask.bool()], found[name][mask.bool()]
        else:
            other = found[name]
        torch.testing.assert_close(other, tensor, rtol=0, atol=atol)


def run(script, *arguments):
    """Run a script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Bag(nn.Module):
    """Mean of embeddings and a linear map: a dict batch with a mask, and a dict out."""

    def __init__(self, width=16, words=50, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, classes)

    def forward(self, tokens, weights, labels=None):
        states = (self.table(tokens) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return {"logits": self.head(states), "states": states}


def bag_batch(rows=4, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, 50, (rows, length), generator=generator),
        "weights": torch.rand(rows, length, generator=generator) + 0.1,
    }
