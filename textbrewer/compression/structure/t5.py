"""T5 and mT5: the first layer's biases by head and relative position serve all layers, which keep the same heads.

The biases of the attention to the encoder are zeros, but there are as many as the first layer has heads.
"""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["T5"]

T5 = Structure(
    FAMILIES["t5"],
    head_width=("key_value_proj_dim",),
    heads=("n_heads",),
    features=("inner_dim",),
    same_heads=True,
    table_switch="has_relative_attention_bias",
    hidden=("d_model", "model_dim"),
)
