"""All layers of the teacher at once: each layer of the student meets their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textbrewer.losses.masking import clear_masked, full_precision, position_weights
from textbrewer.matching.strategy import STRATEGIES, LayerStrategy

__all__ = ["AttentionOverLayers", "attention_over_layers"]


def attention_over_layers(firsts_S: Tensor, firsts_T: Tensor) -> Tensor:
    r"""Return how much each layer of the student attends to each of the teacher's.

    .. math:: \alpha_{bij} = \mathrm{softmax}_j (s_{bi} \cdot t_{bj})

    Args:
        firsts_S: the state of each layer of the student at the first position, ``(batch, layers_S, hidden)``.
        firsts_T: the teacher's, ``(batch, layers_T, hidden)``.

    Returns:
        ``(batch, layers_S, layers_T)``, each row of sum 1.
    """
    return torch.bmm(firsts_S, firsts_T.transpose(1, 2)).softmax(dim=-1)


@STRATEGIES.add("attention")
class AttentionOverLayers(LayerStrategy):
    r"""Each layer of the student meets a weighted sum of all layers of the teacher.

    .. math::
        L = \sum_i \ell\Bigl(s_i, \sum_j \alpha_{ij} t_j\Bigr), \quad
        \alpha_{ij} = \mathrm{softmax}_j (s_{i0} \cdot t_{j0})

    with weights of its own for each row of the batch; position 0 is the first that the mask keeps. The weights have a
    gradient. States must have the shape ``(batch, length, hidden)`` or ``(batch, hidden)`` and, projected, the
    teacher's width. Costs a copy of the teacher's states in memory; nothing is read from the device.

    Args:
        loss: a match loss.
        layers_S: number of the student's layers in the match.
        layers_T: number of the teacher's.

    Reference:
        Passban et al., "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation", 2021, arXiv:2012.14022,
        "Methodology" (there with the states at the first position only: loss ``"pkd"`` looks at those).
    """

    has_parts = True

    def forward(self, states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the sum of the losses; arguments as in :class:`LayerStrategy`.

        Raises:
            ValueError: if the states have another number of dimensions, or student and teacher another shape.
        """
        _check(states_S, states_T)
        student, teacher = full_precision(torch.stack(list(states_S), dim=1), torch.stack(list(states_T), dim=1))
        firsts_S, firsts_T = student, teacher
        if student.dim() == 4:
            weight = position_weights(mask, teacher, (teacher.shape[0], teacher.shape[2]))
            # What is masked may be anything, NaN too, and would reach the gradient of the weights.
            teacher = clear_masked(teacher, None if weight is None else weight.unsqueeze(1).expand(teacher.shape[:-1]))
            firsts_S, firsts_T = _first_positions(student, weight), _first_positions(teacher, weight)
        attention = attention_over_layers(firsts_S, firsts_T)
        sums = torch.bmm(attention, teacher.flatten(2)).reshape(student.shape)
        losses = [
            self.loss(state, combined, mask=mask) for state, combined in zip(states_S, sums.unbind(1), strict=True)
        ]
        return sum(losses[1:], losses[0])


def _first_positions(states: Tensor, weight: Tensor | None) -> Tensor:
    """Return the states at the first position kept, ``(batch, layers, hidden)``; zeros where a row keeps none."""
    if weight is None:
        return states[:, :, 0]
    kept = weight != 0
    first = kept.int().argmax(dim=1)
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, :, first].masked_fill(~kept.any(dim=1)[:, None, None], 0.0)


def _check(states_S: Sequence[Tensor], states_T: Sequence[Tensor]) -> None:
    """Raise ValueError unless all states have one shape, that of hidden states."""
    shapes = {tuple(state.shape) for state in (*states_S, *states_T)}
    if len(shapes) != 1:
        raise ValueError(
            f"states must all have the same shape for strategy 'attention', got {sorted(shapes)}; where the widths "
            "differ, name a projection in the match: 'proj': 'linear'"
        )
    (shape,) = shapes
    if len(shape) not in (2, 3):
        raise ValueError(
            f"states must have the shape (batch, length, hidden) or (batch, hidden) for strategy 'attention', got "
            f"{shape}; match attention maps and heads with another strategy"
        )
