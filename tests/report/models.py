"""Tiny models and batches of the report's tests."""

import torch
import transformers
from torch import nn

ROWS, LENGTH, VOCABULARY, POSITIONS, WIDTH, LAYERS, UNITS, CLASSES = 4, 6, 37, 20, 32, 2, 48, 3


def bert(**settings):
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": UNITS,
        "num_labels": CLASSES,
        **settings,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**config))


def bert_batches(sizes=(ROWS,), length=LENGTH):
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(1, VOCABULARY, (size, length))} for size in sizes]


class Linear(nn.Module):
    """One linear layer, as a model that is given a dict batch."""

    def __init__(self, inputs=8, outputs=5, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(inputs, outputs, bias)

    def forward(self, x):
        return self.layer(x)


def linear_batches(sizes=(4, 4), inputs=8):
    torch.manual_seed(1)
    return [{"x": torch.randn(size, inputs)} for size in sizes]
