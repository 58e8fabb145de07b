"""Parameters that do not train for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def untrained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep parameters from asking for gradients while the context is open; those that did ask again afterwards."""
    asking = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def frozen(teachers: Sequence[nn.Module], student: nn.Module) -> Iterator[None]:
    """Keep the teachers' parameters from asking for gradients; those shared with the student keep theirs."""
    shared = {id(parameter) for parameter in student.parameters()}
    every = (parameter for teacher in teachers for parameter in teacher.parameters())
    with untrained(parameter for parameter in every if id(parameter) not in shared):
        yield
