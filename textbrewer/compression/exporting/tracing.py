"""A model's graph, recorded by ``torch.export`` with axes of any size, and the same as ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from textbrewer.compression.exporting.formats import needed
from textbrewer.compression.exporting.inputs import BATCH, Axes
from textbrewer.compression.exporting.outputs import FlatModel

__all__ = ["shapes_of", "to_onnx", "trace"]


def trace(model: FlatModel, example: Mapping[str, Tensor], axes: Axes, must: Axes) -> Any:
    """Return a model's graph as a ``torch.export.ExportedProgram``.

    Args:
        model: in eval mode.
        example: inputs to record it with.
        axes: that may have any size; those that the model fixes itself are fixed.
        must: axes of which that is an error, as it is of the rows.

    Raises:
        ValueError: if it cannot be recorded, or fixes one of those.
    """
    sizes = tuple(dict.fromkeys(axes[name], torch.export.Dim.AUTO) for name in model.names)
    tensors = tuple(example[name] for name in model.names)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(model, tensors, dynamic_shapes=(sizes,), strict=False)
    except Exception as error:
        raise ValueError(
            f"model must be one that torch.export can record, and {type(model.model).__name__} is not: {_brief(error)}"
        ) from error
    shapes = shapes_of(program, model.names, axes)
    for name, labels in axes.items():
        for axis, label in labels.items():
            required = label == BATCH or axis in must.get(name, {})
            if required and isinstance(shapes[name][axis], int):
                raise ValueError(
                    f"the model must take any size of axis {axis} of {name!r} ({label}), but fixes it to "
                    f"{shapes[name][axis]}: its forward() must not turn the size into a number of Python's"
                )
    return program


def shapes_of(program: Any, names: Sequence[str], axes: Axes) -> dict[str, tuple[int | str, ...]]:
    """Return the shapes of a graph's inputs: numbers, and names of the axes that may have any size."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes: dict[str, tuple[int | str, ...]] = {}
    symbols: dict[str, str] = {}
    for name, inner in zip(names, program.graph_signature.user_inputs, strict=True):
        shape: list[int | str] = []
        for axis, size in enumerate(placeholders[inner].meta["val"].shape):
            label = axes[name].get(axis, str(size))
            if isinstance(size, int):
                shape.append(size)
            elif label == BATCH or symbols.setdefault(label, str(size)) == str(size):
                shape.append(label)
            else:  # of another size, as far as the model is concerned
                shape.append(f"{name}_{label}")
        shapes[name] = tuple(shape)
    return shapes


def to_onnx(program: Any, shapes: Mapping[str, Sequence[int | str]], outputs: Sequence[str], opset: int | None) -> Any:
    """Return a graph as an ``onnx.ModelProto``, without notes of where in which source file its parts come from.

    Args:
        program: what :func:`trace` returned.
        shapes: of its inputs.
        outputs: names of its outputs.
        opset: version of ONNX's operators; ``None``: what torch takes.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError: if an operator has no counterpart.
    """
    needed({"onnx": "onnx", "onnxscript": "onnxscript"}, "onnx", "export to ONNX")
    try:
        with torch.no_grad(), _quiet():
            found = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(shapes),
                output_names=list(outputs),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise ValueError(f"the model must be one that ONNX has operators for: {_brief(error)}") from error
    if found is None:
        raise ValueError("torch.onnx.export must return a program, got None")
    proto = found.model_proto
    _rename_axes(proto, shapes)
    _strip(proto.graph)
    for function in proto.functions:
        _strip(function)
    return proto


def _rename_axes(proto: Any, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Give the axes of a graph's inputs and outputs their names, in the place of torch's symbols."""
    names = {}
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if isinstance(size, str) and dim.dim_param:
                names[dim.dim_param] = size
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = names.get(dim.dim_param, dim.dim_param) if dim.dim_param else dim.dim_param


def _strip(graph: Any) -> None:
    # ONNX Runtime's quantisation trips over the noted shapes; the other notes hold paths of this machine.
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _strip(inner)
    for name in ("input", "output", "initializer"):
        for value in getattr(graph, name):
            if not isinstance(value, str):
                del value.metadata_props[:]
                value.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling that packages are missing which the model has no need of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _brief(error: Exception) -> str:
    """Return an error's class and the beginning of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:6])[:600]}"
