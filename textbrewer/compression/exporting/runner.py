"""Exported models that are called as the models were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.compression.exporting.manifest import InputSpec, Manifest, read_manifest, tokenizer_path
from textbrewer.compression.exporting.runtimes import open_file
from textbrewer.names import suggestion

__all__ = ["Outputs", "Runner", "load_exported"]


class Outputs(dict[str, Tensor]):
    """Tensors by name, which can be had as attributes too: ``outputs.logits``."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; {suggestion(name, list(self))}") from None


class Runner:
    """An exported model, run by its format's runtime on the CPU; no torch model is needed.

    >>> runner = compression.load_exported("student.onnx")
    >>> batch = runner.tokenizer()(["a good film"], return_tensors="pt")
    >>> runner(**batch).logits

    It is called as the model was, with a batch by keywords or its inputs in order; labels and the like, which the model
    only computed a loss from, may be there. :func:`textbrewer.report.report` takes it beside models.

    Args:
        path: what :func:`~textbrewer.compression.export` wrote.
        threads: of the runtime; ``None``: its own choice.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        if threads is not None:
            checks.integer(threads, "threads", minimum=1)
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        names = [spec.name for spec in self.manifest.inputs]
        self._run = open_file(
            self.path, self.manifest.kind, names, self.manifest.outputs, None if threads is None else int(threads),
            half=self.manifest.quantize == "bf16",
        )  # fmt: skip

    @property
    def file(self) -> list[Path]:
        """The files that the model is shipped as."""
        return [self.path.with_name(name) for name in self.manifest.files]

    @property
    def labels(self) -> dict[int, str]:
        """Names of the classes, by number; empty if the model had none."""
        return self.manifest.labels

    def tokenizer(self) -> Any:
        """Return the tokenizer (or processor) that was saved beside the file.

        Raises:
            FileNotFoundError: if there is none.
        """
        folder, name = tokenizer_path(self.path), self.manifest.tokenizer
        if name is None or not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer is beside {str(self.path)!r}; export with tokenizer=...")
        import transformers

        kind = getattr(transformers, name, transformers.AutoTokenizer)
        return kind.from_pretrained(folder)

    def __call__(self, *arguments: Tensor, **named: Tensor) -> Outputs:
        """Return the outputs for a batch.

        Raises:
            ValueError: if an input has another shape or dtype than it must have.
            KeyError, TypeError: if an input is missing or unknown, or is no tensor.
        """
        inputs = self.manifest.inputs
        if len(arguments) > len(inputs):
            raise TypeError(f"the model takes {len(inputs)} inputs, got {len(arguments)}")
        given: dict[str, Any] = {**dict(zip((spec.name for spec in inputs), arguments, strict=False)), **named}
        known = [spec.name for spec in inputs]
        checks.known_keys(given, [*known, *self.manifest.ignored], "the batch")
        for name in known:
            if given.get(name) is None:
                raise KeyError(f"the batch must have {name!r}, which the model was exported with; it takes {known}")
        return Outputs(self._run(dict(_fitting(inputs, given))))

    def __repr__(self) -> str:
        return f"Runner({str(self.path)!r})"


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> Runner:
    """Return an exported model, ready to be called.

    Args:
        path: what :func:`~textbrewer.compression.export` wrote.
        threads: of the runtime; ``None``: its own choice.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if one is damaged, or the runtime does not take it.
        ImportError: without the runtime.
    """
    return Runner(path, threads)


def _fitting(inputs: tuple[InputSpec, ...], given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the inputs in the dtypes that the model takes, whole numbers widened."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        tensor = given[spec.name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{spec.name!r} must be a tensor, got {type(tensor).__name__}")
        dtype = getattr(torch, spec.dtype)
        if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
            raise ValueError(f"{spec.name!r} must be of {spec.dtype}, got {str(tensor.dtype).removeprefix('torch.')}")
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape)
        for size, wanted in zip(shape, spec.shape, strict=False):
            if isinstance(wanted, int):
                fits = fits and size == wanted
            elif sizes.setdefault(wanted, (size, spec.name))[0] != size:
                raise ValueError(
                    f"{wanted} must be the same in all inputs, got {sizes[wanted][0]} in {sizes[wanted][1]!r} and "
                    f"{size} in {spec.name!r}"
                )
        if not fits:
            raise ValueError(f"{spec.name!r} must have the shape {_shape(spec.shape)}, got {_shape(shape)}")
        yield spec.name, tensor.detach().cpu().to(dtype).contiguous()


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
