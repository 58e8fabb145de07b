"""What to prune: how much of which kind, by which score, within which limits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression.choosing import SCOPES, choose_uniform, choose_units
from textbrewer.compression.data_scores import DATA_SCORES, check_data
from textbrewer.compression.gates import has_gates
from textbrewer.compression.hidden_scores import HIDDEN_SCORES, score_by_weights
from textbrewer.compression.masked import Masked
from textbrewer.compression.masks import Masks
from textbrewer.compression.prune_places import check_whole, chosen_modules, given_scores, stays, touches
from textbrewer.compression.sites import HIDDEN, Layout, Site, find_layout
from textbrewer.compression.weight_scores import WEIGHT_SCORES

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune:
    """A plan of what to take out of a model.

    >>> masked = Prune(heads=0.5, ffn=0.5, score="taylor", scope="global").apply(model, dataloader)
    >>> masked.sparsity()
    >>> small = masked.shrink()

    Heads of each attention and units of each feed-forward part are chosen by themselves; heads that share keys and
    values go in groups, and where layers share biases by head (T5) they all lose the same heads. The layers that go are
    chosen first, and shares are of what is in the others. Hidden features are chosen last, by scores of the whole model
    as it was: they go everywhere at once, from embeddings, norms, whatever reads or writes them, pooler and prediction
    head; heads keep their width. Norms then take their statistics over the features that stay, and scales that a model
    works out from its hidden width (T5, BART) follow it.

    Args:
        heads: the share of the attention heads that goes, from 0 to below 1.
        ffn: the share of the feed-forward units that goes.
        hidden: the share of the hidden features that goes; at least one stays. By keyword.
        layers: how many whole layers go, of each stack.
        score: the units of the lowest score go. By their weights: ``"l1"``, ``"l2"``, ``"level"`` (the mean magnitude),
            ``"fpgm"`` (the distance to the others), or your own in
            :data:`~textbrewer.compression.weight_scores.WEIGHT_SCORES`; by data: ``"taylor"``, ``"mean_activation"``,
            ``"apoz"`` (not of hidden features); ``"slim"`` (of hidden features alone: their scales in the norms);
            ``"random"``; or scores that you worked out, a dict of tensors ``(units,)`` by site. For hidden features,
            ``"hidden"`` in it, see :func:`~textbrewer.compression.hidden_scores.hidden_score`.
        scope: ``"uniform"``: the same share everywhere; ``"global"``: the least important of the whole model. Hidden
            features are of one place, for which both are the same.
        minimum: how many heads (groups of heads) and units must stay in each place; not of hidden features.
        maximum: with ``scope="global"``, the largest share of one place that may go; not of hidden features.
        exclude: dotted names of modules, or patterns as ``"*.layer.0.*"``: of what is inside nothing goes; so it can
            name nothing that hidden features pass if these are to go.
        seed: of ``score="random"``.

    Raises:
        ValueError: if a share is not from 0 to below 1, nothing is to go, a name is unknown, or the score is none for
            what is to go.
        TypeError: if an argument is of the wrong kind.
    """

    heads: float = 0.0
    ffn: float = 0.0
    hidden: float = field(default=0.0, kw_only=True)
    layers: int = 0
    score: str | Mapping[str, Tensor] = "l1"
    scope: str = "uniform"
    minimum: int = 1
    maximum: float = 1.0
    exclude: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number(self.heads, "heads", minimum=0, below=1)
        checks.number(self.ffn, "ffn", minimum=0, below=1)
        checks.number(self.hidden, "hidden", minimum=0, below=1)
        checks.integer(self.layers, "layers", minimum=0)
        if not (self.heads or self.ffn or self.hidden or self.layers):
            raise ValueError(
                "one of heads, ffn, hidden and layers must be more than 0, got 0 for all: nothing would be pruned"
            )
        self._check_score()
        checks.one_of(self.scope, SCOPES, "scope")
        checks.integer(self.minimum, "minimum", minimum=1)
        checks.number(self.maximum, "maximum", above=0, maximum=1)
        if self.maximum < 1 and self.scope != "global":
            raise ValueError('maximum must be 1 unless scope="global": otherwise the same share goes everywhere')
        checks.is_a(self.exclude, (list, tuple), "exclude", "a list of names")
        checks.integer(self.seed, "seed")

    def _check_score(self) -> None:
        if isinstance(self.score, Mapping):
            return
        checks.is_a(self.score, str, "score", "a name, or a dict of tensors by site")
        checks.one_of(self.score, [*WEIGHT_SCORES, *DATA_SCORES, *HIDDEN_SCORES, "random"], "score")
        if self.score in HIDDEN_SCORES and (self.heads or self.ffn or self.layers):
            raise ValueError(
                f"score={self.score!r} must be for hidden features alone, which have scales in the norms; heads, ffn "
                'and layers have none: prune them by another score, as "taylor", in a plan of their own'
            )
        if self.score == "apoz" and self.hidden:
            raise ValueError(
                'score must not be "apoz" for hidden features, which are hardly ever zero; use "taylor" or "slim"'
            )

    def apply(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, adaptor: Adaptor | str = "auto"
    ) -> Masked:
        """Choose what goes, and return a copy of the model that behaves as if it were gone.

        Args:
            model: left as it is.
            dataloader: batches as the model takes them, where the score needs data; read once.
            adaptor: for ``score="taylor"``, which reads its ``losses``; the ready-made one needs batches with labels.

        Returns:
            The masked copy, with its masks.

        Raises:
            ValueError: if the model's family is unknown, the plan does not fit it, or the score's data is missing.
            KeyError: if ``exclude`` names what the model has not.
        """
        masks = self.choose(model, dataloader, adaptor)
        return Masked(copy.deepcopy(model), masks)

    def choose(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, adaptor: Adaptor | str = "auto"
    ) -> Masks:
        """Return what :meth:`apply` would put on a copy of the model: which units stay, of each place that loses some.

        The arguments and errors are those of :meth:`apply`.
        """
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module")
        check_data(self.score, DATA_SCORES, dataloader, "apply(model, dataloader)")
        if has_gates(model):
            raise ValueError("model must not be masked already; shrink it first, and prune what comes out")
        layout = find_layout(model, hidden=bool(self.hidden))
        check_whole(model, layout.sites)
        excluded = chosen_modules(model, self.exclude, "exclude")
        wanted = [site for site in layout.sites if self._amount(site.kind) and not touches(site, excluded)]
        scores = self.scores(model, layout, wanted, dataloader, adaptor)
        return Masks(self._choose(layout, wanted, scores, excluded))

    def scores(
        self,
        model: nn.Module,
        layout: Layout,
        sites: Sequence[Site],
        dataloader: Iterable[Any] | None,
        adaptor: Adaptor | str,
    ) -> dict[str, Tensor]:
        """Return the importance of the units of each site, ``(units,)``.

        Raises:
            ValueError: if one is not finite, or given scores do not fit the model.
        """
        if isinstance(self.score, Mapping):
            scores = given_scores(self.score, sites)
        elif self.score == "random":
            generator = torch.Generator().manual_seed(int(self.seed))
            scores = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
        elif self.score in DATA_SCORES:
            scores = DATA_SCORES[self.score](model, sites, dataloader, adaptor)
        else:
            scores = {site.name: score_by_weights(model, layout, site, self.score).cpu() for site in sites}
        for name, score in scores.items():
            if not score.isfinite().all():
                raise ValueError(f"scores must be finite, got {score.tolist()} for {name!r}; look at the weights")
        return scores

    def _choose(
        self, layout: Layout, sites: Sequence[Site], scores: Mapping[str, Tensor], excluded: set[str]
    ) -> dict[str, Tensor]:
        """Return the masks: of layers first, then of what is in the layers that stay, of hidden features at last."""
        masks: dict[str, Tensor] = {}
        for stack in layout.stacks if self.layers else ():
            masks[stack.path] = self._layers(layout, stack.path, scores, excluded)
        for kind in ("heads", "ffn", HIDDEN):
            left = [site for site in sites if site.kind == kind and stays(site, masks)]
            if not self._amount(kind):
                continue
            if not left:
                remedy = "; hidden features are the same everywhere, so set hidden=0" if kind == HIDDEN else ""
                raise ValueError(f"exclude must leave something to prune of {kind}, got {list(self.exclude)}{remedy}")
            if kind == HIDDEN:  # one place
                chosen = choose_uniform(left, scores, self.hidden, 1)
            else:
                limits = int(self.minimum), self.maximum
                chosen = choose_units(left, scores, self._amount(kind), self.scope, *limits)
            if all(mask.all() for mask in chosen.values()):
                largest = max(site.units for site in left)
                raise ValueError(f"{kind} must be large enough to take one of {largest}, got {self._amount(kind)}")
            masks |= chosen
        return masks

    def _layers(self, layout: Layout, path: str, scores: Mapping[str, Tensor], excluded: set[str]) -> Tensor:
        """Return which layers of a stack stay."""
        (stack,) = (stack for stack in layout.stacks if stack.path == path)
        total = len(stack.blocks)
        free = [number for number in range(total) if f"{path}.{number}" not in excluded]
        if self.layers >= total or self.layers > len(free):
            raise ValueError(
                f"layers must leave at least one of the {total} layers of {path!r}, and those in exclude, got "
                f"{self.layers}"
            )
        order = sorted(free, key=lambda number: (float(scores[path][number]), -number))
        mask = torch.ones(total, dtype=torch.bool)
        mask[order[: int(self.layers)]] = False
        return mask

    def _amount(self, kind: str) -> float:
        return {"heads": self.heads, "ffn": self.ffn, HIDDEN: self.hidden, "layers": self.layers}[kind]
