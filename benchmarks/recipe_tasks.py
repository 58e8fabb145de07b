"""The five tasks of the experiments: their rows, the batches made of them, and how a model is scored on them.

All numbers of rows, orders and splits are fixed by seeds here, so that every cell of the grid sees the same data.
"""

from __future__ import annotations

import csv
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from headline import ROOT

sys.path.insert(0, str(ROOT / "examples" / "classification"))
sys.path.insert(0, str(ROOT / "examples" / "ner"))
import sentences
import torch
import transformers
import wikiann
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)

IGNORED = -100  # the label of what is no word's first piece
BATCH, DATA_SEED = 32, 0
PAIRS = {
    "mrpc": "msr_paraphrase_train.txt and msr_paraphrase_test.txt of Microsoft's paraphrase corpus (GLUE's MRPC)",
    "rte": "train.tsv and dev.tsv of RTE as GLUE has it (https://gluebenchmark.com/tasks)",
}
Row = tuple[tuple[Any, ...], Any]  # texts and class, or the words and their tags' numbers
Rows = list[Row]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: in file names and on the command line.
        title: in the report.
        folder: in the data folder.
        read: returns training and evaluation rows, given the folder.
        classes: names of the classes, or tags.
        epochs: of all students.
        seeds: final cells of each method, the seeds 0 to ``seeds - 1``.
        sweep_seeds: of each rate of a sweep.
        longest: pieces; what is longer is cut.
        train_rows, eval_rows: a fixed random choice of so many rows; ``None``: all.
        rates_of: the task whose sweeps' learning rates count; ``None``: its own.
        rates: that the sweeps of all methods try first; ``None``: the methods' own.
        apart: whether the sentences of a pair are read apart and compared, see recipe_pairs.py.
        headline: a task for the few headline figures, with which not all methods are tried.
    """

    name: str
    title: str
    folder: str
    read: Callable[[Path], tuple[Rows, Rows]]
    classes: Sequence[str]
    epochs: int
    seeds: int = 3
    sweep_seeds: int = 1
    longest: int = 64
    train_rows: int | None = None
    eval_rows: int | None = None
    rates_of: str | None = None
    rates: tuple[float, ...] | None = None
    apart: bool = False
    headline: bool = False

    @property
    def tags(self) -> bool:
        """Whether words are classified instead of rows."""
        return self.classes is wikiann.TAGS

    @property
    def metric(self) -> str:
        """Name of the score, in percent."""
        return "entity F1" if self.tags else "accuracy"


@dataclass
class Data:
    """A task's batches.

    Args:
        train: to train on, each of rows of like length.
        held_out: to be scored on.
        train_rows, held_out_rows: how many rows these are.
        texts: the first 100 rows to be scored on, for the latency.
        rows: the training rows.
        more: training rows that were left out.
        tokenizer: the models'.
    """

    train: list[Any]
    held_out: list[Any]
    train_rows: int
    held_out_rows: int
    texts: Rows = field(repr=False)
    rows: Rows = field(repr=False)
    more: Rows = field(repr=False)
    tokenizer: Any = field(repr=False)


def read_sentences(dataset: str) -> Callable[[Path], tuple[Rows, Rows]]:
    """Return a reader of SST-2 or TREC."""

    def read(folder: Path) -> tuple[Rows, Rows]:
        train, held_out = sentences.read(dataset, folder)
        return [((text,), label) for text, label in train], [((text,), label) for text, label in held_out]

    return read


def read_pairs(dataset: str, names: tuple[str, str], columns: tuple[str, str, str], classes: Sequence[str]) -> Any:
    """Return a reader of tab-separated pairs of sentences below a header; quotes are text.

    Args:
        dataset: its name, for the message when it is not there.
        names: of the files.
        columns: of the two sentences and of the label.
        classes: the labels as the file has them.
    """

    def read_file(path: Path) -> Rows:
        if not path.is_file():
            raise SystemExit(f"no file {path}: --data must be a folder with {path.parent.name}: {PAIRS[dataset]}")
        first, second, label = columns
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [((row[first].strip(), row[second].strip()), classes.index(row[label].strip())) for row in reader]

    return lambda folder: (read_file(folder / names[0]), read_file(folder / names[1]))


def read_wikiann(folder: Path) -> tuple[Rows, Rows]:
    """Return WikiANN's sentences, ``(words, numbers of the tags)``."""
    train, test = (
        [(tuple(words), [wikiann.TAGS.index(tag) for tag in tags]) for words, tags in wikiann.read(folder / name)]
        for name in ("train", "test")
    )
    return train, test


MRPC_COLUMNS = ("#1 String", "#2 String", "Quality")
RTE_CLASSES = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", "sst2_glue", read_sentences("sst2"), sentences.CLASSES["sst2"], 2, train_rows=16_000),
        Task("trec", "TREC", "trec", read_sentences("trec"), sentences.CLASSES["trec"], 4, 5),
        Task(
            "mrpc",
            "MRPC",
            "glue_mrpc",
            read_pairs("mrpc", ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"), MRPC_COLUMNS, "01"),
            ("other", "paraphrase"),
            epochs=3,
            seeds=5,
            longest=128,
        ),
        Task(
            "rte",
            "RTE",
            "glue_rte",
            read_pairs("rte", ("train.tsv", "dev.tsv"), ("sentence1", "sentence2", "label"), RTE_CLASSES),
            RTE_CLASSES,
            epochs=3,
            seeds=5,
            longest=128,
            rates=(2e-5, 5e-5),
            apart=True,
        ),
        Task(
            "sst2-full",
            "SST-2, all rows",
            "sst2_glue",
            read_sentences("sst2"),
            sentences.CLASSES["sst2"],
            epochs=2,
            rates_of="sst2",
            headline=True,
        ),
        Task("wikiann", "WikiANN", "wikiann_en", read_wikiann, wikiann.TAGS, 3, train_rows=10_000, eval_rows=3_000),
    )
}


