"""Distillers: from one batch to one loss, for one or several teachers and tasks."""

from textbrewer.distillers.basic import BasicDistiller
from textbrewer.distillers.general import GeneralDistiller
from textbrewer.distillers.multi_task import MultiTaskDistiller
from textbrewer.distillers.multi_teacher import MultiTeacherDistiller
from textbrewer.distillers.mutual import MutualDistiller
from textbrewer.distillers.precomputing import precompute
from textbrewer.distillers.theseus import TheseusDistiller
from textbrewer.distillers.trainer import BasicTrainer
from textbrewer.matching import CustomMatch

__all__ = [
    "BasicDistiller",
    "BasicTrainer",
    "CustomMatch",
    "GeneralDistiller",
    "MultiTaskDistiller",
    "MultiTeacherDistiller",
    "MutualDistiller",
    "TheseusDistiller",
    "precompute",
]
