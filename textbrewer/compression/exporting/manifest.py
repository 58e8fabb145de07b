"""What is written beside an exported file: how to call it, what it was made of, and how well it was found to agree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["InputSpec", "Manifest", "digest", "file_names", "manifest_path", "read_manifest", "tokenizer_path"]

FORMAT = "textbrewer-exported-model"
VERSION = 1


@dataclass(frozen=True)
class InputSpec:
    """An input of an exported model.

    Args:
        name: of it.
        dtype: as torch calls it, ``"int64"``.
        shape: numbers, and names of the axes that may have any size.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an exported model.

    Args:
        kind: name of its format.
        model: name of its class.
        quantize: what it was quantised to.
        mode: how, of int8.
        inputs: in order.
        outputs: their names, in order.
        ignored: what a batch may hold that is no input: labels.
        labels: names of the classes, by number.
        tokenizer: class of what makes its inputs, saved beside it.
        check: figures of the comparison with the model.
        versions: of the packages that wrote it.
        files: SHA-256 of each of its files.
    """

    kind: str
    model: str
    quantize: str | None
    mode: str | None
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)
    tokenizer: str | None = None
    check: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2)
        path.write_text(f"{text}\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of an exported file.

    Args:
        path: of the exported file.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, or they do not belong together.
    """
    beside = manifest_path(path)
    for needed in (path, beside):
        if not needed.is_file():
            raise FileNotFoundError(f"load_exported needs {str(needed)!r}, which compression.export writes")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        version = found.pop("version")
        if version != VERSION:
            raise ValueError(f"it is of version {version!r}, and this release reads version {VERSION}")
        inputs = tuple(InputSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in found.pop("inputs"))
        labels = {int(number): label for number, label in found.pop("labels").items()}
        outputs, ignored = tuple(found.pop("outputs")), tuple(found.pop("ignored"))
        manifest = Manifest(inputs=inputs, outputs=outputs, ignored=ignored, labels=labels, **found)
        known = set(manifest.files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(beside)!r} must be as compression.export writes it, and is not: {error}") from error
    for name in known | {path.name}:
        part = path.with_name(name)
        if not part.is_file():
            raise FileNotFoundError(f"load_exported needs {str(part)!r}, which belongs to {path.name}")
        if digest(part) != manifest.files.get(name):
            raise ValueError(f"{str(part)!r} is damaged, or was not exported together with {beside.name}; export again")
    return manifest


def manifest_path(path: Path) -> Path:
    """Return where the manifest of an exported file is."""
    return path.with_name(f"{path.name}.json")


def tokenizer_path(path: Path) -> Path:
    """Return the folder where the tokenizer of an exported file is."""
    return path.with_name(f"{path.stem}.tokenizer")


def file_names(path: Path, beside: tuple[str, ...]) -> list[str]:
    """Return the names of all that may belong to an exported file, the manifest's last.

    Args:
        path: of it.
        beside: endings of its format's other files.
    """
    others = [f"{path.stem}{ending}" for ending in beside]
    return [path.name, *others, tokenizer_path(path).name, manifest_path(path).name]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """Return what Python 3.11's ``hashlib.file_digest`` does, in Python 3.10."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()
