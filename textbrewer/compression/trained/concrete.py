"""The hard concrete distribution: factors between 0 and 1 that are often exactly one of them, with gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LOG_ALPHA_LIMIT",
    "TEMPERATURE",
    "inference_factor",
    "inference_factors",
    "log_alpha_for",
    "probability_kept",
    "sample",
]

TEMPERATURE = 2 / 3
LOWEST, HIGHEST = -0.1, 1.1
"""What the factors are stretched to before they are clipped to 0 and 1."""
LOG_ALPHA_LIMIT = math.log(100)
"""How far log alpha may go from 0, so that it can come back."""
_EPSILON = 1e-6
_SHARPNESS = 0.8


def sample(log_alpha: Tensor, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    r"""Return factors for some noise, with gradients to ``log_alpha`` where they are not clipped.

    .. math::
        s = \sigma\Big( \frac{\ln u - \ln(1 - u) + \ln\alpha}{\beta} \Big), \qquad z = \min(1, \max(0, 1.2 s - 0.1))

    Args:
        log_alpha: :math:`\ln\alpha`, of any shape.
        noise: :math:`u`, uniform in (0, 1), of the same shape.
        temperature: :math:`\beta`.

    Reference:
        Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018, arXiv:1712.01312, equations
        10 and 11.
    """
    noise = noise.clamp(_EPSILON, 1 - _EPSILON)
    concrete = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / temperature)
    return (concrete * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def probability_kept(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    r"""Return the probability that a factor is not 0, :math:`P(z > 0) = \sigma(\ln\alpha + \beta \ln 11)`.

    Reference:
        Louizos et al., 2018, arXiv:1712.01312, equation 12.
    """
    return torch.sigmoid(log_alpha - temperature * math.log(-LOWEST / HIGHEST))


def inference_factors(log_alpha: Tensor, minimum: int = 1, temperature: float = TEMPERATURE) -> Tensor:
    r"""Return the factors with which a model is evaluated, without gradients.

    The :math:`\mathrm{round}(\sum P(z = 0))` lowest are 0, the others :math:`\sigma(0.8 \ln\alpha / \beta)`.

    Args:
        log_alpha: ``(units,)``.
        minimum: how many are not 0 in any case.
        temperature: :math:`\beta`.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models" (CoFi), 2022, arXiv:2204.00408, section 3.1,
        and the authors' code for what is done at inference.
    """
    log_alpha = log_alpha.detach()
    gone = (1 - probability_kept(log_alpha, temperature)).sum().round()
    stays = (len(log_alpha) - gone).clamp(min=min(minimum, len(log_alpha)))
    order = log_alpha.argsort(descending=True, stable=True)
    factors = inference_factor(log_alpha[order], temperature)
    factors = torch.where(torch.arange(len(order), device=order.device) < stays, factors, torch.zeros_like(factors))
    return torch.empty_like(factors).scatter_(0, order, factors)


def inference_factor(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    r"""Return :math:`\sigma(0.8 \ln\alpha / \beta)`, by which what stays is multiplied when a model is evaluated."""
    return torch.sigmoid(_SHARPNESS * log_alpha / temperature)


def log_alpha_for(drop_rate: float) -> float:
    r"""Return :math:`\ln\alpha = \ln(1 - p) - \ln p`, within its limits.

    Reference:
        Louizos et al., 2018, arXiv:1712.01312: its authors' code (``droprate_init``).
    """
    return max(-LOG_ALPHA_LIMIT, min(LOG_ALPHA_LIMIT, math.log(1 - drop_rate) - math.log(drop_rate)))
