"""Layers of a network that must lose the same channels, as torch-pruning finds them in a forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import Tensor, nn

from textbrewer.compression.sites import Site
from textbrewer.hooks.forward import call

__all__ = ["ChannelGroup", "groups_of", "tensors_in", "traced"]


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that must lose the same channels.

    Args:
        graph: torch-pruning's.
        items: its group: what is done to which layer.
        name: of the first layer that writes the channels.
        channels: how many there are.
        blocks: by how many groups (of convolutions, of normalisation) they are divided; all lose the same.
    """

    graph: Any
    items: Any
    name: str
    channels: int
    blocks: int

    @property
    def site(self) -> Site:
        """The place, for choosing units in it: a unit is one channel in every block."""
        return Site("ratio", self.name, "", self.channels // self.blocks, self.blocks)

    def prune(self, mask: Tensor) -> None:
        """Take out the channels where ``mask``, of units, is false."""
        gone = (~mask.repeat(self.blocks)).nonzero().flatten().tolist()
        if gone:
            root = self.items[0].dep
            self.graph.get_pruning_group(root.target.module, root.handler, gone).prune()


def groups_of(graph: Any, returned: set[Any], kept: set[nn.Module]) -> Iterator[ChannelGroup]:
    """Yield the groups of layers that may lose channels."""
    for items in graph.get_all_groups():
        writers = [dep.target for dep, _ in items if graph.is_out_channel_pruning_fn(dep.handler)]
        if not returned.isdisjoint(writers) or not kept.isdisjoint(node.module for node in writers):
            continue
        root = items[0].dep.target
        channels, blocks = len(items[0].idxs), lcm(*(_blocks(graph, dep) for dep, _ in items))
        if channels % blocks == 0:
            yield ChannelGroup(graph, items, graph._module2name[root.module], channels, blocks)


def _blocks(graph: Any, dep: Any) -> int:
    """Return into how many groups a layer divides the channels that it reads, or writes."""
    module = dep.target.module
    known = graph.get_pruner_of_module(module) if isinstance(module, nn.Module) else None
    depthwise = getattr(module, "groups", 1) > 1 and getattr(module, "groups", 1) == getattr(module, "out_channels", 0)
    if known is None or depthwise:
        return 1
    writes = graph.is_out_channel_pruning_fn(dep.handler)
    return int(known.get_out_channel_groups(module) if writes else known.get_in_channel_groups(module))


def traced(pruning: Any, model: nn.Module, inputs: Any) -> tuple[Any, set[Any]]:
    """Return torch-pruning's graph of a model, and the nodes of it that the model returns."""
    outputs: list[Tensor] = []

    def forward(module: nn.Module, batch: Any) -> list[Tensor]:
        outputs.extend(tensor for tensor in tensors_in(call(module, batch, {})) if tensor.grad_fn is not None)
        return outputs

    with warnings.catch_warnings():
        # They say that parameters outside of layers are sliced along their last axis longer than 1.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected", category=UserWarning)
        graph = pruning.DependencyGraph().build_dependency(model, inputs, forward_fn=forward)
    for node in graph.module2node.values():
        # Off where a parameter of three axes meets what is concatenated: right for tokens' positions, not for channels.
        node.enable_index_mapping = True
    last = {tensor.grad_fn for tensor in outputs}
    return graph, {node for node in graph.module2node.values() if node.grad_fn in last or not node.outputs}


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)
