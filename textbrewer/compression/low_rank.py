"""Linear maps replaced by pairs of smaller ones, by the directions of their outputs that matter on some data.

>>> report = factorize_(model, dataloader, ratio=0.5)
>>> print(report)
>>> shapes = low_rank_manifest(model)              # beside model.state_dict(): what it takes to load it again
>>> restore_low_rank_(fresh_model, shapes).load_state_dict(model.state_dict())
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression import low_rank_ranks, whitening
from textbrewer.compression.low_rank_layers import LowRankLinear, choose_maps, matrix_of
from textbrewer.compression.low_rank_manifest import low_rank_manifest, restore_low_rank_
from textbrewer.compression.low_rank_ranks import Spectrum, largest_rank
from textbrewer.hooks.stacks import places_of

__all__ = [
    "FactorizeReport",
    "FactorizedMap",
    "LowRankLinear",
    "factorize_",
    "low_rank_manifest",
    "restore_low_rank_",
]


@dataclass(frozen=True)
class FactorizedMap:
    """One linear map that became a pair.

    Args:
        name: dotted name in the model.
        outputs: width of its outputs.
        inputs: width of its inputs.
        rank: width between the two halves.
        energy: share of the squared (whitened) singular values kept: 1 minus the relative squared error of the outputs.
    """

    name: str
    outputs: int
    inputs: int
    rank: int
    energy: float

    @property
    def before(self) -> int:
        """Weights of the map, without its bias, which stays."""
        return self.outputs * self.inputs

    @property
    def after(self) -> int:
        """Weights of the pair."""
        return self.rank * (self.outputs + self.inputs)


@dataclass(frozen=True)
class FactorizeReport:
    """What :func:`factorize_` did.

    Args:
        method: ``"whitened"`` or ``"svd"``.
        maps: the maps that became pairs.
        left: the maps left as they are, by name, with the reason.
        considered: weights of the maps that could have become pairs, of which ``ratio`` is the share to remove.
    """

    method: str
    maps: tuple[FactorizedMap, ...]
    left: Mapping[str, str]
    considered: int

    @property
    def removed(self) -> int:
        """Weights that the model has fewer now."""
        return sum(item.before - item.after for item in self.maps)

    @property
    def ratio(self) -> float:
        """Weights removed, as a share of those of the maps that could have become pairs."""
        return self.removed / self.considered

    def __str__(self) -> str:
        rows = [("map", "outputs x inputs", "rank", "weights", "energy kept")]
        rows += [
            (item.name, f"{item.outputs} x {item.inputs}", f"{item.rank}", f"{item.before} -> {item.after}",
             f"{item.energy:.4f}")
            for item in self.maps
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"left: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, f"{self.removed} weights removed, {self.ratio:.1%} of the maps considered"])


def factorize_(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    scope: str = "layer",
    method: str = "whitened",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    adaptor: Adaptor | str = "auto",
    damping: float = 1e-6,
) -> FactorizeReport:
    r"""Replace linear maps by pairs of smaller ones, in place.

    .. math::
        W \approx \hat W = U_k V_k, \qquad
        \hat W = \arg\min_{\mathrm{rank}\, \hat W \le k} \mathbb{E} \lVert (W - \hat W) x \rVert^2
               = \mathrm{SVD}_k(W L) L^{-1}, \quad L L^\top = \mathbb{E}[x x^\top]

    with the expectation over the map's inputs on the data (``"whitened"``), or over inputs that are alike in all
    directions (``"svd"``: the nearest matrix in the Frobenius norm). Biases stay. ``nn.Linear`` and transformers'
    ``Conv1D`` are replaced; output heads, shared weights and some others are not, see
    :func:`~textbrewer.compression.low_rank_layers.choose_maps`, and neither are maps of which the pair would be as
    large as the map (:math:`k \ge mn / (m + n)`): the report says of each why.

    All pairs are computed before the first is put in. Make the optimiser afterwards. A state dict of the model loads
    into a fresh one after :func:`restore_low_rank_`.

    Args:
        model: changed in place; nothing of it is if anything is raised.
        dataloader: batches as the model takes them, for ``"whitened"``: run in eval mode where the model is.
        ratio: share of the weights to remove, above 0 and below 1: of each map, or of all maps considered.
        energy: instead of ``ratio``, share of the squared (whitened) singular values to keep, above 0 up to 1.
        scope: ``"layer"``: every map has the same ratio or keeps the same energy; ``"global"``: one budget, spent by
            :func:`~textbrewer.compression.low_rank_ranks.ranks_under_budget`.
        method: ``"whitened"`` or ``"svd"``.
        include: dotted names, or patterns such as ``"*.intermediate"``, of maps or of modules around them; only these.
        exclude: likewise, of what to leave.
        adaptor: says by ``inputs_mask`` which positions are padding; see
            :func:`~textbrewer.compression.whitening.second_moments`.
        damping: added to the second moments, times the mean of their diagonal, times the identity: where the data does
            not reach, directions are kept by their weights, and few positions do no harm. With 0 it is an error if the
            moments are singular.

    Returns:
        What became of each map.

    Raises:
        TypeError, ValueError, KeyError: if an argument cannot work, weights or inputs are not finite, or no map is
            left to be replaced.

    Reference:
        Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        2024, arXiv:2403.07378, section 3.1; for ``"svd"`` Eckart and Young, "The approximation of one matrix by another
        of lower rank", Psychometrika 1, 1936.
    """
    _check(model, dataloader, ratio, energy, scope, method, damping)
    maps, left = choose_maps(model, include, exclude)
    for name, module in list(maps.items()):
        if largest_rank(*matrix_of(module).shape) < 1:
            left[name] = f"no pair is smaller than {_times(matrix_of(module).shape)}"
            del maps[name]
    moments = None
    if dataloader is not None and maps:
        moments = whitening.second_moments(model, maps, dataloader, adaptor)
        for name in maps.keys() - moments.keys():
            left[name] = "the data did not reach it"
            del maps[name]
    bases = {name: _directions(name, module, moments, damping) for name, module in maps.items()}
    shapes = {name: matrix_of(module).shape for name, module in maps.items()}
    spectra = {name: Spectrum(shapes[name][0], shapes[name][1], energies) for name, (_, energies) in bases.items()}
    ranks = _ranks(spectra, ratio, energy, scope, left) if spectra else {}
    if not ranks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise ValueError(f"the model must have a linear map that can become a smaller pair, got none ({reasons})")
    pairs = {name: _pair(maps[name], bases[name][0][:, :rank]) for name, rank in ranks.items()}
    places = {name: places_of(model, maps[name]) for name in pairs}
    for name, pair in pairs.items():
        for children, key in places[name]:
            children[key] = pair
    done = [
        FactorizedMap(name, item.outputs, item.inputs, ranks[name], sum(item.shares()[: ranks[name]]))
        for name, item in spectra.items()
        if name in ranks
    ]
    return FactorizeReport(method, tuple(done), left, sum(item.weights for item in spectra.values()))


def _check(model: Any, dataloader: Any, ratio: Any, energy: Any, scope: str, method: str, damping: Any) -> None:
    """Raise for arguments that cannot work."""
    checks.is_a(model, nn.Module, "model", "a torch module")
    checks.one_of(scope, ("layer", "global"), "scope")
    checks.one_of(method, ("whitened", "svd"), "method")
    if (ratio is None) == (energy is None):
        raise ValueError(f"give either ratio or energy, got ratio={ratio!r} and energy={energy!r}")
    if ratio is not None:
        checks.number(ratio, "ratio", above=0, below=1)
    if energy is not None:
        checks.number(energy, "energy", above=0, maximum=1)
    checks.number(damping, "damping", minimum=0)
    if method == "whitened" and dataloader is None:
        raise ValueError('method="whitened" needs a dataloader, got None; pass one, or take method="svd"')
    if method == "svd" and dataloader is not None:
        raise ValueError('method="svd" reads no data; leave dataloader out, or take method="whitened"')
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError("model must have no adapters of peft inside; merge them first: model = merge_lora(model)")


def _directions(
    name: str, module: nn.Module, moments: dict[str, Tensor] | None, damping: float
) -> tuple[Tensor, Tensor]:
    """Return the directions of a map's outputs and their energies; the moments are let go of."""
    matrix = matrix_of(module)
    device = whitening.working_device(matrix)
    moment = None if moments is None else moments.pop(name).to(device)
    return whitening.output_directions(matrix.to(device), moment, damping, name)


