"""``teacher_precision="int8"``: a teacher's Linear layers with int8 weights, in place of its own while it runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from textbrewer.hooks.stacks import Place, places_of

_REMEDY = "use teacher_precision='bf16'"


class Int8Layers:
    """The Linear layers of a model in int8; everything else stays the model's own, the weights of other layers too.

    Weights are quantised once, one scale for each output; activations at each call, one scale for each tensor.

    Args:
        model: float32, on a CPU.
        kept: parameters of layers that stay as they are, because training changes them, by their ``id``.

    Raises:
        ValueError: if this torch cannot do it, or the model has no layers to quantise.
    """

    def __init__(self, model: nn.Module, kept: Collection[int] = ()) -> None:
        self.name = type(model).__name__
        self._swaps: list[tuple[Place, nn.Module, nn.Module]] = []
        quantise = _quantiser()
        for layer in dict.fromkeys(item for item in model.modules() if type(item) is nn.Linear):
            if layer.weight.dtype == torch.float32 and id(layer.weight) not in kept:
                quantised = quantise(layer)
                self._swaps += [(place, layer, quantised) for place in places_of(model, layer)]
        if not self._swaps:
            raise ValueError(f"teacher_precision='int8': {self.name} has no float32 nn.Linear layers; {_REMEDY}")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Hang the int8 layers into the model while the context is open."""
        try:
            for (children, name), _, quantised in self._swaps:
                children[name] = quantised
            yield
        except (AttributeError, TypeError) as error:
            raise RuntimeError(
                f"teacher_precision='int8': {self.name} failed with int8 layers in place of its Linear ones: {error}. "
                f"If it runs without, then it reads the weights of these layers itself: {_REMEDY}"
            ) from error
        finally:
            for (children, name), layer, _ in self._swaps:
                children[name] = layer


def _quantiser() -> Callable[[nn.Linear], nn.Module]:
    """Return a function that makes an int8 layer of a Linear one and leaves that as it is.

    torch's own dynamic quantisation, although its module is deprecated: its successor, torchao, is slower than bf16
    on a CPU unless the model is compiled.

    Raises:
        ValueError: if torch no longer has it, or this build cannot run it.
    """
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise ValueError(
            f"teacher_precision='int8' needs torch.ao.quantization, which torch has dropped; {_REMEDY}"
        ) from error
    if torch.backends.quantized.engine in (None, "none"):
        raise ValueError(f"teacher_precision='int8': torch has no int8 kernels on this machine; {_REMEDY}")
    configured = {nn.Linear: per_channel_dynamic_qconfig}

    def quantise(layer: nn.Linear) -> nn.Module:
        # A copy of the module object alone, which shares the weights: the quantisation leaves marks on it.
        holder = nn.Sequential(copy.copy(layer))
        with warnings.catch_warnings():
            # They announce that the function, and the tensors it makes, will go from torch; see above.
            warnings.filterwarnings(
                "ignore", message=r"(?s)torch\.ao\.quantization is deprecated", category=DeprecationWarning
            )
            warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor", category=UserWarning)
            quantize_dynamic(holder, configured, inplace=True)  # type: ignore[no-untyped-call]
        module: nn.Module = holder[0]
        # The same dicts: hooks that are set on the user's layer, now or later, hear the int8 layer.
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for kind in ("", "_with_kwargs"):
                module.__dict__[hooks + kind] = layer.__dict__[hooks + kind]
        module.__dict__["_forward_hooks_always_called"] = layer.__dict__["_forward_hooks_always_called"]
        return module

    return quantise
