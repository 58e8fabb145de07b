"""The family that a teacher is of."""

from __future__ import annotations

from textbrewer.layouts.families import FAMILIES, Family, InnerWidth, LayerStack, register_family
from textbrewer.names import suggestion

__all__ = ["FAMILIES", "Family", "InnerWidth", "LayerStack", "family_of", "register_family"]


def family_of(model_type: str) -> Family:
    """Return the family of a config's ``model_type``.

    Raises:
        ValueError: if it is unknown; the message says how to make it known.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"the teacher's config.model_type must be of a known family, got {model_type!r}; "
            f"{suggestion(model_type, FAMILIES)}. Make it known with "
            f"textbrewer.students.register_family({model_type!r}, 'bert'), if it is built as BERT is, or with a Family "
            "that says how it is built (about 10 lines, see there)"
        )
    return FAMILIES[model_type]
