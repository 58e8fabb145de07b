"""A model written in one of the formats, to a folder where nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textbrewer.compression.exporting import onnx_files, tracing
from textbrewer.compression.exporting.formats import Target
from textbrewer.compression.exporting.inputs import Inputs, another_shape
from textbrewer.compression.exporting.openvino_files import save_openvino
from textbrewer.compression.exporting.outputs import FlatModel

__all__ = ["write"]


def write(model: FlatModel, inputs: Inputs, outputs: Sequence[str], target: Target) -> dict[str, tuple[int | str, ...]]:
    """Write a model.

    Args:
        model: in eval mode, in float32.
        inputs: real ones.
        outputs: names of its outputs.
        target: what to write.

    Returns:
        The shapes of the inputs, with names for the axes that may have any size.

    Raises:
        ValueError: if it cannot be written so.
        ImportError: without a package that this takes.
    """
    as_program = target.format.name == "torch"
    if as_program and target.quantize == "bf16":
        half = copy.deepcopy(model.model).to(torch.bfloat16)
        model = FlatModel(half, model.names, model.positional, torch.bfloat16).eval()
    program, shapes = _traced(model, inputs)
    if as_program:
        torch.export.save(_bare(program), target.path)
        return shapes
    proto = tracing.to_onnx(program, shapes, outputs, target.opset)
    if target.quantize == "bf16":
        onnx_files.matrices_to_bf16(proto)
    if target.format.name == "openvino":
        _write_openvino(proto, target, inputs)
    elif target.quantize == "int8":
        onnx_files.quantize_onnx(proto, target.path, target.mode or "dynamic", inputs.batches)
    else:
        onnx_files.save_onnx(proto, target.path)
    return shapes


def _traced(model: FlatModel, inputs: Inputs) -> tuple[Any, dict[str, tuple[int | str, ...]]]:
    """Return a model's graph and the shapes of its inputs, recorded with other sizes than those of the data.

    Raises:
        ValueError: if it cannot be recorded, or does not take other sizes where it must.
    """
    batch = inputs.batches[0]
    for axes in inputs.candidates:
        example = another_shape(batch, axes)
        if not _takes(model, example):
            continue
        program = tracing.trace(model, example, axes, inputs.must)
        shapes = tracing.shapes_of(program, model.names, axes)
        sizes = [size for name in model.names for size in zip(shapes[name], batch[name].shape, strict=True)]
        # A length that the model fixes must be that of the data.
        if all(fixed == size for fixed, size in sizes if isinstance(fixed, int)):
            return program, shapes
    found = ", ".join(f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in example.items())
    raise ValueError(
        f"the model must take batches of any number of rows, and of any size where the data's sizes differ or "
        f"dynamic_axes says so, and does not take {found}"
    )


def _takes(model: FlatModel, example: Mapping[str, Tensor]) -> bool:
    """Return whether a model can be called so: some must have a length, or look for a token at the end."""
    try:
        model.outputs([example[name] for name in model.names])
    except Exception:
        return False
    return True


def _write_openvino(proto: Any, target: Target, inputs: Inputs) -> None:
    """Write a model for OpenVINO, by way of an ONNX file."""
    between = Path(target.path).with_suffix(".onnx")
    onnx_files.save_onnx(proto, between)
    try:
        save_openvino(between, target.path, target.quantize, target.mode or "dynamic", inputs.batches)
    finally:
        for written in (between, between.with_name(f"{between.name}.data")):
            written.unlink(missing_ok=True)


def _bare(program: Any) -> Any:
    """Return a graph without the notes of where its parts come from, which hold paths of this machine."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program
