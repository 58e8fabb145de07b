"""Whether a checkpoint fits the run that is to go on from it, found out before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from textbrewer.engine import checkpoint

if TYPE_CHECKING:
    from textbrewer.engine.job import Job

STEP_CALLBACKS = "step_callbacks"
"""The key of their states in a checkpoint."""
LAYERS = "layers"
"""The key, in a checkpoint's ``state.json``, of how many layers of each class the student and projections had."""
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


def layer_classes(model: nn.Module) -> dict[str, int]:
    """Return how many layers of each class a model has: modules with parameters of their own, by class name."""
    return dict(Counter(type(module).__name__ for module in model.modules() if list(module.parameters(recurse=False))))


def check_layers(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Check that student and projections compute with the layers that wrote the checkpoint.

    Their tensors do not tell: a linear map that rounds to int8 as it is trained has those of a plain one.

    Args:
        path: the checkpoint.
        state: its ``state.json``.
        model: student and projections.

    Raises:
        ValueError: if there were more or fewer layers of some class.
    """
    written, own = state.get(LAYERS), layer_classes(model)
    if written is None or written == own:  # none in a checkpoint of an earlier version
        return
    kinds = sorted(kind for kind in {*written, *own} if written.get(kind, 0) != own.get(kind, 0))
    counts = [", ".join(f"{found.get(kind, 0)} {kind}" for kind in kinds) for found in (written, own)]
    raise ValueError(
        f"the checkpoint {str(path)!r} was written by a student (or projections) with other layers: {counts[0]}; here "
        f"there are {counts[1]}. Make the student as it was when the run began, with prepare_qat_ if it was called then"
    )


def check_training(path: Path, training: Mapping[str, Any], job: Job) -> None:
    """Check that a checkpoint's optimiser, schedule and step callbacks are those of this run.

    Args:
        path: the checkpoint.
        training: what its file for them holds.
        job: this run's.

    Raises:
        ValueError: if they are others.
    """
    optimizer = job.optimizer
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
    if (job.scheduler is None) != (training["scheduler"] is None):
        has = "has no" if training["scheduler"] is None else "has a"
        raise ValueError(f"the checkpoint {str(path)!r} {has} learning-rate schedule; resume with the same")
    theirs = [entry["class"] for entry in training.get(STEP_CALLBACKS, [])]
    mine = [class_name(callback) for callback in job.step_callbacks]
    if theirs != mine:
        raise ValueError(
            f"the checkpoint {str(path)!r} was written with step_callbacks {theirs} and must be resumed with as many "
            f"of the same kinds, got {mine}"
        )


def class_name(thing: Any) -> str:
    """Return the name of an optimiser's or a callback's class."""
    return type(thing).__name__
