"""Which weights to set to zero: how many, singly or in blocks, by which score, where."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression.choosing import SCOPES
from textbrewer.compression.data_scores import check_data
from textbrewer.compression.trained.groups import Groups
from textbrewer.compression.trained.results import weight_masks
from textbrewer.compression.trained.targets import check_patterns, weight_groups
from textbrewer.compression.weights.masks import WeightMasks
from textbrewer.compression.weights.scores import (
    MAGNITUDES,
    choose_weights,
    given_scores,
    magnitudes,
    random_scores,
    taylor,
)
from textbrewer.compression.weights.sparse import SparseWeights

__all__ = ["SparsePruning"]


@dataclass(frozen=True)
class SparsePruning:
    """A plan of which weights to set to zero, one by one or in blocks.

    The zeros stay in ordinary dense tensors: this alone makes a model **neither smaller nor faster**; see
    :class:`SparseWeights`.

    >>> sparse = SparsePruning(amount=0.9, exclude=["*.layer.0"]).apply(model)
    >>> sparse.sparsity()["weights"]
    0.9

    Biases are left alone, and so is a weight's share of rounding: so many go as are whole, rounded down. A weight that
    several modules share is pruned for all of them.

    Args:
        amount: the share of the weights that go, from above 0 to below 1.
        block: outputs and inputs of the blocks that go as one, which must divide each weight; ``None`` in it: all of
            them, so that ``(1, None)`` is an output. ``None``: single weights. Weights of convolutions only singly.
        score: blocks of the lowest score go. ``"l1"``, the sum of the magnitudes; ``"level"``, their mean; ``"l2"``,
            their norm: all of them the magnitude of a single weight. ``"taylor"``, the square of the sum of gradient
            times weight, by data; ``"random"``; or scores that you worked out, a dict of tensors of a weight's shape by
            its name, which are summed over a block.
        scope: ``"uniform"``: the same share of each weight matrix; ``"global"``: the lowest scores of all.
        maximum: with ``scope="global"``, the largest share of one weight matrix that may go.
        modules: dotted names or patterns of linear modules (``Conv1D`` too) and convolutions, or of modules around
            them. ``None``: the linear modules of the attentions and feed-forward parts of a model of a known family;
            embeddings and heads are left out.
        exclude: names or patterns of what is left alone.
        seed: of ``score="random"``.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.
    """

    amount: float
    block: tuple[int | None, int | None] | None = None
    score: str | Mapping[str, Tensor] = "l1"
    scope: str = "uniform"
    maximum: float = 1.0
    modules: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number(self.amount, "amount", above=0, below=1)
        if self.block is not None:
            _check_block(self.block)
        if not isinstance(self.score, Mapping):
            checks.is_a(self.score, str, "score", "a name, or a dict of tensors by name of a weight")
            checks.one_of(self.score, [*MAGNITUDES, "taylor", "random"], "score")
        checks.one_of(self.scope, SCOPES, "scope")
        checks.number(self.maximum, "maximum", above=0, maximum=1)
        if self.maximum < 1 and self.scope != "global":
            raise ValueError('maximum must be 1 unless scope="global": otherwise the same share goes everywhere')
        if self.maximum < self.amount:
            raise ValueError(f"maximum must be at least amount={self.amount}, got {self.maximum}")
        check_patterns(self.modules, "modules")
        check_patterns(self.exclude, "exclude")
        checks.integer(self.seed, "seed")

    def apply(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, adaptor: Adaptor | str = "auto"
    ) -> SparseWeights:
        """Choose which weights go, and return a copy of the model with zeros for them.

        Args:
            model: left as it is.
            dataloader: batches as the model takes them, with labels, for ``score="taylor"``; read once.
            adaptor: for ``score="taylor"``, which reads its ``losses``.

        Returns:
            The copy, with its masks.

        Raises:
            ValueError: if the plan does not fit the model, or the score's data is missing.
            KeyError: if a pattern names what the model has not.
        """
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module")
        check_data(self.score, ["taylor"], dataloader, "apply(model, dataloader)")
        groups = self.groups(model)
        if self.score == "taylor" and dataloader is not None:
            scores = taylor(model, groups, dataloader, adaptor)
        else:
            scores = self.scores(groups)
        stays = choose_weights(scores, self.amount, self.scope, self.maximum)
        if all(bool(mask.all()) for mask in stays.values()):
            largest = max(one.count for one in groups)
            raise ValueError(f"amount must be large enough to take one of {largest} blocks, got {self.amount}")
        masks = weight_masks(groups, [stays[one.name] for one in groups])
        return SparseWeights(copy.deepcopy(model), WeightMasks(masks))

    def groups(self, model: nn.Module) -> list[Groups]:
        """Return the weights that may go, in blocks.

        Raises:
            ValueError: if there are none, or the blocks do not divide one.
            KeyError: if a pattern names what the model has not.
        """
        return weight_groups(model, self.modules, self.exclude, self.block or (1, 1))

    def scores(self, groups: Sequence[Groups]) -> dict[str, Tensor]:
        """Return the importance of each block, ``(blocks,)`` by weight; for scores that need no data.

        Raises:
            ValueError: if given scores do not fit the model.
        """
        if isinstance(self.score, Mapping):
            return given_scores(groups, self.score)
        if self.score == "random":
            return random_scores(groups, int(self.seed))
        return magnitudes(groups, self.score)


def _check_block(block: Any) -> None:
    """Raise unless a block is two sizes."""
    checks.is_a(block, tuple, "block", "a pair (outputs, inputs)")
    if len(block) != 2:
        raise ValueError(f"block must be a pair (outputs, inputs), got {block}")
    for side, name in zip(block, ("outputs", "inputs"), strict=True):
        if side is not None:
            checks.is_a(side, int, f"block's {name}", "a whole number, or None for all")
            checks.integer(side, f"block's {name}", minimum=1)
