"""Heads, feed-forward units and hidden features that go one after the other while a model is trained, or distilled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from textbrewer import checks
from textbrewer.callbacks import TrainingRun
from textbrewer.compression.choosing import choose_uniform, choose_units
from textbrewer.compression.data_scores import DATA_SCORES, check_data
from textbrewer.compression.gates import close, open_gates
from textbrewer.compression.masked import Masked
from textbrewer.compression.on_schedule import OnSchedule
from textbrewer.compression.prune import Prune
from textbrewer.compression.pruning_schedules import PruningSchedule
from textbrewer.compression.running_taylor import (
    RunningTaylor,
    check_decay,
    check_trained,
    reader_weights,
    unit_terms,
)
from textbrewer.compression.sites import HIDDEN, Layout, Site, find_layout

__all__ = ["GradualPruning"]

_KINDS = ("heads", "ffn", HIDDEN)


class GradualPruning(OnSchedule):
    """Prunes the student of a run step by step: what is left learns to do without what went.

    >>> gradual = GradualPruning(Prune(heads=0.5, ffn=0.5, score="taylor"), end=0.6)
    >>> distiller.train(optimizer, dataloader, num_epochs=3, step_callbacks=[gradual])
    >>> small = gradual.shrink()

    At ``begin``, every so many steps, and at ``end`` the least important units are switched off by hooks, so many of
    them as the schedule says; at ``end`` as many as ``plan.apply`` would. What is gone stays gone, and no longer
    matters: neither for the student's outputs, which callbacks see as pruned as it is, nor for its gradients. With many
    steps between (``every``) this is pruning and training in turns.

    When the run is over the student stays under its masks, and can be trained further so; :meth:`shrink` returns the
    smaller model, :meth:`remove` takes the masks off. Masks and scores are kept in the run's checkpoints. Shares are
    logged as ``sparsity_heads``, ``sparsity_ffn`` and ``sparsity_hidden``.

    Args:
        plan: what goes, by which score, within which limits. The student's layers must all stay. Scores by weights are
            those of the student at the time. ``"taylor"`` is read from the run's own gradients, of the loss that it is
            trained by, with no pass over data: see :class:`~textbrewer.compression.running_taylor.RunningTaylor`.
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``: see
            :func:`~textbrewer.compression.pruning_schedules.sparsity_at`.
        begin: when the first go: an ``int`` counts optimiser steps, a ``float`` is a share of the run.
        end: when the last go.
        every: optimiser steps between two prunings.
        initial: the share that goes at ``begin``, of each kind.
        power: of the cubic schedule.
        decay: of ``score="taylor"``: what is left of a score after each step; 0.98 unless set.
        dataloader: batches for ``score="mean_activation"`` and ``"apoz"``, read anew for each pruning.

    Raises:
        ValueError: if a setting is out of its range, or the plan takes what cannot go while training.
        TypeError: if one is of the wrong kind.
    """

    def __init__(
        self,
        plan: Prune,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.6,
        every: int = 20,
        initial: float = 0.0,
        power: float = 3.0,
        decay: float | None = None,
        dataloader: Iterable[Any] | None = None,
    ) -> None:
        checks.is_a(plan, Prune, "plan", "a Prune")
        self._shares: dict[str, float] = {kind: getattr(plan, kind) for kind in _KINDS if getattr(plan, kind)}
        _check_plan(plan, self._shares, initial, dataloader)
        self.plan, self._dataloader, self._decay = plan, dataloader, check_decay(decay, plan.score)
        self._by_gradients = plan.score == "taylor"
        settings = {
            **self._shares,
            "score": plan.score if isinstance(plan.score, str) else "given",
            **{name: getattr(plan, name) for name in ("scope", "minimum", "maximum", "seed")},
            "exclude": list(plan.exclude),
            "decay": self._decay,
        }
        times = PruningSchedule(schedule, begin, end, every, initial, power)
        super().__init__(times, settings, self._by_gradients)
        self._student: nn.Module | None = None
        self._run: TrainingRun | None = None
        self._layout: Layout
        self._sites: list[Site] = []
        self._factors: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._taylor: RunningTaylor | None = None
        self._figures: dict[str, float] = {}

    @property
    def masked(self) -> Masked:
        """The student under its masks as they are now, with these.

        Raises:
            ValueError: if no run has begun.
        """
        if self._student is None:
            raise ValueError("the pruning must have begun: pass it to train(..., step_callbacks=[...]) first")
        masks = {name: factor.cpu() > 0 for name, factor in self._factors.items()}
        return Masked.seen(self._student, self._layout, masks)

    def sparsity(self) -> dict[str, float]:
        """Return the share of what is switched off, by component: see :meth:`Masked.sparsity`."""
        return self.masked.sparsity()

    def shrink(self) -> nn.Module:
        """Return a smaller copy of the student, without masks and what they switch off: see :meth:`Masked.shrink`."""
        return self.masked.shrink()

    def remove(self) -> None:
        """Take the masks off the student, which then computes with all of its weights, and forget it."""
        close(self._handles)
        self._student, self._run, self._taylor = None, None, None
        self._handles, self._factors = [], {}

    def begin(self, run: TrainingRun) -> None:
        """Look at the student, and put factors of 1 on its units.

        Raises:
            ValueError: if the plan or the schedule does not fit it, or it has masks already.
            KeyError: if the plan excludes what it has not.
        """
        if self._student is not None:
            raise ValueError(
                "GradualPruning must be new for each run, this one has pruned a model; make another one, after "
                "shrink(), or remove() if the same model is to start again or to be resumed"
            )
        super().begin(run)
        # Whatever cannot be is found out now: with any scores, the same units may go.
        places = replace(self.plan, score="random").choose(run.student)
        self._layout = find_layout(run.student, hidden=HIDDEN in self._shares)
        self._sites = [site for site in self._layout.sites if site.name in places]
        if self._by_gradients:
            weights = [(name, weight) for site in self._sites for name, weight, _ in reader_weights(run.student, site)]
            check_trained(weights, run.optimizer)
            self._taylor = RunningTaylor(unit_terms(run.student, self._sites), self._decay)
        elif isinstance(self.plan.score, Mapping):
            self.plan.scores(run.student, self._layout, self._sites, None, "auto")
        device = next(run.student.parameters()).device
        self._factors = {site.name: torch.ones(site.units, device=device) for site in self._sites}
        self._handles = open_gates(run.student, self._sites, self._factors)
        self._student, self._run = run.student, run
        self._note_figures()

    def after_backward(self, step: int) -> None:
        """Read the gradients."""
        if self._taylor is not None and self._last < self._end:
            self._taylor.add()

    def after_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Prune, if it is time; return the shares that are gone."""
        self.prune_if_due(step)
        return self._figures

    def prune(self, step: int) -> None:
        """Switch off what the schedule wants gone after a step."""
        shares = {kind: self.share(step, final) for kind, final in self._shares.items()}
        if not any(shares.values()):
            return
        scores = self._scores()
        for name, factors in self._factors.items():
            scores[name] = scores[name].cpu().double().masked_fill(factors.cpu() == 0, -torch.inf)
        for kind, share in shares.items():
            for name, mask in self._chosen(kind, scores, share).items():
                # In place, as the hooks hold it. A resumed run that is longer may want less gone than there is.
                self._factors[name].mul_(mask.to(self._factors[name].device))
        self._note_figures()

    def _chosen(self, kind: str, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Return which units of a kind stay, with the plan's limits."""
        plan, sites = self.plan, [site for site in self._sites if site.kind == kind]
        if kind == HIDDEN:  # one place, without limits
            return choose_uniform(sites, scores, share, 1)
        return choose_units(sites, scores, share, plan.scope, int(plan.minimum), plan.maximum)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, scores so far, and settings."""
        sums = {} if self._taylor is None else self._taylor.state_dict()
        masks = {name: factor.cpu() > 0 for name, factor in self._factors.items()}
        return {**super().state_dict(), "masks": masks, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up masks and scores.

        Raises:
            ValueError: if they are of other settings, or another model.
        """
        super().load_state_dict(state)
        shapes, own = ({name: len(value) for name, value in one.items()} for one in (state["masks"], self._factors))
        if shapes != own:
            raise ValueError(f"GradualPruning must be resumed with the same model: it has units {own}, not {shapes}")
        for name, factor in self._factors.items():
            factor.copy_(state["masks"][name])
        if self._taylor is not None:
            self._taylor.load_state_dict(state["sums"], next(iter(self._factors.values())).device)
        self._note_figures()

    def _scores(self) -> dict[str, Tensor]:
        """Return how important each unit is now, alike on all processes."""
        if self._taylor is not None:
            return self._taylor.scores()
        if self._student is None or self._run is None:
            raise RuntimeError("scores need a run that has begun")
        scores = self.plan.scores(self._student, self._layout, self._sites, self._dataloader, "auto")
        if self._dataloader is not None:  # each process may have had other batches
            device = next(self._student.parameters()).device
            scores = {name: score.to(device) for name, score in scores.items()}
            self._run.average(list(scores.values()))
        return scores

    def _note_figures(self) -> None:
        shares = self.sparsity()
        self._figures = {f"sparsity_{kind}": shares[kind] for kind in self._shares}


def _check_plan(plan: Prune, shares: Mapping[str, float], initial: float, dataloader: Iterable[Any] | None) -> None:
    """Raise ValueError unless a plan can be followed while training."""
    if plan.layers:
        raise ValueError(
            "layers must be 0 in a plan for GradualPruning, as heads, feed-forward units and hidden features can go "
            f"one after the other and whole layers cannot, got {plan.layers}; prune layers first, shrink, and train "
            "what comes out, or see TheseusDistiller"
        )
    if isinstance(initial, (int, float)) and initial > min(shares.values()):
        raise ValueError(f"initial must be at most each share that the plan takes, got {initial} and {dict(shares)}")
    needing = DATA_SCORES.keys() - {"taylor"}  # which reads the run's gradients here
    check_data(plan.score, needing, dataloader, "GradualPruning(..., dataloader=...)")
