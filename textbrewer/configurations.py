"""What a run is to do: ``TrainingConfig``, ``DistillationConfig`` and ``IntermediateMatch``, checked on construction."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from textbrewer import checks
from textbrewer.losses import fsp_loss, mmd_loss
from textbrewer.presets import (
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
)
from textbrewer.schedulers import cwsm_temperature_scheduler_builder, flsw_temperature_scheduler_builder

__all__ = ["Config", "DistillationConfig", "IntermediateMatch", "Projection", "TrainingConfig"]

C = TypeVar("C", bound="Config")
PRECISIONS = ("no", "bf16", "fp16", "apex")
OPT_LEVELS = ("O0", "O1", "O2", "O3")
WEIGHTINGS = ("micro_batch", "positions")


@dataclass
class Config:
    """Reading and writing that all configurations share."""

    @classmethod
    def from_dict(cls: type[C], dict_object: Mapping[str, Any]) -> C:
        """Construct a configuration from a dict.

        Raises:
            TypeError: if it is not a dict.
            KeyError: if it has an unknown key; the message names the nearest known one.
        """
        checks.is_a(dict_object, (dict, Mapping), f"{cls.__name__}.from_dict's argument", "a dict")
        checks.known_keys(dict_object, [item.name for item in dataclasses.fields(cls)], cls.__name__)
        return cls(**dict_object)

    @classmethod
    def from_json_file(cls: type[C], json_filename: str | os.PathLike[str]) -> C:
        """Construct a configuration from a JSON file.

        Raises:
            ValueError: if the file is not JSON.
            TypeError, KeyError: as :meth:`from_dict`.
        """
        with open(json_filename, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{os.fspath(json_filename)!r} must be a JSON file: {error}") from error
        return cls.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; ``from_dict`` of them gives an equal configuration."""
        return dataclasses.asdict(self)

    def to_json_file(self, json_filename: str | os.PathLike[str]) -> None:
        """Write the settings as JSON.

        Raises:
            TypeError: if a setting is a function of your own, which JSON cannot hold; register it under a name.
        """
        text = json.dumps(self.to_dict(), indent=2)
        with open(json_filename, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    def __repr__(self) -> str:
        lines = "".join(f"  {item.name} : {getattr(self, item.name)}\n" for item in dataclasses.fields(self))
        return f"{type(self).__name__}:\n{lines}"


@dataclass(repr=False)
class TrainingConfig(Config):
    """How to train: accumulation, checkpoints, logs, device, precision.

    Args:
        gradient_accumulation_steps: micro-batches whose gradients are averaged into one optimiser step. The last,
            shorter window of an epoch is averaged over its own size.
        ckpt_frequency: checkpoints an epoch, evenly spaced.
        ckpt_epoch_frequency: write them in every n-th epoch (and in the last).
        ckpt_steps: with ``num_steps``: a checkpoint every so many optimiser steps, and at the end. ``None``: only at
            the end.
        log_dir: folder of the tensorboard log; ``None`` for none.
        output_dir: folder of the checkpoints; made when the training starts.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, or ``None``: the best there is.
        fp16: ``True`` is short for ``precision="fp16"``.
        fp16_opt_level: Apex's level, ``"O0"`` to ``"O3"``; other than the default only with ``precision="apex"``.
        data_parallel: ``True``: split each batch over this machine's GPUs with ``torch.nn.DataParallel``.
        local_rank: this process's rank on its machine in distributed training, -1 for none. ``torchrun`` and
            ``accelerate launch`` set it for you.
        precision: ``"no"`` (float32), ``"bf16"`` or ``"fp16"`` mixed precision, ``"apex"`` (NVIDIA Apex, if installed).
        logging_steps: optimiser steps between two readings of the losses from the device, for log and progress bar.
            Every step is logged all the same.
        log_with: trackers of accelerate, beside tensorboard: a name such as ``"wandb"`` or a list of them.
        save_total_limit: how many ``checkpoint-*`` folders of this run to keep for resuming; ``None``: all. The
            student's own files ``gs*.pkl`` are never deleted.
        accumulation_weighting: ``"micro_batch"``: the plain mean over the window's micro-batches, as TextBrewer;
            ``"positions"``: each loss weighs what it averages over (masked positions, rows or pairs) across the
            window and all processes, so that the step equals that of one large batch.
        find_unused_parameters: for distributed training: allow student parameters that get no gradient in a step.
            ``False`` saves a walk over the graph in each step where every parameter is used.
        progress_bar: show a progress bar with the losses, the rate and the time left.

    Raises:
        TypeError, ValueError: if a value is of another type or out of range; the message names it.
    """

    gradient_accumulation_steps: int = 1
    ckpt_frequency: int = 1
    ckpt_epoch_frequency: int = 1
    ckpt_steps: int | None = None
    log_dir: str | None = None
    output_dir: str = "./saved_models"
    device: str | None = None
    fp16: bool = False
    fp16_opt_level: str = "O1"
    data_parallel: bool = False
    local_rank: int = -1
    precision: str = "no"
    logging_steps: int = 10
    log_with: str | list[str] | None = None
    save_total_limit: int | None = 2
    accumulation_weighting: str = "micro_batch"
    find_unused_parameters: bool = True
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation_steps", "ckpt_frequency", "ckpt_epoch_frequency", "logging_steps"):
            checks.integer(getattr(self, name), name, minimum=1)
            setattr(self, name, int(getattr(self, name)))
        for name in ("ckpt_steps", "save_total_limit"):
            if getattr(self, name) is not None:
                checks.integer(getattr(self, name), name, minimum=1)
                setattr(self, name, int(getattr(self, name)))
        for name in ("fp16", "data_parallel", "find_unused_parameters", "progress_bar"):
            checks.is_a(getattr(self, name), bool, name, "True or False")
        checks.integer(self.local_rank, "local_rank", minimum=-1)
        for name in ("log_dir", "output_dir"):
            path = getattr(self, name)
            if path is not None or name == "output_dir":
                checks.is_a(path, (str, os.PathLike), name, "a path")
                setattr(self, name, os.fspath(path))
        checks.one_of(self.accumulation_weighting, WEIGHTINGS, "accumulation_weighting")
        self._check_precision()
        self.device = _device(self.device)
        if self.data_parallel and self.local_rank != -1:
            raise ValueError("data_parallel and local_rank exclude each other: leave data_parallel=False with torchrun")

    def _check_precision(self) -> None:
        checks.one_of(self.precision, PRECISIONS, "precision")
        checks.one_of(self.fp16_opt_level, OPT_LEVELS, "fp16_opt_level")
        if self.fp16 and self.precision == "bf16":
            raise ValueError("fp16=True and precision='bf16' contradict each other; give one of them")
        if self.fp16 and self.precision == "no":
            self.precision = "fp16"
        if self.fp16_opt_level != "O1" and self.precision != "apex":
            raise ValueError(
                f"fp16_opt_level={self.fp16_opt_level!r} is a setting of NVIDIA Apex; ask for it with "
                f"precision='apex' (Apex must be installed), or leave it out: fp16=True is torch's own mixed precision"
            )


def _device(device: str | torch.device | None) -> str:
    """Return the device's name; for ``None`` the best device of this machine."""
    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    checks.is_a(device, (str, torch.device), "device", "a device's name such as 'cuda' or 'cpu'")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be a device's name such as 'cuda', 'cuda:1', 'mps' or 'cpu', got {device!r}") from error
    missing = kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available()
    if missing:
        raise ValueError(f"device {str(device)!r} is not available on this machine; leave device out to take the best there is")
    return str(device)


@dataclass(frozen=True)
class Projection:
    """The parsed ``proj`` of a match: kind, widths (``None``: to be read from the models) and optimiser options."""

    kind: str
    dim_S: int | None = None
    dim_T: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_projection(proj: str | Sequence[Any] | None) -> Projection | None:
    """Return the parsed ``proj`` of a match, ``None`` for ``None``.

    Raises:
        TypeError, ValueError: if it is not of one of the forms that :class:`IntermediateMatch` names.
    """
    if proj is None:
        return None
    parts: list[Any] = [proj] if isinstance(proj, str) else list(proj)
    options = dict(parts.pop()) if parts and isinstance(parts[-1], Mapping) else {}
    if len(parts) not in (1, 3):
        raise ValueError(
            f"proj must be a name, [name, dim_S, dim_T] or [name, dim_S, dim_T, {{optimiser options}}], got {proj!r}"
        )
    checks.one_of(parts[0], PROJ_MAP, "the first item of proj")
    for size, name in zip(parts[1:], ("dim_S", "dim_T"), strict=False):
        checks.integer(size, f"{name} of proj {proj!r}", minimum=1)
    sizes = [int(size) for size in parts[1:]] or [None, None]
    return Projection(parts[0], sizes[0], sizes[1], options)


@dataclass
class IntermediateMatch:
    """One pair of features to bring together.

    Args:
        layer_T: the teacher's layer: its place in the adaptor's ``hidden`` or ``attention`` list. For ``fsp`` and
            ``nst`` a list of two.
        layer_S: the student's layer, likewise.
        weight: factor of this loss in the total.
        loss: a name of ``MATCH_LOSS_MAP``.
        feature: ``"hidden"`` or ``"attention"``.
        proj: brings the student's feature to the teacher's width: ``None``, a name of ``PROJ_MAP`` alone (widths are
            read from the models), ``[name, dim_S, dim_T]``, or ``[name, dim_S, dim_T, {optimiser options}]``.
        teacher: the teacher's number in the list of a ``MultiTeacherDistiller``.

    Raises:
        TypeError, ValueError: if a value is of another type, unknown or out of range; the message names it.
    """

    layer_T: int | list[int]
    layer_S: int | list[int]
    weight: float
    loss: str
    feature: str
    proj: str | Sequence[Any] | None = None
    teacher: int = 0

    def __post_init__(self) -> None:
        checks.one_of(self.feature, FEATURES, "feature of an intermediate match")
        checks.one_of(self.loss, MATCH_LOSS_MAP, "loss of an intermediate match")
        checks.number(self.weight, "weight of an intermediate match", minimum=0)
        checks.integer(self.teacher, "teacher of an intermediate match", minimum=0)
        self.layer_T = _layers(self.layer_T, "layer_T")
        self.layer_S = _layers(self.layer_S, "layer_S")
        pair = MATCH_LOSS_MAP[self.loss] in (fsp_loss, mmd_loss)
        for name, layers in (("layer_T", self.layer_T), ("layer_S", self.layer_S)):
            if pair and not (isinstance(layers, list) and len(layers) == 2):
                raise ValueError(f"{name} of a match with loss {self.loss!r} must be a list of two layers, got {layers!r}")
        if isinstance(self.layer_T, list) != isinstance(self.layer_S, list):
            raise ValueError(
                f"layer_T and layer_S must both be numbers or both be lists, got {self.layer_T!r} and {self.layer_S!r}"
            )
        if not isinstance(self.proj, str) and self.proj is not None:
            self.proj = [dict(item) if isinstance(item, Mapping) else item for item in self.proj]
        parse_projection(self.proj)

    @property
    def projection(self) -> Projection | None:
        """The parsed ``proj``; ``None`` without one."""
        return parse_projection(self.proj)

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any] | None) -> IntermediateMatch | None:
        """Construct a match from a dict (``None`` gives ``None``).

        Raises:
            KeyError: if a key is unknown or missing.
        """
        if dict_object is None:
            return None
        checks.is_a(dict_object, (dict, Mapping), "an intermediate match", "a dict")
        known = [item.name for item in dataclasses.fields(cls)]
        checks.known_keys(dict_object, known, "intermediate match")
        missing = [name for name in known[:5] if name not in dict_object]
        if missing:
            raise KeyError(f"intermediate match {dict(dict_object)!r} must have the key {missing[0]!r}")
        return cls(**dict_object)


