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

__all__ = [
    "CustomMatch",
    "PlannedMatch",
    "build_projection",
    "plan_matches",
    "select",
    "teacher_feature",
    "width_of_model",
]
