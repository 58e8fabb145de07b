"""What pruning must know of a family beside where its weights are: the numbers that its modules keep about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from textbrewer.layouts import Family

__all__ = ["Structure", "kind_of", "structure_of"]


@dataclass(frozen=True)
class Structure:
    """How the models of a family are made smaller.

    The attributes named here are those of an attention module: the parent of the first writer of its heads. Those that
    a module does not have are passed over, so that one entry serves variants and versions.

    Args:
        family: where the layers, heads and units are.
        head_width: attributes that may hold the width of a head, from which the number of heads is worked out; the
            first one there counts.
        heads: attributes that hold the number of heads.
        key_value_heads: attributes that hold the number of heads of keys and values.
        features: attributes that hold the number of heads times the width of a head.
        layer_number: attributes of a layer's modules that hold its number in the stack.
        same_heads: whether all layers of a stack must keep the same heads, as each adds a bias by head that only the
            first one works out.
        table_switch: attribute of an attention that is true where it has such a table of biases.
        hidden: attributes of any module that hold the hidden width where they equal it.
        roots: attributes of any module that hold the square root of the hidden width where they equal it.
        resized: a function of a model and a hidden width (a multiple of that of all its heads) that returns another
            model of its class with that width; without one, the class is called with a config that says it. By two
            such models it is found out where the hidden features are.
    """

    family: Family
    head_width: tuple[str, ...]
    heads: tuple[str, ...] = ()
    key_value_heads: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    layer_number: tuple[str, ...] = ("layer_idx",)
    same_heads: bool = False
    table_switch: str | None = None
    hidden: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    resized: Callable[[nn.Module, int], nn.Module] | None = None


def kind_of(model: nn.Module) -> str:
    """Return by what a model's structure is registered: its ``config.model_type``, else the name of its class."""
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def structure_of(model: nn.Module, known: Mapping[str, Structure]) -> Structure:
    """Return the structure of a model.

    Raises:
        ValueError: if it is unknown; the message shows how to register it.
    """
    kind = kind_of(model)
    if kind not in known:
        raise ValueError(
            f"the model must be of a known family, got {kind!r}; known: {', '.join(known)}. If it is built as one of "
            f"these, register it: compression.register_structure({kind!r}, 'bert'); else say how it is built:\n"
            f"compression.register_structure({kind!r}, Structure(\n"
            "    family=Family(\n"
            '        hidden="hidden_size",\n'
            '        stacks=(LayerStack(("encoder.layers",), "num_layers", "num_heads", "ffn_size"),),\n'
            '        attentions=(InnerWidth(("attention.query", "attention.key", "attention.value"), '
            '("attention.output",)),),\n'
            '        feed_forwards=(InnerWidth(("ffn.up",), ("ffn.down",)),),\n'
            "    ),\n"
            '    head_width=("head_dim",),\n'
            '    heads=("num_heads",),\n'
            "))"
        )
    return known[kind]
