"""Supervised training of one model, to make a teacher or a baseline."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import adaptors, checks, engine
from textbrewer.adaptors import Adaptor
from textbrewer.callbacks import StepCallback
from textbrewer.configurations import TrainingConfig
from textbrewer.distillers import first_step, terms, training, weighting
from textbrewer.distillers.compiling import compiled
from textbrewer.distillers.student import StudentModule
from textbrewer.hooks.forward import Modes, modes_of, set_modes


class BasicTrainer:
    """Trains a model on the sum of its adaptor's ``losses``.

    Args:
        train_config: how to train.
        model: the model.
        adaptor: what its outputs mean, or ``"auto"`` for a transformers model; must return ``losses``.
    """

    def __init__(self, train_config: TrainingConfig, model: nn.Module, adaptor: Adaptor | str) -> None:
        checks.is_a(train_config, TrainingConfig, "train_config", "a TrainingConfig")
        checks.is_a(model, nn.Module, "model", "a torch module")
        self.t_config = dataclasses.replace(train_config)
        self.model = model
        self.adaptor = adaptors.resolve(adaptor, "adaptor")
        self._modes_before: Modes | None = None

    def __enter__(self) -> BasicTrainer:
        """Put the model in train mode."""
        self._modes_before = modes_of([self.model])
        self.model.train()
        return self

    def __exit__(self, *error: object) -> None:
        """Put the mode back."""
        if self._modes_before is not None:
            set_modes(self._modes_before)
            self._modes_before = None

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        dataloader: Iterable[Any],
        num_epochs: int | None = None,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        max_grad_norm: float = -1.0,
        num_steps: int | None = None,
        callback: Callable[..., Any] | None = None,
        batch_postprocessor: Callable[[Any], Any] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        step_callbacks: Sequence[StepCallback] = (),
        **args: Any,
    ) -> None:
        """Train the model; the arguments are those of :meth:`GeneralDistiller.train`.

        Raises:
            TypeError, ValueError, KeyError: if an argument, or what the adaptor returns, cannot work.
            NonFiniteError: if a loss or gradient is NaN or infinite.
        """
        self._check_config()
        training.check_loader(dataloader, "dataloader")
        training.check_model_arguments(self.train, args, self._called_models())
        folder = self.t_config.output_dir
        training.check_arguments(optimizer, self.model, folder, max_grad_norm, callback, resume_from, step_callbacks)
        engine.plan_steps(self.t_config, num_epochs, num_steps, [engine.size_of(dataloader)])
        modes: AbstractContextManager[Any] = self if self._modes_before is None else nullcontext()
        models = [self.model] if self.t_config.compile else []
        with engine.Runtime(self.t_config) as runtime, modes, self._prepared(runtime), compiled(models, "model"):
            loader = engine.shard(dataloader, runtime)
            # The second plan, of what each process reads; a warning about both lengths was given with the first.
            epochs = num_epochs if num_steps is None else None
            plan = engine.plan_steps(self.t_config, epochs, num_steps, [engine.size_of(loader)])
            exact = self.t_config.accumulation_weighting == "positions"
            job = engine.Job(
                module=self._module().to(runtime.device),
                student=self.exported,
                optimizer=optimizer,
                source=engine.LoaderBatches(loader, batch_postprocessor),
                step=self._step(runtime, args, plan),
                scheduler=training.make_scheduler(optimizer, scheduler_class, scheduler_args, scheduler),
                max_grad_norm=max_grad_norm,
                callback=callback,
                shares=(lambda batches: weighting.shares(batches, runtime, self.count_positions)) if exact else None,
                settings=self.t_config.to_dict(),
                step_callbacks=step_callbacks,
            )
            engine.run(job, self.t_config, runtime, plan, resume_from)

    @property
    def exported(self) -> nn.Module:
        """The model that ``gs<step>.pkl`` and the callback are about."""
        return self.model

    def _called_models(self) -> list[nn.Module]:
        """Return the models that get batches and further arguments."""
        return [self.model]

    def _module(self) -> nn.Module:
        """Return the module to train."""
        return StudentModule(self.model, {"": self.adaptor}, {})

    def _prepared(self, runtime: engine.Runtime) -> AbstractContextManager[None]:
        """Return the context in which the module is trained."""
        return nullcontext()

    def _step(self, runtime: engine.Runtime, model_args: dict[str, Any], plan: engine.StepPlan) -> engine.Step:
        """Return the function of one forward pass."""
        return SupervisedStep(runtime, model_args, type(self).__name__)

    def _check_config(self) -> None:
        """Raise ValueError for settings of a teacher, which is not here."""
        if self.t_config.compile == "teacher":
            raise ValueError("compile='teacher': a BasicTrainer has no teacher; use compile=True, or 'student'")
        if self.t_config.teacher_precision is not None:
            raise ValueError(
                f"teacher_precision={self.t_config.teacher_precision!r}: a BasicTrainer has no teacher; use precision"
            )

    def count_positions(self, batch: Any) -> weighting.Counts:
        """Count what the losses average over; see :meth:`GeneralDistiller.count_positions`."""
        return weighting.count_positions(batch)


class SupervisedStep:
    """One forward pass: the model's own losses.

    Args:
        runtime: the machine.
        model_args: further arguments of the model.
        who: the trainer's class, for messages.
    """

    def __init__(self, runtime: engine.Runtime, model_args: dict[str, Any], who: str) -> None:
        self.runtime, self.model_args, self.who = runtime, model_args, who

    def __call__(
        self, module: Callable[..., Any], batch: Any, progress: float, share: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the adaptor's losses; there is nothing more to log."""
        batch = self.runtime.to_device(batch)
        with first_step.explained(batch):
            views = adaptors.Views(module(batch, self.model_args)["views"])
        if "losses" not in views:
            raise KeyError(
                f"{self.who} optimises 'losses', but the adaptor returned only {sorted(views)}; return the loss "
                "under that key (a transformers model has one when the batch has labels)"
            )
        now = terms.Now(0.0, 1.0, share)
        loss, _ = terms.total(terms.hard_label_terms(views, now), now)
        return loss, {}
