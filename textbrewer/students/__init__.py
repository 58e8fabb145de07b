"""Students made of their teachers: some of the layers, the most important features, the teacher's weights."""

from textbrewer.layouts.families import FAMILIES, Family, InnerWidth, LayerStack, register_family
from textbrewer.students.initialise import init_student_from_teacher
from textbrewer.students.layers import uniform_layers

__all__ = [
    "FAMILIES",
    "Family",
    "InnerWidth",
    "LayerStack",
    "init_student_from_teacher",
    "register_family",
    "uniform_layers",
]
