"""Reduced forms of a teacher's features: what a loss needs of them where that is less than the whole.

A loss marked with :func:`teacher_form` accepts the teacher's feature also in that form, with the same result. A cache
of teacher outputs then stores the form, which is smaller, and is not computed anew in every epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["TeacherForm", "form_of", "teacher_form"]

F = TypeVar("F", bound=Callable[..., Any])
_ATTRIBUTE = "teacher_form"


@dataclass(frozen=True)
class TeacherForm:
    """A reduced form of a teacher's feature.

    Args:
        name: its name; losses with the same form share what is stored.
        reduce: ``f(feature, mask) -> Tensor`` with the rows first; ``mask`` is ``(batch, length)`` or ``None``.
        positions: the dimensions of the form that run over positions, the rows being dimension 0.
        uses_mask: whether the mask changes the kept part of the form.
    """

    name: str
    reduce: Callable[[Any, Tensor | None], Tensor]
    positions: tuple[int, ...] = ()
    uses_mask: bool = False


def teacher_form(form: TeacherForm) -> Callable[[F], F]:
    """Return a decorator that notes on a loss the form in which it also accepts the teacher's feature."""

    def mark(function: F) -> F:
        setattr(function, _ATTRIBUTE, form)
        return function

    return mark


def form_of(function: Callable[..., Any]) -> TeacherForm | None:
    """Return what :func:`teacher_form` noted on a loss (or on the function of a partial), ``None`` without."""
    form: TeacherForm | None = getattr(function, _ATTRIBUTE, None)
    if form is None and isinstance(function, functools.partial):
        return form_of(function.func)
    return form
