"""The machine of one run: device, processes, precision, and the backward pass under them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    convert_to_fp32,
    send_to_device,
)
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.configurations import TrainingConfig
from textbrewer.engine.precision import precision_of

Optimizer = torch.optim.Optimizer


class Runtime:
    """Device, processes and precision of a run.

    Accelerate keeps its state once a process. A run sets that state up anew for its own device and precision, and
    :meth:`close` puts back what was there, so several distillers with different ones can follow each other, and other
    users of accelerate are left alone.

    Args:
        config: device, precision, distribution and trackers.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._state_before = [(state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]
        self.config = config
        self.precision = precision_of(config)
        self.apex: Any = _import_apex() if self.precision == "apex" else None
        self.accelerator = _accelerator(config, self.precision)
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main = self.rank == 0
        self.scaler: Any = self.accelerator.scaler
        self._unscaled = False
        self.reads_are_free = self.device.type == "cpu"

    def __enter__(self) -> Runtime:
        """Return the runtime; the end of the context closes it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the runtime."""
        self.close()

    def close(self) -> None:
        """Put accelerate's process-wide state back as it was before the run."""
        for state, content in self._state_before:
            state._shared_state.clear()
            state._shared_state.update(content)

    def prepare(
        self, module: nn.Module, optimizer: Optimizer, teachers: Sequence[nn.Module] = ()
    ) -> tuple[nn.Module, Any]:
        """Return module and optimiser made ready: moved to the device, under mixed precision, distributed.

        Args:
            module: what is trained.
            optimizer: its optimiser.
            teachers: models that Apex has to know; elsewhere they need nothing.
        """
        module.to(self.device)
        if self.apex is not None:
            models, optimizer = self.apex.amp.initialize(
                [module, *teachers], optimizer, opt_level=self.config.fp16_opt_level
            )
            module = models[0]
        if self.config.data_parallel:
            gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
            if gpus < 2:
                checks.warn(f"data_parallel=True splits batches over several GPUs, but this run has {gpus}")
            module = nn.DataParallel(module)
        module = self.accelerator.prepare_model(module)
        if self.scaler is None:
            # Accelerate's optimiser wrapper serves gradient scaling, and looks for packages on disk at every step.
            return module, optimizer
        return module, self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def to_device(self, batch: Any, device: torch.device | None = None) -> Any:
        """Return the batch on the run's device, or another; tuples, dicts and packed sequences keep their type."""
        # From a GPU to a CPU the copy must be waited for: nothing there knows when it has arrived.
        return send_to_device(batch, device or self.device, non_blocking=(device or self.device).type != "cpu")

    def to_float32(self, outputs: Any) -> Any:
        """Return a model's outputs with half-precision tensors as float32, if this run has mixed precision."""
        return convert_to_fp32(outputs) if self.precision in ("bf16", "fp16") else outputs

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass has this run's precision."""
        return self.accelerator.autocast() if self.precision in ("bf16", "fp16") else nullcontext()

    def teacher_autocast(self, own: str | None, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a teacher's forward pass has its precision.

        Args:
            own: the precision of its own; ``None``: the run's.
            device: where it runs.
        """
        if own is None and (device.type == self.device.type or self.precision not in ("bf16", "fp16")):
            return self.autocast()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(own or self.precision)
        # A teacher on a CPU beside a run in fp16 on a GPU: CPUs are no good at fp16.
        enabled = dtype is not None and not (own is None and dtype == torch.float16 and device.type == "cpu")
        return torch.autocast(device.type, dtype=dtype, enabled=enabled)

    def teacher_to_float32(self, outputs: Any, own: str | None) -> Any:
        """Return a teacher's outputs with half-precision tensors as float32, if it has a precision of its own."""
        return convert_to_fp32(outputs) if own is not None else self.to_float32(outputs)

    def micro_batch(self, module: nn.Module, sync: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward pass; gradients are exchanged only if ``sync``."""
        return nullcontext() if sync or self.world == 1 else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor, optimizer: Any) -> None:
        """Add the loss's gradients, scaled as the precision needs it."""
        if self.apex is not None:
            with self.apex.amp.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        elif self.scaler is not None:
            self.accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes by hand, for a window whose end came unforeseen."""
        if self.world == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.average(gradients)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world

    def gradient_norm(self, parameters: Sequence[nn.Parameter], optimizer: Any, limit: float) -> Tensor:
        """Return the norm of the gradients, unscaled, before clipping them to ``limit`` (if that is positive)."""
        if self.apex is not None:
            parameters = list(self.apex.amp.master_params(optimizer))
        elif self.scaler is not None:
            self.unscale(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def unscale(self, optimizer: Any) -> None:
        """Take the scale of fp16 off the gradients, if that was not done in this step yet."""
        if not self._unscaled:
            self.accelerator.unscale_gradients(optimizer)
            self._unscaled = True

    def step(self, optimizer: Any) -> bool:
        """Update the parameters; return False if gradient scaling skipped that, because gradients overflowed."""
        optimizer.step()
        self._unscaled = False
        return self.scaler is None or not optimizer.step_was_skipped

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return self.accelerator.reduce(value, "sum") if self.world > 1 else value

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any process (waits for the device)."""
        if self.world == 1:
            return flag
        return bool(self.sum_over_ranks(torch.tensor(float(flag), device=self.device)) > 0)

    def agree(self, value: int) -> int:
        """Return rank 0's number."""
        return int(self.share(value))

    def share(self, value: Any) -> Any:
        """Return rank 0's object."""
        if self.world == 1:
            return value
        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


def _accelerator(config: TrainingConfig, precision: str) -> Accelerator:
    device = torch.device(config.device or "cpu")
    cpu = device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    launched = _enter_launched_world(config, device)
    if not cpu and device.index is not None and not launched:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision if precision in ("bf16", "fp16") else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=config.log_with,
            project_dir=config.log_dir or config.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
            step_scheduler_with_optimizer=False,
        )
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"training under {accelerator.distributed_type} is not supported; launch with torchrun, or with an "
            "accelerate configuration of plain data-parallel training"
        )
    return accelerator


def _enter_launched_world(config: TrainingConfig, device: torch.device) -> bool:
    """Make the launcher's variables visible where the user started the processes; return whether there are several.

    Raises:
        ValueError: if ``local_rank`` is given outside a distributed launch.
    """
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    if config.local_rank == -1 and not initialised:
        return int(os.environ.get("LOCAL_RANK", -1)) != -1
    if config.local_rank != -1 and not initialised and "RANK" not in os.environ:
        raise ValueError(
            f"local_rank={config.local_rank}, but this process belongs to no distributed training; start the script "
            "with torchrun or accelerate launch, or call torch.distributed.init_process_group first"
        )
    if initialised:
        local_rank = config.local_rank if config.local_rank != -1 else torch.distributed.get_rank()
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
        os.environ.setdefault("WORLD_SIZE", str(torch.distributed.get_world_size()))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return True


def _import_apex() -> Any:
    try:
        import apex
        import apex.amp
    except ImportError as error:
        raise ImportError(
            "precision='apex' needs NVIDIA Apex, which is not installed; precision='fp16' is torch's own mixed "
            "precision and needs nothing more"
        ) from error
    return apex
