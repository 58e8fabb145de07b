"""How important the channels of convolutional networks are, most of them as torch-pruning works them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import adaptors
from textbrewer.adaptors import Adaptor
from textbrewer.compression.data_scores import batches_on, loss_of
from textbrewer.hooks.forward import call, device_of

__all__ = ["CHANNEL_SCORES", "Scorer", "add_gradients", "check_data", "median_distances"]

Scorer = Callable[[Any, Any], Any]
"""A function of torch-pruning's graph and one of its groups: the scores of its channels, ``None`` if it has none."""


def _of_library(kind: str, **options: Any) -> Callable[[Any], Scorer]:
    """Return what makes a score of one of torch-pruning's."""

    def build(pruning: Any) -> Scorer:
        scorer = getattr(pruning.importance, kind)(**options)
        return lambda graph, items: scorer(items)

    return build


def median_distances(graph: Any, items: Any) -> Tensor | None:
    r"""Return how far the filter of each channel is from all others, :math:`\sum_j \lVert W_c - W_j \rVert_2`.

    A mean over the layers that write the channels, each divided by its own mean. (Of torch-pruning's own, the distances
    are those of the weights' squares, and it fails where a convolution in groups reads them.)

    Reference:
        He et al., "Filter Pruning via Geometric Median", 2019, arXiv:1811.00250, equation 5.
    """
    scores = None
    for item in items:
        layer: Any = item.dep.target.module
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        if not graph.is_out_channel_pruning_fn(item.dep.handler):
            continue
        weight = layer.weight.detach().double()
        rows = (weight.transpose(0, 1) if getattr(layer, "transposed", False) else weight).flatten(1)
        rows = rows[torch.tensor(item.idxs, device=rows.device)]
        distances = torch.cdist(rows, rows).sum(1)
        if scores is None:
            scores = rows.new_zeros(len(items[0].idxs))
        scores.index_add_(0, torch.tensor(item.root_idxs, device=rows.device), distances / distances.mean())
    return scores


CHANNEL_SCORES: dict[str, Callable[[Any], Scorer]] = {
    "l1": _of_library("GroupMagnitudeImportance", p=1),
    "l2": _of_library("GroupMagnitudeImportance", p=2),
    "fpgm": lambda pruning: median_distances,
    "slim": _of_library("BNScaleImportance"),
    "lamp": _of_library("LAMPImportance"),
    "taylor": _of_library("GroupTaylorImportance"),
    "random": _of_library("RandomImportance"),
}
"""By name, what makes a score of the module ``torch_pruning``."""


def check_data(score: str, dataloader: Any) -> None:
    """Raise ValueError unless data is given where a score needs it, and only there."""
    if score == "taylor" and dataloader is None:
        raise ValueError('score="taylor" needs data: pass dataloader=, with batches that the adaptor finds losses for')
    if score != "taylor" and dataloader is not None:
        raise ValueError(f"dataloader must be None for score={score!r}, which does not read it; leave it out")


def add_gradients(model: nn.Module, dataloader: Iterable[Any], adaptor: Adaptor | str) -> None:
    """Add up the gradients of a model's losses over some data, in its parameters.

    Parameters that the losses do not reach get gradients of zero, which score lowest.

    Raises:
        ValueError: if the adaptor returns no losses, or the dataloader yields nothing.
    """
    read = adaptors.resolve(adaptor, "adaptor")
    for parameter in model.parameters():
        parameter.grad = parameter.new_zeros(parameter.shape)
    for batch in batches_on(dataloader, device_of(model)):
        torch.autograd.backward(loss_of(read(batch, call(model, batch, {}))))
