"""Reads WikiANN and scores entities as CoNLL does."""

from collections.abc import Iterable, Sequence
from pathlib import Path

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
SOURCE = "train and test of WikiANN, English (https://github.com/davidsbatista/NER-datasets, WikiANN/en)"
Sentence = tuple[list[str], list[str]]
Entity = tuple[str, int, int]


def read(path: Path) -> list[Sentence]:
    """Return sentences, ``(words, tags)``, of lines ``en:word<TAB>tag`` with an empty line between sentences.

    Raises:
        SystemExit: if there is no such file; the message says where to get it.
    """
    if not path.is_file():
        raise SystemExit(f"no file {path}: --data must be a folder with {SOURCE}")
    sentences = []
    for block in path.read_text(encoding="utf-8").strip("\n").split("\n\n"):
        pairs = [line.rsplit("\t", maxsplit=1) for line in block.split("\n")]
        sentences.append(([word.split(":", maxsplit=1)[1] for word, _ in pairs], [tag for _, tag in pairs]))
    return sentences


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of one sentence's BIO tags: type, first word, word after the last.

    As in CoNLL's scorer, an ``I`` that continues nothing, or another type, begins an entity.
    """
    found, start = set(), 0
    for place, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        goes_on = tag.startswith("I-") and before[1:] == tag[1:]
        if before != "O" and not goes_on:
            found.add((before[2:], start, place))
        if not goes_on:
            start = place
    return found


def f1(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> float:
    """Return the F1 of entities over all sentences, in percent: right only with type and both ends; 0 without any."""
    right = count = 0
    for tags, guesses in zip(gold, predicted, strict=True):
        true, guessed = entities(tags), entities(guesses)
        right += len(true & guessed)
        count += len(true) + len(guessed)
    return 100 * 2 * right / count if count else 0.0
