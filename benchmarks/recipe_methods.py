"""The methods that the experiments compare: a new recipe of the library is one line here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import recipe_tasks
import torch
from recipe_cells import KD, Distilled, Method, Recipe, Supervised, Teacher, Work, narrowed
from recipe_models import LAYERS, shorten
from torch import nn

from textbrewer import data_utils

HIDDEN = [  # hidden state 0 is the embeddings, so 2, 4 and 6 are the outputs of layers 1, 3 and 5
    {"layer_T": 2 * layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 3}
    for layer in range(len(LAYERS) + 1)
]
COPIES = 2  # of each row, augmented


class Mean(nn.Module):
    """Several models as one that returns their mean logits: the ensemble.

    Args:
        models: the models.
    """

    def __init__(self, models: list[Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **batch: Any) -> Any:
        """Return the first model's output with the mean of all logits."""
        outputs = [model(**batch) for model in self.models]
        outputs[0].logits = torch.stack([output.logits for output in outputs]).mean(dim=0)
        return outputs[0]


@dataclass(frozen=True)
class Ensemble(Method):
    """The teachers together, not trained any further."""

    layers: tuple[int, ...] = tuple(range(6))
    teachers: int = 3

    def seeds(self, task: Any) -> range:
        """Return one seed: the teachers of the first three students are the same."""
        return range(1)

    def epochs(self, task: Any) -> int:
        """Return the number of epochs: none."""
        return 0

    @property
    def shape(self) -> str:
        """Of the model: the latency's key."""
        return f"{self.teachers} x {super().shape}"

    def fit(self, work: Work) -> Any:
        """Return the models as one."""
        return Mean(work.teachers).eval()


@dataclass(frozen=True)
class MoreText(Recipe):
    """A recipe on more text than the labelled rows, all of it labelled by the teacher; in as many steps.

    Args:
        source: ``"unlabelled"``: training rows of the task that the grid leaves out, without their labels;
            ``"augmented"``: copies of the rows with words masked, deleted, or short runs of words.
    """

    source: str = "augmented"

    def applies(self, task: Any) -> bool:
        """Return whether the task has such text."""
        return super().applies(task) and not task.tags and (self.source == "augmented" or task.train_rows is not None)

    def settings(self) -> dict[str, Any]:
        """Return what else to note with a result."""
        return {**super().settings(), "more_text": self.source}

    def fit(self, work: Work) -> Any:
        """Train, and return the model."""
        make = {"unlabelled": recipe_tasks.left_out, "augmented": augmented}[self.source]
        more = make(work.task, work.data)
        steps = work.steps
        data = replace(work.data, train=[*work.data.train, *more])
        return super().fit(replace(work, data=data, max_steps=steps))


def augmented(task: Any, data: Any) -> list[Any]:
    """Return batches of changed copies of the training rows."""
    source = np.random.default_rng(0)
    changes = [
        lambda words: data_utils.masking(words, p=0.15, generator=source),
        lambda words: data_utils.deleting(words, p=0.15, generator=source),
        lambda words: data_utils.n_gram_sampling(words, generator=source),
    ]
    rows = []
    for texts, label in data.rows * COPIES:
        change = changes[source.integers(len(changes))]
        changed = tuple(" ".join(map(str, change(text.split()))) or text for text in texts)
        rows.append((changed, label))
    return recipe_tasks.make_batches(task, rows, data.tokenizer)


def recipe(title: str, name: str, **fields: Any) -> Recipe:
    """Return the cell of a recipe of the library with its default settings, or those given as ``options``."""
    return Recipe(title, recipe=name, **fields)


def example(method: Method, base: Any) -> Any:
    """Return an untrained model of a method's shape, for its latency.

    Args:
        method: the method.
        base: the whole pretrained model.
    """
    if isinstance(method, Ensemble):
        return Mean([copy.deepcopy(base) for _ in range(method.teachers)])
    if method.width is not None:
        return narrowed(base, method, 0.0)
    return shorten(base, 0.0, method.layers)


METHODS: dict[str, Method] = {
    "teacher": Teacher("teacher, 6 layers", headline=True),
    "pretrained": Supervised("no teacher, pretrained layers", start="pretrained", headline=True),
    "finetuned": Supervised("no teacher, fine-tuned layers"),
    "kd": Distilled("plain KD", swept=True, learn=KD),
    "hidden": Distilled(
        "KD and hidden states", swept=True, learn={**KD, "intermediate_matches": HIDDEN}, headline=True
    ),
    "tinybert": recipe("TinyBERT, two stages", "tinybert"),
    "minilmv2": recipe("MiniLMv2, then KD", "minilmv2"),
    "minilm": recipe("MiniLM, then KD", "minilm"),
    "pkd-skip": recipe("PKD-Skip", "pkd-skip"),
    "pkd-last": recipe("PKD-Last", "pkd-last"),
    "distilbert": recipe("DistilBERT's losses, on the task", "distilbert"),
    "textbrewer-L3": recipe("TextBrewer's L3", "textbrewer-L3"),
    "bert-emd": recipe("BERT-EMD", "bert-emd"),
    "cofi-dynamic": recipe("CoFi's dynamic matching", "cofi-dynamic"),
    "rail-kd": recipe("RAIL-KD", "rail-kd"),
    "alp-kd": recipe("ALP-KD", "alp-kd"),
    "mobilebert": recipe("MobileBERT, progressive", "mobilebert"),
    "annealing-kd": recipe("Annealing-KD", "annealing-kd"),
    "teacher-assistant": recipe("teacher assistant of 4 layers", "teacher-assistant"),
    "born-again": recipe("born-again, 2 generations", "born-again"),
    "deep-mutual-learning": recipe(
        "deep mutual learning", "deep-mutual-learning", options={"is_caching_logits": False}
    ),
    "dist": recipe("KD with DIST", "kd", options={"loss": "dist"}),
    # The layers are those of the student's own teacher, whose layers it starts as.
    "several-teachers": recipe("three teachers: KD and hidden states", "hidden", teachers=3),
    "several-cofi": recipe("three teachers: CoFi's dynamic matching", "cofi-dynamic", teachers=3),
    # Of its teachers' size, as in TextBrewer's comparison with an ensemble.
    "several-whole": recipe("three teachers: KD, a student of 6 layers", "kd", teachers=3, layers=tuple(range(6))),
    "ensemble": Ensemble("ensemble of the three teachers"),
    "unlabelled": MoreText("KD and hidden states, more unlabelled text", recipe="hidden", source="unlabelled"),
    "augmented": MoreText("KD and hidden states, augmented text", recipe="hidden", source="augmented"),
    "narrow": recipe("KD and hidden states, 3 layers of width 192", "hidden", width=192),
    "narrow-6": recipe(
        "KD and hidden states, 6 layers of width 192", "hidden", width=192, layers=tuple(range(6)), headline=True
    ),
    "random": recipe("KD and hidden states, random start", "hidden", start="random"),
}
