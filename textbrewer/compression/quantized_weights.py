"""int8 weights as torchao keeps them: made, recognised, taken apart for the disk and put together again.

The weight of a linear map is :math:`W_{oi} = s_o q_{oi}` with whole numbers :math:`q` from -128 to 127 and one scale
:math:`s` for each output. Where activations are in int8 too, each position has a scale and a zero point of its own,
worked out when the map is called.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks

__all__ = ["ACTIVATIONS", "assemble", "int8_weight", "is_fake_quantized", "quantized_names", "take_apart", "torchao"]

ACTIVATIONS = ("int8", "float")
"""What the inputs of a quantised linear map are multiplied as."""
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALE = "scale"


def torchao(what: str) -> Any:
    """Return the module ``torchao.quantization``.

    Raises:
        ImportError: without torchao.
    """
    try:
        import torchao.quantization as module
    except ImportError as error:
        raise ImportError(f"{what} needs torchao: pip install 'textbrewer[qat]'") from error
    return module


def is_fake_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear map that rounds as int8 would, in training."""
    return type(module).__name__ == "FakeQuantizedLinear" and _is_torchaos(type(module))


def quantized_names(model: nn.Module) -> list[str]:
    """Return the dotted names of a model's modules that are fake-quantised, or whose weights are quantised."""
    return [
        name
        for name, module in model.named_modules()
        if is_fake_quantized(module)
        or any(_is_torchaos(type(parameter)) for parameter in module.parameters(recurse=False))
    ]


def int8_weight(values: Tensor, scale: Tensor, dtype: torch.dtype, activations: str) -> Tensor:
    """Return a quantised weight as a tensor of torchao.

    Args:
        values: :math:`q`, ``(outputs, inputs)`` of int8.
        scale: :math:`s`, ``(outputs, 1)``.
        dtype: of the products.
        activations: one of :data:`ACTIVATIONS`.
    """
    module, block = torchao("a model with int8 weights"), [1, values.shape[1]]
    if activations == "int8" and not _multiplies_whole_numbers(values.device):
        # Elsewhere the products of whole numbers may overflow: multiplied as floats, after the same rounding.
        weight: Tensor = module.IntxUnpackedToInt8Tensor(
            values, scale, torch.zeros_like(scale, dtype=torch.int8), torch.int8, tuple(block), dtype,
            "int8_asym_per_token",
        )  # fmt: skip
        return weight
    dynamic = None
    if activations == "int8":
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        dynamic = QuantizeTensorToInt8Kwargs(granularity=module.PerRow(), mapping_type=module.MappingType.ASYMMETRIC)
    whole: Tensor = module.Int8Tensor(values, scale, block, dtype, act_quant_kwargs=dynamic)
    return whole


def take_apart(tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Put plain tensors in the place of quantised ones, each followed by its scale.

    Args:
        tensors: by name; changed in place.

    Returns:
        By name what else is needed to put them together, fit for JSON; empty without quantised tensors.

    Raises:
        ValueError: if a tensor is quantised in another way than this library's.
    """
    found = {}
    for name, tensor in list(tensors.items()):
        if not _is_torchaos(type(tensor)):
            continue
        parts: Any = tensor
        activations = _activations_of(parts)
        if activations is None:
            raise ValueError(
                f"weights must be plain tensors, or int8 as quantize_ and convert_qat_ make them, to be saved, got a "
                f"{type(tensor).__name__} in {name!r}"
            )
        tensors[name], tensors[f"{name}.{_SCALE}"] = parts.qdata.clone(), parts.scale.clone()
        found[name] = {"dtype": str(parts.dtype).removeprefix("torch."), "activations": activations}
    return found


def assemble(tensors: Mapping[str, Tensor], quantized: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
    """Return tensors with the quantised ones whole again.

    Args:
        tensors: as :func:`take_apart` left them.
        quantized: what it returned.

    Raises:
        ImportError: without torchao, if there are any.
        ValueError, KeyError: if they do not fit together.
    """
    whole = dict(tensors)
    for name, entry in quantized.items():
        checks.one_of(entry["dtype"], _FLOATS, f"the dtype of {name!r}")
        checks.one_of(entry["activations"], ACTIVATIONS, f"the activations of {name!r}")
        values, scale = whole[name], whole.pop(f"{name}.{_SCALE}")
        if values.dtype != torch.int8 or scale.shape != (len(values), 1):
            raise ValueError(f"{name!r} must be int8 with a scale for each of {len(values)} outputs")
        whole[name] = int8_weight(values, scale, _FLOATS[entry["dtype"]], entry["activations"])
    return whole


def _activations_of(weight: Any) -> str | None:
    """Return what a weight's inputs are multiplied as, ``None`` if it is not one of ours."""
    kind, rows = type(weight).__name__, len(weight)
    zero = getattr(weight, "zero_point", None)
    if getattr(getattr(weight, "scale", None), "shape", None) != (rows, 1) or (zero is not None and bool(zero.any())):
        return None
    if kind == "IntxUnpackedToInt8Tensor":
        dynamic = weight.target_dtype == torch.int8 and weight.activation_quantization == "int8_asym_per_token"
        return "int8" if dynamic else None
    if kind != "Int8Tensor" or any(getattr(weight, name) is not None for name in ("act_quant_scale", "act_pre_scale")):
        return None
    dynamic = weight.act_quant_kwargs
    if dynamic is None:
        return "float"
    by_position = type(dynamic.granularity).__name__ == "PerRow" and dynamic.mapping_type.name == "ASYMMETRIC"
    return "int8" if by_position and not dynamic.reduce_range else None


def _is_torchaos(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torchao"


@functools.cache
def _multiplies_whole_numbers(device: torch.device) -> bool:
    """Return whether products of int8 are exact on a device: on CPUs they need instructions that old ones lack."""
    from torchao.utils import should_reduce_range

    return not should_reduce_range(device)
