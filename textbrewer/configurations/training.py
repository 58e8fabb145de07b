"""How to train."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from textbrewer import checks
from textbrewer.configurations.config import Config

PRECISIONS = ("no", "bf16", "fp16", "apex")
OPT_LEVELS = ("O0", "O1", "O2", "O3")
WEIGHTINGS = ("micro_batch", "positions")
TEACHER_PRECISIONS = ("no", "bf16", "fp16", "int8")


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
            A run with bf16 on a processor that only emulates it warns: it is slower than float32 there.
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
        teacher_precision: the precision of the teacher's forward pass alone: ``"no"`` (float32), ``"bf16"`` or
            ``"fp16"`` autocast, ``"int8"`` (weights and products of its Linear layers, on a CPU); ``None``: that of
            the run. Its outputs come back as float32.
        compile: ``True``: compile teacher and student with ``torch.compile`` for the run; ``"teacher"`` or
            ``"student"``: that one. The first batches take minutes longer.
        stack_matches: compute the losses of one kind between features of one shape in a single call; ``None``: on
            GPUs only. On a CPU, copying the features together costs more than it saves.

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
    teacher_precision: str | None = None
    compile: bool | str = False
    stack_matches: bool | None = None

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
        self._check_faster_steps()
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

    def _check_faster_steps(self) -> None:
        if self.teacher_precision is not None:
            checks.one_of(self.teacher_precision, TEACHER_PRECISIONS, "teacher_precision")
            if self.precision == "apex":
                raise ValueError("teacher_precision is not for precision='apex', whose opt_level rules the teacher too")
        if self.stack_matches is not None:
            checks.is_a(self.stack_matches, bool, "stack_matches", "True, False or None")
        if not isinstance(self.compile, bool) and self.compile not in ("teacher", "student"):
            raise ValueError(f"compile must be True, False, 'teacher' or 'student', got {self.compile!r}")
        if self.compile and self.data_parallel:
            raise ValueError(
                "compile and data_parallel exclude each other: DataParallel copies the models at every step; "
                "use torchrun for several GPUs, or compile=False"
            )
        if self.compiles("teacher") and self.teacher_precision == "int8":
            raise ValueError(
                f"compile={self.compile!r} cannot compile a teacher with teacher_precision='int8'; "
                "use compile='student', or teacher_precision='bf16'"
            )

    def compiles(self, side: str) -> bool:
        """Return whether ``compile`` asks for a side, ``"teacher"`` or ``"student"``."""
        return self.compile is True or self.compile == side


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
        raise ValueError(
            f"device must be a device's name such as 'cuda', 'cuda:1', 'mps' or 'cpu', got {device!r}"
        ) from error
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ValueError(
            f"device {str(device)!r} is not available on this machine; leave device out to take the best there is"
        )
    return str(device)
