"""How important each hidden feature is, by all the tensors that it appears in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import HIDDEN, Layout, Site
from textbrewer.compression.weight_scores import WEIGHT_SCORES, unit_weights
from textbrewer.layouts.inner import Axis
from textbrewer.layouts.residual import Residual, tensors_of

__all__ = ["HIDDEN_SCORES", "feature_weights", "hidden_score", "norm_scale", "score_by_weights"]

_BY_SUMS = ("l1", "level")


def hidden_score(model: nn.Module, site: Site, score: str) -> Tensor:
    r"""Return the importance of each hidden feature by weights, ``(features,)`` in float64.

    The score is that of all rows of a feature, one of each tensor :math:`W` that it lies in (embeddings, norms,
    whatever reads or writes it; tied ones once), each divided by its mean size so that all tensors count alike, however
    large they are: ``"l1"`` and ``"level"`` rank by

    .. math::
        s_i = \sum_W \lVert W_i \rVert_1 \Big/ \tfrac1d \sum_j \lVert W_j \rVert_1,

    all others take :math:`W_i \big/ \big(\tfrac1d \sum_j \lVert W_j \rVert_2^2\big)^{1/2}`, so that ``"l2"`` is

    .. math::
        s_i = \Big( \sum_W \lVert W_i \rVert_2^2 \Big/ \tfrac1d \sum_j \lVert W_j \rVert_2^2 \Big)^{1/2}.

    ``"slim"`` is the mean magnitude of its scales in the norms: see :func:`norm_scale`.

    Args:
        model: whose features they are.
        site: of its hidden features.
        score: a name in :data:`~textbrewer.compression.weight_scores.WEIGHT_SCORES`, or ``"slim"``.
    """
    if score in HIDDEN_SCORES:
        result: Tensor = HIDDEN_SCORES[score](model, site)
        return result
    weights = []
    for weight in feature_weights(model, site):
        size = weight.abs().sum(1).mean() if score in _BY_SUMS else weight.square().sum(1).mean().sqrt()
        if size > 0:
            weights.append(weight / size)
    scores: Tensor = WEIGHT_SCORES[score](weights or [torch.zeros(site.units, 1, dtype=torch.float64)])
    return scores


def score_by_weights(model: nn.Module, layout: Layout, site: Site, score: str) -> Tensor:
    """Return the importance of any site's units by weights alone, ``(units,)``."""
    if site.kind == HIDDEN:
        return hidden_score(model, site, score)
    scores: Tensor = WEIGHT_SCORES[score](unit_weights(model, layout, site))
    return scores


def norm_scale(model: nn.Module, site: Site) -> Tensor:
    r"""Return the mean magnitude of each hidden feature's scales in the norms, :math:`\frac1N \sum_n |\gamma_{n,i}|`.

    Raises:
        ValueError: if the model has no norm with scales.

    Reference:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, arXiv:1708.06519,
        section 3 (for the channels of batch norms).
    """
    norms = site.inner.norms if isinstance(site.inner, Residual) else []
    scales: list[Any] = [getattr(model.get_submodule(name), "weight", None) for name in norms]
    found = [scale.detach().double().abs() for scale in scales if scale is not None]
    if not found:
        raise ValueError(f'score must not be "slim" for {type(model).__name__}, whose norms have no scales; use "l2"')
    return torch.stack(found).mean(0)


HIDDEN_SCORES = {"slim": norm_scale}
"""Scores that only hidden features have: ``f(model, site) -> (features,)``."""


def feature_weights(model: nn.Module, site: Site) -> list[Tensor]:
    """Return the weights of each hidden feature as tensors ``(features, n)`` in float64: tied ones once, no biases."""
    residual, tensors, parameters = site.inner, tensors_of(model), dict(model.named_parameters(remove_duplicate=False))
    weights: dict[tuple[int, int], Tensor] = {}
    for name, axis in residual.axes if residual is not None else ():
        if name in parameters and not _is_bias(parameters, Axis(name, axis)):
            rows = tensors[name].detach().double().movedim(axis, 0)
            weights.setdefault((id(tensors[name]), axis), rows.reshape(site.units, -1))
    return list(weights.values())


def _is_bias(parameters: dict[str, nn.Parameter], axis: Axis) -> bool:
    return axis.tensor.rpartition(".")[2] == "bias" and parameters[axis.tensor].dim() == 1
