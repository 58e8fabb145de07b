"""Models made smaller: pruned and shrunk, quantised, saved and loaded; linear maps of low rank; LoRA; exported."""

from textbrewer.compression.cnn import prune_channels
from textbrewer.compression.config_list import ConfigListPlan, from_config_list
from textbrewer.compression.exporting import ExportReport, Runner, export, load_exported
from textbrewer.compression.gradual import GradualPruning
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
from textbrewer.compression.quantization import QuantizeReport, convert_qat_, prepare_qat_, quantize_
from textbrewer.compression.saving import save
from textbrewer.compression.structure import STRUCTURES, Structure, register_structure
from textbrewer.compression.trained import ADMMPruning, HardConcretePruning, MovementPruning, SlimPenalty
from textbrewer.compression.weights import GradualSparsity, KeepSparse, SparsePruning, SparseWeights, WeightMasks
from textbrewer.layouts import Family, InnerWidth, LayerStack

__all__ = [
    "STRUCTURES",
    "ADMMPruning",
    "ConfigListPlan",
    "ExportReport",
    "FactorizeReport",
    "FactorizedMap",
    "Family",
    "GradualPruning",
    "GradualSparsity",
    "HardConcretePruning",
    "InnerWidth",
    "KeepSparse",
    "LayerStack",
    "LowRankLinear",
    "Masked",
    "Masks",
    "MovementPruning",
    "Prune",
    "QuantizeReport",
    "Runner",
    "SlimPenalty",
    "SparsePruning",
    "SparseWeights",
    "Structure",
    "WeightMasks",
    "convert_qat_",
    "export",
    "factorize_",
    "from_config_list",
    "load",
    "load_adapter",
    "load_exported",
    "lora_",
    "low_rank_manifest",
    "merge_lora",
    "prepare_qat_",
    "prune_channels",
    "quantize_",
    "register_structure",
    "restore_low_rank_",
    "save",
    "save_adapter",
]
