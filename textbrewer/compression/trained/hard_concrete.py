"""Pruning by hard concrete factors under a constraint on the model's size, as CoFi does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from textbrewer import checks
from textbrewer.callbacks import StepCallback, TrainingRun
from textbrewer.compression.gates import close, open_gates
from textbrewer.compression.masks import Masks
from textbrewer.compression.pruning_schedules import PruningSchedule, sparsity_at, step_of
from textbrewer.compression.sites import Layout, find_layout
from textbrewer.compression.trained import concrete, targets
from textbrewer.compression.trained.expected_size import ExpectedSize
from textbrewer.compression.trained.holding import Held
from textbrewer.compression.trained.learned_factors import FactorSettings, LearnedFactors
from textbrewer.compression.trained.results import checked

__all__ = ["HardConcretePruning"]


class HardConcretePruning(StepCallback):
    r"""Prunes heads, feed-forward units and layers while training, until a given share of the parameters has gone.

    Each of them has a factor :math:`z` in its way, drawn anew for every optimiser step from a hard concrete
    distribution whose :math:`\ln\alpha` is learned with the loss and with

    .. math::
        \lambda_1 (s - t) + \lambda_2 (s - t)^2

    where :math:`s` is the expected share of the parameters inside the stacks of layers that is gone, and :math:`t`
    rises in a straight line to ``target``. :math:`\ln\alpha` goes down this term, the multipliers go up it.

    In eval mode the model has the factors of inference: of each site those with the lowest :math:`\ln\alpha` are 0, as
    many as are expected to be, and the others a little below 1. At ``end`` these are multiplied into the weights that
    read the heads and units, and the rest of the run trains what is left; the model comes out of ``train()`` without
    hooks. Whole layers that have gone are still in it, and go with :meth:`masks`. Weights that are saved before ``end``
    do not have the factors in them.

    >>> pruning = HardConcretePruning(0.6)
    >>> distiller.train(optimizer, dataloader, num_epochs=10, step_callbacks=[pruning])
    >>> small = Masked(student, pruning.masks()).shrink()

    Args:
        target: the share of the parameters inside the stacks of layers to remove, above 0 and below 1.
        heads: whether heads (groups of heads that share keys and values) may go.
        ffn: whether feed-forward units may.
        layers: whether whole layers may.
        begin: when the factors come in: an ``int`` counts optimiser steps, a ``float`` is a share of the run.
        ramp: when :math:`t` reaches ``target``.
        end: when the factors are fixed and multiplied into the weights.
        lr: learning rate of :math:`\ln\alpha` (Adam).
        lambda_lr: that of the multipliers; ``None``: ``lr``.
        drop_rate: about how likely a factor is 0 at first; all :math:`\ln\alpha` start at
            :math:`\ln(1 - p) - \ln p` and a little noise.
        temperature: :math:`\beta` of the distribution.
        minimum: how many heads and units stay in each place, and layers in each stack.
        exact: whether at ``end`` heads and units near the border are taken out, or in again, until ``target`` is met.
            Otherwise it is met about as well as the multipliers hold the constraint, as with the authors.
        exclude: names or patterns of modules whose heads and units all stay; not with ``layers``.
        seed: of the factors, the same on all processes.

    Raises:
        ValueError, TypeError: if a setting cannot be.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models" (CoFi), 2022, arXiv:2204.00408, sections 2.2
        and 3.1; hidden dimensions, and attention or feed-forward parts as a whole, are not pruned here. Louizos et al.,
        "Learning Sparse Neural Networks through L0 Regularization", 2018, arXiv:1712.01312.
    """

    def __init__(
        self,
        target: float,
        *,
        heads: bool = True,
        ffn: bool = True,
        layers: bool = False,
        begin: float = 0.0,
        ramp: float = 0.4,
        end: float = 0.8,
        lr: float = 1e-2,
        lambda_lr: float | None = None,
        drop_rate: float = 0.05,
        temperature: float = concrete.TEMPERATURE,
        minimum: int = 1,
        exact: bool = True,
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        checks.number(target, "target", above=0, below=1)
        switches = {"heads": heads, "ffn": ffn, "layers": layers}
        for name, switch in {**switches, "exact": exact}.items():
            checks.is_a(switch, bool, name, "True or False")
        self.kinds = [name for name, switch in switches.items() if switch]
        if not self.kinds:
            raise ValueError("one of heads, ffn and layers must be True, got none: nothing could be pruned")
        self.schedule = PruningSchedule("linear", begin, ramp, every=1)
        PruningSchedule("linear", ramp, end, every=1)
        for value, name in ((lr, "lr"), (lr if lambda_lr is None else lambda_lr, "lambda_lr")):
            checks.number(value, name, above=0)
        checks.number(drop_rate, "drop_rate", above=0, below=1)
        checks.number(temperature, "temperature", above=0)
        checks.integer(minimum, "minimum", minimum=1)
        targets.check_patterns(exclude, "exclude")
        if exclude and layers:
            raise ValueError(f"exclude must be empty with layers=True, got {list(exclude)}: it goes with its layer")
        checks.integer(seed, "seed")
        self.target, self.exact, self.end_of_pruning, self.exclude = float(target), exact, end, exclude
        rates = (lr, lr if lambda_lr is None else lambda_lr)
        self.settings = FactorSettings(*rates, drop_rate, temperature, int(minimum), int(seed))
        self._student: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._open = self._fixed = False

    def begin(self, run: TrainingRun) -> None:
        """Start with all units in.

        Raises:
            ValueError: if the run or its model cannot be pruned so.
            KeyError: if ``exclude`` names what the model has not.
        """
        self._student, self._handles = None, []
        self._open = self._fixed = False
        model = run.student
        layout = find_layout(model)
        self._sites = targets.chosen_sites(layout, model, self.kinds, self.exclude)
        units = [kind for kind in self.kinds if kind in targets.UNITS]
        self._groups = targets.unit_groups(model, units, self.exclude, readers=True) if units else []
        targets.check_run(run, {name: one for group in self._groups for name, one in group.parameters.items()})
        if "layers" in self.kinds:
            _check_places(model, layout)
        self._begin, self._ramp = targets.steps_of(self.schedule, run)
        self._end = step_of(self.end_of_pruning, run.total_steps, "end")
        if self._end < self._ramp:
            raise ValueError(f"end must not be before ramp, got the steps {self._end} and {self._ramp}")
        size = ExpectedSize(model, layout, self._sites)
        self._check_target(size)
        self._learned = LearnedFactors(self._sites, size, self.settings, next(model.parameters()).device)
        self._student, self._run = model, run

    def before_step(self, step: int) -> None:
        """Draw the factors of a step."""
        if step < self._begin or self._fixed:
            return
        if not self._open:
            self._put_on()
        self._learned.draw()

    def after_backward(self, step: int) -> None:
        """Learn the distributions and the multipliers."""
        if self._fixed:
            Held.of_groups(self._groups, self._stays()).gradients_to_zero()
        if self._fixed or not self._open:
            return
        gradients = self._learned.gradients()
        self._run.average(gradients)
        scale = self._run.loss_scale()
        gradients = [gradient / scale for gradient in gradients]
        if scale != 1 and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return  # fp16 may overflow here where the parameters' gradients did not
        self._learned.learn(gradients, self._target_at(step))

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor | float] | None:
        """Fix the factors when it is time."""
        if not self._open:
            return None
        if self._fixed:
            Held.of_groups(self._groups, self._stays()).weights_to_zero()
        elif step >= self._end:
            if self.exact:
                self._learned.meet(self.target)
            self._fix()
        lambdas = self._learned.lambdas.detach().clone()
        return {
            "hard_concrete_sparsity": self._learned.gone(),
            "hard_concrete_expected_sparsity": self._learned.expected(),
            "hard_concrete_target": self._target_at(step),
            "hard_concrete_lambda_1": lambdas[0],
            "hard_concrete_lambda_2": lambdas[1],
        }

    def end(self) -> None:
        """Take the factors off; after a run that stopped before ``end`` they are in the weights then, too."""
        if self._open and not self._fixed:
            self._fix()
        close(self._handles)
        self._handles = []

    def masks(self) -> Masks:
        """Return which units stay, for :class:`~textbrewer.compression.Masked`.

        Raises:
            ValueError: if there was no training yet.
        """
        checked(self._student)
        return Masks({name: factors > 0 for name, factors in self._learned.resting.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return what is learned of the factors, and how far they are."""
        state = {"learned": self._learned.state_dict(), "open": self._open, "fixed": self._fixed}
        return {"settings": self._settings(), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other settings.
        """
        targets.check_settings(self._settings(), state["settings"], type(self).__name__)
        self._learned.load_state_dict(state["learned"])
        if state["fixed"]:
            self._open = self._fixed = True
            if self.exact:
                self._learned.meet(self.target)
            self._keep_layers_off()
        elif state["open"]:
            self._put_on()

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the first one."""
        moments = [self.schedule.begin, self.schedule.end, self.end_of_pruning]
        return {
            "target": self.target,
            "exact": self.exact,
            "kinds": self.kinds,
            "moments": moments,
            **vars(self.settings),
        }

    def _put_on(self) -> None:
        self._handles = open_gates(checked(self._student), self._sites, self._learned.drawn, self._learned.resting)
        self._open = True

    @torch.no_grad()
    def _fix(self) -> None:
        """Multiply the factors into the weights, and leave only layers that have gone to hooks."""
        self._fixed = True
        close(self._handles)
        for one in self._groups:
            factors = one.spread(self._learned.resting[one.name])
            for parameter, factor in zip(one.parameters.values(), factors, strict=True):
                parameter.mul_(factor.to(parameter.dtype))
        self._keep_layers_off()

    def _keep_layers_off(self) -> None:
        layers = [site for site in self._sites if site.inner is None]
        self._handles = open_gates(checked(self._student), layers, self._learned.resting)

    def _stays(self) -> list[Tensor]:
        return [self._learned.resting[one.name] > 0 for one in self._groups]

    def _target_at(self, step: int) -> float:
        return self.target * sparsity_at("linear", step, self._begin, self._ramp, 0.0, 1.0)

    def _check_target(self, size: ExpectedSize) -> None:
        """Raise ValueError if more is to go than can."""
        least = concrete.probability_kept(torch.tensor(-concrete.LOG_ALPHA_LIMIT), self.settings.temperature)
        kept = {}
        for site in self._sites:
            stays = min(self.settings.minimum, site.units) / site.units
            kept[site.name] = least.clamp(min=stays).expand(site.units)
        most = float(size(kept))
        if self.target > most:
            raise ValueError(
                f"target must be at most {most:.3f}, what {' and '.join(self.kinds)} can give of the parameters inside "
                f"the layers, got {self.target}"
            )


def _check_places(model: nn.Module, layout: Layout) -> None:
    """Raise ValueError for a model whose layers compute by their place, of which not any may go."""
    for field in layout.structure.family.by_position:
        if getattr(getattr(model, "config", None), field, False):
            raise ValueError(f"layers must be False where config.{field} is set: a layer depends on its place there")
