"""Where a model's self-attention is, found by the names that models give to its parts."""

from __future__ import annotations

import re

from torch import nn

from textbrewer.hooks.attention import USUAL_PROJECTIONS
from textbrewer.hooks.forward import is_encoder_decoder

__all__ = ["attention_modules"]

# What models call attention from a decoder to an encoder: "crossattention", "encoder_attn", "EncDecAttention" ...
_CROSS = re.compile(r"cross|enc_?dec|encoder_(decoder_)?att", re.IGNORECASE)
_REMEDY = "name the modules yourself: textbrewer.hooks.capture_qkv(model, [...]), and return its views from an adaptor"


def attention_modules(model: nn.Module) -> list[str]:
    """Return the self-attention modules of a model's stack of blocks, in order.

    They are found by the projections of queries, keys and values that they hold, under the usual names (those that
    :func:`~textbrewer.hooks.capture_qkv` knows): BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, GPT-2, OPT, Llama, BART,
    T5, ViT and their like. Of a model with encoder and decoder, those of the decoder, as ``adaptor="auto"`` reads the
    decoder's states; attention to the encoder is left out.

    Args:
        model: the model.

    Returns:
        Dotted names, one a block; a block that the model runs several times (ALBERT) has its name here once.

    Raises:
        ValueError: if there is no such module, or there are several stacks of them, such as a text's and a picture's.
    """
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if any(all(part in children for part in usual) for usual in USUAL_PROJECTIONS) and not _is_cross(name, module):
            stacks.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    if is_encoder_decoder(model):
        stacks = {stack: names for stack, names in stacks.items() if "decoder" in stack.split(".")}
    kind = type(model).__name__
    if not stacks:
        raise ValueError(f"the self-attention modules of {kind} cannot be found by the usual names; {_REMEDY}")
    if len(stacks) > 1:
        raise ValueError(f"{kind} must have one stack of self-attention modules, got {', '.join(stacks)}; {_REMEDY}")
    (found,) = stacks.values()
    return found


def _is_cross(name: str, module: nn.Module) -> bool:
    """Return whether a module attends to another sequence than its own, by its name or by what it says of itself."""
    # A model's own name is no sign: only the block's part of the path counts, what follows the last number.
    inner = re.split(r"(?<![^.])\d+(?![^.])", name)[-1]
    return bool(_CROSS.search(inner)) or getattr(module, "is_cross_attention", False) is True
