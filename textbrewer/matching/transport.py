"""Many layers to many: the cheapest transport between the layers of student and teacher (BERT-EMD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textbrewer import checks
from textbrewer.matching.dynamic import costs_of_pairs
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy

__all__ = ["Transport", "cheapest_transport", "cost_attention"]

Loss = Callable[..., Tensor]
Array = NDArray[np.float64]

# No weight falls below this share, and no cost counts as less than this share of the mean cost: a weight of zero could
# never grow again, and one layer that the student has learned perfectly would take all the weight.
_LEAST = 1e-6


def _solver() -> Any:
    """Return the module with the exact solver.

    Raises:
        ImportError: if it is not installed; the message has the command.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "strategy 'emd' needs the package POT: pip install 'textbrewer[emd]' (or: pip install POT)"
        ) from error
    return ot


def cheapest_transport(costs: Array, weights_S: Array, weights_T: Array) -> Array:
    r"""Return the flow of least cost from the layers of the student to those of the teacher.

    .. math:: \min_{F \ge 0} \sum_{ij} F_{ij} D_{ij}, \quad \sum_j F_{ij} = w^S_i, \quad \sum_i F_{ij} = w^T_j

    Args:
        costs: D, ``(layers_S, layers_T)``, finite.
        weights_S: positive, of sum 1.
        weights_T: positive, of sum 1.

    Returns:
        F, the shape of ``costs``: exact, from the network simplex; at most ``layers_S + layers_T - 1`` are not zero.

    Raises:
        ImportError: if POT is not installed.
    """
    flow: Array = _solver().emd(weights_S, weights_T, costs)
    return flow


def cost_attention(weights: Array, paid: Array, temperature: float | None = None) -> Array:
    r"""Return the weights of one side's layers for the next step: more for those whose transport was cheap.

    .. math:: u_i = \frac{\sum_j F_{ij} D_{ij}}{w_i}, \quad v_i = \frac{\sum_k u_k}{u_i}, \quad
        w_i \leftarrow \frac{v_i}{\sum_k v_k} \text{ or } \mathrm{softmax}(v / \tau)_i

    Args:
        weights: w, positive, of sum 1.
        paid: what the transport of each layer cost, :math:`\sum_j F_{ij} D_{ij}`.
        temperature: of the softmax; ``None``: plain normalisation.

    Returns:
        Positive weights of sum 1; the weights as they are where nothing cost anything.
    """
    unit_costs = paid / weights
    if not unit_costs.sum() > 0:
        return weights
    attention = unit_costs.sum() / np.maximum(unit_costs, _LEAST * unit_costs.mean())
    if temperature is not None:
        attention = np.exp((attention - attention.max()) / temperature)
    attention = np.maximum(attention / attention.sum(), _LEAST)
    new: Array = attention / attention.sum()
    return new


@STRATEGIES.add("emd")
class Transport(LayerStrategy):
    r"""The earth mover's distance between the layers of the student and those of the teacher.

    .. math:: L = \sum_{ij} F_{ij} D_{ij}, \quad D_{ij} = \ell(s_i, t_j)

    with the flow F of :func:`cheapest_transport`, which has no gradient, between layers whose weights start equal.
    After each forward pass in training (a micro-batch, not an update) the weights follow :func:`cost_attention`. They
    are the buffers ``weights_S`` and ``weights_T``, which checkpoints carry. Of several processes, the first one's
    weights count at the start of a step (where the wrapper hands buffers round, as DistributedDataParallel does), and
    each goes on from its own batch.

    Weights belong to one match: hidden states and attention each learn their own, the ``separate`` form of the authors'
    code, whose other form averages the two after each step. Costs and weights are read from the device once a step.
    Costs that are not finite give a loss that is not finite, and leave the weights as they are.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's.
        weight_temperature: of the softmax over the layers in :func:`cost_attention`; ``None``, as in the authors' code:
            plain normalisation.
        update: whether the weights are updated; if not, they stay equal.

    Raises:
        ImportError: if POT is not installed.
        ValueError, TypeError: if an option is of another type or out of range.

    Reference:
        Li et al., "BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance", 2020,
        arXiv:2010.06133, section 3; the update as in the authors' code.
    """

    weights_S: Tensor
    weights_T: Tensor

    def __init__(
        self,
        loss: Loss,
        layers_S: int,
        layers_T: int,
        weight_temperature: float | None = None,
        update: bool = True,
    ) -> None:
        super().__init__(loss, layers_S, layers_T)
        if weight_temperature is not None:
            checks.number(weight_temperature, "weight_temperature of strategy 'emd'", above=0)
        checks.is_a(update, bool, "update of strategy 'emd'", "True or False")
        _solver()
        self.weight_temperature, self.update = weight_temperature, update
        self.register_buffer("weights_S", torch.full((layers_S,), 1.0 / layers_S))
        self.register_buffer("weights_T", torch.full((layers_T,), 1.0 / layers_T))

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the cost of the transport; arguments as in :class:`LayerStrategy`."""
        costs, weights_S, weights_T = self._read(costs_of_pairs(self.loss, states_S, states_T, mask))
        finite = bool(np.isfinite(costs).all())
        flow = cheapest_transport(costs, weights_S, weights_T) if finite else np.outer(weights_S, weights_T)
        losses = [
            float(flow[i, j]) * self.loss(states_S[i], states_T[j], mask=mask)
            for i, j in np.argwhere(flow > 0).tolist()
        ]
        if self.update and finite and self.training and torch.is_grad_enabled():
            paid = flow * costs
            self._write(self.weights_S, cost_attention(weights_S, paid.sum(axis=1), self.weight_temperature))
            self._write(self.weights_T, cost_attention(weights_T, paid.sum(axis=0), self.weight_temperature))
        return sum(losses[1:], losses[0])

    def _read(self, costs: Tensor) -> tuple[Array, Array, Array]:
        """Return costs and weights as arrays, in one transfer; the weights are of sum 1 to the last digit."""
        weights = [item.to(costs) for item in (self.weights_S, self.weights_T)]
        values = torch.cat([costs.flatten(), *weights]).cpu().double().numpy()
        found, weights_S, weights_T = np.split(values, [costs.numel(), costs.numel() + self.layers_S])
        return found.reshape(costs.shape), weights_S / weights_S.sum(), weights_T / weights_T.sum()

    @staticmethod
    def _write(buffer: Tensor, weights: Array) -> None:
        """Put new weights in place of the old: the buffer stays the one that the module registered."""
        with torch.no_grad():
            buffer.copy_(torch.from_numpy(weights))
