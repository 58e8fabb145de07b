"""DistilBERT, whose attention calls the width of all its heads ``dim``."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["DISTILBERT"]

DISTILBERT = Structure(
    FAMILIES["distilbert"],
    head_width=("attention_head_size",),
    heads=("n_heads",),
    features=("dim",),
)
