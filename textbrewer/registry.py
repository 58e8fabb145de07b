"""Tables of named functions: a ``dict`` whose errors list the known names, and the five tables of the library."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from textbrewer.names import suggestion

F = TypeVar("F", bound=Callable[..., Any])


_BUILDER = "is_builder"


def builder(function: F) -> F:
    """Note on an entry that it must be called with its parameters, and what it returns is what does the work."""
    setattr(function, _BUILDER, True)
    return function


class Registry(dict[str, Callable[..., Any]]):
    """A table of functions by name.

    An ordinary ``dict`` (assignment, ``in`` and iteration work), plus :meth:`add` to register while defining,
    and :meth:`make` to build an entry from a specification such as ``["flsw", 1, 2]``.

    Args:
        kind: what the entries are, for error messages ("KD loss").
        entries: the first entries.
    """

    def __init__(self, kind: str, entries: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def add(self, *names: str) -> Callable[[F], F]:
        """Return a decorator that registers a function under one or several names.

        Raises:
            ValueError: without a name, or if a name is taken already.
        """
        if not names:
            raise ValueError(f"a {self.kind} must be given at least one name")
        for name in names:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already; assign to the table to replace it")

        def register(function: F) -> F:
            for name in names:
                self[name] = function
            return function

        return register

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a {self.kind} must be a non-empty string, got {name!r}")
        if not callable(function):
            raise TypeError(f"{self.kind} {name!r} must be callable, got {function!r}")
        super().__setitem__(name, function)

    def __getitem__(self, key: Any) -> Any:
        """Return the entry named ``key``; a list or tuple ``[name, *arguments]`` calls the entry (see :meth:`make`)."""
        if isinstance(key, (list, tuple)):
            return self.make(key)
        return super().__getitem__(key)

    def __missing__(self, key: object) -> Any:
        raise KeyError(f"unknown {self.kind} {key!r}; {suggestion(key, self)}")

    def __contains__(self, key: object) -> bool:
        if isinstance(key, (list, tuple)):
            return bool(key) and super().__contains__(key[0])
        return super().__contains__(key)

    def make(self, spec: str | Sequence[Any]) -> Any:
        """Return an entry, or what it builds.

        Args:
            spec: a name: the entry itself; ``[name, *arguments]`` or ``[name, {keyword: value}]``: the entry called
                with these arguments, and its result returned.

        Raises:
            KeyError: if the name is not in the table.
            TypeError: if the arguments do not fit the entry.
            ValueError: if the entry is a :func:`builder` and no arguments are given.
        """
        if isinstance(spec, str):
            if getattr(self[spec], _BUILDER, False):
                needed = ", ".join(inspect.signature(self[spec]).parameters)
                raise ValueError(f"{self.kind} {spec!r} needs its parameters: write [{spec!r}, {needed}]")
            return self[spec]
        if not isinstance(spec, (list, tuple)) or not spec:
            raise TypeError(f"a {self.kind} must be a name or a list [name, *arguments], got {spec!r}")
        function, arguments = self[spec[0]], spec[1:]
        try:
            if len(arguments) == 1 and isinstance(arguments[0], Mapping):
                return function(**arguments[0])
            return function(*arguments)
        except TypeError as error:
            raise TypeError(f"{self.kind} {list(spec)!r}: {error}") from error

    def bound(self, spec: str | Sequence[Any]) -> Callable[..., Any]:
        """Return an entry, with its own constants set.

        Args:
            spec: a name: the entry itself; ``[name, {keyword: value}]``: the entry with these keywords given.

        Raises:
            KeyError: if the name is not in the table.
            TypeError: if the specification has another form.
            ValueError: if the entry has no such keyword; the message lists those that it has.
        """
        if isinstance(spec, str):
            function: Callable[..., Any] = self[spec]
            return function
        given = list(spec) if isinstance(spec, (list, tuple)) else []
        constants = given[1] if len(given) == 2 else {}
        if len(given) not in (1, 2) or not isinstance(given[0], str) or not isinstance(constants, Mapping):
            raise TypeError(f"a {self.kind} must be a name or a list [name, {{constant: value}}], got {spec!r}")
        function = self[given[0]]
        known = own_constants(function)
        for name in constants:
            if known is not None and name not in known:
                remedy = suggestion(name, known) if known else "it has none"
                raise ValueError(f"{self.kind} {given[0]!r} has no constant {name!r}; {remedy}")
        return functools.partial(function, **constants) if constants else function


def name_of(spec: Any) -> Any:
    """Return the name in a specification ``name`` or ``[name, ...]``; what is neither is returned as it is."""
    return spec[0] if isinstance(spec, (list, tuple)) and spec else spec


_GIVEN = {"mask", "labels", "progress", "temperature"}


@functools.lru_cache(maxsize=256)
def own_constants(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names of a loss's own constants: its keyword parameters that no distiller gives.

    ``None`` for a function that takes any keyword, or whose signature cannot be read.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in _GIVEN
    )


KD_LOSS_MAP = Registry("KD loss")
"""Losses between logits: ``f(logits_S, logits_T, temperature) -> scalar``."""
MATCH_LOSS_MAP = Registry("match loss")
"""Losses between intermediate features: ``f(feature_S, feature_T, mask=None) -> scalar``."""
PROJ_MAP = Registry("projection")
"""Modules that bring a student's feature to the teacher's width: ``f(dim_in, dim_out) -> Module``."""
WEIGHT_SCHEDULER = Registry("weight scheduler")
"""Factors of a loss weight over training: ``f(progress) -> factor``, progress from 0 to 1."""
TEMPERATURE_SCHEDULER = Registry("temperature scheduler")
"""Temperatures by batch: ``f(logits_S, logits_T, base_temperature) -> number or tensor``."""
