"""BERT, and what is built as it is: RoBERTa, CamemBERT, XLM-RoBERTa, ELECTRA."""

from textbrewer.compression.structure.structure import Structure
from textbrewer.layouts import FAMILIES

__all__ = ["BERT"]

BERT = Structure(
    FAMILIES["bert"],
    head_width=("attention_head_size",),
    heads=("num_attention_heads",),
    features=("all_head_size",),
)
