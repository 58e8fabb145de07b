"""The nearest known name, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that resembles ``name`` most, capitals aside, ``None`` if none does.

    Args:
        name: what was given.
        known: the names that there are.
        cutoff: how like each other they must be, 0 to 1, as :func:`difflib.get_close_matches` measures it.
    """
    by_small_letters = {item.lower(): item for item in known}
    near = difflib.get_close_matches(str(name).lower(), by_small_letters, n=1, cutoff=cutoff)
    return by_small_letters[near[0]] if near else None


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return ``"known: a, b"``, headed by ``"did you mean 'a'? "`` where one of them resembles ``name``."""
    names = [str(item) for item in known]
    near = nearest(name, names)
    hint = "" if near is None else f"did you mean {near!r}? "
    return f"{hint}known: {', '.join(names)}"
