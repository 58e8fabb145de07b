"""Models as files that other runtimes run: :func:`export`."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.exporting.checking import AGREEMENTS, TOLERANCES, Check, compare
from textbrewer.compression.exporting.formats import Target, find_target, needed
from textbrewer.compression.exporting.inputs import Inputs, first_row, read_inputs
from textbrewer.compression.exporting.manifest import (
    InputSpec,
    Manifest,
    digest,
    file_names,
    manifest_path,
    tokenizer_path,
)
from textbrewer.compression.exporting.outputs import FlatModel
from textbrewer.compression.exporting.result import ExportReport
from textbrewer.compression.exporting.runtimes import open_file
from textbrewer.compression.exporting.staging import check_free, staged
from textbrewer.compression.exporting.writing import write
from textbrewer.compression.gates import has_gates
from textbrewer.compression.quantized_weights import quantized_names
from textbrewer.hooks.forward import evaluating

__all__ = ["export"]

_PACKAGES = ("textbrewer", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    data: Any,
    quantize: str | None = None,
    mode: str = "dynamic",
    tokenizer: Any = None,
    format: str | None = None,
    tolerance: float | None = None,
    agreement: float | None = None,
    opset: int | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    batches: int = 16,
    overwrite: bool = False,
) -> ExportReport:
    r"""Write a model as a file that runs without it, once the file is found to say what the model says.

    >>> report = compression.export(student, "student.onnx", data=dev_loader, quantize="int8", tokenizer=tokenizer)
    >>> runner = compression.load_exported("student.onnx")

    The file is run on the data at other shapes than it was recorded with, and on a single row. It must hold, for every
    output :math:`y` of the model and :math:`\hat y` of the file, at all positions that are no padding,

    .. math::
        \max |\hat y - y| \le \mathrm{tolerance} \cdot \max(1, \max |y|), \qquad
        \text{quantised:}\ \sqrt{\textstyle\sum (\hat y - y)^2} \le \mathrm{tolerance} \cdot \sqrt{\textstyle\sum y^2}

    and of outputs named ``logits`` the largest must be the same one in a share ``agreement`` of the rows or positions.

    Rows may be any number, and so may lengths: the second axis of whole numbers, and any axis that differs between the
    batches. Labels are no inputs. Caches of decoders are off.

    Args:
        model: with parameters in float32; left as it is. Pruned ones must be shrunk.
        path: where to write: ``.onnx`` (for ONNX Runtime), ``.xml`` (OpenVINO) or ``.pt2`` (``torch.export``). Beside
            it come a JSON file that says how to call it, and the tokenizer's folder.
        data: real batches as the model takes them, to check the file and to calibrate; or one batch (a dict, tuple or
            tensor).
        quantize: ``"int8"``: weights per output channel and activations; ``"bf16"``: weights in bfloat16. With OpenVINO
            and ``.pt2`` the products are in bfloat16 too; ONNX Runtime has none on CPUs, and computes in float32: there
            the file is half as large and no faster.
        mode: of int8: ``"dynamic"``: the range of activations is taken in every call; ``"static"``: once, from
            ``data``.
        tokenizer: or processor, with ``save_pretrained``: saved in a folder beside the file.
        format: ``"onnx"``, ``"openvino"`` or ``"torch"``; by default what the ending says.
        tolerance: by default 0.0001, for bf16 0.05, for int8 0.15.
        agreement: by default 0 in float32, else 0.9.
        opset: version of ONNX's operators, at least 18; by default what torch takes.
        dynamic_axes: further axes that must be of any size, as ``{"pixel_values": {2: "height", 3: "width"}}``.
        batches: how many batches of the data are read, at most.
        overwrite: whether files that are there may be replaced.

    Raises:
        ValueError: if the model cannot be exported, or the file does not say what the model says; the message has the
            figures, and nothing is written.
        TypeError, KeyError: if an argument is of the wrong kind.
        FileExistsError: if a file is there, without ``overwrite``.
        ImportError: if an optional package is missing; the message has the command that installs it.
    """
    target = find_target(Path(path), format, quantize, mode, opset)
    _check(model, target, tokenizer, tolerance, agreement, batches)
    names = file_names(target.path, target.format.beside)
    check_free(target.path.parent, names, overwrite)
    inputs = read_inputs(model, data, int(batches), dynamic_axes)
    with evaluating(model), torch.no_grad():
        flat = FlatModel(_on_cpu(model), inputs.names, inputs.positional).eval()
        outputs = _outputs_of(flat, inputs)
        with staged(target.path.parent, names) as folder:
            staging = replace(target, path=folder / target.path.name)
            shapes = write(flat, inputs, list(outputs), staging)
            files = sorted(folder.iterdir())
            check = _checked(flat, inputs, list(outputs), staging, tolerance, agreement)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(tokenizer_path(staging.path)))
            manifest = Manifest(
                kind=target.format.name,
                model=type(model).__name__,
                quantize=quantize,
                mode=target.mode,
                inputs=_specs(inputs, shapes),
                outputs=tuple(outputs),
                ignored=inputs.ignored,
                labels=_labels(model, outputs),
                tokenizer=None if tokenizer is None else type(tokenizer).__name__,
                check=check.summary(),
                versions=_versions(),
                files={file.name: digest(file) for file in files},
            )
            manifest.write(manifest_path(staging.path))
            sizes = {file.name: file.stat().st_size for file in files}
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ExportReport(target.path, sizes, manifest.kind, quantize, target.mode, shapes, check, held)


def _check(model: Any, target: Target, tokenizer: Any, tolerance: Any, agreement: Any, batches: Any) -> None:
    """Raise for arguments that cannot work."""
    if tolerance is not None:
        checks.number(tolerance, "tolerance", above=0)
    if agreement is not None:
        checks.number(agreement, "agreement", minimum=0, maximum=1)
    checks.integer(batches, "batches", minimum=1)
    _check_model(model)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(
            f"tokenizer must have save_pretrained, as those of transformers, got {type(tokenizer).__name__}"
        )
    extra = target.format.extra
    if extra:
        what = f"export to {target.path.name}"
        needed({"onnx": "onnx", "onnxscript": "onnxscript"}, extra, what)
        needed({"onnxruntime": "onnxruntime"} if extra == "onnx" else {"openvino": "openvino"}, extra, what)


def _check_model(model: Any) -> None:
    """Raise unless a model can be exported."""
    checks.is_a(model, nn.Module, "model", "a torch.nn.Module; of a Masked, what shrink() returns")
    if has_gates(model):
        raise ValueError("model must be shrunk to be exported, got a masked one; export masked.shrink()")
    for name in quantized_names(model):
        raise ValueError(
            f"model must not be quantised already to be exported, got int8 or fake-quantised {name!r}; export a model "
            'in float32 with quantize="int8", after quantisation-aware training what convert_qat_(model, to="float") '
            "leaves"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"model must have its weights in memory, and {name!r} is on the meta device; load it first"
            )
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(
                f"model must be in float32 to be exported, got {str(tensor.dtype).removeprefix('torch.')} in {name!r}; "
                'export a copy, copy.deepcopy(model).float(), if need be with quantize="bf16"'
            )


def _on_cpu(model: nn.Module) -> nn.Module:
    """Return a model itself if it is on the CPU, or a copy."""
    tensors = [*model.parameters(), *model.buffers()]
    return model if all(tensor.device.type == "cpu" for tensor in tensors) else copy.deepcopy(model).cpu()


def _outputs_of(flat: FlatModel, inputs: Inputs) -> dict[str, Tensor]:
    """Return a model's outputs for the first batch, by name.

    Raises:
        ValueError: if it does not take it.
    """
    try:
        return flat.outputs([inputs.batches[0][name] for name in inputs.names])
    except Exception as error:
        left = f" ({', '.join(inputs.ignored)} left out, which would be no input of the file)" if inputs.ignored else ""
        raise ValueError(
            f"data must yield batches that the model takes, and it fails on one of {inputs.names}{left}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _checked(
    flat: FlatModel,
    inputs: Inputs,
    outputs: list[str],
    target: Target,
    tolerance: float | None,
    agreement: float | None,
) -> Check:
    """Return the figures of a file compared with the model.

    Raises:
        ValueError: if it is not within the bounds.
    """
    run = open_file(target.path, target.format.name, inputs.names, outputs, half=target.quantize == "bf16")
    batches = [*inputs.batches, first_row(inputs.batches[0])]
    check = compare(lambda batch: flat.outputs([batch[name] for name in inputs.names]), run, batches)
    failures = check.failures(
        TOLERANCES[target.quantize] if tolerance is None else float(tolerance),
        AGREEMENTS[target.quantize] if agreement is None else float(agreement),
        quantized=target.quantize is not None,
    )
    if failures:
        raise ValueError(
            f"{target.path.name} must say what the model says, and does not; nothing was written: "
            f"{'; '.join(failures)} (over {check.rows} rows: {check}). Other bounds can be set by tolerance= and "
            "agreement="
        )
    return check


def _specs(inputs: Inputs, shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[InputSpec, ...]:
    """Return the inputs as a manifest has them."""
    first = inputs.batches[0]
    return tuple(InputSpec(name, str(first[name].dtype).removeprefix("torch."), shapes[name]) for name in inputs.names)


def _labels(model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the names of a model's classes, if it has logits of as many."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    logits = outputs.get("logits")
    if logits is None or logits.shape[-1] != len(labels):
        return {}
    return {int(number): str(label) for number, label in labels.items()}


def _versions() -> dict[str, str]:
    """Return the releases of the packages that take part."""
    return {name: metadata.version(name) for name in _PACKAGES if name in sys.modules}
