"""Queries, keys, values and attention scores of models that do not return them, as sdpa attention does not.

>>> inner = capture_qkv(student, [f"encoder.layer.{n}.attention.self" for n in range(4)]).attach()
>>> def adaptor(batch, outputs):
...     qkv = inner.views()
...     scores = [attention_scores(q, k) for q, k in zip(qkv["query"], qkv["key"])]
...     return {"logits": outputs.logits, "attention": scores}
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.hooks.modules import Capture, Tap, first_tensor, label, resolve

__all__ = ["USUAL_PROJECTIONS", "attention_maps", "attention_scores", "capture_qkv", "qkv_tap"]

_FEATURES = ("query", "key", "value")

# The names that transformers' and timm's attention modules give to their projections and numbers of heads.
USUAL_PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
    ("qkv_proj",),
    ("qkv",),
    ("Wqkv",),
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def capture_qkv(
    model: nn.Module,
    modules: Sequence[str | nn.Module],
    projections: str | Sequence[str] | None = None,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    by_head: bool = False,
) -> Capture:
    """Return a capture of the queries, keys and values of attention modules.

    They are captured as projected: before any rotation (RoPE in Llama, GPT-NeoX ...), normalisation or scaling that
    the model applies afterwards. Where the model rotates, scores computed from them are not the model's own.

    Args:
        model: the model whose forward passes count.
        modules: the attention modules that hold the projections, by dotted name or themselves.
        projections: names inside each attention module: the three projections of query, key and value, or the one
            that gives all three. By default the usual names are looked for (``query``, ``q_proj``, ``c_attn`` ...).
        num_heads: heads of the queries; by default read from the attention module or its ``config``.
        num_key_value_heads: heads of keys and values where several query heads share one; read likewise, else the
            same as ``num_heads``. Shared keys and values are repeated, once for each query head.
        by_head: how the output of a single projection is laid out: False for all queries, then all keys, then all
            values (GPT-2, Phi-3, ViT), True for query, key and value of the first head, then of the second, and so on
            (GPT-NeoX, BLOOM).

    Returns:
        A capture that does not listen yet, with the features ``"query"``, ``"key"`` and ``"value"``: one tensor
        ``(batch, heads, length, head width)`` per attention module.

    Raises:
        KeyError: if an attention module or a projection is not there, or none of the usual names is.
        ValueError: if there are no modules, the heads cannot be read or do not divide; when the capture is read, if a
            projection's output does not fit the heads.
        TypeError: if ``modules`` is not a list of names or modules.
    """
    checks.is_a(modules, (list, tuple), "modules", "a list of dotted names or modules")
    if not modules:
        raise ValueError(f"modules must name at least one attention module, got {modules!r}")
    settings = projections, num_heads, num_key_value_heads, by_head
    return Capture(model, [qkv_tap(model, name, feature, *settings) for name in modules for feature in _FEATURES])


def qkv_tap(
    model: nn.Module,
    module: str | nn.Module,
    feature: str,
    projections: str | Sequence[str] | None = None,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    by_head: bool = False,
) -> Tap:
    """Return where to listen for one feature of one attention module; the arguments are those of :func:`capture_qkv`.

    Args:
        model: the model.
        module: the attention module.
        feature: ``"query"``, ``"key"`` or ``"value"``.
        projections: names inside the module.
        num_heads: heads of the queries.
        num_key_value_heads: heads of keys and values.
        by_head: how the output of a single projection is laid out.

    Raises:
        KeyError: if the module or a projection is not there.
        ValueError: if the feature is unknown, or the heads cannot be read or do not divide.
    """
    checks.one_of(feature, _FEATURES, "feature")
    attention, path = resolve(model, module), label(model, module)
    parts = _projections(attention, path, projections)
    layout = _layout(attention, path, num_heads, num_key_value_heads, len(parts) == 1, by_head)
    index = _FEATURES.index(feature)
    part = parts[index % len(parts)]
    select = partial(_by_heads, index=index, layout=layout)
    return Tap(feature, f"{path}.{part}".strip("."), resolve(attention, part), select)


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    r"""Scaled dot products of queries and keys, the attention before its softmax.

    .. math::
        A_{ij} = s \, q_i \cdot k_j + m_{ij}

    Args:
        query: ``(batch, heads, query length, width)``.
        key: ``(batch, heads, key length, width)``.
        mask: what to leave out; nothing by default. Booleans or whole numbers, where False or 0 is left out,
            ``(batch, key length)`` as tokenisers give or four-dimensional; or floating numbers that are added to the
            scores, four-dimensional. Four dimensions must broadcast to the result's.
        scale: the factor :math:`s`; by default one over the root of the width.
        causal: whether to leave out the keys after each query. With fewer queries than keys, the last query meets all.

    Returns:
        Scores ``(batch, heads, query length, key length)``, of the queries' dtype; the dtype's lowest finite number
        where something is left out, so that a softmax over a row with nothing left is finite.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if ``scale`` is no number.

    Reference:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.1.
    """
    same = query.dim() == key.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    if not same:
        raise ValueError(
            "query and key must be (batch, heads, length, width) with the same batch, heads and width, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    checks.number(scale, "scale")
    scores = query @ key.transpose(-1, -2) * scale
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        mask = _four_dimensional(mask, scores)
        if mask.is_floating_point():
            scores = (scores + mask.to(scores.dtype)).clamp(min=lowest)
        else:
            scores = scores.masked_fill(mask == 0, lowest)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(later.triu(1 + key.shape[-2] - query.shape[-2]), lowest)
    return scores


def attention_maps(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Softmax of :func:`attention_scores` over the keys, with the same arguments.

    Returns:
        Probabilities ``(batch, heads, query length, key length)``; each row sums to 1, without dropout.
    """
    return attention_scores(query, key, mask, scale, causal).softmax(dim=-1)


