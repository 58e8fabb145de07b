"""``TrainingConfig.compile``: models compiled for a run, in place, and put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from textbrewer.configurations import TrainingConfig
from textbrewer.matching import CustomMatch

# Where ``nn.Module.compile()`` keeps what is called in place of the module's own forward pass.
_COMPILED = "_compiled_call_impl"


@contextmanager
def compiled(models: Sequence[nn.Module], who: str) -> Iterator[None]:
    """Compile models with ``torch.compile`` while the context is open; one that is compiled already stays so.

    Args:
        models: the models, none for no change; their names, parameters and ``state_dict`` stay as they are.
        who: ``"teacher"``, ``"student"`` or ``"model"``, for messages.

    Raises:
        RuntimeError: if torch cannot compile a model, or its backward pass.
    """
    if not models:
        yield
        return
    import torch._functorch.config as functorch

    fresh = [model for model in dict.fromkeys(models) if vars(model).get(_COMPILED) is None]
    names = ", ".join(dict.fromkeys(type(model).__name__ for model in models))
    try:
        for model in fresh:
            vars(model)[_COMPILED] = _compile(model, who)
        # Gradients are asked for once more where one that is not finite is traced to its term: nothing is given away.
        with explained(who, names), functorch.patch(donated_buffer=False):
            yield
    finally:
        for model in fresh:
            vars(model).pop(_COMPILED, None)


def refuse(config: TrainingConfig, custom_matches: Sequence[CustomMatch]) -> None:
    """Raise ValueError if a run with custom matches asks for compiled models."""
    if config.compile and custom_matches:
        raise ValueError(
            "compile and custom_matches exclude each other: custom matches listen to modules inside both models, "
            "which a compiled model no longer calls one by one; use compile=False"
        )


def _compile(model: nn.Module, who: str) -> Callable[..., Any]:
    """Return the model's forward pass, compiled.

    As ``nn.Module.compile()`` does it, which however leaves torch's own modules such as ``nn.Sequential`` as they are,
    and does not tell when nothing of a model could be compiled.
    """
    from torch._dynamo import lookup_backend

    inductor = lookup_backend("inductor")
    name, graphs = type(model).__name__, 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return inductor(graph, inputs)

    def forward(*args: Any, **arguments: Any) -> Any:
        return model._call_impl(*args, **arguments)  # type: ignore[no-untyped-call]

    fast = torch.compile(forward, backend=backend)

    def call(*args: Any, **arguments: Any) -> Any:
        with explained(who, name):
            outputs = fast(*args, **arguments)
        if graphs == 0:
            raise _failed(who, name, "torch found nothing in it that it can compile")
        return outputs

    return call


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Run a model without its compilation while the context is open."""
    function = vars(model).pop(_COMPILED, None)
    try:
        yield
    finally:
        if function is not None:
            vars(model)[_COMPILED] = function


@contextmanager
def explained(who: str, names: str) -> Iterator[None]:
    """Turn a failed compilation into an error that names the model and the remedy.

    Raises:
        RuntimeError: in place of torch's own.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _failed(who, names, lines[0].rstrip(".;:") if lines else type(error).__name__) from error


def _failed(who: str, names: str, reason: str) -> RuntimeError:
    other = {"teacher": " or compile='student'", "student": " or compile='teacher'"}.get(who, "")
    return RuntimeError(
        f"compile: the {who} ({names}) could not be compiled: {reason}. Use compile=False{other}, or "
        "install what is missing (on a CPU, a C++ compiler such as g++)"
    )
