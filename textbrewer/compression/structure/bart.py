"""BART and mBART: encoder and decoder, which also attends to the encoder."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["BART"]

BART = Structure(
    FAMILIES["bart"],
    head_width=("head_dim",),
    heads=("num_heads",),
    features=("embed_dim",),
    hidden=("embed_dim",),
    roots=("embed_scale",),
)
