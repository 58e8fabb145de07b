"""What a model consists of: :func:`display_parameters`, and the initialisation of TextBrewer's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from textbrewer import checks

__all__ = ["LayerNode", "display_parameters", "initializer_builder"]

Ranges: TypeAlias = NDArray[np.int64]
_NO_RANGES = np.empty((0, 2), dtype=np.int64)


class LayerNode:
    """A row of :func:`display_parameters`: a tensor, or a module with the rows below it.

    Args:
        name: last part of the dotted name, with a remark such as ``"(shared)"``.
        parent: the node above, None for the whole model.
        value: ``[number of elements, MiB]``, of the node and everything below it.
        fullname: the dotted name, with the same remark.

    Attributes:
        children_name: the nodes below by the last part of their dotted name, without remarks; also ``node["encoder"]``.
    """

    def __init__(
        self,
        name: str,
        parent: LayerNode | None = None,
        value: list[float] | None = None,
        fullname: str | None = None,
    ) -> None:
        self.name = name
        self.fullname = name if fullname is None else fullname
        self.value: list[float] = [0, 0.0] if value is None else value
        self.children_name: dict[str, LayerNode] = {}
        self.parent = parent

    def __contains__(self, key: object) -> bool:
        return key in self.children_name

    def __getitem__(self, key: str) -> LayerNode:
        return self.children_name[key]

    def __setitem__(self, key: str, value: LayerNode) -> None:
        self.children_name[key] = value

    def add(self, value: list[float]) -> None:
        """Add ``[number of elements, MiB]`` to this node and to every node above it."""
        node: LayerNode | None = self
        while node is not None:
            node.value = [node.value[0] + value[0], node.value[1] + value[1]]
            node = node.parent

    def remark(self, text: str) -> None:
        """Append ``"(text)"`` to the name."""
        self.name += f"({text})"
        self.fullname += f"({text})"

    def rows(self, max_level: int | None = None, level: int = 0) -> Iterator[tuple[int, LayerNode]]:
        """Yield ``(level, node)`` for this node and those below it, down to ``max_level``."""
        yield level, self
        if max_level is None or level < max_level:
            for child in self.children_name.values():
                yield from child.rows(max_level, level + 1)

    def format(self, max_level: int | None = None) -> str:
        """Return the table of this node and those below it, down to ``max_level``."""
        rows = [("  " * level + "--" + node.name, level, node) for level, node in self.rows(max_level)]
        width = max(len(label) for label, _, _ in rows) + 1
        lines = ["", f"{'LAYER NAME':<{width}}\t{'#PARAMS':>15}\t{'RATIO':>10}\t{'MEM(MB)':>8}"]
        for label, level, node in rows:
            if len(node.children_name) == 1 and level != max_level:
                lines.append(f"{label:<{width}}")  # the numbers are those of the one row below
                continue
            count, memory = node.value
            ratio = count / self.value[0] if self.value[0] else 0.0
            lines.append(f"{label + ':':<{width}}\t{int(count):15,d}\t{ratio:>10.2%}\t{memory:>8.2f}")
        return "\n".join(lines) + "\n"


def display_parameters(model: nn.Module | Mapping[str, Any], max_level: int | None = None) -> tuple[str, LayerNode]:
    """Count the elements and the memory of a model's parameters, as a table and as a tree.

    What is counted is the state dict: parameters, and the buffers that are saved with the model (marked
    ``"(buffer)"``; buffers that are not saved are left out). An element of memory is counted once: a tensor that was
    counted before under another name, as tied weights are, has the value 0 and is marked ``"(shared)"``; of a tensor
    that overlaps with those counted before, the elements that are new are counted, and it is marked
    ``"(partly shared)"``. This holds for tensors on the meta device too. A sparse tensor counts as if it were dense.

    Args:
        model: the module, or a state dict. Entries of a state dict that hold no tensor take no row.
        max_level: the deepest level to show, 0 for the total; every level by default.

    Returns:
        The table (columns name, number of elements, share of the total, memory in MiB) and the root of the tree, whose
        nodes hold ``[number of elements, MiB]`` as ``value``; ``tree["encoder"]["layer"].value``.

    Raises:
        TypeError: if ``model`` is neither a module nor a mapping from names to tensors.
        ValueError: if ``max_level`` is negative.
    """
    if max_level is not None:
        checks.integer(max_level, "max_level", minimum=0)
    root = LayerNode("model")
    counted: dict[object, Ranges] = {}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} if isinstance(model, nn.Module) else {}
    for name, tensors in _named_tensors(model).items():
        node = _node(root, name)
        counts = [_count(tensor, counted) for tensor in tensors]
        new, distinct, new_bytes = (sum(column) for column in zip(*counts, strict=True))
        node.add([new, new_bytes / 1024 / 1024])
        if name in buffers:
            node.remark("buffer")
        if new < distinct:
            node.remark("partly shared" if new else "shared")
    return root.format(max_level), root


def initializer_builder(std: float) -> Callable[[nn.Module], None]:
    """Return a function for ``model.apply`` that draws new weights, as BERT does.

    Weights of linear layers and embeddings are drawn from normal(0, ``std``), biases of linear layers set to zero;
    other modules are left as they are.

    Args:
        std: standard deviation of the weights.

    Raises:
        ValueError: if ``std`` is negative or not finite.
    """
    checks.number(std, "std", minimum=0)

    def init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    return init_weights


def _named_tensors(model: object) -> dict[str, list[Tensor]]:
    """Return the tensors of each entry of a state dict that has some: a packed quantised weight has several."""
    checks.is_a(model, (nn.Module, Mapping), "model", "a module or a state dict")
    # The parameters themselves, not detached copies: a tensor without storage is known by its identity only.
    entries = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else cast(Mapping[str, Any], model)
    found: dict[str, list[Tensor]] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping) or not isinstance(name, str):
            raise TypeError(
                f"a state dict must be a mapping from names to tensors, got {name!r}: {type(value).__name__}; "
                "pass the state dict inside it"
            )
        parts = value if isinstance(value, (tuple, list)) else (value,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if tensors:
            found[name] = tensors
    if entries and not found and not isinstance(model, nn.Module):
        raise TypeError(f"a state dict must be a mapping from names to tensors, got no tensor among {list(entries)}")
    return found


def _node(root: LayerNode, name: str) -> LayerNode:
    """Return the node of a dotted name, made together with those above it where they are missing."""
    node, parts = root, name.split(".")
    for depth, part in enumerate(parts):
        if part not in node:
            node[part] = LayerNode(part, parent=node, fullname=".".join(parts[: depth + 1]))
        node = node[part]
    return node


def _count(tensor: Tensor, counted: dict[object, Ranges]) -> tuple[int, int, int]:
    """Return the tensor's elements not ``counted`` yet, all its distinct elements, and the bytes of the former.

    ``counted`` holds the ranges of bytes of each storage met before, and is brought up to date.
    """
    size = tensor.element_size()
    if tensor.layout is torch.strided:
        # The storage's identity rather than its address, which is 0 for every tensor on the meta device.
        key: object = ("storage", tensor.untyped_storage()._cdata)
        covered = _union(_byte_ranges(tensor))
    else:
        key = ("tensor", id(tensor))
        covered = np.array([[0, tensor.numel() * size]], dtype=np.int64)
    before = counted.get(key, _NO_RANGES)
    counted[key] = _union(np.concatenate([before, covered]))
    new_bytes = _total(counted[key]) - _total(before)
    return new_bytes // size, _total(covered) // size, new_bytes


def _byte_ranges(tensor: Tensor) -> Ranges:
    """Return the ranges ``(start, end)`` of bytes that a strided tensor covers of its storage."""
    if tensor.numel() == 0:
        return _NO_RANGES
    run = 1  # consecutive elements covered by the dimensions of small stride
    starts = np.array([tensor.storage_offset()], dtype=np.int64)
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride <= run:
            run += stride * (length - 1)
        else:
            starts = np.add.outer(starts, stride * np.arange(length)).ravel()
    return np.stack([starts, starts + run], axis=1) * tensor.element_size()


def _union(ranges: Ranges) -> Ranges:
    """Return the same bytes as sorted ranges that neither overlap nor touch."""
    if len(ranges) < 2:
        return ranges
    ranges = ranges[ranges[:, 0].argsort()]
    reached = np.maximum.accumulate(ranges[:, 1])
    first = np.concatenate([[True], ranges[1:, 0] > reached[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([ranges[first, 0], reached[last]], axis=1)


def _total(ranges: Ranges) -> int:
    """Return the number of bytes in ranges that do not overlap."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())
