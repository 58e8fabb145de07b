"""The nearest known name, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return ``"known: a, b"``, headed by ``"did you mean 'a'? "`` where one of them resembles ``name``."""
    names = [str(item) for item in known]
    by_small_letters = {item.lower(): item for item in names}
    near = difflib.get_close_matches(str(name).lower(), by_small_letters, n=1)
    hint = f"did you mean {by_small_letters[near[0]]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"
