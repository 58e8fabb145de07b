"""What a report is made of: the models by name, and things that are run without being torch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from textbrewer import checks
from textbrewer.hooks.forward import call, device_of

__all__ = ["Entry", "Exported", "Measured", "read_entries"]


@runtime_checkable
class Exported(Protocol):
    """Something that runs batches and knows its own files, as what ``textbrewer.compression.load_exported`` returns."""

    @property
    def file(self) -> str | Path | Sequence[str | Path]:
        """What it is shipped as."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return the outputs for a batch."""


@dataclass(frozen=True)
class Measured:
    """Something that runs batches without being a torch module, such as an ONNX Runtime session.

    >>> session = onnxruntime.InferenceSession("student-int8.onnx")
    >>> def run(**batch):
    ...     return session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    >>> report({"teacher": teacher, "int8": Measured(run, file="student-int8.onnx")}, batches)

    It is timed, scored and its file is measured; parameters, FLOPs and memory are left out, as torch does not see them.
    A module with the file that it is shipped as is measured as a module, but for the file.

    Args:
        call: is called as modules are: a dict batch by keywords, a tuple or list by position, with tensors on the CPU.
            Its runtime's threads are its own: set them where the runtime is made.
        file: what it is shipped as, for the size: a file, a folder, or several of them.
        name: of the model in the report.
    """

    call: Callable[..., Any]
    file: str | Path | Sequence[str | Path] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise TypeError(f"call must be something that can be called, got {type(self.call).__name__}")
        for path in self.paths:
            if not path.exists():
                raise FileNotFoundError(f"file must be there, got {str(path)!r}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run ``call``, so that a score function can take this as it takes a module."""
        return self.call(*arguments, **named)

    @property
    def paths(self) -> list[Path]:
        """The files and folders."""
        given = [self.file] if isinstance(self.file, (str, Path)) else (self.file or ())
        return [Path(path) for path in given]


@dataclass(frozen=True)
class Entry:
    """A model of a report.

    Args:
        name: in the report.
        given: what the user gave: a module or :class:`Measured`.
    """

    name: str
    given: nn.Module | Measured

    @property
    def module(self) -> nn.Module | None:
        """The torch module, if it is one."""
        inner = self.given.call if isinstance(self.given, Measured) else self.given
        return inner if isinstance(inner, nn.Module) else None

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device("cpu") if self.module is None else device_of(self.module)

    def run(self, batch: Any) -> Any:
        """Return the outputs for a batch, which is on the device; done when this returns."""
        outputs = call(self.given, batch, {})  # type: ignore[arg-type]  # a Measured is called alike
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return outputs


def read_entries(models: Any, names: Sequence[str] | None) -> list[Entry]:
    """Return the models with their names.

    Args:
        models: a list or a dict by name, of modules, :class:`Measured`, and what :class:`Exported` describes, which is
            measured with its own files.
        names: of a list's models; by default those of ``Measured``, else of the class, numbered if they repeat.

    Raises:
        ValueError: without a model, if the names are given twice, repeat, or are not as many as the models.
        TypeError: if a model is neither.
    """
    checks.is_a(models, (Sequence, Mapping), "models", "a list of models, or a dict of them by name")
    if not models:
        raise ValueError("models must hold at least one model, got none")
    if isinstance(models, Mapping):
        if names is not None:
            raise ValueError(f"names must be left out where models is a dict, whose keys they are, got {list(names)}")
        found, labels = [_measured(model) for model in models.values()], list(models)
    else:
        found = [_measured(model) for model in models]
        labels = list(names if names is not None else _default_names(found))
    if len(labels) != len(found):
        raise ValueError(f"names must be as many as the models, {len(found)}, got {len(labels)}")
    for label, model in zip(labels, found, strict=True):
        checks.is_a(label, str, "the name of a model", "a string")
        if not isinstance(model, (nn.Module, Measured)):
            raise TypeError(
                f"model {label!r} must be a torch module or Measured(call=..., file=...), got {type(model).__name__}"
            )
    if len(set(labels)) < len(labels) or not all(labels):
        raise ValueError(f"names must be different and not empty, got {labels}")
    return [Entry(label, model) for label, model in zip(labels, found, strict=True)]


def _measured(model: Any) -> Any:
    """Return something that knows its own files as what is measured with them, anything else as it is."""
    if isinstance(model, Exported) and not isinstance(model, (nn.Module, Measured)):
        return Measured(model, file=model.file)
    return model


def _default_names(models: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for model in models:
        wanted = (model.name if isinstance(model, Measured) else None) or type(model).__name__
        number, name = 1, wanted
        while name in names:
            number += 1
            name = f"{wanted} {number}"
        names.append(name)
    return names
