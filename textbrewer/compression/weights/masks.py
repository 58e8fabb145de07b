"""Which weights of a model stay: a boolean for each, by parameter; to be looked at, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from textbrewer.compression.named_masks import NamedMasks

__all__ = ["WeightMasks"]


class WeightMasks(NamedMasks):
    """Booleans of a parameter's shape by its name, true for the weights that stay. Others stay whole.

    >>> masks["bert.encoder.layer.0.attention.self.query.weight"]
    tensor([[ True, False, ...

    Args:
        masks: the booleans by name of a parameter.

    Raises:
        TypeError: if one is no tensor of booleans.
        ValueError: if there are none.
    """

    file_format = "textbrewer-weight-masks"
    by = "name of a parameter"

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__(masks)
        if not masks:
            raise ValueError("masks must be of at least one parameter, got none")

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the masks are of a model's parameters and their shapes."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        for name, mask in self._masks.items():
            if shapes.get(name) != mask.shape:
                own = f"is of shape {tuple(shapes[name])} there" if name in shapes else "is none there"
                raise ValueError(
                    f"masks must be of the parameters of this {type(model).__name__}: {name!r}, with a mask of shape "
                    f"{tuple(mask.shape)}, {own}. The masks are of another model"
                )
