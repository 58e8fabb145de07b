"""Targets whose weights are numbers, or follow from the teachers' own logits and the labels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.distillers.targets.base import TARGETS, Moment, checked_weights
from textbrewer.distillers.targets.mixture import Mixture, log_probabilities, log_probability_of, wide

__all__ = ["Confidence", "ConfidenceAware", "Entropy", "MeanLogits", "MeanProbs", "WeightedProbs"]

# exp(CE) of a class that a teacher holds impossible would be infinite.
_LARGEST_LOSS = 1e4


@TARGETS.add("mean_logits")
class MeanLogits(Mixture):
    r"""The mean of the teachers' logits, as in TextBrewer.

    .. math:: z = \sum_k w_k z_k

    At any temperature the student learns from the normalised geometric mean of the teachers' probabilities (a product
    of experts, which is sharp). With ``probability_shift`` the mean is shifted, as in TextBrewer.

    Args:
        count: how many teachers there are.
        weights: one a teacher; their sum is made 1; ``None``: all the same.
        shift_each: shift each teacher's logits instead, before the mean is taken.
    """

    def __init__(self, count: int, weights: Sequence[float] | None = None, shift_each: bool = False) -> None:
        super().__init__(count)
        self.weights = None if weights is None else checked_weights(weights, count, "weights of target 'mean_logits'")
        checks.is_a(shift_each, bool, "shift_each of target 'mean_logits'", "True or False")
        self.shifts_each = shift_each

    def parts(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> list[Tensor]:
        """Return the weighted logits."""
        return [logits if self.weights is None else logits * self.weights[number]]

    def merge(self, kept: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """Return the sum."""
        return [kept[0] + fresh[0]] if kept else fresh

    def logits(self, kept: list[Tensor], temperature: float) -> Tensor:
        """Return the mean."""
        return kept[0] if self.weights is not None else kept[0] / self.count


class WeightedProbs(Mixture):
    r"""Probabilities mixed with weights by position that are normalised over the teachers.

    Kept are :math:`\log \sum_k w_k p_k` and :math:`\log \sum_k w_k`, so the weights need not be known before the last
    teacher, and no teacher's probabilities are kept.
    """

    @abstractmethod
    def log_weight(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> Tensor:
        """Return the logarithm of a teacher's weights, not normalised, by position."""

    def parts(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> list[Tensor]:
        """Return the logarithms of the weighted probabilities and of the weights."""
        weight = self.log_weight(number, logits, labels, moment)
        return [log_probabilities(logits, moment.knowledge.temperature) + weight.unsqueeze(-1), weight]

    def merge(self, kept: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """Return the logarithms of the sums."""
        return [torch.logaddexp(*pair) for pair in zip(kept, fresh, strict=True)] if kept else fresh

    def logits(self, kept: list[Tensor], temperature: float) -> Tensor:
        """Return logits whose softmax at the temperature is the mixture."""
        return temperature * (kept[0] - kept[1].unsqueeze(-1))


@TARGETS.add("mean_probs")
class MeanProbs(WeightedProbs):
    r"""The mean of the teachers' probabilities at the run's temperature, the usual target of an ensemble.

    .. math:: p = \sum_k w_k \operatorname{softmax}(z_k / \tau), \qquad z = \tau \log p

    The logits :math:`z` are given to the KD loss, whose softmax at :math:`\tau` is :math:`p` again. With a temperature
    schedule, :math:`\tau` is the base temperature, and the schedule treats the mixture as it would one teacher.

    For forward KL and cross-entropy its gradient is that of ``mean_loss``: :math:`\sum_k w_k KL(p_k \| q)` is
    :math:`KL(p \| q)` plus a constant of the student. For reverse KL, ``mean_logits`` is what ``mean_loss`` equals.

    Args:
        count: how many teachers there are.
        weights: one a teacher; their sum is made 1; ``None``: all the same.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    def __init__(self, count: int, weights: Sequence[float] | None = None) -> None:
        super().__init__(count)
        self.weights = checked_weights(weights, count, "weights of target 'mean_probs'")

    def log_weight(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> Tensor:
        """Return the teacher's weight, the same at all positions."""
        weight = self.weights[number]
        return torch.full(logits.shape[:-1], math.log(weight) if weight else -math.inf, device=logits.device)


@TARGETS.add("confidence")
class Confidence(WeightedProbs):
    r"""Probabilities weighted by how sure each teacher is of its answer; needs no labels.

    .. math:: p = \sum_k w_k \operatorname{softmax}(z_k / \tau), \qquad
        w_k \propto \max_c \operatorname{softmax}(z_k)_c \text{ or } \exp(\text{margin}_k / T)

    The margin is the distance of the two largest logits.

    Args:
        count: how many teachers there are.
        by: ``"probability"`` of the answer, or ``"margin"``.
        softness: :math:`T`, for the margin.
    """

    def __init__(self, count: int, by: str = "probability", softness: float = 1.0) -> None:
        super().__init__(count)
        checks.one_of(by, ("probability", "margin"), "by of target 'confidence'")
        checks.number(softness, "softness of target 'confidence'", above=0)
        self.by, self.softness = by, softness

    def log_weight(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> Tensor:
        """Return the logarithm of the largest probability, or the margin over the softness."""
        if self.by == "probability" or logits.shape[-1] == 1:
            return log_probabilities(logits, 1.0).amax(dim=-1)
        first, second = wide(logits).topk(2, dim=-1).values.unbind(dim=-1)
        return (first - second) / self.softness


class _WeightedByTheOthers(Mixture):
    r"""Probabilities mixed with weights that fall with a penalty: :math:`w_k = \frac{1}{K-1} (1 - e_k / \sum_j e_j)`.

    As :math:`w_k` is the share of the *other* teachers' penalties, the mixture is a sum of positive terms: kept are the
    logarithms of :math:`\sum_k p_k \sum_{j \neq k} e_j`, of :math:`\sum_k p_k` and of :math:`\sum_k e_k`. No teacher's
    probabilities are kept, and nothing is subtracted. A single teacher has the weight 1.
    """

    @abstractmethod
    def log_penalty(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logarithm of a teacher's penalty by position."""

    def parts(self, number: int, logits: Tensor, labels: Tensor | None, moment: Moment) -> list[Tensor]:
        """Return the logarithms of the probabilities and of the penalty."""
        return [log_probabilities(logits, moment.knowledge.temperature), self.log_penalty(logits, labels)]

    def merge(self, kept: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """Return the logarithms of the three sums."""
        probs, penalty = fresh
        if not kept:
            return [torch.full_like(probs, -math.inf), probs, penalty]
        mixed, probs_before, penalty_before = kept
        more = torch.logaddexp(probs + penalty_before.unsqueeze(-1), probs_before + penalty.unsqueeze(-1))
        return [
            torch.logaddexp(mixed, more),
            torch.logaddexp(probs_before, probs),
            torch.logaddexp(penalty_before, penalty),
        ]

    def logits(self, kept: list[Tensor], temperature: float) -> Tensor:
        """Return logits whose softmax at the temperature is the mixture."""
        mixed, probs, penalty = kept
        if self.count == 1:
            return temperature * probs
        return temperature * (mixed - penalty.unsqueeze(-1) - math.log(self.count - 1))


@TARGETS.add("ca_mkd")
class ConfidenceAware(_WeightedByTheOthers):
    r"""Probabilities weighted by how well each teacher predicts the true class, row by row.

    .. math:: w_k = \tfrac{1}{K-1}\bigl(1 - \operatorname{softmax}_k(CE(z_k, y))\bigr), \qquad
        p = \sum_k w_k \operatorname{softmax}(z_k / \tau)

    Needs ``labels`` from the student's adaptor; without a label (a negative one) all teachers weigh the same. The
    published code divides by :math:`K` once more, and also weights features; here these have the weights of their
    matches.

    Reference:
        Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022, arXiv:2201.00007, section 3.
    """

    reads_labels = "target='ca_mkd'"
    reads_student = True

    def log_penalty(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the cross-entropy of the true class."""
        return (-log_probability_of(logits, labels)).clamp(max=_LARGEST_LOSS)


@TARGETS.add("entropy")
class Entropy(_WeightedByTheOthers):
    r"""Probabilities weighted by how certain each teacher is, row by row; needs no labels.

    .. math:: w_k = \tfrac{1}{K-1}\Bigl(1 - \frac{H_k}{\sum_j H_j}\Bigr), \qquad
        p = \sum_k w_k \operatorname{softmax}(z_k / \tau)

    with :math:`H_k` the entropy of :math:`\operatorname{softmax}(z_k)`. The published weights are not divided by
    :math:`K - 1`, so that their sum is that.

    Reference:
        Kwon, Na, Lee, Kim, "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020.
    """

    def log_penalty(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logarithm of the entropy."""
        logs = log_probabilities(logits, 1.0)
        entropy = -torch.where(logs > -math.inf, logs.exp() * logs, 0.0).sum(dim=-1)
        return entropy.clamp_min(torch.finfo(entropy.dtype).tiny).log()
