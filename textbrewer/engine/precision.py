"""In which precision a run computes, and what of it the device cannot do, or only slowly."""

from __future__ import annotations

import os

import torch

from textbrewer import checks
from textbrewer.configurations import TrainingConfig

__all__ = ["emulates_bf16", "precision_of", "warn_of_emulation"]


def precision_of(config: TrainingConfig) -> str:
    """Return the configured precision, or the launcher's (``accelerate launch --mixed_precision``) where none is.

    Args:
        config: how to train.

    Raises:
        ValueError: for fp16 on a CPU, which accelerate would ignore, or a teacher in int8 elsewhere.
    """
    precision = config.precision
    if precision == "no" and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in ("bf16", "fp16"):
        precision = os.environ["ACCELERATE_MIXED_PRECISION"]
    kind = torch.device(config.device or "cpu").type
    if precision == "fp16" and kind == "cpu":
        raise ValueError(
            "precision='fp16' (fp16=True) needs a GPU, and the device is 'cpu'; use precision='bf16' there"
        )
    if config.teacher_precision == "fp16" and kind == "cpu":
        raise ValueError(
            "teacher_precision='fp16' needs a GPU, and the device is 'cpu'; use teacher_precision='bf16' there"
        )
    if config.teacher_precision == "int8" and kind != "cpu":
        raise ValueError(
            f"teacher_precision='int8' is for CPUs, and the device is {kind!r}; use teacher_precision='bf16' there"
        )
    for name, value in (("precision", precision), ("teacher_precision", config.teacher_precision)):
        warn_of_emulation(name, value, kind)
    return precision


def warn_of_emulation(name: str, value: str | None, kind: str) -> None:
    """Warn of bfloat16 on a processor that has no such products, where it is the slowest of all choices.

    Args:
        name: the setting's name.
        value: its value.
        kind: of the device, such as ``"cpu"``.
    """
    if value == "bf16" and kind == "cpu" and emulates_bf16():
        checks.warn(
            f"{name}='bf16' is slow here: torch emulates bfloat16 products on this processor, many times slower than "
            f"those of float32; use {name}='no'"
        )


def emulates_bf16() -> bool:
    """Return whether matrix products in bfloat16 run on this CPU without the library that is fast at them.

    One core without AVX-512 does 61 billion operations a second in float32 and 0.8 in bfloat16 (matrices of 1024 x 384
    and 384 x 1536, torch 2.13.0).
    """
    try:
        there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return bool(there and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # a build of torch that cannot tell
        return False
