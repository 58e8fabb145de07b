"""Matches between the outputs of any two modules, with a loss and a projection of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.hooks import first_tensor
from textbrewer.presets import MATCH_LOSS_MAP


@dataclass
class CustomMatch:
    """A match between the outputs of two modules.

    Args:
        module_T: a module of the teacher, or its dotted name.
        module_S: a module of the student, or its dotted name.
        weight: factor of this loss in the total.
        loss: ``f(output_S, output_T, inputs_mask_S, inputs_mask_T) -> scalar`` (masks may be ``None``), or a name of
            ``MATCH_LOSS_MAP``, which gets the student's mask.
        proj_func: brings the student's output to the teacher's width: a module, which is then trained and saved with
            the student, or a function. ``None``: the output as it is.
        proj_group: optimiser options for the parameters of ``proj_func``, such as ``{"lr": 1e-3}``.
    """

    module_T: nn.Module | str
    module_S: nn.Module | str
    weight: float
    loss: Callable[..., Tensor] | str
    proj_func: Callable[..., Any] | None = None
    proj_group: dict[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("module_T", "module_S"):
            checks.is_a(getattr(self, name), (nn.Module, str), name, "a module or its dotted name")
        checks.number(self.weight, "weight of a custom match", minimum=0)
        if isinstance(self.loss, str):
            checks.one_of(self.loss, MATCH_LOSS_MAP, "loss of a custom match")
        elif not callable(self.loss):
            raise TypeError(f"loss of a custom match must be a function or a known name, got {self.loss!r}")
        if self.proj_func is not None and not callable(self.proj_func):
            raise TypeError(f"proj_func of a custom match must be a module or a function, got {self.proj_func!r}")
        self.proj_group = dict(self.proj_group or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> CustomMatch:
        """Construct a custom match from a dict with the fields of this class.

        Raises:
            KeyError: if a key is unknown.
        """
        checks.known_keys(dict_object, [item.name for item in fields(cls)], "custom match")
        return cls(**dict_object)

    def value(self, output_S: Any, output_T: Any, mask_S: Tensor | None, mask_T: Tensor | None) -> Tensor:
        """Return the loss between the (projected) student's and the teacher's output."""
        if isinstance(self.loss, str):
            loss: Tensor = MATCH_LOSS_MAP[self.loss](output_S, output_T, mask=mask_S)
            return loss
        return self.loss(output_S, output_T, mask_S, mask_T)


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[dict[int, Any]]:
    """Record what each module returns while the context is open, by its number; leave no hook behind.

    A tuple, list or dict output counts as its first tensor. A module that runs several times leaves its last output.
    """
    outputs: dict[int, Any] = {}

    def recorder(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[number] = first_tensor(output)

        return hook

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.callback(module.register_forward_hook(recorder(number)).remove)
        yield outputs
