"""How important a model's units are by their weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import Layout, Site
from textbrewer.layouts.inner import Axis, by_block
from textbrewer.registry import Registry

__all__ = ["WEIGHT_SCORES", "unit_weights"]

WeightScore = Callable[[Sequence[Tensor]], Tensor]
WEIGHT_SCORES = Registry("importance score")
"""Scores by weights: ``f(weights) -> (units,)``, the weights of a site's units as tensors ``(units, n)`` in float64."""

_ROWS = 512


@WEIGHT_SCORES.add("level")
def mean_magnitude(weights: Sequence[Tensor]) -> Tensor:
    r"""Return the mean magnitude of each unit's weights, :math:`\frac1{|u|} \sum_{w \in u} |w|`: alike at any size."""
    return l1_norm(weights) / sum(weight.shape[1] for weight in weights)


@WEIGHT_SCORES.add("l1")
def l1_norm(weights: Sequence[Tensor]) -> Tensor:
    r"""Return the sum of the magnitudes of each unit's weights, :math:`\sum_{w \in u} |w|`.

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, section 3.1.
    """
    return torch.stack([weight.abs().sum(1) for weight in weights]).sum(0)


@WEIGHT_SCORES.add("l2")
def l2_norm(weights: Sequence[Tensor]) -> Tensor:
    r"""Return the norm of each unit's weights, :math:`\sqrt{\sum_{w \in u} w^2}`."""
    return torch.stack([weight.square().sum(1) for weight in weights]).sum(0).sqrt()


@WEIGHT_SCORES.add("fpgm")
def distance_to_others(weights: Sequence[Tensor]) -> Tensor:
    r"""Return how far each unit's weights are from the others', :math:`\sum_j \lVert w_i - w_j \rVert_2`.

    Those nearest the geometric median have the lowest score: the others can stand in for them.

    Reference:
        He et al., "Filter Pruning via Geometric Median", 2019, arXiv:1811.00250, section 3.3, equation 7.
    """
    units = len(weights[0])
    scores = []
    for start in range(0, units, _ROWS):  # of thousands of units, all pairs at once would be too many
        squares = sum(
            torch.cdist(weight[start : start + _ROWS], weight, compute_mode="donot_use_mm_for_euclid_dist").square()
            for weight in weights
        )
        scores.append(torch.as_tensor(squares).sqrt().sum(1))
    return torch.cat(scores)


def unit_weights(model: nn.Module, layout: Layout, site: Site) -> list[Tensor]:
    """Return the weights that write or read each unit of a site, as tensors ``(units, n)`` in float64; no biases.

    Of layers, all weights of two axes or more that every layer has.
    """
    if site.inner is None:
        return _layer_weights(layout, site)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = []
    for name, axis in _weight_axes(site):
        moved = parameters[name].detach().double().movedim(axis, 0)
        blocks = by_block(moved, site.inner.features, site.units, f"units of {site.name!r}")
        weights.append(blocks.transpose(0, 1).flatten(1))
    return weights


def _weight_axes(site: Site) -> list[Axis]:
    """Return the axes of a site along which weights lie, without those of biases and tables."""
    tables = tuple(f"{table}.weight" for table in site.tables)
    axes = site.inner.axes if site.inner is not None else []
    return [axis for axis in axes if axis.tensor.endswith(".weight") and not axis.tensor.endswith(tables)]


def _layer_weights(layout: Layout, site: Site) -> list[Tensor]:
    (stack,) = (stack for stack in layout.stacks if stack.path == site.stack)
    each = [dict(block.named_parameters()) for block in stack.blocks]
    return [
        torch.stack([own[name].detach().double().flatten() for own in each])
        for name, first in each[0].items()
        if first.dim() > 1 and all(name in own and own[name].shape == first.shape for own in each)
    ]
