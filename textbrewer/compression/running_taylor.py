"""First-order importance from a training's own gradients, with no pass over the data for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.low_rank_layers import shared_parameters
from textbrewer.compression.sites import HIDDEN, Site
from textbrewer.layouts.inner import is_transposed

__all__ = ["DECAY", "RunningTaylor", "check_decay", "check_trained", "reader_weights", "unit_terms"]

DECAY = 0.98
"""What is left of a score after a step: the last fifty steps or so count."""

Terms = Callable[[], Mapping[str, Tensor]]


class RunningTaylor:
    r"""A decaying sum over the steps of a run of squared first-order terms.

    .. math::
        s \leftarrow d\, s + \Big( \sum_w \frac{\partial L}{\partial w} w \Big)^2

    after each backward pass; :math:`d` is the decay. The terms are what the loss would change by without the weights,
    to first order.

    Args:
        terms: returns the terms of the gradients that are there, one tensor a name.
        decay: from above 0 to 1; 1 sums all steps alike.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771, equation 8, and
        section 4.1 for a decaying sum.
    """

    def __init__(self, terms: Terms, decay: float) -> None:
        self._terms, self._decay = terms, decay
        self.sums: dict[str, Tensor] = {}

    def add(self) -> None:
        """Add the terms of the gradients of one step."""
        with torch.no_grad():
            for name, term in self._terms().items():
                sums = self.sums.get(name)
                self.sums[name] = term.square() if sums is None else sums.mul_(self._decay).add_(term.square())

    def scores(self) -> dict[str, Tensor]:
        """Return the sums.

        Raises:
            ValueError: if there are none yet, or one is not finite.
        """
        if not self.sums:
            raise ValueError('score="taylor" needs the gradients of at least one step before something goes')
        for name, sums in self.sums.items():
            if not sums.isfinite().all():
                raise ValueError(f'score="taylor": the sums of squared gradients of {name!r} are not finite')
        return dict(self.sums)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums, for a checkpoint."""
        return {name: sums.clone() for name, sums in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up sums."""
        self.sums = {name: sums.to(device, copy=True) for name, sums in state.items()}


def unit_terms(model: nn.Module, sites: Sequence[Site]) -> Terms:
    """Return a function that returns the first-order term of each unit, ``(units,)`` by site.

    A unit's is the sum of gradient times weight over the weights that read it, in all layers that share it: what
    :func:`~textbrewer.compression.data_scores.taylor_scores` squares. Of a hidden feature weights that are tied to an
    embedding are left out, as their gradients are of both places.

    Args:
        model: whose gradients are read.
        sites: of heads, feed-forward units or hidden features.
    """
    readers = {site.name: list(reader_weights(model, site)) for site in sites}
    units = {site.name: site.units for site in sites}

    def terms() -> dict[str, Tensor]:
        found = {}
        for name, weights in readers.items():
            parts = [
                (weight.grad * weight).movedim(axis, 0).flatten(1).sum(1)
                for _, weight, axis in weights
                if weight.grad is not None
            ]
            if parts:
                found[name] = torch.stack(parts).sum(0).double().reshape(units[name], -1).sum(1)
        return found

    return terms


def reader_weights(model: nn.Module, site: Site) -> Iterable[tuple[str, nn.Parameter, int]]:
    """Yield name, parameter and axis of the weights that read a site's units."""
    if site.inner is None:
        return
    shared = shared_parameters(model) if site.kind == HIDDEN else {}
    for reader in site.inner.readers:
        weight = model.get_parameter(f"{reader}.weight")
        if id(weight) not in shared:
            yield f"{reader}.weight", weight, 0 if is_transposed(model.get_submodule(reader)) else 1


def check_trained(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless an optimiser trains all parameters: only then there are gradients, and of one scale."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters:
        if not parameter.requires_grad or id(parameter) not in held:
            raise ValueError(
                f'score="taylor" needs the gradients of all weights that it scores, but {name!r} is not trained; train '
                "it, name it in exclude, or take a score by weights"
            )


def check_decay(decay: Any, score: object) -> float:
    """Return the decay, the usual one for ``None``.

    Raises:
        ValueError: if it is not above 0 and at most 1, or set for a score that has none.
        TypeError: if it is no number.
    """
    if decay is None:
        return DECAY
    checks.number(decay, "decay", above=0, maximum=1)
    if not isinstance(score, str) or score != "taylor":
        raise ValueError(f'decay must be left out unless score="taylor", got {decay}')
    return float(decay)
