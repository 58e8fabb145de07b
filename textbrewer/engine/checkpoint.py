"""Checkpoints: written beside the old ones under a temporary name and renamed when whole, checked when read.

A run leaves, in its output folder, ``gs{step}.pkl`` (the student's tensors, TextBrewer's file) and, for resuming,
``checkpoint-{step}/``: ``model.safetensors`` (student and projections), ``training.pt`` (optimiser, learning-rate
schedule, gradient scaler), ``rank-{n}.pt`` (random numbers and place in the data of each process) and ``state.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from textbrewer.files import replaced

FORMAT = "textbrewer-checkpoint"
VERSION = 1
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.pt"
_COMPILED = "_orig_mod"
"""Under this name torch.compile keeps the module it wraps."""
UNREADABLE = (OSError, EOFError, ValueError, SafetensorError)
"""What reading a damaged safetensors file raises."""


def rank_file(rank: int) -> str:
    """Return the name of a process's own file."""
    return f"rank-{rank}.pt"


def after_callback_file(rank: int) -> str:
    """Return the name of the file that takes a process's own file's place once the callback is done."""
    return f"rank-{rank}-after-callback.pt"


def check_writable(folder: Path) -> None:
    """Make the output folder and try to write there.

    Raises:
        ValueError: if that fails, before any work is done.
    """
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir must be a folder that can be written to, got {str(folder)!r}: {error}") from error


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` under a temporary name, flushed to disk and renamed."""
    with replaced(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def plain_state(student: nn.Module) -> dict[str, Tensor]:
    """Return the student's tensors under the names it has outside any wrapper (compiled, data-parallel)."""
    while (inner := _wrapped(student)) is not None:
        student = inner
    # A compiled part of the student keeps its wrapper's name as one part of the dotted names below it.
    return {
        ".".join(part for part in name.split(".") if part != _COMPILED): value
        for name, value in student.state_dict().items()
    }


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the module inside a compiled or data-parallel one, ``None`` for any other."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    return dict(model.named_children()).get(_COMPILED)


class Writer:
    """Writes the checkpoints of one run.

    Args:
        folder: the output folder.
        keep: how many ``checkpoint-*`` folders of this run to keep, ``None``: all.
        run_id: names the run; older runs' folders are never deleted.
    """

    def __init__(self, folder: Path, keep: int | None, run_id: str) -> None:
        self.folder, self.keep, self.run_id = folder, keep, run_id

    def temporary(self, step: int) -> Path:
        """Return the folder to write a checkpoint into before it is whole."""
        return self.folder / f".checkpoint-{step}.tmp"

    def begin(self, step: int) -> Path:
        """Make the temporary folder, empty."""
        path = self.temporary(step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def finish(self, step: int, model: nn.Module, training: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write the shared files into the temporary folder, give it its name, and delete what is too many."""
        path = self.temporary(step)
        save_model(model, str(path / MODEL_FILE))
        torch.save(dict(training), path / TRAINING_FILE)
        files = {item.name: item.stat().st_size for item in path.iterdir()}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "saved_at": time.time(),
            **state,
            "files": files,
        }
        (path / STATE_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        _flush(path)
        final = self.folder / f"checkpoint-{step}"
        if final.exists():
            old = self.folder / f".checkpoint-{step}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(path, final)
            shutil.rmtree(old)
        else:
            os.replace(path, final)
        self._drop_old(final)
        return final

    def _drop_old(self, newest: Path) -> None:
        if self.keep is None:
            return
        own = [
            path for path, state in checkpoints_in(self.folder) if state.get("run_id") == self.run_id and path != newest
        ]
        for path in own[max(self.keep - 1, 0) :]:
            shutil.rmtree(path)


def _flush(folder: Path) -> None:
    """Ask the system to put every file of the folder on disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tidy(folder: Path) -> None:
    """Remove what an interrupted write left, and give a checkpoint that was set aside its name back if it is free."""
    for leftover in folder.glob(".gs*.pkl.tmp-*"):
        leftover.unlink()
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    for old in folder.glob(".checkpoint-*.old"):
        final = folder / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, final)


def checkpoints_in(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the whole checkpoints of a folder with their ``state.json``, newest first; leave out what is not one.

    A folder set aside while its successor was being named counts, if the successor is missing.
    """
    found = []
    names = [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.old")]
    for path in names:
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and state.get("format") == FORMAT:
            found.append((path, state))
    return sorted(found, key=lambda item: (-item[1]["saved_at"], item[0].name))


def find_checkpoint(resume_from: str | os.PathLike[str], folder: Path) -> Path | None:
    """Return the checkpoint to resume from.

    Args:
        resume_from: a checkpoint's folder, or ``"latest"``: the newest of the output folder.
        folder: the output folder.

    Returns:
        The checkpoint's folder; ``None`` for ``"latest"`` if there is none yet.

    Raises:
        ValueError: if the named folder does not exist, or folders named like checkpoints are none.
    """
    if os.fspath(resume_from) == "latest":
        whole = checkpoints_in(folder)
        if not whole and any(folder.glob("checkpoint-*")):
            names = sorted(path.name for path in folder.glob("checkpoint-*"))
            raise ValueError(
                f"resume_from='latest': {names} in {str(folder)!r} cannot be read as checkpoints of this library; "
                "move them away to start anew, or name a good one"
            )
        return whole[0][0] if whole else None
    path = Path(resume_from)
    if not path.is_dir():
        raise ValueError(
            f"resume_from must be 'latest' or a checkpoint's folder, got {str(path)!r}, which is no folder"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``state.json`` after checking that the checkpoint is whole.

    Raises:
        ValueError: if it is no checkpoint of this library, of a newer version, or damaged.
    """
    try:
        state: Any = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of this library ({STATE_FILE} missing or unreadable: {error}); "
            "name a folder 'checkpoint-<step>' that training wrote"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a checkpoint of this library: its {STATE_FILE} is another's")
    if state["version"] > VERSION:
        raise ValueError(f"{str(path)!r} was written by a newer version (format {state['version']}, known {VERSION})")
    for name, size in state["files"].items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            raise damaged(path, f"{name} should have {size} bytes, has {actual}")
    return state


def read_tensors(path: Path, name: str) -> Any:
    """Load one of a checkpoint's files on the CPU, tensors and plain values only.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return torch.load(path / name, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything on bytes that are no pickle
        raise damaged(path, f"{name}: {error}") from error


def read_model(path: Path, model: nn.Module) -> None:
    """Load student and projections into ``model``.

    Raises:
        ValueError: if the file cannot be read or belongs to another student.
    """
    try:
        load_model(model, str(path / MODEL_FILE))
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} belongs to another student or other projections: {error}"
        ) from error
    except UNREADABLE as error:
        raise damaged(path, f"{MODEL_FILE}: {error}") from error


def damaged(path: Path, what: str) -> ValueError:
    """Return the error for a checkpoint that cannot be read."""
    return ValueError(f"the checkpoint {str(path)!r} is damaged ({what}); resume from an older one")
