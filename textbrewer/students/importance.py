"""Which features of a teacher matter: by the size of their weights, or of their values on some data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from textbrewer.hooks import first_tensor
from textbrewer.hooks.forward import call, device_of, evaluating, is_encoder_decoder, on_device, real_positions
from textbrewer.students.spaces import Space

__all__ = ["activation_scores", "choose", "weight_scores"]


def choose(space: Space, scores: Tensor) -> None:
    """Keep the blocks of a space with the highest scores, in their old order; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    space.kept = order[: space.blocks.student].sort().values


def weight_scores(space: Space, teacher: nn.Module) -> Tensor:
    r"""Return the importance of each block of a space by the teacher's weights, ``(blocks,)`` in float64.

    A unit or a head :math:`b` by the norm of all weights that write or read it,

    .. math::
        s_b = \sqrt{\sum_W \sum_{i \in b} \lVert W_i \rVert^2},

    and a hidden feature by the embeddings and norms, each of which counts alike however large it is:

    .. math::
        s_i = \sqrt{\sum_W \lVert W_i \rVert^2 \Big/ \tfrac1d \sum_j \lVert W_j \rVert^2}.
    """
    parameters = dict(teacher.named_parameters(remove_duplicate=False))
    total = torch.zeros(space.blocks.teacher, dtype=torch.float64)
    seen: set[int] = set()
    for name, axis in space.axes:
        weight = parameters.get(name)
        if weight is None or id(weight) in seen or not _counts(teacher, name, space.kind):
            continue
        seen.add(id(weight))
        squares = weight.detach().double().square().movedim(axis, -1)
        squares = squares.reshape(-1, squares.shape[-1]).sum(0).cpu()
        by_block = space.by_block(squares).sum((0, 2))
        mean = by_block.mean() if space.kind == "hidden" else 1.0
        total += by_block / mean if mean > 0 else by_block
    return total.sqrt()


def activation_scores(spaces: Sequence[Space], teacher: nn.Module, dataloader: Iterable[Any]) -> list[Tensor]:
    r"""Return the importance of each block of each space by the teacher's values on some data, ``(blocks,)``.

    .. math::
        s_b = \frac1{|b|} \sum_{i \in b} \frac1P \sum_p \lvert h_{p,i} \rvert

    over all positions :math:`p` that are no padding, of the outputs of the layers that the student gets for hidden
    features, of the inputs of the projection that reads them for heads and units.

    Args:
        spaces: what to score.
        teacher: run in eval mode and without gradients; its modes are put back.
        dataloader: batches as the teacher takes them; each is read once.

    Raises:
        ValueError: if the dataloader yields nothing.
    """
    device = device_of(teacher)
    listeners = [_Listener(space, teacher) for space in spaces]
    with ExitStack() as open_contexts, torch.no_grad():
        open_contexts.enter_context(evaluating(teacher))
        for listener in listeners:
            listener.attach(teacher, open_contexts)
        batches = 0
        for batch in tqdm(dataloader, desc="importance", leave=False, dynamic_ncols=True):
            batch = on_device(batch, device)
            for listener in listeners:
                listener.batch = batch
            call(teacher, batch, {})
            batches += 1
    if not batches:
        raise ValueError("dataloader must yield at least one batch to find out what matters, got none")
    return [listener.scores() for listener in listeners]


class _Listener:
    """Sums the absolute values of the features of one space."""

    def __init__(self, space: Space, teacher: nn.Module) -> None:
        self.space = space
        self.batch: Any = None
        self.sums, self.positions = torch.zeros(space.features, dtype=torch.float64), 0
        self.two_sided = is_encoder_decoder(teacher)

    def attach(self, teacher: nn.Module, open_contexts: ExitStack) -> None:
        """Listen to the readers until the contexts are closed."""
        for name in self.space.readers:
            module, decoder = teacher.get_submodule(name), self.two_sided and "decoder" in name.split(".")
            if self.space.kind == "hidden":
                handle = module.register_forward_hook(lambda _, __, output, side=decoder: self.add(output, side))
            else:
                handle = module.register_forward_pre_hook(lambda _, inputs, side=decoder: self.add(inputs, side))
            open_contexts.callback(handle.remove)

    def add(self, states: Any, decoder: bool) -> None:
        """Add the features of one batch."""
        values = first_tensor(states).detach()
        mask = real_positions(self.batch, decoder, values.shape[:-1])
        values = values.flatten(0, -2) if mask is None else values[mask]
        self.sums += values.double().abs().sum(0).cpu()
        self.positions += len(values)

    def scores(self) -> Tensor:
        """Return the mean absolute value of each block."""
        return self.space.by_block(self.sums / max(1, self.positions)).mean((0, 2))


def _counts(teacher: nn.Module, name: str, kind: str) -> bool:
    """Return whether a tensor has a say: of hidden features embeddings and norms, of others linear weights."""
    path, _, leaf = name.rpartition(".")
    owner = teacher.get_submodule(path)
    embeds = isinstance(owner, (nn.Embedding, nn.Conv2d))
    if leaf != "weight":
        return False
    return embeds or "Norm" in type(owner).__name__ if kind == "hidden" else not embeds
