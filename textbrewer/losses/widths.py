"""How wide the student's (projected) feature must be beside the teacher's, noted on losses that do not say "same"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

from textbrewer import checks

__all__ = ["WidthRule", "student_width", "width_rule_of"]

F = TypeVar("F", bound=Callable[..., Any])
WidthRule = Literal["same", "any", "twice"]
_ATTRIBUTE = "student_width"


def student_width(rule: WidthRule) -> Callable[[F], F]:
    """Return a decorator that notes on a match loss which widths fit it.

    Args:
        rule: ``"same"``: the teacher's (what holds for a loss without a note); ``"any"``: the loss compares relations
            between positions or rows, whatever the width; ``"twice"``: a mean and a variance for each of the teacher's.

    Raises:
        ValueError: if the rule is unknown.
    """
    checks.one_of(rule, get_args(WidthRule), "rule")

    def mark(function: F) -> F:
        setattr(function, _ATTRIBUTE, rule)
        return function

    return mark


def width_rule_of(function: Callable[..., Any]) -> WidthRule:
    """Return what :func:`student_width` noted on a loss (or on the function of a partial), ``"same"`` without."""
    if isinstance(function, functools.partial):
        return width_rule_of(function.func)
    return getattr(function, _ATTRIBUTE, "same")
