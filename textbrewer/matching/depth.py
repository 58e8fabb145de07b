"""How many layers a model has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from textbrewer import checks

__all__ = ["number_of_layers"]

_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NAMES_OF_DECODERS = ("decoder_layers", "num_decoder_layers")


def number_of_layers(model: nn.Module) -> int:
    """Return the number of layers of a model.

    It is read from the model's ``config``, as transformers models have one; of a model with encoder and decoder it is
    the decoder's, whose hidden states the ready-made adaptor gives. A model whose configuration does not tell has as
    many layers as the longest ``ModuleList`` in it whose members are of one class.

    Args:
        model: any module.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if neither tells; the message says what to pass instead.
    """
    checks.is_a(model, nn.Module, "model", "a torch module")
    for found in _counts(getattr(model, "config", None)):
        if isinstance(found, int) and not isinstance(found, bool) and found >= 1:
            return found
    lists = [
        len(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    ]
    if not lists:
        raise ValueError(
            f"the number of layers must be told by the model's config ({', '.join(_NAMES)}) or by a ModuleList of "
            f"layers, got a {type(model).__name__} without either; pass the number of layers instead of the model"
        )
    return max(lists)


def _counts(config: Any) -> Iterator[Any]:
    """Yield what a configuration says of the number of layers, the most telling first; ``None`` where nothing."""
    if config is None:
        return
    if getattr(config, "is_encoder_decoder", False):
        for name in _NAMES_OF_DECODERS:
            yield getattr(config, name, None)
        # A model put together of two has a configuration for each.
        yield from _counts(getattr(config, "decoder", None))
    for name in _NAMES:
        yield getattr(config, name, None)
    # A model of text and images has one for each.
    yield from _counts(getattr(config, "text_config", None))
