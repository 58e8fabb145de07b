"""The tiny models, data and adaptors of the comparison: torch alone, so both environments run the very same code.

Nothing here may import textbrewer. Dropout draws with ``torch.rand``, whose numbers do not depend on the processor,
and the projections to keys carry no bias: its gradient is zero but for rounding, which Adam would blow up to full
steps in a random direction and so hide what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

VOCABULARY, LENGTH, ROWS, BATCH = 50, 12, 60, 8
CLASSES, CLASSES_2 = 5, 3
FIELDS = ("input_ids", "attention_mask", "labels")
Adaptor = Callable[[Any, Any], dict[str, Any]]


class Dropout(nn.Module):
    """Dropout with a mask from ``torch.rand``."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero a tenth of ``x`` while training."""
        return x * (torch.rand(x.shape) >= 0.1) / 0.9 if self.training else x


class Layer(nn.Module):
    """A transformer encoder layer, normalised after each block, that also returns its raw attention scores."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm_1, self.norm_2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), Dropout()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new states ``(batch, length, width)`` and the scores ``(batch, heads, length, length)``."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + (1 - mask[:, None, None].to(x)) * -10000
        mixed = self.dropout(scores.softmax(-1)) @ v
        x = self.norm_1(x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norm_2(x + self.dropout(self.down(nn.functional.gelu(self.up(x))))), scores


class TinyEncoder(nn.Module):
    """Encoder with a head: ``class``, ``tags``, ``span``, ``two_tags`` (two of 3-D logits) or ``tasks`` (two classes).

    Args:
        layers: number of layers.
        width: hidden width.
        head: one of the names above.
        outputs: ``dict`` or ``tuple``: what :meth:`forward` returns.
    """

    def __init__(self, layers: int, width: int, head: str, outputs: str = "dict") -> None:
        super().__init__()
        self.head_name, self.outputs = head, outputs
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.norm, self.dropout = nn.LayerNorm(width), Dropout()
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        # Without bias for spans: a softmax over positions does not see it, so its gradient is zero but for rounding.
        self.head_1 = nn.Linear(width, 2, bias=False) if head == "span" else nn.Linear(width, CLASSES)
        self.head_2 = nn.Linear(width, CLASSES_2) if head in ("two_tags", "tasks") else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, scale: float = 1.0) -> Any:
        """Return logits, hidden states (with the embeddings), raw attention scores and the loss on the labels."""
        x = self.dropout(self.norm(self.words(input_ids) + self.places))
        hidden, attention = [x], []
        for layer in self.layers:
            x, scores = layer(x, attention_mask)
            hidden.append(x)
            attention.append(scores)
        logits = [scale * z for z in self.logits(x)]
        loss = label_loss(logits, labels) if self.head_name != "tasks" else None
        result = {"logits": logits, "hidden": hidden, "attention": attention, "loss": loss}
        return result if self.outputs == "dict" else tuple(result.values())

    def logits(self, x: Tensor) -> list[Tensor]:
        """Return the logits of every head for the last states ``x``."""
        if self.head_name in ("class", "tasks"):
            x = x[:, 0]
        first = self.head_1(x)
        if self.head_name == "span":
            return [first[..., 0], first[..., 1]]
        return [first] if self.head_2 is None else [first, self.head_2(x)]


def label_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the heads; ``labels`` has a last dimension for them if there are several."""
    each = [labels] if len(logits) == 1 else labels.unbind(-1)
    return sum(
        nn.functional.cross_entropy(z.flatten(0, -2), y.flatten()) for z, y in zip(logits, each, strict=True)
    ) / len(logits)


def make_teacher(width: int, head: str, outputs: str = "dict") -> TinyEncoder:
    """Return a teacher of 4 layers whose logits are spread enough to teach something."""
    model = TinyEncoder(4, width, head, outputs)
    with torch.no_grad():
        for layer in (model.head_1, model.head_2):
            if layer is not None:
                layer.weight *= 3
    return model


