"""Several files written as one: in a folder of their own first, and then all of them put in their places, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_free", "staged"]


def check_free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise FileExistsError if one of the files is there and must not be replaced, ValueError if one is a folder."""
    for name in names:
        path = folder / name
        if path.is_dir() and not name.endswith(".tokenizer"):
            raise ValueError(f"path must be a file, got the folder {str(path)!r}")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{str(path)!r} is there already; take another path, or pass overwrite=True")


@contextmanager
def staged(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files to, which are moved to another one unless an exception is raised.

    Args:
        folder: where they go, made if need be.
        names: of all that may be written, the last one the file that says that the others are whole. What has such a
            name and is not written goes.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{names[0]}.", dir=folder))
    done = False
    try:
        new, old = stage / "new", stage / "old"
        new.mkdir()
        old.mkdir()
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                _flush(path)
        _move(new, old, folder, names)
        done = True
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in missing if not done else ():
            if not any(parent.iterdir()):
                parent.rmdir()


def _move(new: Path, old: Path, folder: Path, names: Sequence[str]) -> None:
    """Move what was written, and undo it all if a move fails."""
    moves: list[tuple[Path, Path]] = []
    try:
        for name in names:
            for source, target in ((folder / name, old / name), (new / name, folder / name)):
                if source.exists():
                    os.replace(source, target)
                    moves.append((source, target))
    except BaseException:
        for source, target in reversed(moves):
            os.replace(target, source)
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
