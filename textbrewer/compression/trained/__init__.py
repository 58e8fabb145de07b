"""Pruning that takes part in a training: callbacks for ``train(..., step_callbacks=[...])`` of any distiller."""

from textbrewer.compression.trained.admm import ADMMPruning
from textbrewer.compression.trained.hard_concrete import HardConcretePruning
from textbrewer.compression.trained.movement import MovementPruning
from textbrewer.compression.trained.slim import SlimPenalty

__all__ = ["ADMMPruning", "HardConcretePruning", "MovementPruning", "SlimPenalty"]
