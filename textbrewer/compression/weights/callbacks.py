"""Weights set to zero while a model is trained, and zeros that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.compression.on_schedule import OnSchedule
from textbrewer.compression.pruning_schedules import PruningSchedule
from textbrewer.compression.running_taylor import RunningTaylor, check_decay, check_trained
from textbrewer.compression.trained.groups import Groups
from textbrewer.compression.trained.holding import Held
from textbrewer.compression.trained.results import weight_masks
from textbrewer.compression.trained.targets import check_patterns, weight_groups
from textbrewer.compression.weights.masks import WeightMasks
from textbrewer.compression.weights.plan import SparsePruning
from textbrewer.compression.weights.scores import block_terms, choose_weights
from textbrewer.compression.weights.sparse import SparseWeights

__all__ = ["GradualSparsity", "KeepSparse"]


class GradualSparsity(OnSchedule):
    """Sets more and more weights of the student of a run to zero; what is left learns to do without them.

    The zeros stay in dense tensors: the student becomes **neither smaller nor faster** by this; see
    :class:`SparseWeights`.

    >>> gradual = GradualSparsity(SparsePruning(amount=0.9), end=0.6)
    >>> distiller.train(optimizer, dataloader, num_epochs=3, step_callbacks=[gradual])
    >>> gradual.sparse.sparsity()["weights"]
    0.9

    Before each step of the optimiser the gradients of weights that are gone are set to zero, after it the weights. What
    is gone stays gone. With ``schedule="one_shot"`` all go at ``begin`` and are kept at zero from then on. Masks and
    scores are kept in the run's checkpoints, the share that is gone is logged as ``sparsity``. When the run is over the
    zeros are ordinary numbers in the student's weights; train it further with :class:`KeepSparse`.

    Args:
        plan: what goes, by which score, at the end. ``"taylor"`` is read from the run's own gradients: see
            :class:`~textbrewer.compression.running_taylor.RunningTaylor`.
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``: see
            :func:`~textbrewer.compression.pruning_schedules.sparsity_at`.
        begin: when the first go: an ``int`` counts optimiser steps, a ``float`` is a share of the run.
        end: when the last go.
        every: optimiser steps between two prunings.
        initial: the share that goes at ``begin``.
        power: of the cubic schedule.
        decay: of ``score="taylor"``: what is left of a score after each step; 0.98 unless set.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.
    """

    def __init__(
        self,
        plan: SparsePruning,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.6,
        every: int = 20,
        initial: float = 0.0,
        power: float = 3.0,
        decay: float | None = None,
    ) -> None:
        checks.is_a(plan, SparsePruning, "plan", "a SparsePruning")
        if isinstance(initial, (int, float)) and initial > plan.amount:
            raise ValueError(f"initial must be at most amount={plan.amount}, got {initial}")
        self.plan, self._decay = plan, check_decay(decay, plan.score)
        self._by_gradients = isinstance(plan.score, str) and plan.score == "taylor"
        settings = {
            **{name: getattr(plan, name) for name in ("amount", "scope", "maximum", "seed")},
            "block": None if plan.block is None else list(plan.block),
            "score": plan.score if isinstance(plan.score, str) else "given",
            "modules": None if plan.modules is None else list(plan.modules),
            "exclude": list(plan.exclude),
            "decay": self._decay,
        }
        super().__init__(PruningSchedule(schedule, begin, end, every, initial, power), settings, self._by_gradients)
        self._student: nn.Module | None = None
        self._groups: list[Groups] = []
        self._stays: dict[str, Tensor] = {}
        self._held: Held
        self._taylor: RunningTaylor | None = None
        self._figures: dict[str, float] = {}

    @property
    def sparse(self) -> SparseWeights:
        """The student with its masks as they are now.

        Raises:
            ValueError: if no run has begun.
        """
        if self._student is None:
            raise ValueError("the pruning must have begun: pass it to train(..., step_callbacks=[...]) first")
        return SparseWeights(self._student, self._masks())

    def begin(self, run: TrainingRun) -> None:
        """Look at the student; nothing is gone yet.

        Raises:
            ValueError: if the plan or the schedule does not fit it.
            KeyError: if a pattern names what it has not.
        """
        super().begin(run)
        groups = self.plan.groups(run.student)
        if self._by_gradients:
            check_trained([item for one in groups for item in one.parameters.items()], run.optimizer)
        else:
            self.plan.scores(groups)  # given ones that do not fit are found out now
        self._student, self._groups = run.student, groups
        self._taylor = RunningTaylor(block_terms(groups), self._decay) if self._by_gradients else None
        self._mask({one.name: torch.ones(one.count, dtype=torch.bool, device=one.device) for one in groups})

    def after_backward(self, step: int) -> None:
        """Read the gradients, and take those of what is gone away."""
        if self._taylor is not None and self._last < self._end:
            self._taylor.add()
        self._held.gradients_to_zero()

    def after_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Let weights go, if it is time; set to zero what is gone; return the share."""
        self.prune_if_due(step)
        self._held.weights_to_zero()
        return self._figures

    def prune(self, step: int) -> None:
        """Set to zero what the schedule wants gone after a step."""
        share = self.share(step, self.plan.amount)
        if not share:
            return
        scores = self.plan.scores(self._groups) if self._taylor is None else self._taylor.scores()
        scores = {name: score.masked_fill(~self._stays[name], -torch.inf) for name, score in scores.items()}
        stays = choose_weights(scores, share, self.plan.scope, self.plan.maximum)
        # A resumed run that is longer may want less gone than there is.
        self._mask({name: mask & self._stays[name] for name, mask in stays.items()})
        self._held.weights_to_zero()

    def state_dict(self) -> dict[str, Any]:
        """Return which blocks stay, scores so far, and settings."""
        sums = {} if self._taylor is None else self._taylor.state_dict()
        return {**super().state_dict(), "stays": {name: mask.cpu() for name, mask in self._stays.items()}, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up masks and scores.

        Raises:
            ValueError: if they are of other settings, or another model.
        """
        super().load_state_dict(state)
        shapes, own = ({name: len(mask) for name, mask in one.items()} for one in (state["stays"], self._stays))
        if shapes != own:
            raise ValueError(f"GradualSparsity must be resumed with the same model: it has blocks {own}, not {shapes}")
        self._mask({one.name: state["stays"][one.name].to(one.device) for one in self._groups})
        if self._taylor is not None:
            self._taylor.load_state_dict(state["sums"], self._groups[0].device)

    def _mask(self, stays: dict[str, Tensor]) -> None:
        """Take up which blocks stay, ``(blocks,)`` by weight."""
        if self._student is None:
            raise RuntimeError("masks need a run that has begun")
        self._stays = stays
        masks = self._masks()
        self._held = Held.by_name(self._student, masks)
        total = sum(mask.numel() for mask in masks.values())
        self._figures = {"sparsity": sum(int((~mask).sum()) for mask in masks.values()) / total}

    def _masks(self) -> dict[str, Tensor]:
        return weight_masks(self._groups, [self._stays[one.name] for one in self._groups])


class KeepSparse(StepCallback):
    """Keeps zeros in the weights of the student of a run: a sparse model that is trained further, or on other data.

    >>> distiller.train(optimizer, dataloader, num_epochs=1, step_callbacks=[KeepSparse(sparse.masks)])

    Args:
        masks: which weights stay; the others are set to zero as the run begins. ``None``: what is zero then stays zero,
            in the weights that ``modules`` and ``exclude`` name, as for :class:`SparsePruning`.
        modules: names or patterns, where there are no masks.
        exclude: names or patterns of what is left alone.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if there are both masks and patterns.
    """

    def __init__(
        self,
        masks: WeightMasks | Mapping[str, Tensor] | None = None,
        modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        check_patterns(modules, "modules")
        check_patterns(exclude, "exclude")
        if masks is not None and (modules is not None or exclude):
            raise ValueError("modules and exclude must be left out where masks are given, which say what is kept")
        self.masks = masks if masks is None or isinstance(masks, WeightMasks) else WeightMasks(masks)
        self._given, self._modules, self._exclude = masks is not None, modules, exclude
        self._student: nn.Module
        self._held: Held

    def begin(self, run: TrainingRun) -> None:
        """Find the zeros, or set them.

        Raises:
            ValueError: if there are none, or the masks are of another model.
            KeyError: if a pattern names what the model has not.
        """
        self._student = run.student
        if not self._given:
            groups = weight_groups(run.student, self._modules, self._exclude)
            found = {name: weight.detach() != 0 for one in groups for name, weight in one.parameters.items()}
            self.masks = WeightMasks({name: mask for name, mask in found.items() if not mask.all()} or found)
        self._take(self.masks)

    def after_backward(self, step: int) -> None:
        """Take the gradients of what is gone away."""
        self._held.gradients_to_zero()

    def after_step(self, step: int) -> None:
        """Set to zero what is gone."""
        self._held.weights_to_zero()

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": dict(self.masks or {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the masks.

        Raises:
            ValueError: if others were given, or they are of another model.
        """
        masks = WeightMasks(state["masks"])
        if self._given and not _same(masks, self.masks or {}):
            raise ValueError("KeepSparse must be resumed with the masks of the run before, got others")
        self._take(masks)

    def _take(self, masks: WeightMasks | None) -> None:
        if masks is None or all(bool(mask.all()) for mask in masks.values()):
            raise ValueError("the model must have weights that are zero, to be kept so, got none; prune it first")
        masks.check(self._student)
        self.masks, self._held = masks, Held.by_name(self._student, masks)
        self._held.weights_to_zero()


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in one.items())
