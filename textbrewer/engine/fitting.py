"""Whether a checkpoint fits the run that is to go on from it, found out before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from textbrewer.engine import checkpoint

Shapes = Mapping[str, tuple[int, ...]]


def check_model(path: Path, model: nn.Module) -> None:
    """Check that a checkpoint holds the tensors of ``model``, student and projections.

    Raises:
        ValueError: if the file cannot be read or belongs to another student.
    """
    try:
        with safe_open(str(path / checkpoint.MODEL_FILE), framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except checkpoint.UNREADABLE as error:
        raise checkpoint.damaged(path, f"{checkpoint.MODEL_FILE}: {error}") from error
    difference = _difference(stored, model)
    if difference is not None:
        raise ValueError(
            f"the checkpoint {str(path)!r} belongs to another student or other projections: {difference}; resume with "
            "the models and the configuration that it was written with"
        )


def _difference(stored: Shapes, model: nn.Module) -> str | None:
    """Return the first thing that keeps stored tensors from being the model's, ``None`` if there is none."""
    own = model.state_dict()
    for name, shape in stored.items():
        if name not in own:
            return f"it has {name!r}, which there is not here"
        if tuple(own[name].shape) != shape:
            return f"{name!r} has the shape {shape} there, {tuple(own[name].shape)} here"
    # Of tensors that share memory, tied weights, only one is stored.
    memory = {own[name].untyped_storage().data_ptr() for name in stored}
    for name, value in own.items():
        if name not in stored and value.untyped_storage().data_ptr() not in memory:
            return f"it lacks {name!r}"
    return None


def check_training(path: Path, training: Mapping[str, Any], optimizer: Any, scheduler: Any) -> None:
    """Check that a checkpoint's optimiser and schedule are those of this run.

    Args:
        path: the checkpoint.
        training: what its file for optimiser and schedule holds.
        optimizer: this run's.
        scheduler: this run's, or ``None``.

    Raises:
        ValueError: if they are others.
    """
    written, own = training["optimizer_class"], class_name(optimizer)
    if written != own:
        raise ValueError(f"the checkpoint {str(path)!r} is of another optimizer: {written}, not {own}")
    sizes = [
        [len(group["params"]) for group in groups]
        for groups in (training["optimizer"]["param_groups"], optimizer.param_groups)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint {str(path)!r} is of another optimizer (other parameter groups): it has groups of "
            f"{sizes[0]} parameters, this one of {sizes[1]}"
        )
    if (scheduler is None) != (training["scheduler"] is None):
        has = "has no" if training["scheduler"] is None else "has a"
        raise ValueError(f"the checkpoint {str(path)!r} {has} learning-rate schedule; resume with the same")


def class_name(optimizer: Any) -> str:
    """Return the name of an optimiser's class."""
    return type(optimizer).__name__
