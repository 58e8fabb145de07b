"""Knowledge distillation and model compression: a small fast model out of a big trained one."""

from textbrewer import (
    collators,
    compression,
    configurations,
    data_utils,
    distillers,
    losses,
    matching,
    presets,
    projections,
    recipes,
    report,
    schedulers,
    students,
    utils,
)
from textbrewer.adaptors import ADAPTOR_KEYS, FEATURES
from textbrewer.api import distill
from textbrewer.collators import TwoTokenizerCollator
from textbrewer.configurations import DistillationConfig, IntermediateMatch, TrainingConfig
from textbrewer.distillers import (
    BasicDistiller,
    BasicTrainer,
    CustomMatch,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
    MutualDistiller,
    TheseusDistiller,
    precompute,
)
from textbrewer.matching import match_layers
from textbrewer.presets import register_new
from textbrewer.registry import (
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
)
from textbrewer.students import init_student_from_teacher
from textbrewer.teacher_cache import CacheError, CacheInfo, TeacherCache

__version__ = "0.3.0.dev0"

Distillers = {
    "Basic": BasicDistiller,
    "General": GeneralDistiller,
    "MultiTeacher": MultiTeacherDistiller,
    "MultiTask": MultiTaskDistiller,
    "Train": BasicTrainer,
}
"""The distillers by the names that TextBrewer gave them."""

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "BasicDistiller",
    "BasicTrainer",
    "CacheError",
    "CacheInfo",
    "CustomMatch",
    "DistillationConfig",
    "Distillers",
    "GeneralDistiller",
    "IntermediateMatch",
    "MultiTaskDistiller",
    "MultiTeacherDistiller",
    "MutualDistiller",
    "TeacherCache",
    "TheseusDistiller",
    "TrainingConfig",
    "TwoTokenizerCollator",
    "collators",
    "compression",
    "configurations",
    "data_utils",
    "distill",
    "distillers",
    "init_student_from_teacher",
    "losses",
    "match_layers",
    "matching",
    "precompute",
    "presets",
    "projections",
    "recipes",
    "register_new",
    "report",
    "schedulers",
    "students",
    "utils",
]
