"""What attention modules do with projected queries and keys before the softmax: scale, rotation, position bias."""

from __future__ import annotations

import re
import sys
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.hooks.attention import attention_scores
from textbrewer.hooks.modules import Tap, label

__all__ = ["left_out", "own_scores", "position_tap"]

# Attention of transformers that rotates what it projects and does no more: by its own apply_rotary_pos_emb, with the
# cosines and sines that the model computes once for all its layers.
_ROTATING = ("GemmaAttention", "LlamaAttention", "MistralAttention", "Phi3Attention", "Qwen2Attention")
# Attention of transformers that adds a position bias, and returns it beside its output.
_BIASED = ("MT5Attention", "T5Attention")
# Scales that a module's attribute does not tell: it has none in some releases, or another has gone into the query.
_SCALES: dict[str, float | None] = {
    "EsmSelfAttention": None,
    "GPTNeoSelfAttention": 1.0,
    "MT5Attention": 1.0,
    "T5Attention": 1.0,
    "UMT5Attention": 1.0,
}


def _kind(attention: nn.Module) -> str:
    """Return the name of an attention module's class, if it is one of transformers, else an empty one."""
    return type(attention).__name__ if type(attention).__module__.startswith("transformers.") else ""


def _scale(attention: nn.Module) -> float | None:
    """Return the factor of an attention module's scores; ``None`` for one over the root of the width of a head."""
    if _kind(attention) in _SCALES:
        return _SCALES[_kind(attention)]
    found = (getattr(attention, name, None) for name in ("scaling", "scale"))
    return next((float(value) for value in found if isinstance(value, (int, float)) and value), None)


def _rotations(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute the angles of a model's rotations."""
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


def position_tap(model: nn.Module, attention: nn.Module) -> Tap | None:
    """Return where to listen for what an attention module does with positions: its rotation, or its bias.

    Args:
        model: the model.
        attention: one of its attention modules.

    Returns:
        ``None`` where it does nothing with them, or what it does is not known.
    """
    if _kind(attention) in _BIASED:
        return Tap("position", label(model, attention), attention, itemgetter(1))
    rotations = _rotations(model)
    if _kind(attention) in _ROTATING and len(rotations) == 1:
        return Tap("position", label(model, rotations[0]), rotations[0], torch.stack)
    return None


def own_scores(attention: nn.Module, query: Tensor, key: Tensor, position: Tensor | None = None) -> Tensor:
    """Return the scores of an attention module as it computes them, before the mask and the softmax.

    Args:
        attention: the module.
        query: its queries as projected, ``(batch, heads, length, width)``.
        key: its keys, likewise.
        position: what :func:`position_tap` gave; ``None`` for neither rotation nor bias.

    Reference:
        Su et al., "RoFormer", 2021, arXiv:2104.09864, section 3.2 (rotation); Raffel et al., "Exploring the Limits of
        Transfer Learning with a Unified Text-to-Text Transformer", 2020, arXiv:1910.10683, section 2.1 (bias).
    """
    scores = partial(attention_scores, scale=_scale(attention))
    if position is None:
        return scores(query, key)
    # Angles are computed once, on the first device of a model that is spread over several.
    position = position.to(query.device)
    if _kind(attention) in _BIASED:
        return scores(query, key, position)
    rotate: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")  # noqa: B009
    return scores(*rotate(query, key, *position))


def left_out(model: nn.Module, attention: nn.Module) -> str | None:
    """Return what a model does to its scores that :func:`own_scores` leaves out, ``None`` where nothing is known of.

    Told by the names of what the model holds: its modules, parameters and buffers.

    Args:
        model: the model.
        attention: one of its attention modules.
    """
    if position_tap(model, attention) is not None:
        return None
    parts = (model.named_modules(), model.named_parameters(), model.named_buffers())
    names = [name for items in parts for name, _ in items]
    inner = [name for name, _ in attention.named_children()]
    rotates = _rotations(model) or getattr(getattr(model, "config", None), "rotary_dim", None)
    found = {
        "the normalisation of queries and keys": any(re.match("(q|k|query|key)_?(layer)?norm", name) for name in inner),
        "the rotation of queries and keys": bool(rotates) or any("rotary" in name for name in names),
        "a bias by position": any(re.search(r"relative|rel_(pos|emb)|distance_emb|alibi", name) for name in names),
    }
    return " and ".join(what for what, there in found.items() if there) or None
