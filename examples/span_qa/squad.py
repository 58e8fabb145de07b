"""Span reading comprehension by characters: reads SQuAD's format, cuts windows, scores answers."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = {
    "cmrc2018": "https://github.com/ymcui/cmrc2018, folder squad-style-data",
    "drcd": "https://github.com/DRCKnowledgeTeam/DRCD",
}
SPECIAL = PAD, CLS, SEP, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[UNK]"
TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


class Question(NamedTuple):
    """A question on a passage, with its answers: text, and place of the first character."""

    passage: str
    question: str
    answers: list[tuple[str, int]]


def read(path: Path, dataset: str) -> list[Question]:
    """Return the questions of a file in SQuAD's format.

    Raises:
        SystemExit: if there is no such file; the message says where to get it.
    """
    if not path.is_file():
        raise SystemExit(f"no file {path}: --data must be the folder of {dataset}'s files ({SOURCES[dataset]})")
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [
        Question(part["context"], item["question"], [(one["text"], one["answer_start"]) for one in item["answers"]])
        for article in articles
        for part in article["paragraphs"]
        for item in part["qas"]
    ]


def span(question: Question) -> tuple[int, int] | None:
    """Return first and last character of the first answer that stands where it says; ``None`` if none does."""
    for text, start in question.answers:
        if text and question.passage[start : start + len(text)] == text:
            return start, start + len(text) - 1
    return None


def vocabulary(questions: Iterable[Question]) -> dict[str, int]:
    """Return a number for each character, after those of the special tokens."""
    seen = {character for item in questions for character in (item.passage + item.question).lower()}
    return {token: number for number, token in enumerate([*SPECIAL, *sorted(seen)])}


def windows(item: Question, vocab: dict[str, int], length: int, stride: int) -> list[dict[str, Any]]:
    """Return the question with each window of the passage: ``[CLS] question [SEP] window [SEP]``.

    Args:
        item: the question.
        vocab: numbers of the characters.
        length: tokens of a row at most.
        stride: characters from one window's start to the next's.

    Returns:
        A dict a window: ``input_ids``; ``token_type_ids``: 0 the question, 1 the window, 2 the characters there that
        the question has too; ``front``: tokens before the window; ``first``: the place of its first character.
    """
    question, passage = item.question.lower()[: length // 3], item.passage.lower()
    front, room = len(question) + 2, length - len(question) - 3
    rows = []
    for first in range(0, max(1, len(passage) - room + stride), stride):
        part = passage[first : first + room]
        tokens = [CLS, *question, SEP, *part, SEP]
        rows.append(
            {
                "input_ids": [vocab.get(token, vocab[UNKNOWN]) for token in tokens],
                "token_type_ids": [0] * front + [1 + (character in question) for character in part] + [1],
                "front": front,
                "first": first,
            }
        )
    return rows


def tokens_of(text: str) -> list[str]:
    """Return the tokens that scores count: each Chinese character, each other word or number; no punctuation."""
    return TOKEN.findall(text.lower())


def common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest run of tokens that both have."""
    best, before = 0, [0] * (len(right) + 1)
    for token in left:
        row = [0] * (len(right) + 1)
        for place, other in enumerate(right):
            if token == other:
                row[place + 1] = before[place] + 1
        best, before = max(best, *row), row
    return best


def score(prediction: str, answers: Iterable[str]) -> tuple[float, float]:
    """Return exact match and F1 against the best of the answers, 0 to 1.

    As in CMRC 2018's own measure, F1 counts the longest run of tokens in common, not a bag of tokens.
    """
    guess, exact, best = tokens_of(prediction), 0.0, 0.0
    for answer in answers:
        truth = tokens_of(answer)
        exact = max(exact, float(guess == truth))
        if guess or truth:
            best = max(best, 2 * common_run(guess, truth) / (len(guess) + len(truth)))
    return exact, best
