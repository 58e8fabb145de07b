"""The models of the experiments: the pretrained one, and students made of its layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from recipe_pairs import PairByCosine
from recipe_tasks import Task

LAYERS = (1, 3, 5)  # the students start as these layers of a model of six, counted from 0


def pretrained(task: Task, path: str, seed: int, tiny: bool) -> Any:
    """Return the pretrained model with a new classifier; ``tiny``: a small random one of six layers."""
    torch.manual_seed(seed)
    kind = "BertForTokenClassification" if task.tags else "BertForSequenceClassification"
    cls: Any = PairByCosine if task.apart else getattr(transformers, kind)
    if not tiny:
        return cls.from_pretrained(path, num_labels=len(task.classes), dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(path)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": len(task.classes)}
    config.update(sizes)
    return cls(config)


def with_dropout(config: Any, dropout: float) -> Any:
    """Return a copy of a model's configuration with another dropout."""
    config = copy.deepcopy(config)
    config.update({"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout})
    return config


def shorten(model: Any, dropout: float, layers: tuple[int, ...] = LAYERS) -> Any:
    """Return a new model with the chosen layers of ``model``, and its embeddings, pooler and classifier."""
    config = with_dropout(model.config, dropout)
    config.num_hidden_layers = len(layers)
    student = type(model)(config)
    student.load_state_dict(model.state_dict(), strict=False)
    for mine, theirs in enumerate(layers):
        student.bert.encoder.layer[mine].load_state_dict(model.bert.encoder.layer[theirs].state_dict())
    return student


def anew(model: Any, dropout: float, layers: tuple[int, ...] = LAYERS) -> Any:
    """Return a new model of the kind of ``model`` with fewer layers and random weights."""
    config = with_dropout(model.config, dropout)
    config.num_hidden_layers = len(layers)
    return type(model)(config)
