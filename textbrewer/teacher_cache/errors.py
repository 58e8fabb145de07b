"""What goes wrong with a cache of teacher outputs."""

from __future__ import annotations


class CacheError(ValueError):
    """A cache folder cannot be used; the message says why, and what to do."""