def default_folder() -> Path:
    """Return the folder of the datasets."""
    return Path(os.environ.get("TEXTBREWER_DATA", ROOT.parent / "shared" / "data"))


@cache
def load(name: str, folder: Path, sweep: bool, tiny: bool, tokenizer_path: str) -> Data:
    """Return a task's batches.

    Args:
        name: the task's.
        folder: of the datasets.
        sweep: 90% of the training rows, to be scored on the other 10%; ``False``: all of them, to be scored on the
            dev or test rows.
        tiny: 64 rows of each, to try the scripts.
        tokenizer_path: folder of the tokenizer.
    """
    task = TASKS[name]
    every, held_out = task.read(folder / task.folder)
    train, more = divided(every, 64 if tiny else task.train_rows)
    held_out, _ = divided(held_out, 64 if tiny else task.eval_rows)
    if sweep:
        train, held_out = split(train)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    batches = [make_batches(task, rows, tokenizer) for rows in (train, held_out)]
    return Data(*batches, len(train), len(held_out), held_out[:100], train, more[:64] if tiny else more, tokenizer)


def divided(rows: Rows, count: int | None) -> tuple[Rows, Rows]:
    """Return a fixed random choice of rows, all of them in their order for ``None``, and the others."""
    if count is None:
        return rows, []
    numbers = list(range(len(rows)))
    random.Random(DATA_SEED).shuffle(numbers)
    return [rows[number] for number in numbers[:count]], [rows[number] for number in numbers[count:]]


def left_out(task: Task, data: Data) -> list[Any]:
    """Return batches of the training rows that the grid leaves out: text of the task, whose labels are not used."""
    return make_batches(task, data.more, data.tokenizer)


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Return nine tenths of the rows to train on in a sweep, and the tenth to be scored on."""
    numbers = list(range(len(rows)))
    random.Random(DATA_SEED + 1).shuffle(numbers)
    held_out = set(numbers[: len(rows) // 10])
    return [row for number, row in enumerate(rows) if number not in held_out], [rows[n] for n in sorted(held_out)]


def encode(task: Task, rows: Rows, tokenizer: Any, **settings: Any) -> Any:
    """Return rows as the tokenizer gives them."""
    settings = {"truncation": True, "max_length": task.longest, **settings}
    if task.tags:
        return tokenizer([list(words) for words, _ in rows], is_split_into_words=True, **settings)
    columns = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
    return tokenizer(*columns, **settings)


def make_batches(task: Task, rows: Rows, tokenizer: Any) -> list[Any]:
    """Return fixed batches of 32 rows of like length, padded to the longest of each."""
    lengths = [len(pieces) for pieces in encode(task, rows, tokenizer)["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(rows), BATCH):
        part = [rows[number] for number in order[start : start + BATCH]]
        batch = encode(task, part, tokenizer, padding=True, return_tensors="pt")
        if task.tags:
            labels = first_pieces(batch, [tags for _, tags in part])
        else:
            labels = torch.tensor([label for _, label in part])
        batches.append({**batch, "labels": labels})
    return batches


def first_pieces(batch: Any, tags: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return labels ``(batch, length)``: a word's first piece has its tag, the others :data:`IGNORED`."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, row_tags in enumerate(tags):
        places = batch.word_ids(row)
        for column, place in enumerate(places):
            if place is not None and place != places[column - 1]:
                labels[row, column] = row_tags[place]
    return labels


@torch.inference_mode()
def evaluate(task: Task, model: Any, batches: Sequence[Any]) -> dict[str, float]:
    """Return the score in percent and the mean cross-entropy, in float32; with two classes, also the second's F1.

    Words beyond the longest length are left out of the entities, on both sides.
    """
    model.eval()
    gold, guesses, loss, count = [], [], 0.0, 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{name: column for name, column in batch.items() if name != "labels"}).logits.float()
        loss += float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
        best = logits.argmax(dim=-1)
        gold += list(labels)
        guesses += list(best)
    found = {"loss": loss / count}
    if task.tags:
        kept = [row != IGNORED for row in gold]
        named = [
            [[wikiann.TAGS[number] for number in row[places]] for row, places in zip(rows, kept, strict=True)]
            for rows in (gold, guesses)
        ]
        return {"score": wikiann.f1(*named), **found}
    truth, said = torch.stack(gold), torch.stack(guesses)
    found["score"] = 100 * (truth == said).float().mean().item()
    if len(task.classes) == 2:
        right = int(((truth == 1) & (said == 1)).sum())
        found["f1"] = 200 * right / max(1, int((truth == 1).sum()) + int((said == 1).sum()))
    return found
