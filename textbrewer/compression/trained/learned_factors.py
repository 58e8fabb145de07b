"""Factors on units whose distributions are learned, under a constraint on how many are expected to be zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import Site
from textbrewer.compression.trained import concrete
from textbrewer.compression.trained.expected_size import ExpectedSize

__all__ = ["FactorSettings", "LearnedFactors"]


@dataclass(frozen=True)
class FactorSettings:
    """How factors are learned; see :class:`~textbrewer.compression.trained.HardConcretePruning`."""

    lr: float
    lambda_lr: float
    drop_rate: float
    temperature: float
    minimum: int
    seed: int


class LearnedFactors:
    r"""Hard concrete factors, and the multipliers of the constraint :math:`s = t`.

    Args:
        sites: one factor a unit.
        size: the expected share of the parameters that is gone, :math:`s`.
        settings: how they are learned.
        device: where they are.
    """

    def __init__(
        self, sites: Sequence[Site], size: ExpectedSize, settings: FactorSettings, device: torch.device
    ) -> None:
        self.size, self.settings = size, settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        mean = concrete.log_alpha_for(settings.drop_rate)
        self.log_alphas: dict[str, nn.Parameter] = {}
        for site in sites:
            start = mean + 0.01 * torch.randn(site.units, generator=self._generator)
            limited = start.clamp(-concrete.LOG_ALPHA_LIMIT, concrete.LOG_ALPHA_LIMIT)
            self.log_alphas[site.name] = nn.Parameter(limited.to(device))
        self.lambdas = nn.Parameter(torch.zeros(2, device=device))
        groups: list[dict[str, Any]] = [
            {"params": list(self.log_alphas.values())},
            {"params": [self.lambdas], "lr": settings.lambda_lr},
        ]
        self._optimizer = torch.optim.Adam(groups, lr=settings.lr)
        self._noise: dict[str, Tensor] = {}
        # The same tensors all the time, as a compiled model keeps hold of them.
        self.drawn = {name: torch.ones_like(one).requires_grad_() for name, one in self.log_alphas.items()}
        self.resting = {name: torch.ones_like(one, requires_grad=False) for name, one in self.log_alphas.items()}
        self._whole = {site.name for site in sites if site.inner is None}
        self.settle()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw all factors anew, without gradients yet."""
        for name, log_alpha in self.log_alphas.items():
            self._noise[name] = torch.rand(len(log_alpha), generator=self._generator).to(log_alpha.device)
            self.drawn[name].copy_(concrete.sample(log_alpha, self._noise[name], self.settings.temperature))
            self.drawn[name].grad = None

    def gradients(self) -> list[Tensor]:
        """Return the loss's gradients by the factors that were drawn last."""
        return [torch.zeros_like(one) if one.grad is None else one.grad for one in self.drawn.values()]

    def learn(self, gradients: Sequence[Tensor], target: float) -> None:
        r"""Take a step: :math:`\ln\alpha` down the loss and the constraint's term, the multipliers up the latter.

        Args:
            gradients: of the loss, by the factors.
            target: :math:`t`.
        """
        with torch.enable_grad():
            names = list(self.log_alphas)
            drawn = [
                concrete.sample(self.log_alphas[name], self._noise[name], self.settings.temperature) for name in names
            ]
            gap = self.expected() - target
            constraint = self.lambdas[0] * gap + self.lambdas[1] * gap.square()
            self._optimizer.zero_grad()
            loss = (torch.cat(drawn) * torch.cat(list(gradients))).sum() + constraint
            loss.backward()  # type: ignore[no-untyped-call]
        if self.lambdas.grad is not None:
            self.lambdas.grad.neg_()  # up, not down
        self._optimizer.step()
        with torch.no_grad():
            for log_alpha in self.log_alphas.values():
                log_alpha.clamp_(-concrete.LOG_ALPHA_LIMIT, concrete.LOG_ALPHA_LIMIT)
        self.settle()

    def settle(self) -> None:
        """Work out the factors of inference; those of layers are 0 or 1, as no weights can take them up."""
        for name, log_alpha in self.log_alphas.items():
            found = concrete.inference_factors(log_alpha, self.settings.minimum, self.settings.temperature)
            self.resting[name].copy_((found > 0).to(found.dtype) if name in self._whole else found)

    @torch.no_grad()
    def meet(self, target: float) -> None:
        r"""Let the factors of inference meet a target: some of those near the border are taken out, or in again.

        Of units that go those with the lowest :math:`\ln\alpha` come first, of units that come back those with the
        highest; a head that is larger than what is missing is passed over.

        Args:
            target: the share of the parameters that is to be gone.
        """
        names = [name for name in self.log_alphas if name not in self._whole]
        if not names:
            return
        costs = self.size.costs({name: self.resting[name] for name in self._whole})
        stays = {name: (self.resting[name] > 0).tolist() for name in names}
        left = {name: sum(stays[name]) for name in names}
        missing = target - float(self.gone())
        units = [
            (value, name, unit)
            for name in names
            for unit, value in enumerate(self.log_alphas[name].tolist())
            if stays[name][unit] == (missing > 0)
        ]
        for value, name, unit in sorted(units, reverse=missing < 0):
            if costs[name] > abs(missing) or (missing > 0 and left[name] <= self.settings.minimum):
                continue
            left[name] += 1 if missing < 0 else -1
            factor = concrete.inference_factor(torch.tensor(value), self.settings.temperature)
            self.resting[name][unit] = factor if missing < 0 else 0.0
            missing += costs[name] if missing < 0 else -costs[name]

    def expected(self) -> Tensor:
        """Return the expected share of the parameters that is gone."""
        temperature = self.settings.temperature
        return self.size(
            {name: concrete.probability_kept(log_alpha, temperature) for name, log_alpha in self.log_alphas.items()}
        )

    def gone(self) -> Tensor:
        """Return the share of the parameters that is gone at inference."""
        return self.size({name: (factors > 0).to(factors.dtype) for name, factors in self.resting.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return all that is learned, and the generator's state."""
        return {
            "log_alphas": {name: log_alpha.detach() for name, log_alpha in self.log_alphas.items()},
            "lambdas": self.lambdas.detach(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other units.
        """
        theirs = {name: len(log_alpha) for name, log_alpha in state["log_alphas"].items()}
        if theirs != {name: len(log_alpha) for name, log_alpha in self.log_alphas.items()}:
            raise ValueError(
                "the checkpoint is of hard concrete pruning of another model's units; resume with the same"
            )
        for name, log_alpha in self.log_alphas.items():
            log_alpha.copy_(state["log_alphas"][name])
        self.lambdas.copy_(state["lambdas"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.settle()
