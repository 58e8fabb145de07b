"""A model with zeros in place of some of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.trained.holding import Held
from textbrewer.compression.weights.masks import WeightMasks

__all__ = ["SparseWeights"]


class SparseWeights:
    """A model some of whose weights are zero, with what says which.

    The zeros stay in ordinary dense tensors: the model is **not smaller and not faster**, in memory, on disk or in
    time; only a program that knows sparse matrices would make something of them, and torch's own layers do not. To get
    a smaller and faster model, prune units: :class:`~textbrewer.compression.Prune`.

    >>> sparse = SparseWeights(model, WeightMasks.load("masks.safetensors"))

    The model is saved and loaded as ever. Training it fills the zeros again, unless
    :class:`~textbrewer.compression.weights.KeepSparse` takes part.

    Args:
        model: gets the zeros in place.
        masks: which weights stay.

    Raises:
        ValueError: if the masks are of another model.
        TypeError: if an argument is of the wrong kind.
    """

    def __init__(self, model: nn.Module, masks: WeightMasks | Mapping[str, Tensor]) -> None:
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module")
        self.masks = masks if isinstance(masks, WeightMasks) else WeightMasks(masks)
        self.masks.check(model)
        self.model = model
        Held.by_name(model, self.masks).weights_to_zero()

    def sparsity(self) -> dict[str, float]:
        """Return the share of weights that are masked.

        Returns:
            A share for each masked parameter by its name; ``"weights"``, of all these together; ``"parameters"``, of
            all parameters of the model.
        """
        off = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        shares = {name: off[name] / mask.numel() for name, mask in self.masks.items()}
        masked = sum(mask.numel() for mask in self.masks.values())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        gone = sum(off.values())
        return {**shares, "weights": gone / masked, "parameters": gone / total}
