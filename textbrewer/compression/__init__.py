"""Models made smaller: pruned and shrunk, saved and loaded; linear maps of low rank; LoRA students."""

from textbrewer.compression.loading import load
from textbrewer.compression.lora import load_adapter, lora_, merge_lora, save_adapter
from textbrewer.compression.low_rank import (
    FactorizedMap,
    FactorizeReport,
    LowRankLinear,
    factorize_,
    low_rank_manifest,
    restore_low_rank_,
)
from textbrewer.compression.masked import Masked
from textbrewer.compression.masks import Masks
from textbrewer.compression.prune import Prune
from textbrewer.compression.saving import save
from textbrewer.compression.structure import STRUCTURES, Structure, register_structure
from textbrewer.layouts import Family, InnerWidth, LayerStack

__all__ = [
    "STRUCTURES",
    "FactorizeReport",
    "FactorizedMap",
    "Family",
    "InnerWidth",
    "LayerStack",
    "LowRankLinear",
    "Masked",
    "Masks",
    "Prune",
    "Structure",
    "factorize_",
    "load",
    "load_adapter",
    "lora_",
    "low_rank_manifest",
    "merge_lora",
    "register_structure",
    "restore_low_rank_",
    "save",
    "save_adapter",
]
