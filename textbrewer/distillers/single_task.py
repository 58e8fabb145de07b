"""``train()`` of the distillers that have one dataloader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from textbrewer.callbacks import StepCallback
from textbrewer.distillers import running, training
from textbrewer.distillers.base import BaseDistiller
from textbrewer.engine import Source


class SingleTaskDistiller(BaseDistiller):
    """A distiller with one task; see the subclasses."""

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
        """Train the student.

        A dict batch calls the models by keywords, a tuple or list by position, anything else as the one input; a dict
        with the keys ``'teacher'`` and ``'student'`` (and ``'teacher_cache'``: what the teacher would return) feeds
        each side its own part.

        Args:
            optimizer: over the student's parameters; projections join it as further parameter groups.
            dataloader: yields batches; with ``num_steps`` it is read again and again and needs no length.
            num_epochs: passes over the data.
            scheduler_class: learning-rate schedule, made as ``scheduler_class(optimizer=optimizer, **scheduler_args)``.
            scheduler_args: its arguments.
            scheduler: a schedule made beforehand; prefer ``scheduler_class``, which sees the projections too.
            max_grad_norm: clips the gradients of student and projections to this norm; not positive: no clipping.
            num_steps: optimiser steps; counts before ``num_epochs``.
            callback: ``callback(model=student, step=global_step)``, called after each checkpoint.
            batch_postprocessor: applied to each batch.
            resume_from: a folder ``checkpoint-<step>``, or ``"latest"``: the newest in the output folder, if there is
                one. Training goes on as if it had never stopped.
            step_callbacks: take part in every optimiser step, as pruning while training does; see
                :class:`~textbrewer.callbacks.StepCallback`.
            **args: further arguments of both models.

        Raises:
            TypeError, ValueError, KeyError: if an argument, or what the adaptors return for the first batch, cannot
                work; before the first update.
            NonFiniteError: if a loss or gradient is NaN or infinite.
        """
        training.check_model_arguments(self.train, args, [*self.teachers.all(), self.model_S])
        arguments = running.Arguments(
            optimizer,
            num_epochs,
            num_steps,
            scheduler_class,
            scheduler_args,
            scheduler,
            max_grad_norm,
            callback,
            resume_from,
            args,
            step_callbacks,
        )
        postprocessors = {"": self._postprocessor(batch_postprocessor)}
        data = running.Data({"": dataloader}, postprocessors, lambda sources: self._source(sources[""]))
        running.train(self, arguments, data)

    def _postprocessor(self, given: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        """Return what is applied to each batch, of which the user's own is given."""
        return given

    def _source(self, batches: Source) -> Source:
        """Return where the batches come from."""
        return batches