class _Layout(NamedTuple):
    """How the outputs of an attention module's projections are laid out."""

    path: str
    heads: int
    key_value_heads: int
    head_width: int | None
    fused: bool
    by_head: bool


def _layout(
    attention: nn.Module, path: str, heads: int | None, key_value_heads: int | None, fused: bool, by_head: bool
) -> _Layout:
    """Return the layout of one attention module, read from it where it is not given."""
    if heads is None and (heads := _read(attention, _HEADS)) is None:
        raise ValueError(f"the number of heads of {path!r} must be one of its attributes {_HEADS}; pass num_heads")
    if key_value_heads is None and (key_value_heads := _read(attention, _KEY_VALUE_HEADS)) is None:
        key_value_heads = heads
    checks.integer(heads, "num_heads", minimum=1)
    checks.integer(key_value_heads, "num_key_value_heads", minimum=1)
    if heads % key_value_heads:
        raise ValueError(f"num_key_value_heads must divide num_heads, got {key_value_heads} and {heads} for {path!r}")
    if by_head and not (fused and heads == key_value_heads):
        raise ValueError(
            f"by_head must be False for {path!r}: it needs a single projection, with as many heads for all"
        )
    return _Layout(path, heads, key_value_heads, _read(attention, ("head_dim",)), fused, by_head)


def _read(attention: nn.Module, names: Sequence[str]) -> int | None:
    """Return the first whole number under one of the names in an attention module or its config."""
    for owner in (attention, getattr(attention, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _projections(attention: nn.Module, path: str, given: str | Sequence[str] | None) -> Sequence[str]:
    """Return the names of an attention module's three projections, or of the one that gives all three."""
    if given is None:
        children = dict(attention.named_children())
        for usual in USUAL_PROJECTIONS:
            if all(name in children for name in usual):
                return usual
        raise KeyError(
            f"{path!r} has none of the usual projections {', '.join('/'.join(usual) for usual in USUAL_PROJECTIONS)}; "
            f"it has: {', '.join(children) or 'nothing'}; pass projections, or the module that holds them"
        )
    names = (given,) if isinstance(given, str) else tuple(given)
    if len(names) not in (1, 3):
        raise ValueError(f"projections must be one name, or the three of query, key and value, got {given!r}")
    return names


def _by_heads(output: Any, index: int, layout: _Layout) -> Tensor:
    """Return a projection's output as ``(batch, heads, length, head width)``; ``index`` 0 query, 1 key, 2 value."""
    projected = first_tensor(output)
    if projected.dim() != 3:
        raise ValueError(
            f"the projections of {layout.path!r} must give (batch, length, width), got {tuple(projected.shape)}"
        )
    heads = layout.key_value_heads if index else layout.heads
    blocks = layout.heads + 2 * layout.key_value_heads if layout.fused else heads
    width = projected.shape[-1] // blocks
    if width * blocks != projected.shape[-1] or width != (layout.head_width or width):
        raise ValueError(
            f"a projection of {layout.path!r} must give {blocks} times the width of a head ({layout.head_width}), "
            f"got {projected.shape[-1]}; check num_heads, num_key_value_heads and projections"
        )
    states = projected.reshape(*projected.shape[:2], blocks, width)
    if layout.by_head:
        states = states[..., index::3, :]
    elif layout.fused:
        first = (0, layout.heads, layout.heads + layout.key_value_heads)[index]
        states = states[:, :, first : first + heads]
    states = states.transpose(1, 2)
    return states if heads == layout.heads else states.repeat_interleave(layout.heads // heads, dim=1)


def _four_dimensional(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a mask that broadcasts to the scores."""
    if mask.dim() == 2 and not mask.is_floating_point() and mask.shape == (scores.shape[0], scores.shape[-1]):
        return mask[:, None, None, :]
    fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores.shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask must be (batch, key length) of booleans or whole numbers, or four-dimensional and broadcast to "
            f"{tuple(scores.shape)}, got {tuple(mask.shape)} of {mask.dtype}"
        )
    return mask
