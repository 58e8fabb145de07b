"""Reports on models: what can be seen of them before and after a distillation."""

from textbrewer.report.layer_similarity import LayerSimilarity, layer_similarity, plot_layer_similarity

__all__ = ["LayerSimilarity", "layer_similarity", "plot_layer_similarity"]
