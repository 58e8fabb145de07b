"""How a model takes a batch, and how it is run for what it says: in eval mode, on its own device, modes put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "Modes",
    "call",
    "device_of",
    "evaluating",
    "is_encoder_decoder",
    "modes_of",
    "on_device",
    "real_positions",
    "set_modes",
]

_IGNORED = -100
Modes = list[tuple[nn.Module, bool]]


def call(model: nn.Module, batch: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a model on a batch: a dict by keywords, a tuple or list by position, anything else as the one input."""
    if isinstance(batch, Mapping):
        return model(**batch, **arguments)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return model(*batch, **arguments)
    return model(batch, **arguments)


def modes_of(models: Sequence[nn.Module]) -> Modes:
    """Return every module of the models with its training flag."""
    return [(module, module.training) for model in models for module in model.modules()]


def set_modes(modes: Modes) -> None:
    """Put back training flags that :func:`modes_of` returned."""
    for module, training in modes:
        module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode while the context is open."""
    modes = modes_of([model])
    model.eval()
    try:
        yield
    finally:
        set_modes(modes)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model has encoder and decoder, by its configuration; one without has not."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, the CPU for a model that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch (a tensor, or dicts, lists and tuples of tensors) with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, PackedSequence):
        return batch.to(device=device)  # type: ignore[call-arg]  # which torch's own annotation leaves out
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch


def real_positions(batch: Any, decoder: bool, shape: torch.Size) -> Tensor | None:
    """Return which positions of a batch are no padding, ``None`` where it does not say.

    Args:
        batch: the batch.
        decoder: whether the positions of the decoder are meant, in a model that has both.
        shape: ``(batch, length)`` of the states that are asked about; a mask of another shape does not count.
    """
    if not isinstance(batch, Mapping):
        return None
    if decoder:
        labels = batch.get("labels")
        candidates = [batch.get("decoder_attention_mask"), None if labels is None else labels != _IGNORED]
    else:
        candidates = [batch.get("attention_mask")]
    return next((mask.bool() for mask in candidates if mask is not None and mask.shape == shape), None)
