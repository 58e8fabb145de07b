"""A model's weights, counted: by component, and those that are zero by matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["COMPONENTS", "Zeros", "component_of", "named_weights", "parameters_by_component", "zeros_by_matrix"]

COMPONENTS = ("embeddings", "attention", "feed-forward", "norms", "head", "other")
"""The components that parameters are counted by, in the order they are shown."""

_HEADS = {"cls", "head", "heads", "score", "qa_outputs", "pooler", "fc", "output"}
_FEED_FORWARDS = {"intermediate", "output", "mlp", "ffn", "ff", "fc1", "fc2", "lin1", "lin2", "linear1", "linear2"}
_EMBEDDINGS = {"wte", "wpe", "shared"}


@dataclass(frozen=True)
class Zeros:
    """How many elements of a matrix are zero.

    Args:
        name: dotted name of the matrix.
        zeros: elements that are zero.
        total: elements in all.
    """

    name: str
    zeros: int
    total: int

    @property
    def share(self) -> float:
        """Zero elements as a share of all, from 0 to 1."""
        return self.zeros / self.total if self.total else 0.0


def component_of(name: str, module: nn.Module | None = None) -> str:
    """Return the component of :data:`COMPONENTS` that a parameter belongs to, by its dotted name.

    The first of these rules that holds (part: between dots; small and capital letters are the same):

    1. norms: the module's class is called ``...Norm...``, or the part that names the module has ``norm`` in it or is
       ``ln_...``.
    2. head: a part has ``classif``, ``predictions``, ``lm_head``, ``logits`` or ``projector`` in it, begins with
       ``vocab_``, or is ``cls``, ``head``, ``heads``, ``score``, ``qa_outputs`` or ``pooler``; or ``fc`` or ``output``
       outside numbered blocks.
    3. attention: a part has ``attn`` or ``attention`` in it.
    4. feed-forward: a part is ``intermediate``, ``mlp``, ``ffn``, ``ff``, ``fc1``, ``fc2``, ``lin1``, ``lin2``,
       ``linear1``, ``linear2`` or ``output``, or has ``feed_forward`` or ``denserelu`` in it.
    5. embeddings: the module is an ``nn.Embedding``, or a part has ``embed`` in it or is ``wte``, ``wpe`` or
       ``shared``.
    6. other: everything else.

    Args:
        name: dotted name of the parameter.
        module: which it is a parameter of.
    """
    parts = name.lower().split(".")[:-1] or name.lower().split(".")
    in_block = any(part.isdigit() for part in parts)
    heads = _HEADS - {"fc", "output"} if in_block else _HEADS

    def has(*words: str) -> bool:
        return any(word in part for part in parts for word in words)

    if "Norm" in type(module).__name__ or "norm" in parts[-1] or parts[-1].startswith("ln_"):
        return "norms"
    if heads & {*parts} or has("classif", "predictions", "lm_head", "logits", "projector", "vocab_"):
        return "head"
    if has("attn", "attention"):
        return "attention"
    if _FEED_FORWARDS & {*parts} or has("feed_forward", "denserelu"):
        return "feed-forward"
    if isinstance(module, nn.Embedding) or _EMBEDDINGS & {*parts} or has("embed"):
        return "embeddings"
    return "other"


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Yield each parameter once with its name and module, and the weights that quantised modules keep packed."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, parameter.detach(), modules.get(name.rpartition(".")[0])
    for name, value in model.state_dict().items():
        for number, part in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(part, Tensor):  # (weight, bias) of torch's own quantised linear layers
                owner = name.removesuffix("._packed_params._packed_params")
                yield f"{owner}.{('weight', 'bias')[number] if number < 2 else number}", part.detach(), None


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each of :data:`COMPONENTS`; a shared tensor counts once, by its first name."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, tensor, module in named_weights(model):
        counts[component_of(name, module)] += tensor.numel()
    return counts


def zeros_by_matrix(model: nn.Module) -> tuple[int, list[Zeros]]:
    """Return how many parameters are zero in all, and of each parameter of two or more dimensions."""
    zeros, found = 0, []
    for name, tensor, _ in named_weights(model):
        count = _zeros(tensor)
        zeros += count
        if tensor.dim() > 1:
            found.append(Zeros(name, count, tensor.numel()))
    return zeros, found


def _zeros(tensor: Tensor) -> int:
    # Quantised tensors hold codes, and their zero need not be code 0.
    packed = tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter)
    values = torch.Tensor.dequantize(tensor) if packed else tensor
    return values.numel() - int(torch.count_nonzero(values))
