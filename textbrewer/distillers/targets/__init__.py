"""How several teachers become one KD loss; importing this registers all targets."""

from textbrewer.distillers.targets import choices, gate, means, separate  # noqa: F401
from textbrewer.distillers.targets.base import TARGETS, Blend, Heard, Moment, Target, make_target
from textbrewer.distillers.targets.mixture import Mixture

__all__ = ["TARGETS", "Blend", "Heard", "Mixture", "Moment", "Target", "make_target"]
