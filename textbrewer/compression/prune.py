"""What to prune: how much of which kind, by which score, within which limits."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression.choosing import choose_global, choose_uniform
from textbrewer.compression.data_scores import DATA_SCORES
from textbrewer.compression.gates import has_gates
from textbrewer.compression.masked import Masked
from textbrewer.compression.masks import Masks
from textbrewer.compression.sites import Layout, Site, find_layout
from textbrewer.compression.weight_scores import WEIGHT_SCORES, unit_weights

__all__ = ["Prune"]

_SCOPES = ("uniform", "global")


@dataclass(frozen=True)
class Prune:
    """A plan of what to take out of a model.

    >>> masked = Prune(heads=0.5, ffn=0.5, score="taylor", scope="global").apply(model, dataloader)
    >>> masked.sparsity()
    >>> small = masked.shrink()

    Heads of each attention and units of each feed-forward part are chosen by themselves; heads that share keys and
    values go in groups, and where layers share biases by head (T5) they all lose the same heads. The layers that go are
    chosen first, and shares are of what is in the others.

    Args:
        heads: the share of the attention heads that goes, from 0 to below 1.
        ffn: the share of the feed-forward units that goes.
        layers: how many whole layers go, of each stack.
        score: the units of the lowest score go. By their weights: ``"l1"``, ``"l2"``, ``"level"`` (the mean magnitude),
            ``"fpgm"`` (the distance to the others), or your own in
            :data:`~textbrewer.compression.weight_scores.WEIGHT_SCORES`; by data: ``"taylor"``, ``"mean_activation"``,
            ``"apoz"``; ``"random"``; or scores that you worked out, a dict of tensors ``(units,)`` by site.
        scope: ``"uniform"``: the same share everywhere; ``"global"``: the least important of the whole model.
        minimum: how many heads (groups of heads) and units must stay in each place.
        maximum: with ``scope="global"``, the largest share of one place that may go.
        exclude: dotted names of modules, or patterns as ``"*.layer.0.*"``: of what is inside nothing goes.
        seed: of ``score="random"``.

    Raises:
        ValueError: if a share is not from 0 to below 1, nothing is to go, or a name is unknown.
        TypeError: if an argument is of the wrong kind.
    """

    heads: float = 0.0
    ffn: float = 0.0
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
        checks.integer(self.layers, "layers", minimum=0)
        if not (self.heads or self.ffn or self.layers):
            raise ValueError("one of heads, ffn and layers must be more than 0, got 0 for all: nothing would be pruned")
        if not isinstance(self.score, Mapping):
            checks.is_a(self.score, str, "score", "a name, or a dict of tensors by site")
            checks.one_of(self.score, [*WEIGHT_SCORES, *DATA_SCORES, "random"], "score")
        checks.one_of(self.scope, _SCOPES, "scope")
        checks.integer(self.minimum, "minimum", minimum=1)
        checks.number(self.maximum, "maximum", above=0, maximum=1)
        if self.maximum < 1 and self.scope != "global":
            raise ValueError('maximum must be 1 unless scope="global": otherwise the same share goes everywhere')
        checks.is_a(self.exclude, (list, tuple), "exclude", "a list of names")
        checks.integer(self.seed, "seed")

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
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module")
        self._check_data(dataloader)
        if has_gates(model):
            raise ValueError("model must not be masked already; shrink it first, and prune what comes out")
        layout = find_layout(model)
        _check_whole(model, layout)
        excluded = self._excluded(model)
        wanted = [site for site in layout.sites if self._amount(site.kind) and not _touches(site, excluded)]
        scores = self.scores(model, layout, wanted, dataloader, adaptor)
        return Masked(copy.deepcopy(model), Masks(self._choose(layout, wanted, scores, excluded)))

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
            scores = _given(self.score, sites)
        elif self.score == "random":
            generator = torch.Generator().manual_seed(int(self.seed))
            scores = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
        elif self.score in DATA_SCORES:
            scores = DATA_SCORES[self.score](model, sites, dataloader, adaptor)
        else:
            scores = {site.name: WEIGHT_SCORES[self.score](unit_weights(model, layout, site)).cpu() for site in sites}
        for name, score in scores.items():
            if not score.isfinite().all():
                raise ValueError(f"scores must be finite, got {score.tolist()} for {name!r}; look at the weights")
        return scores

    def _choose(
        self, layout: Layout, sites: Sequence[Site], scores: Mapping[str, Tensor], excluded: set[str]
    ) -> dict[str, Tensor]:
        """Return the masks: of layers first, then of what is in the layers that stay."""
        masks: dict[str, Tensor] = {}
        for stack in layout.stacks if self.layers else ():
            masks[stack.path] = self._layers(layout, stack.path, scores, excluded)
        for kind in ("heads", "ffn"):
            left = [site for site in sites if site.kind == kind and _stays(site, masks)]
            if not self._amount(kind):
                continue
            if not left:
                raise ValueError(f"exclude must leave something to prune of {kind}, got {list(self.exclude)}")
            if self.scope == "uniform":
                chosen = choose_uniform(left, scores, self._amount(kind), int(self.minimum))
            else:
                chosen = choose_global(left, scores, self._amount(kind), int(self.minimum), self.maximum)
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
        return {"heads": self.heads, "ffn": self.ffn, "layers": self.layers}[kind]

    def _check_data(self, dataloader: Iterable[Any] | None) -> None:
        needs = isinstance(self.score, str) and self.score in DATA_SCORES
        if needs and dataloader is None:
            raise ValueError(f"score={self.score!r} needs data: pass apply(model, dataloader)")
        if not needs and dataloader is not None:
            raise ValueError(f"dataloader must be None for score={self.score!r}, which does not read it; leave it out")

    def _excluded(self, model: nn.Module) -> set[str]:
        """Return the modules that nothing may be taken from.

        Raises:
            KeyError: if a name or pattern fits none.
        """
        found: set[str] = set()
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        for pattern in self.exclude:
            fits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if not fits:
                raise KeyError(f"exclude: the model ({type(model).__name__}) has no module {pattern!r}")
            found |= {name for name in names if any(name == one or name.startswith(one + ".") for one in fits)}
        return found


def _touches(site: Site, excluded: set[str]) -> bool:
    """Return whether something of a site is excluded; of layers each is looked at by itself."""
    return site.inner is not None and not excluded.isdisjoint([*site.inner.readers, *site.inner.writers])


def _stays(site: Site, masks: Mapping[str, Tensor]) -> bool:
    """Return whether a layer of the site stays."""
    mask = masks.get(site.stack)
    return mask is None or any(bool(mask[number]) for number in site.layers)


def _given(given: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return scores that the user worked out.

    Raises:
        ValueError: if a site has none, or not one a unit.
    """
    scores = {}
    for site in sites:
        score = given.get(site.name)
        shape = None if score is None else tuple(torch.as_tensor(score).shape)
        if shape != (site.units,):
            raise ValueError(f"score must have {site.units} numbers for {site.name!r}, got {shape or 'none'}")
        scores[site.name] = torch.as_tensor(score).detach().double().cpu()
    return scores


def _check_whole(model: nn.Module, layout: Layout) -> None:
    """Raise ValueError if weights that would be sliced are no parameters, as in pairs of low rank."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in layout.sites:
        for name, _ in site.inner.axes if site.inner is not None else ():
            if name not in parameters:
                raise ValueError(
                    f"{name!r} must be a parameter of the model to be pruned, and is none: prune first, and factorise, "
                    "quantise or wrap the layers of what comes out"
                )