def _ranks(
    spectra: Mapping[str, Spectrum], ratio: float | None, energy: float | None, scope: str, left: dict[str, str]
) -> dict[str, int]:
    """Return the ranks of the maps to replace, and note the reasons for the others."""
    if scope == "global":
        found = low_rank_ranks.ranks_under_budget(spectra, ratio, energy)
        left.update({name: "the common budget leaves it whole" for name, rank in found.items() if rank is None})
        return {name: rank for name, rank in found.items() if rank is not None}
    if ratio is not None:
        ranks = low_rank_ranks.ranks_by_ratio(spectra, ratio)
    else:
        ranks = low_rank_ranks.ranks_by_energy(spectra, float(energy or 0.0))
    for name, item in spectra.items():
        if ranks[name] < 1:
            left[name] = f"ratio={ratio} leaves no direction of {item.outputs} x {item.inputs}"
        elif ranks[name] > largest_rank(item.outputs, item.inputs):
            left[name] = f"energy={energy} needs rank {ranks[name]}, at which the pair would not be smaller"
    return {name: rank for name, rank in ranks.items() if name not in left}


def _pair(module: nn.Module, directions: Tensor) -> LowRankLinear:
    """Return the pair for a map, seen along some directions of its outputs."""
    matrix = matrix_of(module).to(directions.device)
    return LowRankLinear.of(module, *whitening.factors(matrix, directions))


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
