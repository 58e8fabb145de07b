"""Projections: small modules that bring a student's feature to the teacher's width."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor, nn
from torch.nn.modules import activation

from textbrewer import checks
from textbrewer.names import suggestion
from textbrewer.registry import PROJ_MAP

__all__ = ["GaussianProjection", "gaussian_projection", "linear_projection", "projection_with_activation"]

_WEIGHT_STD = 0.02
_FIRST_VARIANCE = 5.0
_SMALLEST_VARIANCE = 1e-5


def _needs_no_arguments(module: type[nn.Module]) -> bool:
    """Return whether the module can be built by its name alone."""
    try:
        inspect.signature(module).bind()
    except TypeError:
        return False
    return True


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    name: getattr(activation, name) for name in activation.__all__ if _needs_no_arguments(getattr(activation, name))
}


@PROJ_MAP.add("linear")
def linear_projection(dim_in: int, dim_out: int) -> nn.Linear:
    """Return a linear layer with bias, its weights drawn from a normal distribution of deviation 0.02, its bias 0.

    Args:
        dim_in: width of the student's feature.
        dim_out: width of the teacher's feature.

    Raises:
        ValueError: if a width is not a positive whole number.
    """
    checks.integer(dim_in, "dim_in", minimum=1)
    checks.integer(dim_out, "dim_out", minimum=1)
    # Built the ordinary way, its first weights drawn and thrown away: TextBrewer draws them too, and a seed must give
    # the same numbers here and in whatever is drawn next.
    linear = nn.Linear(int(dim_in), int(dim_out))
    nn.init.normal_(linear.weight, mean=0.0, std=_WEIGHT_STD)
    nn.init.zeros_(linear.bias)
    return linear


def projection_with_activation(act_fn: str | type[nn.Module]) -> Callable[[int, int], nn.Sequential]:
    """Return a function that builds a linear projection followed by an activation of its own.

    Args:
        act_fn: the activation: the name of one in ``torch.nn`` ("GELU"), or a module class that takes no arguments.

    Returns:
        ``f(dim_in, dim_out) -> module``, to be used as an entry of ``PROJ_MAP``.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if ``act_fn`` is neither a name nor a module class, or the class needs arguments.
    """
    if isinstance(act_fn, str):
        if act_fn not in _ACTIVATIONS:
            raise ValueError(
                f"act_fn must be the name of an activation in torch.nn, got {act_fn!r}; "
                f"{suggestion(act_fn, _ACTIVATIONS)}"
            )
        make_activation = _ACTIVATIONS[act_fn]
    elif isinstance(act_fn, type) and issubclass(act_fn, nn.Module):
        if not _needs_no_arguments(act_fn):
            raise TypeError(
                f"act_fn must be a module class that takes no arguments, got {act_fn.__name__}; "
                "derive a class that sets them"
            )
        make_activation = act_fn
    else:
        raise TypeError(
            f"act_fn must be the name of an activation or a module class, got {act_fn!r}; "
            f"{suggestion(act_fn, _ACTIVATIONS)}"
        )

    def projection(dim_in: int, dim_out: int) -> nn.Sequential:
        """Return a linear layer as :func:`linear_projection` makes it, and a new activation."""
        return nn.Sequential(linear_projection(dim_in, dim_out), make_activation())

    return projection


class GaussianProjection(nn.Module):
    r"""A mean for each of the teacher's dimensions, and a variance that is the same for all inputs.

    .. math:: \mu = W x + b, \qquad \sigma_c^2 = \log(1 + e^{a_c}) + 10^{-5}

    Args:
        dim_in: width of the student's feature.
        dim_out: width of the teacher's feature.

    Reference:
        Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, arXiv:1904.05835, section 2.1;
        the first variance, 5, is that of the authors' code.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.mean = linear_projection(dim_in, dim_out)
        self.raw_variance = nn.Parameter(
            torch.full((int(dim_out),), math.log(math.expm1(_FIRST_VARIANCE - _SMALLEST_VARIANCE)))
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Return the means, then the variances: ``(..., dim_in)`` becomes ``(..., 2 * dim_out)``."""
        mean: Tensor = self.mean(feature)
        variance = F.softplus(self.raw_variance) + _SMALLEST_VARIANCE
        return torch.cat([mean, variance.expand_as(mean)], dim=-1)


@PROJ_MAP.add("gaussian")
def gaussian_projection(dim_in: int, dim_out: int) -> GaussianProjection:
    """Return a linear layer for the mean, with one variance a dimension of the teacher's, 5 at first (for ``vid``).

    Args:
        dim_in: width of the student's feature.
        dim_out: width of the teacher's feature.

    Raises:
        ValueError: if a width is not a positive whole number.
    """
    return GaussianProjection(dim_in, dim_out)


@PROJ_MAP.add("identity")
def identity_projection(dim_in: int, dim_out: int) -> nn.Linear:
    """Return a linear layer that starts as the identity: of other widths, as the identity on the first dimensions.

    Args:
        dim_in: width of the student's feature.
        dim_out: width of the teacher's feature.

    Raises:
        ValueError: if a width is not a positive whole number.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022, arXiv:2204.00408, section 3.2 (the
        matrix that maps layers is initialised so).
    """
    layer = linear_projection(dim_in, dim_out)
    nn.init.eye_(layer.weight)
    return layer


PROJ_MAP.add("relu")(projection_with_activation("ReLU"))
PROJ_MAP.add("tanh")(projection_with_activation("Tanh"))
