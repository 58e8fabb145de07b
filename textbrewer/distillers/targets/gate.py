"""A target whose weights are learned: a gate that reads the student and weighs the teachers row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.distillers import terms
from textbrewer.distillers.targets.base import TARGETS, Blend, Moment
from textbrewer.distillers.targets.means import WeightedProbs
from textbrewer.distillers.targets.mixture import MixtureBlend, log_probability_of
from textbrewer.distillers.targets.separate import learning_rate

__all__ = ["Gate", "GateBlend", "GateNetwork"]

# The logarithm of the least probability that the gate's loss tells from others: beyond, there would be no gradient.
_LEAST = -1e4


class GateNetwork(nn.Module):
    r"""Weights of several teachers by row: :math:`w = \operatorname{softmax}_k(v \cdot \tanh(\theta_k \odot W x))`.

    The vector :math:`v` is zero at the start, and all teachers weigh the same.

    Args:
        width: width of :math:`x`.
        count: how many teachers there are.
        size: width of the teachers' latent vectors :math:`\theta_k`.
    """

    def __init__(self, width: int, count: int, size: int) -> None:
        super().__init__()
        self.reader = nn.Linear(width, size)
        self.teachers = nn.Parameter(torch.randn(count, size))
        self.scorer = nn.Parameter(torch.zeros(size))

    def forward(self, views: Mapping[str, Any], task: str = "") -> Tensor:
        """Return the logarithms of the weights, ``(batch, teachers)``; the student gets no gradient from them."""
        inputs = gate_input(views)
        if inputs.shape[-1] != self.reader.in_features:
            raise ValueError(
                f"target='gate' must read vectors of one width, got {self.reader.in_features} and then "
                f"{inputs.shape[-1]}; return 'hidden' from adaptor_S"
            )
        read = self.reader(inputs).unsqueeze(1)
        return torch.log_softmax((torch.tanh(self.teachers * read) @ self.scorer).float(), dim=-1)


def gate_input(views: Mapping[str, Any]) -> Tensor:
    """Return what the gate reads of the student, ``(batch, width)``, detached.

    The first position of the last hidden state; without ``hidden``, the logits (of their first position).

    Raises:
        KeyError: if the student's adaptor returned neither.
    """
    if "hidden" in views:
        state: Tensor = views["hidden"][-1]
    elif "logits" in views:
        state = views["logits"][0]
    else:
        raise KeyError(f"target='gate' needs 'hidden' or 'logits' from adaptor_S, which returned only {sorted(views)}")
    state = state[:, 0] if state.dim() == 3 else state
    return state.detach().float()


@TARGETS.add("gate")
class Gate(WeightedProbs):
    r"""Probabilities mixed by a learned gate, which reads the student and weighs the teachers row by row.

    .. math:: w = \operatorname{softmax}_k\bigl(v \cdot \tanh(\theta_k \odot W x)\bigr), \qquad
        p = \sum_k w_k \operatorname{softmax}(z_k / \tau), \qquad
        L_{gate} = -\log \sum_k w_k \operatorname{softmax}(z_k)_y

    :math:`x` is the first position of the student's last hidden state (without ``hidden`` from the adaptor, the
    logits), detached. The KD loss gives the gate no gradient: it would choose whichever teacher the student has matched
    already, and collapse. The gate learns from the labels alone, by the cross-entropy of the mixture that it makes, so
    it is rewarded for trusting, in each row, the teachers that are right. In turn the gate's loss gives the student no
    gradient. It is logged as ``unweighted_gate_loss``, and the mean weights as ``gate_weight_<number>``.

    Needs ``labels`` from the student's adaptor. The gate's parameters are optimised, clipped and checkpointed with the
    student.

    Args:
        count: how many teachers there are.
        size: width of the teachers' latent vectors.
        lr: the gate's learning rate; ``None``: the optimiser's.

    Reference:
        Liu et al., "Adaptive Multi-Teacher Multi-level Knowledge Distillation", 2021, arXiv:2103.04062, section 3.2
        (there the gate also learns from the KD loss).
    """

    reads_labels = "target='gate'"
    reads_student = True
    student_features = frozenset({"hidden"})

    def __init__(self, count: int, size: int = 64, lr: float | None = 1e-3) -> None:
        super().__init__(count)
        checks.integer(size, "size of target 'gate'", minimum=1)
        self.size = int(size)
        self.learner_options = learning_rate(lr, "target 'gate'")

    def build_learner(self, results_S: Views | None) -> bool:
        """Build the gate, once the student's views tell the width of what it reads."""
        if self.learner is not None:
            return False
        if results_S is None:
            return True
        self.learner = GateNetwork(gate_input(results_S).shape[-1], self.count, self.size)
        return False

    def start(self, moment: Moment) -> Blend:
        """Return what takes in the teachers of a step."""
        return GateBlend(self, moment)

    def log_weight(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> Tensor:
        """Return the logarithm of the gate's weight, by position."""
        return _by_position(_learned(moment.results_S)[:, number].detach(), logits)


class GateBlend(MixtureBlend):
    """The teachers of one step; what they give the true classes is kept, for the gate to learn from."""

    def __init__(self, target: Gate, moment: Moment) -> None:
        super().__init__(target, moment)
        self.labelled: list[Tensor] = []

    def parts(self, number: int, head: int, logits: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return what is kept of one head of a teacher."""
        if labels is not None:
            weight = _by_position(_learned(self.moment.results_S)[:, number], logits)
            # The gate must not see a teacher corrected by the labels: it would find all of them right.
            true = weight + log_probability_of(logits, labels).clamp_min(_LEAST)
            if head == len(self.labelled):
                self.labelled.append((labels >= 0).sum())
            return [*super().parts(number, head, logits, labels), true]
        return super().parts(number, head, logits, labels)

    def terms(self, results_S: Views) -> list[terms.Term]:
        """Return the KD term and the gate's."""
        found = super().terms(results_S)
        if not found:
            return []
        weights = _learned(results_S).detach().exp().mean(dim=0)
        self.figures = {f"gate_weight_{number}": weight for number, weight in enumerate(weights)}
        # Where there is no label, the teachers' probabilities of it are 1 each, and so is their mixture.
        losses = [
            -item.kept[2].sum() / labelled.clamp_min(1)
            for item, labelled in zip(self.positions, self.labelled, strict=True)
        ]
        return [*found, terms.Term("gate_loss", torch.stack(losses).mean(), 1.0, "labels")]


def _learned(results_S: Views | None) -> Tensor:
    """Return the logarithms of the gate's weights."""
    if results_S is None or results_S.learned is None:
        raise ValueError("target='gate' needs the student's views, as the step makes them, with the gate's weights")
    learned: Tensor = results_S.learned
    return learned


def _by_position(values: Tensor, logits: Tensor) -> Tensor:
    """Return a value of each row at the row's positions.

    Raises:
        ValueError: if the logits have other rows.
    """
    if len(values) != len(logits):
        raise ValueError(f"target='gate' weighs {len(values)} rows, but a teacher's logits have {len(logits)}")
    return values.view(-1, *[1] * (logits.dim() - 2)).expand(logits.shape[:-1])
