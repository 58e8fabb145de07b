"""Random-number state of a process: taken, put back, and kept from changing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def take(generators: Sequence[torch.Generator] = ()) -> State:
    """Return the state of Python's, NumPy's and torch's generators, of the devices', and of ``generators``.

    The state is made of tensors and plain values only, so that it can be loaded with ``weights_only=True``.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: State = {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "generators": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def put(state: State, generators: Sequence[torch.Generator] = ()) -> None:
    """Put back a state that :func:`take` returned."""
    random.setstate(_tuples(state["python"]))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    for generator, value in zip(generators, state["generators"], strict=True):
        generator.set_state(value)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def _tuples(value: Any) -> Any:
    """Return nested lists as nested tuples, which ``random.setstate`` insists on."""
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def kept(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Put the state back at the end, whatever was drawn in between."""
    state = take(generators)
    try:
        yield
    finally:
        put(state, generators)


def seed(value: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators alike."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
