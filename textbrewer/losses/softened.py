r"""What the losses between logits share: both sides' logits by their temperature, and the distributions they give.

A logit of :math:`-\infty` says that the model does not have the class. Such a class adds nothing: a class that the
student does not have is taken out of the teacher's distribution too. A class that only the teacher lacks has the
probability 0 there, and, unless a loss asks for shared classes only, its own in the student's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.masking import clear_masked, full_precision, position_weights, same_shape, weighted_mean

__all__ = [
    "OF_CLASSES",
    "Softened",
    "log_distributions",
    "lowest",
    "mean_over_positions",
    "mean_over_present",
    "relative_entropy",
    "soften",
    "with_labels",
]


OF_CLASSES = frozenset(
    ("ce", "kl", "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation")
) | {"dkd", "nkd", "dist", "wsld"}
"""The library's losses between probabilities of classes that exclude each other, constant where there is one."""

_SAME_CLASSES = "both models must score the same classes at the same positions"


class Softened(NamedTuple):
    """Logits divided by the temperature, ``(*positions, classes)``, with 0 for what is masked or absent."""

    student: Tensor
    teacher: Tensor
    student_absent: Tensor
    teacher_absent: Tensor
    temperature: float | Tensor
    weight: Tensor | None

    @property
    def absent(self) -> Tensor:
        """Where at least one side lacks the class, ``(*positions, classes)``."""
        return self.student_absent | self.teacher_absent


def _per_position(temperature: float | Tensor, logits: Tensor, weight: Tensor | None) -> float | Tensor:
    """Return the temperature as a number, a 0-dim tensor, or ``(*positions, 1)`` with 1 at masked positions."""
    checks.positive_temperature(temperature)
    if not isinstance(temperature, Tensor):
        return temperature
    temperature = temperature.to(device=logits.device, dtype=logits.dtype)
    if temperature.numel() == 1:
        return temperature.reshape(())
    if temperature.shape != logits.shape[:-1]:
        raise ValueError(
            f"temperature must be a number or a tensor of shape {tuple(logits.shape[:-1])}, one value a position, "
            f"got a tensor of shape {tuple(temperature.shape)}"
        )
    if weight is not None:
        temperature = temperature.masked_fill(weight == 0, 1.0)
    return temperature.unsqueeze(-1)


def soften(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor, mask: Tensor | None) -> Softened:
    """Check the arguments, and divide the logits by the temperature.

    Args:
        logits_S: student logits, ``(*positions, classes)``.
        logits_T: teacher logits, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``positions``.
        mask: ``positions``, zero where a position does not count; None: all count.

    Raises:
        ValueError: if shapes do not fit or ``temperature`` is a number that is not positive.
    """
    same_shape(logits_S, logits_T, "logits", _SAME_CLASSES)
    student, teacher = full_precision(logits_S, logits_T)
    weight = position_weights(None if mask is None else mask != 0, student, student.shape[:-1])
    tau = _per_position(temperature, student, weight)
    student, teacher = clear_masked(student, weight), clear_masked(teacher, weight)
    absent_S, absent_T = student.isneginf(), teacher.isneginf()
    # Zero first, then divide: the gradient of -inf / tau with respect to tau would be NaN.
    student, teacher = student.masked_fill(absent_S, 0.0) / tau, teacher.masked_fill(absent_T, 0.0) / tau
    return Softened(student, teacher, absent_S, absent_T, tau, weight)


def lowest(values: Tensor) -> float:
    """Return the finite number that stands for a logit of minus infinity: its exponential is 0 all the same.

    A position without any class then gives a finite row. Half of the lowest number, so that subtracting the largest
    logit does not overflow.
    """
    return torch.finfo(values.dtype).min / 2


def log_distributions(soft: Softened, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the student's and of the teacher's distribution, ``(*positions, classes)``.

    Args:
        soft: the logits.
        shared: whether a class that only the teacher lacks is taken out of the student's distribution.
    """
    absent, low = soft.absent, lowest(soft.student)
    log_q = F.log_softmax(soft.student.masked_fill(absent if shared else soft.student_absent, low), dim=-1)
    log_p = F.log_softmax(soft.teacher.masked_fill(absent, low), dim=-1)
    return log_q, log_p


def relative_entropy(log_p: Tensor, log_q: Tensor, absent: Tensor) -> Tensor:
    r"""Return :math:`\sum_c p_c (\log p_c - \log q_c)` over the classes that are not ``absent``, by position."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(absent, 0.0).sum(dim=-1)


def mean_over_present(values: Tensor, soft: Softened) -> Tensor:
    """Return the mean of ``values`` over the classes that both models have."""
    present = (~soft.absent).sum(dim=-1).clamp(min=1)
    return values.masked_fill(soft.absent, 0.0).sum(dim=-1) / present


def mean_over_positions(values: Tensor, soft: Softened, power: int = 2) -> Tensor:
    r"""Return the mean over the kept positions of ``values``, one a position, times :math:`\tau` to a power.

    The power keeps the size of the gradient about the same at every temperature: 2 where the loss is of second order
    in the gap between the logits, 1 where it is of first order.
    """
    tau = soft.temperature
    if isinstance(tau, Tensor) and tau.dim():
        tau = tau.squeeze(-1)
    return weighted_mean(values * tau**power, soft.weight)


def with_labels(
    labels: Tensor | None, logits_S: Tensor, logits_T: Tensor, mask: Tensor | None, name: str
) -> tuple[Tensor, Tensor]:
    """Return the true classes, 0 where there is none, and the mask of the positions that are kept and have one.

    Args:
        labels: the true classes, ``positions``, negative where a position has none.
        logits_S: student logits, ``(*positions, classes)``.
        logits_T: teacher logits, same shape.
        mask: ``positions``, zero where a position does not count; None: all count.
        name: the loss, for messages.

    Returns:
        Classes as whole numbers, and a mask of bool; both ``positions``, on the device of the logits.

    Raises:
        TypeError: if the labels are not whole numbers.
        ValueError: if there are none, or a shape does not fit.
    """
    same_shape(logits_S, logits_T, "logits", _SAME_CLASSES)
    if labels is None:
        raise ValueError(f"{name!r} needs labels, the true classes: return 'labels' from the student's adaptor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels must be whole numbers, one class a position, for {name!r}, got {labels.dtype}; use 'sigmoid' "
            "where a position has several classes, 'mse' for regression"
        )
    positions = tuple(logits_S.shape[:-1])
    if tuple(labels.shape) != positions:
        raise ValueError(f"labels must have the shape {positions}, one class a position, got {tuple(labels.shape)}")
    labels = labels.to(device=logits_S.device, dtype=torch.int64)
    kept = labels >= 0
    weight = position_weights(None if mask is None else mask != 0, logits_S, positions)
    if weight is not None:
        kept = kept & (weight != 0)
    # The class of a position that is left out may be any number.
    return labels.masked_fill(~kept, 0), kept
