"""BERT-of-Theseus: a model compressed by replacing groups of its blocks, at random and ever more often."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.configurations import TrainingConfig
from textbrewer.distillers.frozen import frozen, untrained
from textbrewer.distillers.replaced_forward import TheseusModule, TheseusStep
from textbrewer.distillers.replacement import Rate
from textbrewer.distillers.successor import make_successor
from textbrewer.distillers.trainer import BasicTrainer, SupervisedStep
from textbrewer.engine import Runtime, StepPlan
from textbrewer.hooks.forward import modes_of, set_modes

__all__ = ["TheseusDistiller"]

FINETUNED = "finetuned"
"""Folder of the second phase, in the output folder and in that of the log."""

# What is kept or collected of the blocks, which are others in each step.
_OF_BLOCKS = ("use_cache", "output_hidden_states", "output_attentions")


class TheseusDistiller(BasicTrainer):
    r"""Compresses a model by module replacement: no loss between models, only the task's own.

    The predecessor's stack of n blocks is divided into k groups, for each of which the successor has one block. In
    each training forward pass, for each group :math:`i`,

    .. math:: y_{i+1} = r_i\, \mathrm{scc}_i(y_i) + (1 - r_i)\, \mathrm{prd}_i(y_i), \qquad
        r_i \sim \mathrm{Bernoulli}(p_t)

    and only the successor's blocks are trained. The replacing rate :math:`p_t` is constant, or grows to 1: then the
    successor's blocks run alone. The gradient of a block that does not run is zero, as by the formula.

    >>> distiller = TheseusDistiller(train_config, predecessor, successor_layers=3)
    >>> with distiller:
    ...     optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=2e-5)
    ...     distiller.train(optimizer, dataloader, num_epochs=5)
    ...     optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=2e-5)
    ...     distiller.finetune(optimizer, dataloader, num_epochs=2)
    >>> distiller.successor.save_pretrained("successor")

    :meth:`train` takes the arguments of :meth:`BasicTrainer.train`; the dataloader must have a length, or the run
    ``num_steps``. ``gs<step>.pkl`` holds the successor, the callback gets the successor, which then runs alone. The
    log has ``replacement_rate`` and ``replaced``, the share of successor's blocks that ran. Rate and draws follow from
    the seed and the step: they are the same on all processes and after a resume.

    While it trains, the predecessor's blocks are in training mode too (with their dropout), as the authors have it;
    batch statistics of what is frozen stay. Caches, and the collecting of hidden states and attentions, are off.

    Args:
        train_config: how to train; without ``compile`` and ``data_parallel``, except for :meth:`finetune`.
        predecessor: the model to compress, trained on the task. It is left as it is, but for its device.
        successor_layers: k, the number of the successor's blocks. Where k does not divide n, the sizes of the groups
            differ by one: of 5 blocks in 2 groups 0-2 and 3-4.
        adaptor: what the model's outputs mean, or ``"auto"`` for a transformers model; must return ``losses``.
        schedule: ``"linear"``: p = min(1, k t + b) after t optimiser steps; ``"constant"``: p = b.
        base_rate: b; ``None``: 0.3 for linear, 0.5 for constant.
        rate_step: the slope, k in the formula of the rate; the authors have 0.0006 for MRPC. ``None``: what
            ``full_at`` asks for.
        full_at: the share of the run after which the linear rate is 1; ``None``: 0.7.
        blocks: the dotted name of the predecessor's ``nn.ModuleList``, where it is not its only longest one, and for
            models with encoder and decoder.
        init: the predecessor's blocks that the successor's start as: ``"uniform"``, the last of each group;
            ``"first"``, the first k, as the authors have it; or a list of k numbers.
        freeze: keep what is outside the blocks (embeddings, head) as it is, as the authors do; ``False``: it is
            trained too, in the successor's copy.
        seed: of the draws.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work; the message names it.

    Reference:
        Xu et al., "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing", 2020, arXiv:2002.02925,
        section 3.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        predecessor: nn.Module,
        successor_layers: int,
        adaptor: Adaptor | str = "auto",
        schedule: str = "linear",
        *,
        base_rate: float | None = None,
        rate_step: float | None = None,
        full_at: float | None = None,
        blocks: str | None = None,
        init: str | Sequence[int] = "uniform",
        freeze: bool = True,
        seed: int = 0,
    ) -> None:
        checks.is_a(train_config, TrainingConfig, "train_config", "a TrainingConfig")
        checks.is_a(predecessor, nn.Module, "predecessor", "a torch module")
        checks.is_a(freeze, bool, "freeze", "True or False")
        checks.integer(seed, "seed")
        self.rate = Rate(schedule, base_rate, rate_step, full_at)
        self.freeze, self.seed = freeze, int(seed)
        self.predecessor = predecessor
        self.successor, self.mixture = make_successor(predecessor, successor_layers, blocks, init)
        super().__init__(train_config, self.successor, adaptor)

    def trainable_parameters(self, freeze: bool | None = None) -> list[nn.Parameter]:
        """Return the successor's parameters that are trained, for the optimiser.

        Args:
            freeze: only those of the blocks, or all; ``None``: as the distiller.
        """
        freeze = self.freeze if freeze is None else freeze
        return list((self.mixture.stack.blocks if freeze else self.successor).parameters())

    def finetune(
        self,
        optimizer: Any,
        dataloader: Iterable[Any],
        num_epochs: int | None = None,
        *,
        freeze: bool | None = None,
        **arguments: Any,
    ) -> None:
        """Train the successor alone, the second phase.

        Checkpoints and log go to a folder ``finetuned`` in those of the first phase.

        Args:
            optimizer: a new one, over :meth:`trainable_parameters`.
            dataloader: the batches.
            num_epochs: passes over the data.
            freeze: as that of the distiller; ``None``: the same.
            **arguments: the others of :meth:`BasicTrainer.train`.

        Raises:
            TypeError, ValueError, KeyError: if an argument, or what the adaptor returns, cannot work.
        """
        folders = {name: getattr(self.t_config, name) for name in ("output_dir", "log_dir")}
        changes: Any = {name: os.path.join(path, FINETUNED) for name, path in folders.items() if path is not None}
        trainer = BasicTrainer(dataclasses.replace(self.t_config, **changes), self.successor, self.adaptor)
        with self._frozen(self.freeze if freeze is None else freeze):
            trainer.train(optimizer, dataloader, num_epochs, **arguments)

    @property
    def exported(self) -> nn.Module:
        """The model that ``gs<step>.pkl`` and the callback are about: the successor."""
        return self.successor

    def _module(self) -> nn.Module:
        return TheseusModule(self.successor, self.adaptor, self.mixture)

    def _step(self, runtime: Runtime, model_args: dict[str, Any], plan: StepPlan) -> Any:
        for name in _OF_BLOCKS:
            if model_args.get(name):
                raise ValueError(
                    f"{name} must not be asked for in module replacement, where other blocks run in each step; "
                    "leave it out"
                )
        if plan.total_steps is None:
            raise ValueError(
                "module replacement must know the run's length, but the dataloader has none: give num_steps"
            )
        inner = SupervisedStep(runtime, model_args, type(self).__name__)
        return TheseusStep(inner, self.rate, plan.total_steps, self.seed, len(self.mixture.groups))

    @contextmanager
    def _prepared(self, runtime: Runtime) -> Iterator[None]:
        """Freeze what is not trained, and let the predecessor's blocks run as in training."""
        modes = modes_of([self.predecessor])
        self.predecessor.to(runtime.device)
        try:
            for block in self.mixture.predecessor:
                block.train()
                _stay(_with_statistics(block.modules()))
            with frozen([self.predecessor], self.successor), self._frozen(self.freeze):
                yield
        finally:
            set_modes(modes)

    @contextmanager
    def _frozen(self, freeze: bool) -> Iterator[None]:
        """Keep parameters and statistics outside the successor's blocks as they are, if ``freeze``."""
        if not freeze:
            yield
            return
        inside = {id(parameter) for parameter in self.mixture.stack.blocks.parameters()}
        held = [item for item in self.successor.parameters() if id(item) not in inside]
        modules = {id(module) for module in self.mixture.stack.blocks.modules()}
        still = _with_statistics(module for module in self.successor.modules() if id(module) not in modules)
        # At each pass, as the model is put in training mode again after each callback.
        hook = self.successor.register_forward_pre_hook(lambda *call: _stay(still)) if still else None
        try:
            with untrained(held):
                yield
        finally:
            if hook is not None:
                hook.remove()

    def _check_config(self) -> None:
        super()._check_config()
        if self.t_config.data_parallel:
            raise ValueError(
                "data_parallel must be False for module replacement, as its copies of the model would share one list "
                "of blocks; use torchrun for several GPUs"
            )
        if self.t_config.compile:
            raise ValueError(
                f"compile must be False for module replacement, where other blocks run in each step, got "
                f"{self.t_config.compile!r}"
            )
        for module in [*self.successor.modules(), *self.predecessor.modules()]:
            function = getattr(module, "_gradient_checkpointing_func", None)
            reentrant = isinstance(function, partial) and function.keywords.get("use_reentrant", True)
            if reentrant and getattr(module, "gradient_checkpointing", False):
                raise ValueError(
                    "gradient checkpointing must be that without re-entrance, as the first block's inputs have no "
                    "gradient; enable it with use_reentrant=False"
                )


def _with_statistics(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of the modules that keep statistics of the batches they see."""
    return [module for module in modules if getattr(module, "running_mean", None) is not None]


def _stay(modules: Iterable[nn.Module]) -> None:
    """Keep these modules from looking at the batch."""
    for module in modules:
        module.training = False
