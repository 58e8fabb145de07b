"""How the models of a family are built: what their config calls things, where their layers hang, what a layer holds."""

from __future__ import annotations

from dataclasses import dataclass

from textbrewer.names import suggestion

__all__ = ["FAMILIES", "Family", "InnerWidth", "LayerStack", "register_family"]


@dataclass(frozen=True)
class LayerStack:
    """A stack of layers, and the config's fields about it.

    Args:
        paths: the end of the dotted name of its ``nn.ModuleList``; the first one that is in the model counts.
        layers: field of the number of layers.
        heads: field of the number of attention heads.
        intermediate: field of the width of the feed-forward part.
        key_value_heads: field of the number of heads of keys and values, where several query heads share one.
    """

    paths: tuple[str, ...]
    layers: str
    heads: str
    intermediate: str
    key_value_heads: str | None = None


@dataclass(frozen=True)
class InnerWidth:
    """A width inside a layer: features that some of its modules write and others read.

    Modules are named inside the layer, and those that a layer does not have are passed over, so that one entry serves
    variants and versions.

    Args:
        writers: linear modules whose outputs these features are.
        readers: linear modules whose inputs they are.
        tables: embeddings with one column a head, which only the first layer of a stack has, for all its layers: these
            then keep the same heads.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What the library must know of a family of models to choose among their layers, heads and units.

    Args:
        hidden: the config's field of the width of the hidden states.
        stacks: the stacks of layers; those that a model does not have are passed over.
        attentions: the features between the projections of each attention, made of heads.
        feed_forwards: the units of the feed-forward part.
        head_width: field of the width of a head, where it need not be the hidden width divided by the heads.
        follows: fields that change with the hidden width where they equal it.
        per_layer: fields that list something for each layer.
        by_position: switches by which a layer computes otherwise at another place in the stack.
    """

    hidden: str
    stacks: tuple[LayerStack, ...]
    attentions: tuple[InnerWidth, ...]
    feed_forwards: tuple[InnerWidth, ...]
    head_width: str | None = None
    follows: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ("layer_types",)
    by_position: tuple[str, ...] = ()


def _within(path: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


_QKV_PROJ = ("q_proj", "k_proj", "v_proj")
_USUAL = ("num_hidden_layers", "num_attention_heads", "intermediate_size")

_BERT = Family(
    hidden="hidden_size",
    stacks=(LayerStack(("encoder.layer",), *_USUAL),),
    attentions=(
        InnerWidth(_within("attention.self", "query", "key", "value"), ("attention.output.dense",)),
        InnerWidth(_within("crossattention.self", "query", "key", "value"), ("crossattention.output.dense",)),
    ),
    feed_forwards=(InnerWidth(("intermediate.dense",), ("output.dense",)),),
    follows=("embedding_size",),
)
_DISTILBERT = Family(
    hidden="dim",
    stacks=(LayerStack(("transformer.layer",), "n_layers", "n_heads", "hidden_dim"),),
    attentions=(InnerWidth(_within("attention", "q_lin", "k_lin", "v_lin"), ("attention.out_lin",)),),
    feed_forwards=(InnerWidth(("ffn.lin1",), ("ffn.lin2",)),),
)
_GPT2 = Family(
    hidden="n_embd",
    stacks=(LayerStack(("h",), "n_layer", "n_head", "n_inner"),),
    attentions=(
        InnerWidth(("attn.c_attn",), ("attn.c_proj",)),
        InnerWidth(("crossattention.c_attn", "crossattention.q_attn"), ("crossattention.c_proj",)),
    ),
    feed_forwards=(InnerWidth(("mlp.c_fc",), ("mlp.c_proj",)),),
    by_position=("scale_attn_by_inverse_layer_idx",),
)
_LLAMA = Family(
    hidden="hidden_size",
    stacks=(LayerStack(("layers",), *_USUAL, key_value_heads="num_key_value_heads"),),
    attentions=(InnerWidth(_within("self_attn", *_QKV_PROJ), ("self_attn.o_proj",)),),
    feed_forwards=(InnerWidth(("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),),
    head_width="head_dim",
)
_BART = Family(
    hidden="d_model",
    stacks=tuple(
        LayerStack((f"{part}.layers",), f"{part}_layers", f"{part}_attention_heads", f"{part}_ffn_dim")
        for part in ("encoder", "decoder")
    ),
    attentions=tuple(
        InnerWidth(_within(attention, *_QKV_PROJ), (f"{attention}.out_proj",))
        for attention in ("self_attn", "encoder_attn")
    ),
    feed_forwards=(InnerWidth(("fc1",), ("fc2",)),),
)
_T5 = Family(
    hidden="d_model",
    stacks=(
        LayerStack(("encoder.block",), "num_layers", "num_heads", "d_ff"),
        LayerStack(("decoder.block",), "num_decoder_layers", "num_heads", "d_ff"),
    ),
    attentions=(
        InnerWidth(
            _within("layer.0.SelfAttention", "q", "k", "v"),
            ("layer.0.SelfAttention.o",),
            tables=("layer.0.SelfAttention.relative_attention_bias",),
        ),
        InnerWidth(_within("layer.1.EncDecAttention", "q", "k", "v"), ("layer.1.EncDecAttention.o",)),
    ),
    feed_forwards=tuple(
        InnerWidth(_within(f"{place}.DenseReluDense", "wi", "wi_0", "wi_1"), (f"{place}.DenseReluDense.wo",))
        for place in ("layer.1", "layer.2")  # in the encoder, in the decoder
    ),
    head_width="d_kv",
)
_VIT = Family(
    hidden="hidden_size",
    stacks=(LayerStack(("layers", "encoder.layer"), *_USUAL),),
    attentions=(  # the names of transformers 5, and those before
        InnerWidth(_within("attention", *_QKV_PROJ), ("attention.o_proj",)),
        InnerWidth(_within("attention.attention", "query", "key", "value"), ("attention.output.dense",)),
    ),
    feed_forwards=(InnerWidth(("mlp.fc1",), ("mlp.fc2",)), InnerWidth(("intermediate.dense",), ("output.dense",))),
    follows=("pooler_output_size",),
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
    **dict.fromkeys(("bart", "mbart"), _BART),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("vit", "deit"), _VIT),
}
"""The known families by ``config.model_type``; :func:`register_family` adds to them."""


def register_family(model_type: str, family: Family | str) -> None:
    """Make a family of models known: to :func:`~textbrewer.students.init_student_from_teacher`, among others.

    >>> register_family("my_bert", "bert")  # built as BERT is
    >>> register_family("my_model", Family(
    ...     hidden="hidden_size",
    ...     stacks=(LayerStack(("encoder.blocks",), "num_layers", "num_heads", "ffn_size"),),
    ...     attentions=(InnerWidth(("attention.query", "attention.key", "attention.value"), ("attention.output",)),),
    ...     feed_forwards=(InnerWidth(("mlp.up",), ("mlp.down",)),),
    ... ))

    Args:
        model_type: the ``model_type`` of the models' config.
        family: how they are built, or the name of a known family that is built alike.

    Raises:
        ValueError: if another family is registered under that name.
        KeyError: if ``family`` is an unknown name.
        TypeError: if ``family`` is something else.
    """
    if isinstance(family, str):
        if family not in FAMILIES:
            raise KeyError(f"unknown family {family!r}; {suggestion(family, FAMILIES)}")
        family = FAMILIES[family]
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family or the name of a known one, got {type(family).__name__}")
    if FAMILIES.get(model_type, family) != family:
        raise ValueError(f"family {model_type!r} is registered already; assign to FAMILIES to replace it")
    FAMILIES[model_type] = family
