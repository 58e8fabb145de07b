"""Llama, Mistral, Qwen2: a group of query heads shares keys and values, and goes or stays as a whole."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["LLAMA"]

LLAMA = Structure(
    FAMILIES["llama"],
    head_width=("head_dim",),
    heads=("num_heads", "num_attention_heads"),
    key_value_heads=("num_key_value_heads",),
    hidden=("hidden_size",),
)
