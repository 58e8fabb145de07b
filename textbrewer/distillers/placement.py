"""Where each of several teachers runs, and in which precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from textbrewer import checks
from textbrewer.adaptors import Views
from textbrewer.configurations.training import TEACHER_PRECISIONS
from textbrewer.engine import Runtime, warn_of_emulation


class Placement:
    """Devices and precisions of the teachers of a task, by their number.

    Args:
        devices: one each; ``None`` (also for one of them): the run's device.
        precisions: one each; ``None`` (also for one of them): ``TrainingConfig.teacher_precision``.
    """

    def __init__(
        self,
        devices: Sequence[torch.device | str | None] | None = None,
        precisions: Sequence[str | None] | None = None,
    ) -> None:
        self.devices = None if devices is None else [item if item is None else torch.device(item) for item in devices]
        self.precisions = None if precisions is None else list(precisions)

    def device(self, runtime: Runtime, number: int) -> torch.device:
        """Return the device of a teacher."""
        own = None if self.devices is None else self.devices[number]
        return runtime.device if own is None else own

    def precision(self, runtime: Runtime, number: int) -> str | None:
        """Return the precision of a teacher's own; ``None``: that of the run."""
        own = None if self.precisions is None else self.precisions[number]
        return runtime.config.teacher_precision if own is None else own

    def check(self, runtime: Runtime) -> None:
        """Raise ValueError if a precision cannot be had on its device, or in this run."""
        for number, precision in enumerate(self.precisions or []):
            if precision is None:
                continue
            kind, given = self.device(runtime, number).type, f"teacher_precisions[{number}]={precision!r}"
            if runtime.precision == "apex":
                raise ValueError(f"{given} is not for precision='apex', whose opt_level rules the teachers too")
            if precision == "fp16" and kind == "cpu":
                raise ValueError(f"{given} needs a GPU, and this teacher's device is 'cpu'; use 'bf16' there")
            if precision == "int8" and kind != "cpu":
                raise ValueError(f"{given} is for CPUs, and this teacher's device is {kind!r}; use 'bf16' there")
            if precision == "int8" and runtime.config.compiles("teacher"):
                raise ValueError(f"{given}: a teacher in int8 cannot be compiled; use compile='student', or 'bf16'")
            warn_of_emulation(f"teacher_precisions[{number}]", precision, kind)

    def autocast(self, runtime: Runtime, number: int) -> AbstractContextManager[Any]:
        """Return the context in which a teacher's forward pass has its precision."""
        return runtime.teacher_autocast(self.precision(runtime, number), self.device(runtime, number))

    def sent(self, runtime: Runtime, number: int, batch: Any) -> Any:
        """Return a batch on a teacher's device."""
        device = self.device(runtime, number)
        return batch if device == runtime.device else runtime.to_device(batch, device)

    def returned(self, runtime: Runtime, number: int, views: Views) -> Views:
        """Return a teacher's views on the run's device."""
        return views if self.device(runtime, number) == runtime.device else moved(views, runtime.to_device)


def moved(views: Views, to_device: Callable[[Any], Any]) -> Views:
    """Return views on another device."""
    there = Views(to_device(dict(views)), captured=to_device(views.captured))
    there.reduced = to_device(views.reduced)
    return there


def make_placement(devices: Any, precisions: Any, models: Sequence[Any]) -> Placement:
    """Return devices and precisions as a distiller is given them.

    Args:
        devices: a list of one a teacher, or ``None``.
        precisions: likewise.
        models: the teachers.

    Raises:
        TypeError: if one is no list.
        ValueError: if there are not as many as teachers, a precision is unknown, or a teacher that is in the list
            twice is to be on two devices.
    """
    for name, given in (("teacher_devices", devices), ("teacher_precisions", precisions)):
        if given is None:
            continue
        checks.is_a(given, (list, tuple), name, "a list of one a teacher")
        if len(given) != len(models):
            raise ValueError(f"{name} must have one entry a teacher ({len(models)}), got {len(given)}")
    for number, precision in enumerate(precisions or []):
        if precision is not None:
            checks.one_of(precision, TEACHER_PRECISIONS, f"teacher_precisions[{number}]")
    placement = Placement(devices, precisions)
    places: dict[int, torch.device | None] = {}
    for model, device in zip(models, placement.devices or [], strict=False):
        if model is not None and places.setdefault(id(model), device) != device:
            raise ValueError(
                f"teacher_devices: a teacher that is in model_T twice must be on one device, got {places[id(model)]} "
                f"and {device}; deep-copy it"
            )
    return placement
