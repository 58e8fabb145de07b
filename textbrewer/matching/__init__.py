"""Which student feature meets which teacher feature."""

from textbrewer.matching.combined import AttentionOverLayers
from textbrewer.matching.custom import CustomMatch
from textbrewer.matching.depth import number_of_layers
from textbrewer.matching.dynamic import Nearest, Ordered
from textbrewer.matching.layer_maps import LAYER_MAPS, layer_map, match_layers
from textbrewer.matching.plan import (
    PlannedMatch,
    build_projection,
    plan_matches,
    select,
    teacher_feature,
    width_of_model,
)
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy
from textbrewer.matching.subsets import Pairwise, RandomSubset
from textbrewer.matching.transport import Transport

__all__ = [
    "LAYER_MAPS",
    "STRATEGIES",
    "AttentionOverLayers",
    "CustomMatch",
    "LayerStrategy",
    "Nearest",
    "Ordered",
    "Pairwise",
    "PlannedMatch",
    "RandomSubset",
    "Transport",
    "build_projection",
    "layer_map",
    "match_layers",
    "number_of_layers",
    "plan_matches",
    "select",
    "teacher_feature",
    "width_of_model",
]
