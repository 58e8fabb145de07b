"""Texts and pictures that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from textbrewer.files import replaced

__all__ = ["write"]


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it; folders are made, and nothing is left behind on failure."""
    with replaced(Path(path)) as unfinished:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
