"""One forward pass of module replacement: the successor with some of the predecessor's blocks in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer.adaptors import Adaptor, normalise
from textbrewer.distillers.replacement import Mixture, Rate, draw
from textbrewer.distillers.trainer import SupervisedStep
from textbrewer.hooks.forward import call

__all__ = ["TheseusModule", "TheseusStep"]


class TheseusModule(nn.Module):
    """The one module that is trained and wrapped: the successor, in which blocks of the predecessor can run.

    Args:
        successor: the model to train.
        adaptor: what its outputs mean.
        mixture: mixes the blocks; the predecessor's are not checkpointed or synchronised.
    """

    def __init__(self, successor: nn.Module, adaptor: Adaptor, mixture: Mixture) -> None:
        super().__init__()
        self.student = successor
        self._adaptor, self._mixture = adaptor, mixture
        self._proven = False

    def forward(self, batch: Any, arguments: Mapping[str, Any], choice: Sequence[bool]) -> dict[str, Any]:
        """Return the views of the model made of the chosen blocks, as plain dicts.

        Args:
            batch: the batch.
            arguments: further arguments of the model.
            choice: for each group, whether the successor's block runs.
        """
        wanted = self._mixture.blocks(choice)
        with self._mixture.drawn(choice), _listening([] if self._proven else wanted) as ran:
            views = normalise(self._adaptor(batch, call(self.student, batch, arguments)), "adaptor")
        if not self._proven:
            _prove(ran, wanted)
            self._proven = not all(choice)
        own = zip(choice, self._mixture.stack.blocks, strict=True)
        idle = [item for used, block in own if not used for item in block.parameters() if item.requires_grad]
        if idle and "losses" in views:
            first, *others = views["losses"]
            views["losses"] = [_Idle.apply(first, *idle), *others]  # type: ignore[no-untyped-call]
        return {"views": views}


class TheseusStep:
    """One micro-batch: the rate of the step, the draw, and the task's loss.

    Args:
        inner: from the model's outputs to the loss.
        rate: the replacing rate.
        total_steps: optimiser steps of the run.
        seed: of the draws.
        count: how many groups are drawn.
    """

    def __init__(self, inner: SupervisedStep, rate: Rate, total_steps: int, seed: int, count: int) -> None:
        self.inner, self.rate, self.total_steps, self.seed, self.count = inner, rate, total_steps, seed, count
        self.step, self.micro_batch = -1, 0

    def __call__(self, module: nn.Module, batch: Any, progress: float, share: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and what to log of the replacement."""
        step = round(progress * self.total_steps)
        self.micro_batch = self.micro_batch + 1 if step == self.step else 0
        self.step = step
        rate = self.rate.at(step, self.total_steps)
        choice = draw(self.seed, step, self.micro_batch, rate, self.count)
        loss, _ = self.inner(partial(module, choice=choice), batch, progress, share)
        logs = {"replacement_rate": rate, "replaced": sum(choice) / self.count}
        return loss, {name: torch.tensor(value) for name, value in logs.items()}


class _Idle(torch.autograd.Function):
    """The loss as it is, with a gradient of zero for parameters that had no part in it.

    So every step has a gradient, also one in which only the predecessor's blocks run, and every process has one for
    every parameter.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return *gradients, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


@contextmanager
def _listening(blocks: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield a list to which these blocks are added when they run."""
    ran: list[nn.Module] = []
    hooks = [block.register_forward_pre_hook(lambda module, inputs: ran.append(module)) for block in blocks]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _prove(ran: Sequence[nn.Module], wanted: Sequence[nn.Module]) -> None:
    """Raise ValueError unless the wanted blocks ran, in this order."""
    if list(dict.fromkeys(ran)) != list(dict.fromkeys(wanted)):
        raise ValueError(
            f"blocks must be a list that the model's forward pass iterates over: of {len(wanted)} blocks put in it, "
            f"{len(set(ran))} ran, or in another order; does the model call its blocks under other names, or drop "
            "layers at random?"
        )
