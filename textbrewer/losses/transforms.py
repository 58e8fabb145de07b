"""Transforms of both sides' logits, applied before any loss between them."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.masking import clear_masked, full_precision, position_weights
from textbrewer.registry import Registry

__all__ = ["LOGIT_TRANSFORMS", "standardize"]

LOGIT_TRANSFORMS = Registry("logit transform")
"""``f(logits, mask=None) -> logits`` of the same shape."""


@LOGIT_TRANSFORMS.add("standardize")
def standardize(logits: Tensor, mask: Tensor | None = None, eps: float = 1e-7, ddof: int = 1) -> Tensor:
    r"""Logits of each position with mean 0 and standard deviation 1 over its classes.

    .. math:: Z(z)_c = \frac{z_c - \bar z}{\sigma(z) + \epsilon}, \qquad
        \sigma(z)^2 = \frac1{C - \mathrm{ddof}} \sum_c (z_c - \bar z)^2

    The student is then asked for the teacher's order and relative distances, not for logits of the same size, which a
    smaller model reaches only with difficulty. The paper takes it with ``"kl"`` at the temperature 2, and weighs that
    loss 9.

    Args:
        logits: ``(*positions, classes)``, three classes or more.
        mask: ``positions``, zero where a position does not count and its logits become 0; None: all count.
        eps: added to the standard deviation. Where all logits are equal the gradient is of the size of 1 / eps.
        ddof: 1 for the unbiased variance, 0 for the biased one.

    Returns:
        The shape of ``logits``, float32 or wider. A class whose logit is :math:`-\infty` keeps it, and mean and
        deviation are those of the others.

    Raises:
        ValueError: if there are fewer than three classes, the shape of the mask does not fit, ``eps`` is not positive
            or ``ddof`` neither 0 nor 1.

    Reference:
        Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", 2024, arXiv:2403.01427, section 4.
    """
    checks.number(eps, "eps", above=0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if logits.shape[-1] < 3:
        raise ValueError(
            f"logits must have at least 3 classes to be standardized, got {logits.shape[-1]}: of two, nothing is left "
            "but which one is larger, and no gradient; use logit_transform='none'"
        )
    (values,) = full_precision(logits)
    weight = position_weights(None if mask is None else mask != 0, values, values.shape[:-1])
    values = clear_masked(values, weight)
    absent = values.isneginf()
    values = values.masked_fill(absent, 0.0)
    count = (~absent).sum(dim=-1, keepdim=True).to(values.dtype)
    mean = values.sum(dim=-1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean).masked_fill(absent, 0.0)
    # Of a norm the gradient at zero is zero; of a root or of torch.std it is infinite or NaN.
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (count - ddof).clamp(min=1).sqrt()
    standard: Tensor = centred / (deviation + eps)
    return standard.masked_fill(absent, -torch.inf)
