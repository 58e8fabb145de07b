"""Linear maps inside a model, and the pair of smaller ones that takes the place of one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from textbrewer.layouts.inner import is_transposed

__all__ = ["Chosen", "LowRankLinear", "choose_maps", "is_linear_map", "matrix_of", "shared_parameters"]

# What models without a transformers config call the linear map that makes their predictions.
_HEADS = {"classifier", "classification_head", "fc", "head", "heads", "lm_head", "qa_outputs", "score"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LowRankLinear(nn.Module):
    r"""Two linear maps in the place of one: :math:`y = U (V x) + b`.

    Args:
        in_features: width of :math:`x`.
        out_features: width of :math:`y`.
        rank: width :math:`k` in between. The pair has ``rank * (in_features + out_features)`` weights.
        bias: whether it adds a bias.
        device: where its parameters are.
        dtype: of its parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Width between the two maps."""
        return self.up.in_features

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``None`` without one."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the one matrix that the pair stands for, as a tensor without values (device ``meta``).

        Some models (T5) look at the dtype of a layer's weight in every forward pass, which must not cost the product.
        :meth:`dense` returns the values.
        """
        return torch.empty((self.out_features, self.in_features), dtype=self.up.weight.dtype, device="meta")

    def dense(self) -> Tensor:
        """Return the one matrix that the pair stands for, ``(out_features, in_features)``."""
        return self.up.weight @ self.down.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs ``(..., out_features)`` of inputs ``(..., in_features)``."""
        outputs: Tensor = self.up(self.down(inputs))
        return outputs

    @classmethod
    def of(cls, module: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
        """Return the pair that takes a linear map's place, with its bias, dtype, device and training flag.

        Args:
            module: the linear map; its bias becomes that of the pair, the same parameter.
            up: ``(out_features, rank)``.
            down: ``(rank, in_features)``.
        """
        weight: Any = module.weight
        # Without memory first, so that no random numbers are drawn for weights that are replaced at once.
        pair = cls(down.shape[1], up.shape[0], down.shape[0], bias=False, device="meta", dtype=weight.dtype)
        for linear, values in ((pair.down, down), (pair.up, up)):
            values = values.to(device=weight.device, dtype=weight.dtype, copy=True).contiguous()
            linear.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        bias: Any = module.bias
        pair.up.bias = bias
        return pair.train(module.training)


class Chosen(NamedTuple):
    """Linear maps by name, and those left as they are with the reason."""

    maps: dict[str, nn.Module]
    left: dict[str, str]


def is_linear_map(module: nn.Module) -> bool:
    """Return whether a module is a linear map that is called: ``nn.Linear`` itself, or transformers' ``Conv1D``."""
    return type(module) is nn.Linear or is_transposed(module)


def matrix_of(module: nn.Module) -> Tensor:
    """Return the matrix of a linear map as ``(outputs, inputs)``, a view of its parameter without gradient."""
    weight: Any = module.weight
    matrix: Tensor = weight.detach().T if is_transposed(module) else weight.detach()
    return matrix


def choose_maps(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    to_wrap: bool = False,
) -> Chosen:
    """Return the linear maps of a model that may be replaced, and why others may not.

    Left as they are: output heads (what a transformers model has outside its body or calls its output embeddings; else
    modules named such as ``classifier``, ``head`` or ``lm_head``, and the last map of an ``nn.Sequential``), weights
    that another module shares, subclasses of ``nn.Linear``, modules with hooks, the halves of a low-rank pair.

    Args:
        model: the model.
        include: patterns of dotted names, of a map or of a module around it; only these, heads among them too.
        exclude: patterns of what to leave.
        to_wrap: whether the maps are to be kept inside something else, as LoRA does; then hooks, and being half of a
            pair, do not matter.

    Raises:
        ValueError: if a pattern fits no linear map.
    """
    names = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Module)}
    linear: dict[str, Any] = {
        name: module for name, module in names.items() if is_linear_map(module) or isinstance(module, nn.Linear)
    }
    included = _matching(include, linear, "include")
    excluded = _matching(exclude, linear, "exclude") or set()
    pairs = tuple(f"{name}." for name, module in names.items() if isinstance(module, LowRankLinear))
    tied, heads = shared_parameters(model), _heads(model, linear)
    maps, left = {}, {}
    for name, module in linear.items():
        if (included is not None and name not in included) or (name.startswith(pairs) and not to_wrap):
            continue
        if name in excluded:
            left[name] = "excluded"
        elif not is_linear_map(module):
            left[name] = f"a {type(module).__name__}, which other code may use without calling it"
        elif id(module.weight) in tied:
            left[name] = f"its weight is shared by {' and '.join(tied[id(module.weight)])}"
        elif name in heads and included is None:
            left[name] = "an output head; name it in include to take it"
        elif not to_wrap and any(getattr(module, hooks) for hooks in _HOOKS):
            left[name] = "it has hooks, which would be lost"
        elif type(module.weight) not in (Tensor, nn.Parameter):
            left[name] = f"its weight is a {type(module.weight).__name__}, quantised already"
        elif module.weight.is_meta or not module.weight.is_floating_point():
            left[name] = f"its weight is {module.weight.dtype} on {module.weight.device}"
        else:
            maps[name] = module
    return Chosen(maps, left)


def _matching(patterns: str | Sequence[str] | None, names: Mapping[str, nn.Module], argument: str) -> set[str] | None:
    """Return the names that fit a pattern, or are inside of what fits; ``None`` without patterns."""
    if patterns is None:
        return None
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be dotted names or patterns such as '*.attention', got {pattern!r}")
        fits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not fits:
            raise ValueError(f"{argument} must name linear maps of the model, got {pattern!r}; {_hint(pattern, names)}")
        found |= fits
    return found


def _hint(pattern: str, names: Mapping[str, nn.Module]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3) or list(names)[:5]
    return (
        f"it has {', '.join(map(repr, near))}{' and others' if len(near) < len(names) else ''}"
        if near
        else "it has none"
    )


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return, by the id of each parameter that several modules own, the names under which they do."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    return {key: names for key, names in owners.items() if len(names) > 1}


def _heads(model: nn.Module, linear: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the linear maps that make the model's predictions."""
    body: Any = getattr(model, "base_model", None)
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    if isinstance(body, nn.Module) and callable(embeddings):
        inner, output = {id(module) for module in body.modules()}, embeddings()
        return {name for name, module in linear.items() if id(module) not in inner or module is output}
    heads = {name for name in linear if name.partition(".")[0] in _HEADS or name in _HEADS}
    own = [name for name in linear if "." not in name]
    return heads | set(own[-1:]) if isinstance(model, nn.Sequential) else heads
