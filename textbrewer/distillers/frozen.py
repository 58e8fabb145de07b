"""Modes of the models while a distiller works, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from textbrewer.hooks.forward import Modes, evaluating, modes_of, set_modes

__all__ = ["Modes", "evaluating", "frozen", "modes_of", "set_modes"]


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
