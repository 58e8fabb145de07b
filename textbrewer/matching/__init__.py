"""Which student feature meets which teacher feature."""

from textbrewer.matching.custom import CustomMatch
from textbrewer.matching.plan import (
    PlannedMatch,
    build_projection,
    plan_matches,
    select,
    teacher_feature,
    width_of_model,
)
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy

__all__ = [
    "STRATEGIES",
    "CustomMatch",
    "LayerStrategy",
    "PlannedMatch",
    "build_projection",
    "plan_matches",
    "select",
    "teacher_feature",
    "width_of_model",
]
