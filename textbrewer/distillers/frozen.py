"""Modes of the models while a distiller works, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def modes_of(models: Sequence[nn.Module]) -> Modes:
    """Return every module of the models with its training flag."""
    return [(module, module.training) for model in models for module in model.modules()]


def set_modes(modes: Modes) -> None:
    """Put back training flags that :func:`modes_of` returned."""
    for module, training in modes:
        module.training = training


@contextmanager
def frozen(teachers: Sequence[nn.Module], student: nn.Module) -> Iterator[None]:
    """Keep the teachers' parameters from asking for gradients; those shared with the student keep theirs."""
    shared = {id(parameter) for parameter in student.parameters()}
    own = {
        id(parameter): parameter
        for teacher in teachers
        for parameter in teacher.parameters()
        if id(parameter) not in shared and parameter.requires_grad
    }
    for parameter in own.values():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in own.values():
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode while the context is open."""
    modes = modes_of([model])
    model.eval()
    try:
        yield
    finally:
        set_modes(modes)
