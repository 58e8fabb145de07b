"""Structure adapters: what can be pruned in each family of models, one file a group of them."""

from __future__ import annotations

from textbrewer.compression.structure.bart import BART
from textbrewer.compression.structure.bert import BERT
from textbrewer.compression.structure.distilbert import DISTILBERT
from textbrewer.compression.structure.gpt2 import GPT2
from textbrewer.compression.structure.llama import LLAMA
from textbrewer.compression.structure.structure import Structure
from textbrewer.compression.structure.t5 import T5
from textbrewer.compression.structure.vit import VIT
from textbrewer.names import suggestion

__all__ = ["STRUCTURES", "Structure", "register_structure"]

STRUCTURES: dict[str, Structure] = {
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "electra"), BERT),
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2"), LLAMA),
    **dict.fromkeys(("bart", "mbart"), BART),
    **dict.fromkeys(("t5", "mt5"), T5),
    **dict.fromkeys(("vit", "deit"), VIT),
}
"""The known structures by ``config.model_type``; :func:`register_structure` adds to them."""


def register_structure(model_type: str, structure: Structure | str) -> None:
    """Make a family of models known to pruning.

    >>> register_structure("my_bert", "bert")  # built as BERT is
    >>> register_structure("my_model", Structure(
    ...     family=Family(
    ...         hidden="hidden_size",
    ...         stacks=(LayerStack(("encoder.layers",), "num_layers", "num_heads", "ffn_size"),),
    ...         attentions=(InnerWidth(("attn.query", "attn.key", "attn.value"), ("attn.output",)),),
    ...         feed_forwards=(InnerWidth(("ffn.up",), ("ffn.down",)),),
    ...     ),
    ...     head_width=("head_dim",),
    ...     heads=("num_heads",),
    ... ))

    The family's names are those of modules inside a layer, and of the config's fields where there is a config. The
    modules must go by the shapes of their weights or by the attributes named here, and a layer that can be taken out
    must take the hidden states as its first argument and return them, alone or first in a tuple.

    Args:
        model_type: the ``model_type`` of the models' config, or the name of their class where they have none.
        structure: how they are built, or the name of a known family that is built alike.

    Raises:
        ValueError: if another structure is registered under that name.
        KeyError: if ``structure`` is an unknown name.
        TypeError: if ``structure`` is something else.
    """
    if isinstance(structure, str):
        if structure not in STRUCTURES:
            raise KeyError(f"unknown structure {structure!r}; {suggestion(structure, STRUCTURES)}")
        structure = STRUCTURES[structure]
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be a Structure or the name of a known one, got {type(structure).__name__}")
    if STRUCTURES.get(model_type, structure) != structure:
        raise ValueError(f"structure {model_type!r} is registered already; assign to STRUCTURES to replace it")
    STRUCTURES[model_type] = structure
