"""Where the stacks of layers that a family speaks of hang in a model."""

from __future__ import annotations

from torch import nn

from textbrewer.layouts.families import LayerStack

__all__ = ["locate"]


def locate(model: nn.Module, stack: LayerStack) -> tuple[str, nn.ModuleList] | None:
    """Return the dotted name and the layers of a stack, ``None`` if the model does not have it.

    Raises:
        ValueError: if the model has several lists of that name.
    """
    for path in stack.paths:
        found = [
            (name, module)
            for name, module in model.named_modules()
            if (name == path or name.endswith("." + path)) and isinstance(module, nn.ModuleList)
        ]
        if len(found) > 1:
            raise ValueError(
                f"{type(model).__name__} must have one list of layers named {path}, got "
                f"{', '.join(name for name, _ in found)}; name it in full in a Family of your own"
            )
        if found:
            return found[0]
    return None
