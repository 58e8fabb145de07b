"""Batches for a teacher and a student with tokenizers of their own, made of the same texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from textbrewer import checks

__all__ = ["TwoTokenizerCollator"]


class TwoTokenizerCollator:
    """Makes batches ``{"teacher": {...}, "student": {...}}`` of rows of raw text, each side tokenized its own way.

    A ``collate_fn`` for a DataLoader. The distillers feed each side its own part; as the tokens differ, only what has
    no positions can be compared: the logits of classification or regression, not states of single tokens.

    Args:
        tokenizer_T: the teacher's tokenizer: ``tokenizer(texts, padding=..., truncation=..., max_length=...,
            return_tensors="pt")``, for pairs with the second texts as second argument, returns a mapping of tensors.
        tokenizer_S: the student's.
        text: the column of the text, or those of two texts; a number where rows are tuples.
        label: the column of the label, which both sides get as ``labels``; ``None``: there are no labels.
        max_length: texts are cut to as many tokens; ``None``: to what each tokenizer says its model takes.
        padding: ``True``: to the longest row of the batch; ``"max_length"``: to ``max_length``.

    Raises:
        TypeError, ValueError: if an argument cannot work.
    """

    def __init__(
        self,
        tokenizer_T: Callable[..., Any],
        tokenizer_S: Callable[..., Any],
        text: str | int | Sequence[str | int] = "text",
        label: str | int | None = "label",
        max_length: int | None = None,
        padding: bool | str = True,
    ) -> None:
        for name, tokenizer in (("tokenizer_T", tokenizer_T), ("tokenizer_S", tokenizer_S)):
            if not callable(tokenizer):
                raise TypeError(f"{name} must be a tokenizer, called with a list of texts, got {tokenizer!r}")
        columns: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if len(columns) not in (1, 2):
            raise ValueError(f"text must be one column or two, got {text!r}")
        for column in columns:
            checks.is_a(column, (str, int), "text", "a column's name, its number in a tuple, or two of them")
        if label is not None:
            checks.is_a(label, (str, int), "label", "a column's name, its number in a tuple, or None")
        if max_length is not None:
            checks.integer(max_length, "max_length", minimum=1)
        if padding not in (True, "longest", "max_length"):
            raise ValueError(
                f"padding must be True or 'max_length', got {padding!r}: rows of one batch have one length"
            )
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        self.tokenizers = {"teacher": tokenizer_T, "student": tokenizer_S}
        self.columns, self.label, self.max_length, self.padding = columns, label, max_length, padding

    def __call__(self, rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Return the batch of some rows.

        Args:
            rows: dicts, or tuples or lists, with the columns.

        Returns:
            ``{"teacher": {...}, "student": {...}}``: as the tokenizers return them, and ``labels``: ``(rows,)``
            whole or real numbers, or ``(rows, classes)`` where a label is a list.

        Raises:
            ValueError: if there are no rows.
            KeyError, IndexError: if a row lacks a column.
            TypeError: if a text is no string, or a tokenizer does not return a mapping.
        """
        if len(rows) == 0:
            raise ValueError("a batch must have at least one row")
        texts = [[_text(row, number, column) for number, row in enumerate(rows)] for column in self.columns]
        labels = None
        if self.label is not None:
            labels = self._labels([_value(row, number, self.label, "label") for number, row in enumerate(rows)])
        return {side: self._side(side, texts, labels) for side in self.tokenizers}

    def _labels(self, values: Sequence[Any]) -> torch.Tensor:
        try:
            labels = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"column {self.label!r} must hold a number in each row, or as many of them, got {values!r}"
            ) from error
        # Whole numbers are classes; real ones are targets, in the models' precision.
        return labels.float() if labels.is_floating_point() else labels

    def _side(self, side: str, texts: Sequence[list[str]], labels: torch.Tensor | None) -> dict[str, Any]:
        encoded = self.tokenizers[side](
            *texts, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if not isinstance(encoded, Mapping):
            raise TypeError(f"the {side}'s tokenizer must return a mapping of tensors, got {type(encoded).__name__}")
        batch = dict(encoded)
        return batch if labels is None else {**batch, "labels": labels}


def _value(row: Any, number: int, column: str | int, name: str) -> Any:
    """Return one column of a row.

    Raises:
        KeyError, IndexError, TypeError: if it is not there; the message names what is.
    """
    if isinstance(row, Mapping):
        if column not in row:
            raise KeyError(
                f"row {number} has no column {column!r}, only {sorted(map(str, row))}; name the right one as {name}"
            )
        return row[column]
    if not isinstance(row, (tuple, list)):
        raise TypeError(f"row {number} must be a dict, a tuple or a list, got {type(row).__name__}")
    if not isinstance(column, int):
        raise KeyError(f"row {number} has no names of columns, being a {type(row).__name__}; give {name} as a number")
    if not -len(row) <= column < len(row):
        raise IndexError(f"row {number} has no column {column}, only {len(row)} of them; name the right one as {name}")
    return row[column]


def _text(row: Any, number: int, column: str | int) -> str:
    value = _value(row, number, column, "text")
    if not isinstance(value, str):
        raise TypeError(f"column {column!r} must hold texts, got {value!r} in row {number}")
    return value
