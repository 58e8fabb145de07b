"""Movement pruning: scores learned while the weights are, by whether these move away from zero or towards it."""

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
from textbrewer.compression.pruning_schedules import PruningSchedule, pruning_due, sparsity_at
from textbrewer.compression.trained import choosing, targets
from textbrewer.compression.trained.groups import Block, Groups
from textbrewer.compression.trained.results import checked, masks_left, weight_masks

__all__ = ["MovementPruning"]

STRUCTURES = ("weights", "blocks", "units")
_OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass
class _Scored:
    """Groups with their scores.

    Args:
        groups: what goes or stays as one.
        scores: ``(count,)``.
        stays: ``(count,)`` of booleans.
        masks: the same for each weight, shaped to be broadcast to the parameters.
        values: the parameters with what is masked out of them.
    """

    groups: Groups
    scores: nn.Parameter
    stays: Tensor
    masks: list[Tensor]
    values: list[Tensor]


class MovementPruning(StepCallback):
    r"""Prunes by scores :math:`S` that are trained with the weights, through the masks :math:`M` as if there were none.

    .. math::
        W' = W \odot M(S), \qquad
        \frac{\partial L}{\partial S_g} = \sum_{w \in g} \frac{\partial L}{\partial w'} \, w, \qquad
        \frac{\partial L}{\partial w} = \frac{\partial L}{\partial w'} \, m

    so that the score of a weight that moves away from zero grows. *Hard*: what has the lowest scores goes, as much as
    ``sparsity`` says. *Soft*: what has :math:`\sigma(S) < \tau` goes, with the penalty
    :math:`\lambda \frac1n \sum_i \overline{\sigma(S_i)}` on the scores of the :math:`n` weights or sites; how much goes
    is then learned.

    The model's parameters are :math:`W'` all the time, in checkpoints too; what is masked out is kept here and in the
    checkpoints, and comes back as it was when its score rises. While it is away, neither weight decay nor the
    optimiser's momentum changes it. The scores' gradients are not clipped, and their learning rate stays the same.

    >>> pruning = MovementPruning({"heads": 0.5, "ffn": 0.5}, structure="units")
    >>> distiller.train(optimizer, dataloader, num_epochs=3, step_callbacks=[pruning])
    >>> small = Masked(student, pruning.masks()).shrink()

    Args:
        sparsity: hard: the share that goes, from 0 to below 1; with ``structure="units"`` of heads and feed-forward
            units, both alike or by kind.
        threshold: soft: :math:`\tau`, likewise.
        regular_scale: soft: :math:`\lambda`; it rises with :math:`\tau`.
        structure: what has a score: ``"weights"``, one each; ``"blocks"`` of a matrix; ``"units"``: heads (groups of
            heads that share keys and values) and feed-forward units, by the weights that read them.
        block: outputs and inputs of a block; ``None`` for all of them: ``(head_width, None)`` are a head's rows.
        modules: of weights and blocks, what is pruned: dotted names or patterns, as ``"*.attention.*"``; ``None``: the
            linear modules of the heads and feed-forward parts.
        exclude: names or patterns of what is left alone.
        scope: hard: ``"uniform"``: the same share of each weight or site; ``"global"``: the lowest scores of all.
        minimum: how many heads and units stay in each place.
        schedule: how ``sparsity`` or ``threshold`` is reached: ``"cubic"``, ``"linear"`` or ``"one_shot"``.
        begin: when something goes first: an ``int`` counts optimiser steps, a ``float`` is a share of the run. Scores
            are learned from the start.
        end: when all has gone; what it is may still change afterwards.
        every: optimiser steps between two choices.
        score_optimizer: of the scores: ``"adam"`` or ``"sgd"``.
        score_lr: its learning rate.

    Raises:
        ValueError, TypeError, KeyError: if a setting cannot be.

    Reference:
        Sanh et al., "Movement Pruning", 2020, arXiv:2005.07683, equations 2 to 5 and section 4 (soft);
        Lagunas et al., "Block Pruning for Faster Transformers", 2021, arXiv:2109.04838, section 3 (blocks).
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        threshold: float | Mapping[str, float] | None = None,
        regular_scale: float = 1.0,
        structure: str = "weights",
        block: Block | None = None,
        modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        scope: str = "uniform",
        minimum: int = 1,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.7,
        every: int = 1,
        score_optimizer: str = "adam",
        score_lr: float = 1e-2,
    ) -> None:
        if (sparsity is None) == (threshold is None):
            raise ValueError("one of sparsity (hard) and threshold (soft) must be given, and not both")
        checks.one_of(structure, STRUCTURES, "structure")
        self.soft = sparsity is None
        goal, name = (threshold, "threshold") if sparsity is None else (sparsity, "sparsity")
        self.goals = targets.amounts(goal, structure, name)  # type: ignore[arg-type]  # one of them is given
        checks.number(regular_scale, "regular_scale", minimum=0)
        _check_block(block, structure)
        if modules is not None and structure == "units":
            raise ValueError('modules must be None with structure="units"; name what is left alone in exclude')
        targets.check_patterns(modules, "modules")
        targets.check_patterns(exclude, "exclude")
        checks.one_of(scope, SCOPES, "scope")
        if scope != "uniform" and self.soft:
            raise ValueError(f"scope must be left out with threshold, which is the same for all scores, got {scope!r}")
        checks.integer(minimum, "minimum", minimum=1)
        self.schedule = PruningSchedule(schedule, begin, end, every)
        checks.one_of(score_optimizer, _OPTIMIZERS, "score_optimizer")
        checks.number(score_lr, "score_lr", above=0)
        self.regular_scale, self.structure, self.block = regular_scale, structure, block
        self.modules, self.exclude, self.scope, self.minimum = modules, exclude, scope, int(minimum)
        self.score_optimizer, self.score_lr = score_optimizer, score_lr
        self._scored: list[_Scored] = []
        self._student: nn.Module | None = None

    def begin(self, run: TrainingRun) -> None:
        """Start with all scores at 0 and nothing masked.

        Raises:
            ValueError: if the run or its model cannot be pruned so.
            KeyError: if the model has not what settings name.
        """
        self._scored = []
        if self.structure == "units":
            groups = targets.unit_groups(run.student, list(self.goals), self.exclude, readers=True)
        else:
            groups = targets.weight_groups(run.student, self.modules, self.exclude, self.block or (1, 1))
        targets.check_run(run, {name: one for group in groups for name, one in group.parameters.items()})
        self._begin, self._end = targets.steps_of(self.schedule, run)
        if not self.soft and self.structure == "units":
            zeros = [torch.zeros(one.count) for one in groups]
            choosing.largest(groups, zeros, self.goals, self.scope, self.minimum)  # raises for what cannot be
        for one in groups:
            stays = torch.ones(one.count, dtype=torch.bool, device=one.device)
            scores = nn.Parameter(torch.zeros(one.count, device=one.device))
            values = [parameter.detach().clone() for parameter in one.parameters.values()]
            self._scored.append(_Scored(one, scores, stays, one.spread(stays), values))
        self._student = run.student
        scores_of_all = [one.scores for one in self._scored]
        self._optimizer: torch.optim.Optimizer = _OPTIMIZERS[self.score_optimizer](scores_of_all, lr=self.score_lr)

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Train the scores, and leave masked weights without a gradient."""
        ramp = self._ramp(step)
        for one in self._scored:
            movements = []
            for number, parameter in enumerate(one.groups.parameters.values()):
                value = torch.where(one.masks[number], parameter, one.values[number])
                movements.append(value * (torch.zeros_like(value) if parameter.grad is None else parameter.grad))
                if parameter.grad is not None:
                    parameter.grad.mul_(one.masks[number])
            one.scores.grad = one.groups.sums(movements).to(one.scores.dtype)
            if self.soft:
                weight = self.regular_scale * ramp / (len(self._scored) * one.groups.count)
                chance = one.scores.sigmoid()
                one.scores.grad += weight * chance * (1 - chance)
        self._optimizer.step()

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Choose anew what is masked, and mask it."""
        for one in self._scored:
            for number, parameter in enumerate(one.groups.parameters.values()):
                one.values[number] = torch.where(one.masks[number], parameter, one.values[number])
        late = step > self._end and (step - self._begin) % self.schedule.every == 0
        if late or pruning_due(step, self._begin, self._end, self.schedule.every):
            self._choose(step)
        for one in self._scored:
            for mask, value, parameter in zip(one.masks, one.values, one.groups.parameters.values(), strict=True):
                parameter.copy_(torch.where(mask, value, torch.zeros_like(value)))
        return self._figures(step)

    def end(self) -> None:
        """Let go of what is masked out."""
        for one in self._scored:
            one.values = []

    def masks(self) -> Masks:
        """Return which heads and feed-forward units stay, for :class:`~textbrewer.compression.Masked`.

        With ``structure="units"`` these are the pruned ones. Of single weights and blocks, a head or unit goes when all
        weights that read it have gone; one of each place stays.

        Raises:
            ValueError: if there was no training yet, the model's family is unknown, or nothing whole has gone.
        """
        student, scored = checked(self._student), self._scored
        return masks_left(student, self.structure, [one.groups for one in scored], [one.stays for one in scored])

    def weight_masks(self) -> dict[str, Tensor]:
        """Return which weights stay, booleans shaped as the parameters, by name.

        Raises:
            ValueError: if there was no training yet.
        """
        checked(self._student)
        return weight_masks([one.groups for one in self._scored], [one.stays for one in self._scored])

    def state_dict(self) -> dict[str, Any]:
        """Return scores, masks, what is masked out, and the state of the scores' optimiser."""
        return {
            "settings": self._settings(),
            "names": [one.groups.name for one in self._scored],
            "scores": [one.scores.detach() for one in self._scored],
            "stays": [one.stays for one in self._scored],
            "values": [one.values for one in self._scored],
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other settings.
        """
        targets.check_settings(self._settings(), state["settings"], type(self).__name__)
        names = [(one.groups.name, one.groups.count) for one in self._scored]
        theirs = [(name, len(scores)) for name, scores in zip(state["names"], state["scores"], strict=True)]
        if names != theirs:
            raise ValueError("the checkpoint is of movement pruning of another model's weights; resume with the same")
        for number, one in enumerate(self._scored):
            one.scores.copy_(state["scores"][number])
            one.stays.copy_(state["stays"][number])
            one.masks = one.groups.spread(one.stays)
            for mine, value in zip(one.values, state["values"][number], strict=True):
                mine.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the first one."""
        names = ("soft", "goals", "regular_scale", "structure", "scope", "minimum", "score_optimizer", "score_lr")
        schedule = [getattr(self.schedule, name) for name in ("name", "begin", "end", "every")]
        return {**{name: getattr(self, name) for name in names}, "schedule": schedule}

    def _ramp(self, step: int) -> float:
        """Return the share of the goal that is reached when so many steps are done."""
        return sparsity_at(self.schedule.name, step, self._begin, self._end, 0.0, 1.0)

    def _choose(self, step: int) -> None:
        groups, scores = [one.groups for one in self._scored], [one.scores.detach() for one in self._scored]
        goals = {kind: goal * self._ramp(step) for kind, goal in self.goals.items()}
        if self.soft:
            found = choosing.above(groups, scores, goals, self.minimum)
        else:
            found = choosing.largest(groups, scores, goals, self.scope, self.minimum)
        for one, stays in zip(self._scored, found, strict=True):
            one.stays = stays
            one.masks = one.groups.spread(stays)

    def _figures(self, step: int) -> dict[str, Tensor | float]:
        groups, stays = [one.groups for one in self._scored], [one.stays for one in self._scored]
        figures: dict[str, Tensor | float] = {"movement_sparsity": choosing.share_gone(groups, stays)}
        if self.soft:
            ramp, device = self._ramp(step), groups[0].device
            chances = torch.stack([one.scores.detach().sigmoid().mean().to(device) for one in self._scored])
            figures["movement_threshold"] = max(self.goals.values()) * ramp
            figures["movement_penalty"] = self.regular_scale * ramp * chances.mean()
        return figures


def _check_block(block: Block | None, structure: str) -> None:
    """Raise ValueError or TypeError unless a block is given where there are blocks, of two whole numbers."""
    if (block is not None) != (structure == "blocks"):
        raise ValueError(f'block must be given with structure="blocks", and only there, got {block} for {structure!r}')
    if block is None:
        return
    checks.is_a(block, (tuple, list), "block", "(outputs, inputs)")
    if len(block) != 2 or block == (None, None):
        raise ValueError(f"block must be (outputs, inputs), None for all of one of them, got {block}")
    for side in block:
        if side is not None:
            checks.integer(side, "a side of block", minimum=1)
