"""ViT and DeiT, under the names of transformers 5 and those before."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["VIT"]

VIT = Structure(
    FAMILIES["vit"],
    head_width=("head_dim", "attention_head_size"),
    heads=("num_attention_heads",),
    features=("all_head_size",),
)
