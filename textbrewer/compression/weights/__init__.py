"""Single weights and blocks of weights set to zero, at once or while training."""

from textbrewer.compression.weights.callbacks import GradualSparsity, KeepSparse
from textbrewer.compression.weights.masks import WeightMasks
from textbrewer.compression.weights.plan import SparsePruning
from textbrewer.compression.weights.sparse import SparseWeights

__all__ = ["GradualSparsity", "KeepSparse", "SparsePruning", "SparseWeights", "WeightMasks"]