def make_rows(head: str, rows: int = ROWS, classes: int = CLASSES, seed: int = 7) -> list[dict[str, Tensor]]:
    """Return random sentences of 4 to 12 words, with labels for ``head``; padded tags are labelled -100."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=g)

    mask = (torch.arange(LENGTH) < draw(4, LENGTH + 1, rows, 1)).long()
    labels = {
        "class": lambda: draw(0, classes, rows),
        "tasks": lambda: draw(0, classes, rows),
        "span": lambda: draw(0, 4, rows, 2),
        "tags": lambda: draw(0, CLASSES, rows, LENGTH).masked_fill(mask == 0, -100),
        "two_tags": lambda: draw(0, CLASSES_2, rows, LENGTH, 2).masked_fill(mask[..., None] == 0, -100),
    }[head]()
    words = draw(2, VOCABULARY, rows, LENGTH) * mask
    return [dict(zip(FIELDS, row, strict=True)) for row in zip(words, mask, labels, strict=True)]


def make_collate(form: str, random_words: bool, teacher: nn.Module | None) -> Callable[[list[Any]], Any]:
    """Return the function that makes a batch.

    Args:
        form: ``tuple``, ``dict``, ``sides`` (``{'teacher', 'student'}``) or ``cache`` (``sides`` + ``teacher_cache``).
        random_words: replace a sixth of the words, drawn from torch's global generator at each batch.
        teacher: the teacher whose outputs a ``cache`` batch carries.
    """

    def collate(rows: list[dict[str, Tensor]]) -> Any:
        batch = default_collate(rows)
        if random_words:
            batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 1 / 6, 1, batch["input_ids"])
        if form == "dict":
            return batch
        if form == "tuple":
            return tuple(batch.values())
        # The student reads other word numbers than the teacher, as with two vocabularies.
        sides = {"teacher": batch, "student": {**batch, "input_ids": (VOCABULARY - 1 - batch["input_ids"])}}
        if form == "cache":
            with torch.no_grad():
                sides["teacher_cache"] = {"logits": teacher.eval()(**batch)["logits"]}
        return sides

    return collate


def make_loader(rows: list[dict[str, Tensor]], collate: Callable[[list[Any]], Any], shuffle: bool) -> DataLoader[Any]:
    """Return a loader of batches of 8 rows; 60 rows make 8 batches, the last of 4 rows."""
    return DataLoader(rows, batch_size=BATCH, shuffle=shuffle, collate_fn=collate)


def field(batch: Any, name: str) -> Tensor:
    """Return a named field of a dict or tuple batch."""
    return batch[name] if isinstance(batch, Mapping) else batch[FIELDS.index(name)]


def make_adaptor(keys: Sequence[str], head: int | None = None) -> Adaptor:
    """Return an adaptor that gives the named keys.

    Args:
        keys: TextBrewer's adaptor keys.
        head: the only head whose logits and loss are given (one task of several); None: all of them.
    """

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        if not isinstance(outputs, Mapping):
            outputs = dict(zip(("logits", "hidden", "attention", "loss"), outputs, strict=True))
        logits = list(outputs["logits"])[slice(None) if head is None else slice(head, head + 1)]
        mask, labels = field(batch, "attention_mask"), field(batch, "labels")
        several = [labels] if len(logits) == 1 else list(labels.unbind(-1))
        values: dict[str, Callable[[], Any]] = {
            "logits": lambda: logits if len(logits) > 1 else logits[0],
            "logits_mask": lambda: [mask] * len(logits),
            "losses": lambda: [outputs["loss"] if head is None else label_loss(logits, labels)],
            "labels": lambda: several,
            "inputs_mask": lambda: mask,
            "hidden": lambda: outputs["hidden"],
            "attention": lambda: outputs["attention"],
        }
        return {key: values[key]() for key in keys}

    return adaptor
