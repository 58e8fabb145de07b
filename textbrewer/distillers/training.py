"""What every kind of training here does around the engine: checks, projections in the optimiser, schedules."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from textbrewer import checks
from textbrewer.callbacks import StepCallback
from textbrewer.engine.checkpoint import check_writable
from textbrewer.names import nearest, suggestion

# Arguments that train() of one kind of distiller has, and that of another has not.
_OF_OTHER_DISTILLERS = ("batch_postprocessor", "batch_postprocessors", "dataloader", "dataloaders", "num_epochs", "tau")
# So like each other are misspelt and abbreviated names ("resume", "lr_scheduler"); arguments of models are below 0.6.
_RESEMBLES = 0.65

ParameterGroup = tuple[nn.Module, dict[str, Any]]


def check_arguments(
    optimizer: Any,
    student: nn.Module,
    output_dir: str,
    max_grad_norm: float,
    callback: Callable[..., Any] | None,
    resume_from: str | os.PathLike[str] | None,
    step_callbacks: Sequence[StepCallback] = (),
) -> None:
    """Raise for arguments of ``train()`` that cannot work, before anything is done.

    Raises:
        TypeError: if one is of another type.
        ValueError: if the optimiser has none of the student's parameters, or the output folder cannot be written.
    """
    checks.is_a(optimizer, torch.optim.Optimizer, "optimizer", "a torch optimizer over the student's parameters")
    checks.is_a(max_grad_norm, (int, float), "max_grad_norm", "a number")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function (model=..., step=...), got {callback!r}")
    if resume_from is not None:
        checks.is_a(resume_from, (str, os.PathLike), "resume_from", "'latest' or a checkpoint's folder")
    checks.is_a(step_callbacks, (list, tuple), "step_callbacks", "a list of StepCallback")
    for number, item in enumerate(step_callbacks):
        checks.is_a(item, StepCallback, f"step_callbacks[{number}]", "a textbrewer.callbacks.StepCallback")
    trainable = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the student must have parameters with requires_grad=True, all of them are frozen")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable & held:
        raise ValueError(
            "optimizer must hold the student's parameters, it holds none of them; "
            "make it of model_S.parameters(), after moving or replacing parts of the student"
        )
    check_writable(Path(output_dir))


def check_model_arguments(train: Callable[..., None], given: Mapping[str, Any], models: Iterable[nn.Module]) -> None:
    """Raise for what was given as a further argument of the models, but was meant for ``train()`` itself.

    Models of transformers take any argument and ignore those that they do not know, so nothing else would tell.

    Args:
        train: the method that was called.
        given: the further arguments.
        models: those that get them.

    Raises:
        TypeError: if an argument's name resembles one of ``train()``, of this or another distiller, and no model's
            ``forward()`` names it.
    """
    if not given:
        return
    own = [name for name, item in inspect.signature(train).parameters.items() if item.kind is not item.VAR_KEYWORD]
    taken = {name for model in models for name in inspect.signature(model.forward).parameters}
    for name, value in given.items():
        if name not in taken and nearest(name, [*own, *_OF_OTHER_DISTILLERS], _RESEMBLES):
            raise TypeError(
                f"train() has no argument {name!r}, given as {value!r}: {suggestion(name, own)}; further arguments go "
                "to the models, and none of them names this one in its forward()"
            )


def check_loader(loader: Any, name: str) -> None:
    """Raise TypeError unless a loader can be iterated."""
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches such as a DataLoader, got {type(loader).__name__}")


def add_projections(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], scheduler: Any) -> None:
    """Add each projection's parameters to the optimiser, once.

    A learning-rate schedule made before knows nothing of them; a ``LambdaLR`` is told to treat them as its last group.

    Raises:
        ValueError: if the schedule made before cannot take them.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module, options in groups:
        fresh = [parameter for parameter in module.parameters() if id(parameter) not in held]
        if not fresh:
            continue
        if scheduler is not None:
            _extend(scheduler, options.get("lr", optimizer.defaults.get("lr")))
        optimizer.add_param_group({"params": fresh, **options})
        if scheduler is not None:
            optimizer.param_groups[-1].setdefault("initial_lr", scheduler.base_lrs[-1])


def _extend(scheduler: Any, learning_rate: Any) -> None:
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} was made before the projections joined the optimizer; "
            "pass scheduler_class and scheduler_args instead, so that it is made afterwards"
        )
    scheduler.base_lrs.append(learning_rate)
    scheduler.lr_lambdas.append(scheduler.lr_lambdas[-1])


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    scheduler_class: Callable[..., Any] | None,
    scheduler_args: Mapping[str, Any] | None,
    scheduler: Any,
) -> Any:
    """Return the learning-rate schedule: ``scheduler_class(optimizer=..., **scheduler_args)``, else ``scheduler``.

    Raises:
        TypeError: if the arguments do not fit the class.
        ValueError: for arguments without a class.
    """
    if scheduler_class is None:
        if scheduler_args is not None:
            raise ValueError(f"scheduler_args={scheduler_args!r} needs scheduler_class")
        return scheduler
    try:
        return scheduler_class(optimizer=optimizer, **(scheduler_args or {}))
    except TypeError as error:
        name = getattr(scheduler_class, "__name__", repr(scheduler_class))
        raise TypeError(f"scheduler_class {name} does not take scheduler_args={scheduler_args!r}: {error}") from error
