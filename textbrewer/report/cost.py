"""What a model costs: bytes on disk, FLOPs of a batch, memory of a forward pass."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["bytes_of_files", "bytes_on_disk", "flops_of", "is_quantised", "peak_memory"]


def bytes_of_files(paths: Iterable[Path]) -> int:
    """Return the bytes of files, and of all files in folders."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def bytes_on_disk(model: nn.Module) -> tuple[int, str]:
    """Return the bytes of the file that a model's state dict makes, and the file's format.

    The file is written, measured and deleted: ``"safetensors"``, where tied weights are stored once, or
    ``"torch.save"`` for quantised weights, which safetensors cannot hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        if is_quantised(model):
            torch.save(model.state_dict(), path)
            return os.path.getsize(path), "torch.save"
        safetensors.torch.save_model(model, path)
        return os.path.getsize(path), "safetensors"


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model holds weights in another form than ordinary tensors."""
    return any(
        not isinstance(value, Tensor) or value.is_quantized or type(value) not in (Tensor, nn.Parameter)
        for value in model.state_dict().values()
    )


def flops_of(run: Callable[[Any], Any], batch: Any) -> int:
    """Return the floating point operations of one batch as torch counts them: 2 for a multiplication with its addition.

    Counted are matrix products, convolutions and attention; what is done element by element is not. Zero weights and
    padding count like others. Torch's counter leaves out the attention that it computes on CPUs; it is added here.
    """
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run(batch)
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of queries with keys and of weights with values, from shapes ``(..., length, width)``."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def peak_memory(run: Callable[[Any], Any], batch: Any, device: torch.device) -> int | None:
    """Return the most bytes that torch holds at a time in a forward pass, beyond what it held before: weights, inputs.

    On GPUs what torch's allocator had handed out at most, on CPUs the same from the memory events of torch's profiler.
    What libraries allocate by themselves is in neither.

    Returns:
        ``None`` on other devices.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            run(batch)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run(batch)
    events = profiler.kineto_results.events() if profiler.kineto_results is not None else []
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
