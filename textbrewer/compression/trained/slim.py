"""A penalty on the scales of normalisation layers, which drives those that are not needed to zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.compression.prune_places import chosen_modules
from textbrewer.compression.trained import targets

__all__ = ["SlimPenalty"]

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # and those over instances
)
_NAMES = ("LayerNorm", "RMSNorm", "BatchNorm2d")
"""Ends of the names of classes that models bring along."""


class SlimPenalty(StepCallback):
    r"""Adds :math:`\lambda \sum_i |\gamma_i|` over the scales of normalisation layers to the loss, by its subgradient.

    .. math::
        \frac{\partial}{\partial \gamma_i} \mathrel{+}= \lambda \, \mathrm{sign}(\gamma_i)

    It prunes nothing by itself: scales near zero afterwards tell what can go, with ``score="slim"``.

    >>> trainer.train(optimizer, dataloader, num_epochs=3, step_callbacks=[SlimPenalty(1e-4, modules=["*.bn*"])])

    Args:
        scale: :math:`\lambda`. Some (NNI's pruner among them) divide it by the number of layers.
        modules: dotted names of normalisation layers, or patterns; other modules that these fit are passed over.
            ``None``: all of them.
        exclude: names or patterns of those left alone.

    Raises:
        ValueError, TypeError: if a setting cannot be.

    Reference:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, arXiv:1708.06519,
        equation 1.
    """

    def __init__(
        self, scale: float = 1e-4, *, modules: Sequence[str] | None = None, exclude: Sequence[str] = ()
    ) -> None:
        checks.number(scale, "scale", above=0)
        targets.check_patterns(modules, "modules")
        targets.check_patterns(exclude, "exclude")
        self.scale, self.modules, self.exclude = scale, modules, exclude
        self._scales: list[nn.Parameter] = []

    def begin(self, run: TrainingRun) -> None:
        """Find the scales.

        Raises:
            ValueError: if there are none, or the run does not train them.
            KeyError: if a pattern fits no module.
        """
        self._scales = []
        model = run.student
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if self.modules is not None:
            names = chosen_modules(model, self.modules, "modules")
        names -= chosen_modules(model, self.exclude, "exclude")
        found = {}
        for name, module in model.named_modules(remove_duplicate=False):
            weight = getattr(module, "weight", None)
            if name in names and _is_norm(module) and isinstance(weight, nn.Parameter):
                found[f"{name}.weight"] = weight
        if not found:
            raise ValueError(
                f"modules must name normalisation layers that have a weight, got {self.modules}: "
                f"{type(model).__name__} has none there"
            )
        targets.check_run(run, found)
        self._scales = list({id(weight): weight for weight in found.values()}.values())

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Add the penalty's subgradient."""
        for weight in self._scales:
            pull = self.scale * weight.sign()
            weight.grad = pull if weight.grad is None else weight.grad.add_(pull)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Return the penalty, for the log."""
        device = self._scales[0].device
        return {"slim_penalty": self.scale * torch.stack([one.abs().sum().to(device) for one in self._scales]).sum()}


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__.endswith(_NAMES)
