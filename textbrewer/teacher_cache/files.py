"""What a cache does to its folder and file beside LMDB."""

from __future__ import annotations

import os
from pathlib import Path

from textbrewer.teacher_cache.errors import CacheError


def lengthen(file: Path, size: int) -> None:
    """Give a file the pages that it says it has: to read one beyond its end would kill the process (SIGBUS)."""
    if file.stat().st_size >= size or not hasattr(os, "posix_fallocate"):
        return
    try:
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError:
        # The disk is full; a file that is not damaged has nothing there that is read.
        return


def check_folder(path: Path) -> None:
    """Raise CacheError unless the folder is new, empty, or holds an LMDB file."""
    if path.exists() and not path.is_dir():
        raise CacheError(f"a teacher cache is a folder, {str(path)!r} is a file; name another path")
    if not path.is_dir():
        return
    # Looked at once: another process may be making the cache.
    names = {item.name for item in path.iterdir()}
    others = sorted(names - {"lock.mdb"})
    if others and "data.mdb" not in names:
        raise CacheError(
            f"{str(path)!r} is no teacher cache, it holds {', '.join(others[:3])}; name a new or empty folder"
        )
