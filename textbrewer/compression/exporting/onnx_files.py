"""ONNX models on disk: as traced, with matrices in bfloat16, or in int8 by ONNX Runtime's tools."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from textbrewer.compression.exporting.formats import needed

__all__ = ["OPERATORS", "matrices_to_bf16", "quantize_onnx", "save_onnx"]

OPERATORS = {"dynamic": ("MatMul", "Gemm", "Gather"), "static": ("MatMul", "Gemm", "Gather", "Conv")}
"""What is computed, or looked up, in int8. ONNX Runtime has no dynamic convolution of signed weights."""
_ONE_FILE = 1_900_000_000
"""Bytes that one file may have: protobuf ends at 2 GiB. Beyond it the tensors are in a file beside."""


def save_onnx(proto: Any, path: Path) -> None:
    """Write an ONNX model, with its tensors in a file beside (``.onnx.data``) if one cannot hold them."""
    (onnx,) = needed({"onnx": "onnx"}, "onnx", "export to ONNX")
    if _is_large(proto):
        onnx.save_model(proto, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        onnx.save_model(proto, str(path))


def matrices_to_bf16(proto: Any) -> None:
    """Round a model's matrices and tables to bfloat16, in place; whatever uses them computes in float32 as before.

    ONNX Runtime has no products of bfloat16 on CPUs: it makes float32 of the matrices when it loads them. What is won
    is half the file. Vectors (biases, norms) stay float32.
    """
    onnx, numpy, ml_dtypes = needed(
        {"onnx": "onnx", "numpy": "numpy", "ml_dtypes": "ml_dtypes"}, "onnx", 'quantize="bf16"'
    )
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(numpy.ascontiguousarray(values), f"{name}.bf16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.bf16"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def quantize_onnx(proto: Any, path: Path, mode: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Write an ONNX model in int8: weights per output channel, activations as the mode says.

    Products of two activations (in attention) stay in float32, and what comes out of matrix products does so too:
    rounding it again more than doubled the error on MiniLM-L6, and saved no time.

    Args:
        proto: in float32.
        path: where to write it.
        mode: ``"dynamic"``: the range of activations is taken anew in every call; ``"static"``: once, from ``batches``.
        batches: to calibrate with.

    Raises:
        ImportError: without onnxruntime.
        ValueError: if it has nothing to quantise.
    """
    (tools,) = needed({"onnxruntime.quantization": "onnxruntime"}, "onnx", 'quantize="int8"')
    (onnx,) = needed({"onnx": "onnx"}, "onnx", 'quantize="int8"')
    # What quantisation looks for, to see that a model has been prepared; what else it would do is done by the exporter.
    onnx.helper.set_model_props(proto, {"onnx.quant.pre_process": "onnxruntime.quant"})
    large = _is_large(proto)
    plain = path.with_name(f"float-{path.name}")
    settings: dict[str, Any] = {
        "per_channel": True,
        "weight_type": tools.QuantType.QInt8,
        "op_types_to_quantize": list(OPERATORS[mode]),
        "use_external_data_format": large,
        "extra_options": {"MatMulConstBOnly": True},
    }
    save_onnx(proto, plain)
    try:
        with _quiet():
            if mode == "dynamic":
                tools.quantize_dynamic(str(plain), str(path), **settings)
            else:
                settings["quant_format"] = tools.QuantFormat.QDQ
                settings["activation_type"] = tools.QuantType.QUInt8  # signed ones are many times slower
                settings["extra_options"]["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
                tools.quantize_static(str(plain), str(path), _reader(tools, proto, batches), **settings)
    finally:
        for written in (plain, plain.with_name(f"{plain.name}.data")):
            written.unlink(missing_ok=True)
    kinds = {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}
    if not kinds & {"MatMulInteger", "DequantizeLinear"}:
        path.unlink()
        raise ValueError(f"model must have weights that int8 can hold, got none in {', '.join(OPERATORS[mode])}")


def _is_large(proto: Any) -> bool:
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > _ONE_FILE


def _reader(tools: Any, proto: Any, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    """Return what hands the batches to the calibration, one by one."""
    names = [value.name for value in proto.graph.input]
    rest: Iterator[dict[str, Any]] = iter([{name: batch[name].numpy() for name in names} for batch in batches])

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # a class of an optional package
        def get_next(self) -> dict[str, Any] | None:
            return next(rest, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools from advising what has been done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
