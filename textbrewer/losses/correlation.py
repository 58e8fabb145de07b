"""A loss between logits that asks for the teacher's order and spacing, not for its probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.masking import averaged_over
from textbrewer.losses.softened import log_distributions, mean_over_positions, soften
from textbrewer.registry import KD_LOSS_MAP

__all__ = ["dist_loss"]

_SMALLEST = 1e-8


def _centred(values: Tensor, counted: Tensor, number: Tensor, dim: int) -> Tensor:
    """Return ``values`` minus their mean over what is ``counted`` along ``dim``, 0 elsewhere."""
    mean = (values * counted).sum(dim=dim, keepdim=True) / number.unsqueeze(dim).clamp(min=1)
    return (values - mean) * counted


def _correlation_gaps(student: Tensor, teacher: Tensor, counted: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return 1 - Pearson's correlation along ``dim``, 0 where fewer than two values count; and where two do.

    Args:
        student: ``(positions, classes)``.
        teacher: same shape.
        counted: same shape, 1 where a value counts and 0 where not.
        dim: the dimension that is correlated, and gone afterwards.
    """
    number = counted.sum(dim=dim)
    student, teacher = (_centred(values, counted, number, dim) for values in (student, teacher))
    lengths = [torch.linalg.vector_norm(values, dim=dim) for values in (student, teacher)]
    # The floor keeps a row without any spread finite: its correlation is 0.
    correlation = (student * teacher).sum(dim=dim) / (lengths[0] * lengths[1]).clamp(min=_SMALLEST)
    enough = number >= 2
    return (1.0 - correlation).masked_fill(~enough, 0.0), enough


@KD_LOSS_MAP.add("dist")
@averaged_over("batch")
def dist_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    r"""One minus the correlation of the probabilities: over the classes of a position, and over a class's positions.

    .. math::
        L = \frac\beta{N} \sum_n \tau_n^2 \left(1 - r(q_{n\cdot}, p_{n\cdot})\right)
        + \frac{\gamma \overline{\tau^2}}{C} \sum_c \left(1 - r(q_{\cdot c}, p_{\cdot c})\right)

    with :math:`p = \mathrm{softmax}(t / \tau)`, :math:`q = \mathrm{softmax}(s / \tau)`, Pearson's correlation
    :math:`r`, and the mean :math:`\overline{\tau^2}` over the kept positions. Any probabilities :math:`a p + b` with
    :math:`a > 0` satisfy the first part, so a student too small for its teacher may be less sure than it.

    The second part compares the positions of the batch (of this process) with each other: it needs two of them and is
    0 for a batch of one kept position, and a larger batch tells more. Since it is no mean over positions, the loss of a
    batch is not the mean of its micro-batches' losses. With two classes the correlation of the first part is 1 or -1
    whatever the probabilities are, and only the second part teaches.

    Args:
        logits_S: student logits, ``(batch, classes)`` or ``(batch, length, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``; the paper takes 1 for
            ImageNet and 4 for CIFAR.
        mask: ``logits_S.shape[:-1]``, zero where a position does not count; None: all count.
        beta: weight of the first part, 0 or more; 2 in the paper for ImageNet.
        gamma: weight of the second part, 0 or more; 2 in the paper for ImageNet.

    Returns:
        Scalar, float32 or wider; 0 where no position is kept. A class that one of the models lacks (a logit of
        :math:`-\infty`) is left out at that position.

    Raises:
        ValueError: if shapes do not fit, ``temperature`` is not positive or a weight is negative.

    Reference:
        Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022, arXiv:2205.10536,
        section 3.
    """
    checks.number(beta, "beta", minimum=0)
    checks.number(gamma, "gamma", minimum=0)
    soft = soften(logits_S, logits_T, temperature, mask)
    log_q, log_p = log_distributions(soft)
    present = (~soft.absent).to(log_q.dtype)
    student, teacher = log_q.exp() * present, log_p.exp() * present
    over_classes, _ = _correlation_gaps(student, teacher, present, dim=-1)
    counted = present if soft.weight is None else present * soft.weight.unsqueeze(-1)
    flat = [values.flatten(0, -2) for values in (student, teacher, counted)]
    over_positions, enough = _correlation_gaps(flat[0], flat[1], flat[2], dim=0)
    within_classes = over_positions.sum() / enough.sum().clamp(min=1)
    squared = mean_over_positions(torch.ones_like(over_classes), soft)
    return beta * mean_over_positions(over_classes, soft) + gamma * within_classes * squared
