"""Pruning by the alternating direction method of multipliers: weights pulled towards a sparse copy of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.compression.choosing import SCOPES
from textbrewer.compression.masks import Masks
from textbrewer.compression.pruning_schedules import PruningSchedule
from textbrewer.compression.trained import choosing, targets
from textbrewer.compression.trained.groups import Groups
from textbrewer.compression.trained.holding import Held
from textbrewer.compression.trained.results import checked, masks_left, weight_masks

__all__ = ["ADMMPruning"]

STRUCTURES = ("weights", "units")


@dataclass
class _Split:
    """Groups with the sparse copy of their weights.

    Args:
        groups: what goes or stays as one.
        sparse: Z, shaped as the parameters.
        duals: U, likewise.
    """

    groups: Groups
    sparse: list[Tensor]
    duals: list[Tensor]


class ADMMPruning(StepCallback):
    r"""Pulls weights towards a sparse copy while training, and prunes them once they are near it.

    .. math::
        \min_W L(W) + \frac\rho2 \lVert W - Z + U \rVert^2, \qquad
        Z \leftarrow \Pi(W + U), \qquad U \leftarrow U + W - Z

    The penalty's gradient is added in every step; :math:`Z` and :math:`U` follow every ``every`` steps, with
    :math:`\Pi` keeping the weights (heads, units) of the largest norm and setting the others to zero. At ``end`` all
    but the largest are set to zero for good, and the rest of the run trains what is left.

    With an adaptive optimiser a penalty far below the loss's gradients does nothing, whatever ``rho``; look at
    ``admm_distance`` in the log, which should have fallen much before ``end``.

    >>> pruning = ADMMPruning(0.5, rho=1e-2)
    >>> trainer.train(optimizer, dataloader, num_epochs=3, step_callbacks=[pruning])

    Args:
        sparsity: the share that goes, from 0 to below 1; with ``structure="units"`` of heads and feed-forward units,
            both alike or by kind.
        rho: the penalty's weight.
        structure: ``"weights"``, each by itself, or ``"units"``: heads (groups of heads that share keys and values) and
            feed-forward units, by all weights that write or read them.
        modules: of weights, what is pruned: dotted names or patterns; ``None``: the linear modules of the heads and
            feed-forward parts.
        exclude: names or patterns of what is left alone.
        scope: ``"uniform"``: the same share of each weight or site; ``"global"``: the smallest of all.
        minimum: how many heads and units stay in each place.
        begin: when the penalty starts: an ``int`` counts optimiser steps, a ``float`` is a share of the run.
        end: when what is left to go is set to zero.
        every: optimiser steps between two updates of the sparse copy.

    Raises:
        ValueError, TypeError, KeyError: if a setting cannot be.

    Reference:
        Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers",
        2018, arXiv:1804.03294, section 3.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        rho: float = 1e-2,
        structure: str = "weights",
        modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        scope: str = "uniform",
        minimum: int = 1,
        begin: float = 0.0,
        end: float = 0.7,
        every: int = 20,
    ) -> None:
        checks.one_of(structure, STRUCTURES, "structure")
        self.shares = targets.amounts(sparsity, structure, "sparsity")
        checks.number(rho, "rho", above=0)
        if modules is not None and structure == "units":
            raise ValueError('modules must be None with structure="units"; name what is left alone in exclude')
        targets.check_patterns(modules, "modules")
        targets.check_patterns(exclude, "exclude")
        checks.one_of(scope, SCOPES, "scope")
        checks.integer(minimum, "minimum", minimum=1)
        self.schedule = PruningSchedule("linear", begin, end, every)
        self.rho, self.structure, self.modules, self.exclude = rho, structure, modules, exclude
        self.scope, self.minimum = scope, int(minimum)
        self._split: list[_Split] = []
        self._student: nn.Module | None = None
        self._stays: list[Tensor] | None = None

    def begin(self, run: TrainingRun) -> None:
        """Start with a sparse copy of the weights as they are.

        Raises:
            ValueError: if the run or its model cannot be pruned so.
            KeyError: if the model has not what settings name.
        """
        self._split, self._stays, self._student = [], None, None
        if self.structure == "units":
            groups = targets.unit_groups(run.student, list(self.shares), self.exclude, readers=False)
        else:
            groups = targets.weight_groups(run.student, self.modules, self.exclude)
        targets.check_run(run, {name: one for group in groups for name, one in group.parameters.items()})
        self._begin, self._end = targets.steps_of(self.schedule, run)
        for one in groups:
            zeros = [torch.zeros_like(parameter) for parameter in one.parameters.values()]
            self._split.append(_Split(one, [], zeros))
        self._project()
        self._student = run.student

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Add the penalty's gradient."""
        if self._stays is not None:
            Held.of_groups(self._groups, self._stays).gradients_to_zero()
        elif step >= self._begin:
            for _, parameter, sparse, dual in self._weights():
                pull = self.rho * (parameter - sparse + dual)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor | float] | None:
        """Update the sparse copy when it is time, and prune at the end."""
        if self._stays is not None:
            Held.of_groups(self._groups, self._stays).weights_to_zero()
        elif step >= self._end:
            self._prune()
        elif step < self._begin:
            return None
        elif (step - self._begin) % self.schedule.every == 0:
            self._project()
            if step > self._begin:
                for _, parameter, sparse, dual in self._weights():
                    dual.add_(parameter - sparse)
        return self._figures()

    def end(self) -> None:
        """Prune what is not pruned yet, after a run that stopped before."""
        if self._student is not None and self._stays is None:
            self._prune()

    def masks(self) -> Masks:
        """Return the heads and feed-forward units that have gone, for :class:`~textbrewer.compression.Masked`.

        Of single weights, a head or unit goes when all weights that read it have gone; one of each place stays.

        Raises:
            ValueError: if nothing was pruned yet, the model's family is unknown, or nothing whole has gone.
        """
        return masks_left(checked(self._student), self.structure, self._groups, self._pruned())

    def weight_masks(self) -> dict[str, Tensor]:
        """Return which weights stay, booleans shaped as the parameters, by name.

        Raises:
            ValueError: if nothing was pruned yet.
        """
        checked(self._student)
        return weight_masks(self._groups, self._pruned())

    def state_dict(self) -> dict[str, Any]:
        """Return the sparse copy and its duals, or what has gone."""
        return {
            "settings": self._settings(),
            "names": [one.groups.name for one in self._split],
            "sparse": [one.sparse for one in self._split],
            "duals": [one.duals for one in self._split],
            "stays": [] if self._stays is None else self._stays,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other settings.
        """
        targets.check_settings(self._settings(), state["settings"], type(self).__name__)
        if state["names"] != [one.groups.name for one in self._split]:
            raise ValueError("the checkpoint is of ADMM pruning of another model's weights; resume with the same")
        if state["stays"]:
            self._stays = [stays.to(one.device) for stays, one in zip(state["stays"], self._groups, strict=True)]
            self._forget()
            return
        for number, one in enumerate(self._split):
            for mine, stored in (
                *zip(one.sparse, state["sparse"][number], strict=True),
                *zip(one.duals, state["duals"][number], strict=True),
            ):
                mine.copy_(stored)

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the first one."""
        schedule = [self.schedule.begin, self.schedule.end, self.schedule.every]
        names = ("shares", "rho", "structure", "scope", "minimum")
        return {**{name: getattr(self, name) for name in names}, "schedule": schedule}

    @property
    def _groups(self) -> list[Groups]:
        return [one.groups for one in self._split]

    def _weights(self) -> list[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """Return name, parameter, sparse copy and dual of all weights."""
        return [
            (name, parameter, sparse, dual)
            for one in self._split
            for (name, parameter), sparse, dual in zip(
                one.groups.parameters.items(), one.sparse, one.duals, strict=True
            )
        ]

    def _largest(self, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return which groups are the largest, by the norm of values shaped as the parameters."""
        norms = [
            one.groups.sums([value.float().square() for value in some])
            for one, some in zip(self._split, values, strict=True)
        ]
        return choosing.largest(self._groups, norms, self.shares, self.scope, self.minimum)

    @torch.no_grad()
    def _project(self) -> None:
        """Set the sparse copy to the largest of weights and duals."""
        sums = [
            [parameter + dual for parameter, dual in zip(one.groups.parameters.values(), one.duals, strict=True)]
            for one in self._split
        ]
        for one, values, stays in zip(self._split, sums, self._largest(sums), strict=True):
            masks = one.groups.spread(stays)
            one.sparse = [value * mask for value, mask in zip(values, masks, strict=True)]

    @torch.no_grad()
    def _prune(self) -> None:
        """Set all weights to zero that are not among the largest."""
        self._stays = self._largest([list(one.parameters.values()) for one in self._groups])
        Held.of_groups(self._groups, self._stays).weights_to_zero()
        self._forget()

    def _forget(self) -> None:
        """Let go of the sparse copy."""
        for one in self._split:
            one.sparse, one.duals = [], []

    def _pruned(self) -> list[Tensor]:
        if self._stays is None:
            raise ValueError("masks are there when the pruning is done, at its end; train to there first")
        return self._stays

    def _figures(self) -> dict[str, Tensor | float]:
        if self._stays is not None:
            return {"admm_sparsity": choosing.share_gone(self._groups, self._stays)}
        weights = self._weights()
        device = weights[0][1].device
        parts = [
            torch.stack([(one - sparse + dual).square().sum(), (one - sparse).square().sum(), one.square().sum()])
            for _, one, sparse, dual in weights
        ]
        penalty, distance, norm = torch.stack([part.to(device) for part in parts]).sum(0)
        return {"admm_penalty": self.rho / 2 * penalty, "admm_distance": (distance / norm).sqrt()}
