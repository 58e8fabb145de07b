"""OpenVINO models on disk, made of ONNX ones: in float32, with matrices in bfloat16, or in int8 by NNCF."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from textbrewer.compression.exporting.formats import needed

__all__ = ["save_openvino"]


def save_openvino(
    onnx_path: Path, path: Path, quantize: str | None, mode: str, batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Write a model for OpenVINO: ``path`` and, beside it, its tensors with the ending ``.bin``.

    Args:
        onnx_path: the model, in float32 or with matrices in bfloat16.
        path: where to write it.
        quantize: ``"int8"``, or anything else for a model as it is.
        mode: ``"dynamic"``: weights in int8, of activations what OpenVINO chooses when it runs; ``"static"``: both, the
            range of activations calibrated with ``batches``.
        batches: to calibrate with.

    Raises:
        ImportError: without openvino, or for int8 without nncf.
    """
    (openvino,) = needed({"openvino": "openvino"}, "openvino", "export to OpenVINO")
    model = openvino.Core().read_model(str(onnx_path))
    if quantize == "int8":
        with _no_messages():
            (nncf,) = needed({"nncf": "nncf"}, "openvino", 'quantize="int8" for OpenVINO')
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # of progress
            model = _quantized(nncf, model, mode, batches)
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _quantized(nncf: Any, model: Any, mode: str, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    """Return a model in int8."""
    if mode == "dynamic":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    rows = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
    return nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))


@contextmanager
def _no_messages() -> Iterator[None]:
    """Keep NNCF, while it is imported, from setting up reports of its use to its makers."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
