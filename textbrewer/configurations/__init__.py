"""What a run is to do: how to train, what to learn, which features to match; checked on construction."""

from textbrewer.configurations.config import Config
from textbrewer.configurations.distillation import DistillationConfig
from textbrewer.configurations.match import IntermediateMatch, Projection, parse_projection
from textbrewer.configurations.training import TrainingConfig

__all__ = ["Config", "DistillationConfig", "IntermediateMatch", "Projection", "TrainingConfig", "parse_projection"]
