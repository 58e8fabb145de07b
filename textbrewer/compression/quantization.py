"""Linear maps in int8: after training, or by training that rounds as they will.

>>> prepare_qat_(student)                              # then distil as ever, with a teacher in float32
>>> convert_qat_(student)                              # int8 weights, a quarter of the size; for inference
>>> compression.save(student, "int8")

torchao does the rounding; it is an optional extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.gates import has_gates
from textbrewer.compression.low_rank_layers import choose_maps
from textbrewer.compression.quantized_weights import (
    ACTIVATIONS,
    int8_weight,
    is_fake_quantized,
    quantized_names,
    torchao,
)
from textbrewer.hooks.stacks import places_of

__all__ = ["QuantizeReport", "convert_qat_", "prepare_qat_", "quantize_"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class QuantizeReport:
    """What became of a model's linear maps.

    Args:
        layers: names of those that were changed.
        left: the others by name, with the reason.
    """

    layers: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*self.layers, *(f"left: {name}: {reason}" for name, reason in self.left.items())])


def prepare_qat_(
    model: nn.Module,
    activations: str = "int8",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> QuantizeReport:
    r"""Make a model's linear maps compute, in place, as if they were in int8; it is then trained as any other.

    .. math::
        y = \hat W \hat x + b, \qquad \hat W_{oi} = s_o\, \mathrm{round}(W_{oi} / s_o), \quad
        s_o = \max_i |W_{oi}| / 127.5

    with :math:`\hat x` rounded likewise, each position by its own range, and gradients that pass the rounding as if it
    were not there (but not the cut at 127, by which the largest weight of an output may have none). Parameters keep
    their names and are the same objects, so that an optimiser made before still holds them, checkpoints of the training
    are those of the plain model, and to resume one, the model is prepared again.
    Biases are not rounded.

    Args:
        model: the student, changed in place; nothing of it is if anything is raised. Prepare it before listening to
            its modules: the linear ones are new objects.
        activations: ``"int8"``, or ``"float"``: only weights are rounded.
        include: dotted names or patterns such as ``"*.intermediate"`` of linear maps, or of modules around them; only
            these. By default all but output heads, shared weights, subclasses of ``nn.Linear`` and what has hooks.
        exclude: likewise, of what to leave.

    Returns:
        Which maps were prepared, and why others were not.

    Raises:
        ImportError: without torchao.
        TypeError, ValueError: if an argument cannot work, the model is masked or quantised already, or no map is left.

    Reference:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, arXiv:1712.05877, section 3.
    """
    maps, left = _maps(model, activations, include, exclude, "prepare_qat_")
    module = torchao("prepare_qat_")
    from torchao.quantization.qat import QATConfig

    config = QATConfig(_base(module, activations), step="prepare")
    with _same_random_numbers(model):
        prepared = {layer: _alone(layer, lambda held: module.quantize_(held, config)) for layer in maps.values()}
    _replace(model, prepared)
    return QuantizeReport(tuple(maps), left)


def convert_qat_(model: nn.Module, to: str = "int8") -> QuantizeReport:
    """Give a model that was trained after :func:`prepare_qat_`, in place, the weights that it was trained for.

    In int8 it computes what it computed in training, but for the rounding of floats; it is for inference, with all its
    parameters frozen. Whole numbers are multiplied as such on GPUs and on CPUs with instructions for it (VNNI), and as
    floats elsewhere, where it is smaller but not faster.

    Args:
        model: changed in place.
        to: ``"int8"``; or ``"float"``: plain linear maps with the trained weights, which are not rounded, for an export
            that quantises by itself.

    Returns:
        Which maps were converted.

    Raises:
        ImportError: without torchao.
        ValueError: if nothing of the model is fake-quantised.
    """
    checks.is_a(model, nn.Module, "model", "a torch module")
    checks.one_of(to, ("int8", "float"), "to")
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_fake_quantized(module)}
    if not layers:
        done = "; it is quantised already" if quantized_names(model) else ""
        raise ValueError(f"model must be fake-quantised by prepare_qat_ and trained, got none of its layers so{done}")
    module = torchao("convert_qat_")
    from torchao.quantization.qat import QATConfig

    with _same_random_numbers(model):
        plain = {
            layer: _alone(layer, lambda held: module.quantize_(held, QATConfig(step="convert")))
            for layer in layers.values()
        }
    if to == "int8":
        for layer in layers.values():
            rounds_inputs = layer.activation_fake_quantizer is not None
            plain[layer].weight = _rounded(module, layer.weight, "int8" if rounds_inputs else "float")
    _replace(model, plain)
    if to == "int8":
        model.requires_grad_(False)
    return QuantizeReport(tuple(layers))


def quantize_(
    model: nn.Module,
    activations: str = "int8",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> QuantizeReport:
    """Quantise a trained model's linear maps, in place and without data: int8 weights, a quarter of the size.

    The result is for inference, with all parameters frozen, as that of :func:`convert_qat_`. On a CPU the int8 export
    through ONNX Runtime is smaller and faster.

    Args:
        model: changed in place; nothing of it is if anything is raised.
        activations: ``"int8"``: each position's inputs are rounded by their own range when a map is called; or
            ``"float"``: only weights are rounded, and nothing gets faster.
        include: as for :func:`prepare_qat_`.
        exclude: as for :func:`prepare_qat_`.

    Returns:
        Which maps were quantised, and why others were not.

    Raises:
        ImportError: without torchao.
        TypeError, ValueError: if an argument cannot work, the model is masked or quantised already, or no map is left.
    """
    maps, left = _maps(model, activations, include, exclude, "quantize_")
    module = torchao("quantize_")
    weights = {name: _rounded(module, layer.weight, activations) for name, layer in maps.items()}
    for name, layer in maps.items():
        layer.weight = weights[name]
    model.requires_grad_(False)
    return QuantizeReport(tuple(maps), left)


def _maps(
    model: Any,
    activations: str,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    who: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the linear maps that can be quantised, and why others cannot.

    Raises:
        TypeError, ValueError: as :func:`prepare_qat_`.
    """
    checks.is_a(model, nn.Module, "model", "a torch module")
    checks.one_of(activations, ACTIVATIONS, "activations")
    if has_gates(model):
        raise ValueError(f"model must be shrunk before {who}, got a masked one; take masked.shrink()")
    for name in quantized_names(model):
        raise ValueError(f"model must not be quantised already for {who}, got int8 or fake-quantised {name!r}")
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError(f"model must have no adapters of peft inside for {who}; merge them first: merge_lora(model)")
    chosen = choose_maps(model, include, exclude, to_wrap=True)
    maps, left = dict(chosen.maps), dict(chosen.left)
    for name, layer in chosen.maps.items():
        reason = _obstacle(layer)
        if reason is not None:
            left[name] = reason
            del maps[name]
    if not maps:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise ValueError(f"the model must have an nn.Linear that {who} can quantise, got none ({reasons})")
    return maps, left


