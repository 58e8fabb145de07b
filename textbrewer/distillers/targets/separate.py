"""Targets that compare the student with each teacher on its own and weigh the losses."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.distillers import terms
from textbrewer.distillers.targets.agreement import least_norm_weights
from textbrewer.distillers.targets.base import TARGETS, Blend, Moment, Target, checked_weights

__all__ = ["Agree", "LogVariances", "MeanLoss", "Separate", "SeparateBlend", "Uncertainty"]


class Separate(Target):
    """A target that is a weighted sum of the KD losses with each teacher."""

    reads_student = True

    def start(self, moment: Moment) -> Blend:
        """Return what takes in the teachers of a step."""
        return SeparateBlend(self, moment)

    @abstractmethod
    def combine(self, losses: Sequence[Tensor], blend: SeparateBlend, results_S: Views) -> Tensor:
        """Return the KD loss of the step.

        Args:
            losses: the scalar KD loss with each teacher, in their order.
            blend: of the step; its ``figures`` are logged.
            results_S: the student's views.
        """


class SeparateBlend(Blend):
    """The teachers of one step, each compared with the student.

    Their logits are let go; what the backward pass needs of them is kept with the losses.

    Args:
        target: the target.
        moment: the step, with the student's views.
    """

    def __init__(self, target: Separate, moment: Moment) -> None:
        super().__init__()
        self.target, self.moment = target, moment
        self.found: list[terms.Term] = []
        self.asked = 0

    def add(self, number: int, results_T: Views, rows: Sequence[int] | None = None) -> None:
        """Compare the student with a teacher."""
        if self.moment.results_S is None:
            raise ValueError("the student's views are needed before the teachers are asked")
        self.asked += 1
        self.found += terms.kd_terms(self.moment.results_S, results_T, self.moment.knowledge, self.moment.now)

    def terms(self, results_S: Views) -> list[terms.Term]:
        """Return the KD term."""
        if not self.found:
            return []
        value = self.target.combine([term.value for term in self.found], self, results_S)
        return [dataclasses.replace(self.found[0], value=value)]


@TARGETS.add("mean_loss")
class MeanLoss(Separate):
    r"""The mean of the KD losses with each teacher.

    .. math:: L = \sum_k w_k L(z^S, z_k)

    For forward KL and cross-entropy (at one temperature) its gradient is that of ``mean_probs``, which keeps one tensor
    of logits instead of one a teacher; for reverse KL it is that of ``mean_logits``.

    Args:
        count: how many teachers there are.
        weights: one a teacher; their sum is made 1; ``None``: all the same.
    """

    def __init__(self, count: int, weights: Sequence[float] | None = None) -> None:
        super().__init__(count)
        self.weights = checked_weights(weights, count, "weights of target 'mean_loss'")

    def combine(self, losses: Sequence[Tensor], blend: SeparateBlend, results_S: Views) -> Tensor:
        """Return the weighted sum."""
        return torch.stack([loss * weight for loss, weight in zip(losses, self.weights, strict=True)]).sum()


class LogVariances(nn.Module):
    r"""A learned :math:`a_k = \log \sigma_k^2` for each of several losses, 0 at the start.

    Args:
        names: the losses.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, views: Any, task: str = "") -> Tensor:
        """Return them, ``(1, losses)``: parts of a batch on several devices can be put together again."""
        return self.log_variance.unsqueeze(0)


def by_uncertainty(loss: Tensor, log_variance: Tensor) -> Tensor:
    r"""Return :math:`e^{-a} L + a / 2`, a loss with its learned log-variance :math:`a = \log \sigma^2`.

    Reference:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2017, arXiv:1705.07115,
        section 3.2 (the form for classification).
    """
    return torch.exp(-log_variance) * loss + log_variance / 2


@TARGETS.add("uncertainty")
class Uncertainty(Separate):
    r"""The KD losses with each teacher, weighted by learned variances.

    .. math:: L = \frac1K \sum_k \Bigl(e^{-a_k} L(z^S, z_k) + \frac{a_k}{2}\Bigr), \qquad a_k = \log \sigma_k^2

    At the start (:math:`a_k = 0`) that is ``mean_loss``; at the optimum :math:`\sigma_k^2 = 2 L_k`, so a teacher that
    the student cannot follow counts less. The loss may become negative. The :math:`a_k` are learned by the student's
    optimiser, without weight decay, and logged.

    Args:
        count: how many teachers there are.
        lr: their learning rate; ``None``: the optimiser's.

    Reference:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2017, arXiv:1705.07115,
        section 3.2.
    """

    def __init__(self, count: int, lr: float | None = 1e-3) -> None:
        super().__init__(count)
        self.learner = LogVariances([f"teacher_{number}" for number in range(count)])
        self.learner_options = learning_rate(lr, "target 'uncertainty'")

    def combine(self, losses: Sequence[Tensor], blend: SeparateBlend, results_S: Views) -> Tensor:
        """Return the mean of the weighted losses."""
        log_variances = results_S.learned.mean(dim=0)
        for number, value in enumerate(log_variances):
            blend.figures[f"log_variance_{number}"] = value.detach()
        return by_uncertainty(torch.stack(list(losses)), log_variances).mean()


def learning_rate(lr: float | None, name: str) -> dict[str, Any]:
    """Return options of learned weights in the optimiser: no decay, which would pull them to where they started.

    Raises:
        TypeError, ValueError: if the learning rate is not a positive number.
    """
    if lr is None:
        return {"weight_decay": 0.0}
    checks.number(lr, f"lr of {name}", above=0)
    return {"weight_decay": 0.0, "lr": lr}


@TARGETS.add("agree")
class Agree(Separate):
    r"""The KD losses weighted so that the teachers agree best on where the student's logits should go (AEKD).

    .. math:: \min_w \tfrac12 \Bigl\| \sum_k w_k \nabla_{z^S} L(z^S, z_k) \Bigr\|^2 \quad
        \text{with } \sum_k w_k = 1,\; 0 \le w_k \le C

    once a batch, over all rows (of all processes). The weights are logged. The published code averages the gradients
    over the batch first, and so weighs by what the rows have in common.

    Args:
        count: how many teachers there are.
        cap: :math:`C`, at most 1 and at least one over the number of teachers (then all weigh the same).

    Reference:
        Du et al., "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space", NeurIPS 2020,
        section 3.
    """

    def __init__(self, count: int, cap: float = 1.0) -> None:
        super().__init__(count)
        checks.number(cap, "cap of target 'agree'", above=0)
        if not 1 / count <= cap <= 1:
            raise ValueError(f"cap of target 'agree' must be from 1/{count} (one over the teachers) to 1, got {cap!r}")
        self.cap = cap

    def combine(self, losses: Sequence[Tensor], blend: SeparateBlend, results_S: Views) -> Tensor:
        """Return the sum weighted by the solution."""
        gradients = torch.stack([_gradient(loss, results_S["logits"]) for loss in losses])
        gram = blend.moment.sum_over_ranks(gradients @ gradients.T)
        weights = torch.from_numpy(least_norm_weights(gram.double().cpu().numpy(), self.cap)).to(losses[0])
        for number, value in enumerate(weights):
            blend.figures[f"weight_{number}"] = value
        return (torch.stack(list(losses)) * weights).sum()


def _gradient(loss: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss with respect to all heads' logits, in one row."""
    gradients = torch.autograd.grad(loss, list(logits), retain_graph=True, materialize_grads=True)
    return torch.cat([item.detach().float().flatten() for item in gradients])
