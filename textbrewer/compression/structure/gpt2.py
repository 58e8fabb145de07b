"""GPT-2: transposed weights, and queries, keys and values in one projection, which is split by ``split_size``."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["GPT2"]

GPT2 = Structure(
    FAMILIES["gpt2"],
    head_width=("head_dim",),
    heads=("num_heads",),
    features=("embed_dim", "split_size"),
    hidden=("embed_dim",),
)
