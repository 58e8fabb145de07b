"""What a model can be exported as: the file's ending says it, and each format has its own ways to be quantised."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textbrewer import checks

__all__ = ["FORMATS", "MODES", "QUANTIZATIONS", "Format", "Target", "find_target", "needed"]

QUANTIZATIONS = (None, "int8", "bf16")
MODES = ("dynamic", "static")


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: as ``format=`` names it.
        ending: of the file.
        extra: of textbrewer, that brings its packages; empty if torch alone writes and runs it.
        quantizations: what it can be quantised to, beside not at all.
        beside: endings of other files that belong to it, which take the place of its own or follow it.
    """

    name: str
    ending: str
    extra: str
    quantizations: tuple[str, ...]
    beside: tuple[str, ...] = ()


FORMATS = {
    known.name: known
    for known in (
        Format("onnx", ".onnx", "onnx", ("int8", "bf16"), (".onnx.data",)),
        Format("openvino", ".xml", "openvino", ("int8", "bf16"), (".bin",)),
        Format("torch", ".pt2", "", ("bf16",)),
    )
}


@dataclass(frozen=True)
class Target:
    """A file that is to be written.

    Args:
        path: of it.
        format: of it.
        quantize: what to.
        mode: how; ``None`` where there is no choice.
        opset: version of ONNX's operators; ``None``: what torch takes.
    """

    path: Path
    format: Format
    quantize: str | None
    mode: str | None
    opset: int | None


def find_target(path: Path, name: str | None, quantize: str | None, mode: str, opset: int | None) -> Target:
    """Return what is to be written.

    Raises:
        ValueError: if the ending or name is unknown, the two do not fit, or the format cannot be quantised so.
    """
    endings = {known.ending: known for known in FORMATS.values()}
    if name is not None:
        checks.one_of(name, FORMATS, "format")
    found = FORMATS[name] if name is not None else endings.get(path.suffix)
    if found is None:
        kinds = ", ".join(f"{known.ending} ({known.name})" for known in FORMATS.values())
        raise ValueError(f"path must end in one of {kinds}, or format= be given, got {str(path)!r}")
    if path.suffix != found.ending:
        raise ValueError(f"path must end in {found.ending} for format={found.name!r}, got {str(path)!r}")
    if quantize not in QUANTIZATIONS:
        raise ValueError(f'quantize must be None, "int8" or "bf16", got {quantize!r}')
    checks.one_of(mode, MODES, "mode")
    if mode == "static" and quantize != "int8":
        raise ValueError(f'mode="static" is of quantize="int8", got quantize={quantize!r}; leave mode out')
    if quantize is not None and quantize not in found.quantizations:
        able = ", ".join(known.ending for known in FORMATS.values() if quantize in known.quantizations)
        raise ValueError(f"path must end in one of {able} for quantize={quantize!r}, got {str(path)!r}")
    if opset is not None:
        checks.integer(opset, "opset", minimum=18)
        if not found.extra:
            raise ValueError(f"opset must be None for a {found.ending} file, which has no ONNX in it, got {opset}")
        opset = int(opset)
    return Target(path, found, quantize, mode if quantize == "int8" else None, opset)


def needed(modules: Mapping[str, str], extra: str, what: str) -> list[Any]:
    """Return modules of an optional extra.

    Args:
        modules: what is imported, each with the name of its package.
        extra: of textbrewer.
        what: needs it, for the message.

    Raises:
        ImportError: if one is missing; the message has the command that installs it.
    """
    found = []
    for module, package in modules.items():
        try:
            found.append(importlib.import_module(module))
        except ImportError as error:
            raise ImportError(f"{what} needs {package}: pip install 'textbrewer[{extra}]'") from error
    return found