def _layers(layers: Any, name: str) -> int | list[int]:
    """Return layer numbers as an int or a list of ints."""
    if isinstance(layers, (list, tuple)):
        return [int(_layers(layer, name)) for layer in layers]  # type: ignore[arg-type]
    checks.integer(layers, name)
    return int(layers)


@dataclass(repr=False)
class DistillationConfig(Config):
    """What to learn from the teacher.

    The total loss is ``kd_loss_weight * KD + hard_label_weight * sum(losses) + sum(match.weight * match loss)``.

    Args:
        temperature: divides the logits of both sides in the KD loss; positive.
        temperature_scheduler: the temperature by row: ``"none"``, ``"constant"``, ``["flsw", beta, gamma]`` or
            ``["cwsm", beta]``, or another entry of ``TEMPERATURE_SCHEDULER``.
        hard_label_weight: factor of the sum of the adaptor's ``losses``.
        hard_label_weight_scheduler: a further factor over the training, ``"none"`` or a name of ``WEIGHT_SCHEDULER``.
        kd_loss_type: a name of ``KD_LOSS_MAP``.
        kd_loss_weight: factor of the KD loss on the logits.
        kd_loss_weight_scheduler: a further factor over the training, ``"none"`` or a name of ``WEIGHT_SCHEDULER``.
        probability_shift: swap the teacher's logit of the true label with its largest one, so that the teacher is
            never wrong; needs ``labels`` from the student's adaptor.
        intermediate_matches: features to match, a list of :class:`IntermediateMatch` or of dicts with its fields.
        is_caching_logits: run the teacher once over the data before the training and keep what the losses need of
            its outputs, with the batches, in main memory; batches keep their rows, only their order is shuffled.

    Raises:
        TypeError, ValueError, KeyError: if a value is of another type, unknown or out of range; the message names it.
    """

    temperature: float = 4
    temperature_scheduler: str | list[Any] | None = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: str | None = "none"
    kd_loss_type: str = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str | None = "none"
    probability_shift: bool = False
    intermediate_matches: list[Any] = field(default_factory=list)
    is_caching_logits: bool = False

    def __post_init__(self) -> None:
        checks.number(self.temperature, "temperature", above=0)
        checks.one_of(self.kd_loss_type, KD_LOSS_MAP, "kd_loss_type")
        for name in ("hard_label_weight", "kd_loss_weight"):
            checks.number(getattr(self, name), name, minimum=0)
            scheduler = f"{name}_scheduler"
            if getattr(self, scheduler) is None:
                setattr(self, scheduler, "none")
            if getattr(self, scheduler) != "none":
                checks.one_of(getattr(self, scheduler), WEIGHT_SCHEDULER, scheduler)
        if isinstance(self.temperature_scheduler, tuple):
            self.temperature_scheduler = list(self.temperature_scheduler)
        self.temperature_scheduler = self.temperature_scheduler or "none"
        self.make_temperature_scheduler()
        for name in ("probability_shift", "is_caching_logits"):
            checks.is_a(getattr(self, name), bool, name, "True or False")
        matches = self.intermediate_matches or []
        checks.is_a(matches, (list, tuple), "intermediate_matches", "a list of matches")
        self.intermediate_matches = [
            match if isinstance(match, IntermediateMatch) else IntermediateMatch.from_dict(match)
            for match in matches
            if match is not None
        ]

    def make_temperature_scheduler(self) -> Callable[..., Any] | None:
        """Return the scheduler's function, ``None`` for ``"none"``."""
        if self.temperature_scheduler == "none":
            return None
        spec = self.temperature_scheduler
        name = spec[0] if isinstance(spec, list) and spec else spec
        checks.one_of(name, TEMPERATURE_SCHEDULER, "temperature_scheduler")
        scheduler = TEMPERATURE_SCHEDULER.make(spec)  # type: ignore[arg-type]
        if not callable(scheduler):
            raise TypeError(f"temperature_scheduler {spec!r} must give a function, got {scheduler!r}")
        if scheduler in (flsw_temperature_scheduler_builder, cwsm_temperature_scheduler_builder):
            raise ValueError(f"temperature_scheduler {name!r} needs its parameters: write [{name!r}, beta, ...]")
        return scheduler  # type: ignore[no-any-return]
