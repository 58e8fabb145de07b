"""Exported files made runnable, without the model that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textbrewer.compression.exporting.formats import needed

__all__ = ["Run", "open_file"]

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Gives outputs by name for inputs by name, on the CPU."""


def open_file(
    path: Path,
    kind: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    threads: int | None = None,
    *,
    half: bool = False,
) -> Run:
    """Return what runs a file.

    Args:
        path: the file.
        kind: name of its format.
        inputs: their names, in order.
        outputs: likewise.
        threads: of the runtime; ``None``: its own choice. A torch program has those of torch.
        half: whether a runtime that can may compute in bfloat16.

    Raises:
        ImportError: without the runtime.
        ValueError: if it does not take the file.
    """
    try:
        if kind == "onnx":
            return _open_onnx(path, outputs, threads)
        if kind == "openvino":
            return _open_openvino(path, outputs, threads, half)
        return _open_program(path, inputs, outputs, threads)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be run: {type(error).__name__}: {error}") from error


def _open_onnx(path: Path, outputs: Sequence[str], threads: int | None) -> Run:
    (runtime,) = needed({"onnxruntime": "onnxruntime"}, "onnx", "running an ONNX file")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = [value.name for value in session.get_inputs()]

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(list(outputs), {name: batch[name].numpy() for name in taken})
        return {name: torch.from_numpy(values) for name, values in zip(outputs, found, strict=True)}

    return run


def _open_openvino(path: Path, outputs: Sequence[str], threads: int | None, half: bool) -> Run:
    (openvino,) = needed({"openvino": "openvino"}, "openvino", "running an OpenVINO file")
    # By default OpenVINO computes in bfloat16 wherever the processor can, whatever the file holds.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    taken = [value.get_any_name() for value in compiled.inputs]
    request = compiled.create_infer_request()

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = request.infer({name: batch[name].numpy() for name in taken})
        return {name: torch.from_numpy(found[name].copy()) for name in outputs}

    return run


def _open_program(path: Path, inputs: Sequence[str], outputs: Sequence[str], threads: int | None) -> Run:
    if threads is not None:
        raise ValueError("threads must be None for a .pt2 file, which runs with those of torch.set_num_threads")
    module = torch.export.load(path).module()

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(outputs, module(*(batch[name] for name in inputs)), strict=True))

    return run