def _obstacle(layer: Any) -> str | None:
    """Return why a linear map cannot be quantised, ``None`` if it can."""
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, whose weight is the other way round than torchao's"
    if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}, not of 32 or 16 bits"
    if layer.in_features < 2:
        return "it has a single input"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks, which would be lost"
    return None


def _base(module: Any, activations: str) -> Any:
    """Return torchao's config for int8 weights by output, and int8 activations by position, or none."""
    by_output = module.granularity.PerAxis(0)
    if activations == "int8":
        return module.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=by_output)
    return module.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=by_output)


def _rounded(module: Any, weight: Tensor, activations: str) -> nn.Parameter:
    """Return a weight in int8, rounded as in training."""
    rounded = module.IntxUnpackedToInt8Tensor.from_hp(weight.detach(), (1, weight.shape[1]), torch.int8)
    return nn.Parameter(int8_weight(rounded.qdata, rounded.scale, weight.dtype, activations), requires_grad=False)


def _alone(layer: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    """Return what takes a layer's place in a model, with its parameters and in its mode."""
    holder = nn.Sequential(layer)
    change(holder)
    return holder[0].train(layer.training)


def _replace(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> None:
    for old, new in modules.items():
        for children, name in places_of(model, old):
            children[name] = new


def _same_random_numbers(model: nn.Module) -> Any:
    """Return a context that puts back the random numbers: layers are drawn anew before they get their weights."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=list(devices))
