"""How important single weights and blocks of weights are, and which stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import adaptors
from textbrewer.adaptors import Adaptor
from textbrewer.compression.choosing import kept_weights
from textbrewer.compression.data_scores import batches_on, loss_of
from textbrewer.compression.running_taylor import Terms
from textbrewer.compression.trained.groups import Groups
from textbrewer.hooks.forward import call, device_of, evaluating

__all__ = ["MAGNITUDES", "block_terms", "choose_weights", "given_scores", "magnitudes", "random_scores", "taylor"]

Scores = dict[str, Tensor]

MAGNITUDES: dict[str, Callable[[Groups, Tensor], Tensor]] = {
    "l1": lambda groups, weight: groups.sums([weight.abs()]),
    "l2": lambda groups, weight: groups.sums([weight.square()]).sqrt(),
    "level": lambda groups, weight: groups.sums([weight.abs()]) * (groups.count / groups.size),
}
"""Scores by weights: the sum of a block's magnitudes, its norm, the mean of its magnitudes."""


def magnitudes(groups: Sequence[Groups], score: str) -> Scores:
    """Return a score of :data:`MAGNITUDES` for each block, ``(blocks,)`` by parameter."""
    return {one.name: MAGNITUDES[score](one, _wide(_weight(one).detach())) for one in groups}


def random_scores(groups: Sequence[Groups], seed: int) -> Scores:
    """Return random numbers, ``(blocks,)`` by parameter; the same for a seed on all devices."""
    generator = torch.Generator().manual_seed(seed)
    return {one.name: torch.rand(one.count, generator=generator).to(one.device) for one in groups}


def given_scores(groups: Sequence[Groups], given: Mapping[str, Tensor]) -> Scores:
    """Return scores that the user worked out for each weight, summed over each block.

    Raises:
        ValueError: if a parameter has none, or not one for each weight.
    """
    scores = {}
    for one in groups:
        shape = tuple(_weight(one).shape)
        score = given.get(one.name)
        got = None if score is None else tuple(torch.as_tensor(score).shape)
        if got != shape:
            raise ValueError(f"score must have a tensor of shape {shape} for {one.name!r}, got {got or 'none'}")
        scores[one.name] = one.sums([torch.as_tensor(score).detach().to(one.device)])
    return scores


def taylor(
    model: nn.Module, groups: Sequence[Groups], dataloader: Iterable[Any], adaptor: Adaptor | str = "auto"
) -> Scores:
    r"""Return how much the loss would change without each block, to first order, ``(blocks,)`` by parameter.

    .. math::
        s_B = \sum_b \Big( \sum_{w \in B} \frac{\partial L_b}{\partial w} w \Big)^2

    over batches :math:`b`.

    Args:
        model: run in eval mode; its modes are put back, and its gradients are left alone.
        groups: of its weights.
        dataloader: batches as the model takes them, with labels.
        adaptor: its ``losses`` are what counts, the sum of their means.

    Raises:
        ValueError: if the adaptor returns no losses, the dataloader yields nothing, or a weight is frozen.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771, equation 8.
    """
    read = adaptors.resolve(adaptor, "adaptor")
    weights = [_weight(one) for one in groups]
    for one, weight in zip(groups, weights, strict=True):
        if not weight.requires_grad:
            raise ValueError(f'score="taylor" needs gradients, but {one.name!r} is frozen; name it in exclude')
    scores = {one.name: torch.zeros(one.count, device=one.device) for one in groups}
    with evaluating(model), torch.enable_grad():
        for batch in batches_on(dataloader, device_of(model)):
            loss = loss_of(read(batch, call(model, batch, {})))
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for one, weight, gradient in zip(groups, weights, gradients, strict=True):
                if gradient is not None:
                    scores[one.name] += one.sums([_wide(gradient) * _wide(weight.detach())]).square()
    return scores


def block_terms(groups: Sequence[Groups]) -> Terms:
    """Return a function that returns the first-order term of each block, ``(blocks,)``, of the gradients there are."""

    def terms() -> Scores:
        found = {}
        for one in groups:
            weight = _weight(one)
            if weight.grad is not None:
                found[one.name] = one.sums([_wide(weight.grad) * _wide(weight)])
        return found

    return terms


def choose_weights(scores: Mapping[str, Tensor], share: float, scope: str, maximum: float) -> dict[str, Tensor]:
    """Return which blocks stay if those of the lowest scores go, ``(blocks,)`` by parameter; of equal ones the first.

    Args:
        scores: of blocks of one size, ``(blocks,)`` by parameter.
        share: how many go, rounded down: of each parameter, or with ``"global"`` of all together.
        scope: ``"uniform"`` or ``"global"``.
        maximum: the largest share of one parameter's blocks that may go.

    Raises:
        ValueError: if a score is not finite but for minus infinity, or the limit protects more than may stay.
    """
    for name, score in scores.items():
        if score.isnan().any() or (score == torch.inf).any():
            raise ValueError(f"scores must be finite, got NaN or infinity for {name!r}; look at the weights")
    stays = kept_weights(list(scores.values()), share, scope, maximum)
    return dict(zip(scores, stays, strict=True))


def _weight(groups: Groups) -> nn.Parameter:
    (parameter,) = groups.parameters.values()
    return parameter


def _wide(values: Tensor) -> Tensor:
    """Return values in float32 at least, whose sums do not drown small ones."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
