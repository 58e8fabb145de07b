"""The wording of every argument error: what it is, the rule, the value, the remedy."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from textbrewer.names import suggestion


def one_of(value: object, known: Iterable[str], name: str) -> None:
    """Raise ValueError unless ``value`` is among the ``known`` strings."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} must be one of the known names, got {value!r}; {suggestion(value, names)}")


def known_keys(keys: Iterable[str], known: Iterable[str], name: str) -> None:
    """Raise KeyError naming the first key that is not ``known``, and the nearest that is."""
    names = list(known)
    for key in keys:
        if key not in names:
            raise KeyError(f"{name}: unknown key {key!r}; {suggestion(key, names)}")


def is_a(value: object, types: type | tuple[type, ...], name: str, what: str) -> None:
    """Raise TypeError unless ``value`` is an instance of ``types`` (a bool does not pass as a number)."""
    allowed = types if isinstance(types, tuple) else (types,)
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        raise TypeError(f"{name} must be {what}, got {value!r} ({type(value).__name__})")


def number(
    value: Any,
    name: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Raise unless ``value`` is a finite number within the bounds: ``minimum`` and ``maximum`` are allowed values."""
    is_a(value, (int, float), name, "a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value!r}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be less than {below}, got {value!r}")


def integer(value: Any, name: str, *, minimum: int | None = None) -> None:
    """Raise unless ``value`` is a whole number (``3.0`` passes for 3), at least ``minimum``."""
    is_a(value, (int, float), name, "a whole number")
    if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def positive_temperature(temperature: object) -> None:
    """Raise ValueError if ``temperature`` is a number that is not positive (a tensor is not read)."""
    if not isinstance(temperature, Tensor):
        number(temperature, "temperature", above=0)


def same_shape(student: Tensor, teacher: Tensor, name: str) -> None:
    """Raise ValueError unless the student's and the teacher's tensors have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name} of student and teacher must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def warn(message: str) -> None:
    """Warn at the line of the caller's code that led here: the first one outside this package."""
    package, level = __name__.partition(".")[0], 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
