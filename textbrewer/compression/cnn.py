"""Convolutional networks made smaller: channels taken out, wherever they are written, read, normalised or added.

Which layers must lose the same channels is found by torch-pruning, from a forward pass; it is an optional extra.

>>> small = prune_channels(model, images, ratio=0.5)
>>> compression.save(small, "small")
>>> compression.load("small", model=Net())             # in any process
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression.channel_groups import ChannelGroup, groups_of, tensors_in, traced
from textbrewer.compression.channel_scores import CHANNEL_SCORES, Scorer, add_gradients, check_data
from textbrewer.compression.choosing import choose_units
from textbrewer.compression.gates import has_gates
from textbrewer.compression.quantized_weights import quantized_names
from textbrewer.compression.structure import STRUCTURES
from textbrewer.compression.structure.structure import kind_of
from textbrewer.hooks.forward import call, device_of, evaluating, modes_of, on_device

__all__ = ["prune_channels"]

# Attributes in which attentions keep their number of heads, which torch-pruning knows nothing of.
_HEADS = ("head_count", "heads", "n_head", "n_heads", "nhead", "num_attention_heads", "num_heads")


def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    ratio: float = 0.5,
    score: str = "l2",
    scope: str = "uniform",
    minimum: int = 1,
    maximum: float = 1.0,
    exclude: Sequence[str] = (),
    dataloader: Iterable[Any] | None = None,
    adaptor: Adaptor | str = "auto",
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a convolutional (or dense) network with fewer channels, of the same class.

    Layers whose channels meet (in sums, concatenations, normalisation, groups) lose the same ones. The channels that
    the model returns stay, so that its outputs keep their shapes.

    Args:
        model: left as it is.
        example_inputs: what the model takes, as in a batch: a tensor, or a dict, tuple or list of them; one row does.
        ratio: the share of the channels that goes, above 0 and below 1, rounded down.
        score: the channels of the lowest score go. The norm of all their weights: ``"l1"``, ``"l2"``; ``"fpgm"``: their
            distance to the others; ``"slim"``: the factors of their batch normalisation (what has none stays whole);
            ``"lamp"``; ``"taylor"``: how much the loss on data depends on them; ``"random"``.
        scope: ``"uniform"``: the same share everywhere; ``"global"``: the least important of the whole model, scores
            being divided by their mean over the layers that lose the same channels.
        minimum: how many channels (of layers in groups: of each group) must stay in each place.
        maximum: with ``scope="global"``, the largest share of one place that may go.
        exclude: dotted names of modules, or patterns as ``"stem.*"``, that keep all channels that they write.
        dataloader: for ``score="taylor"``: batches as the model takes them; read once.
        adaptor: for ``score="taylor"``: its ``losses`` count.
        seed: of ``score="random"``.

    Returns:
        The copy, in the modes of the model, on its device. :func:`textbrewer.compression.save` keeps it: what a
        transformers config says of its widths is no longer true.

    Raises:
        ImportError: without torch-pruning.
        TypeError, ValueError, KeyError: if an argument cannot work, the model is a transformer, or cannot be run on
            ``example_inputs``, before and after.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900. Scores: He et al.,
        arXiv:1811.00250 (fpgm); Liu et al., arXiv:1708.06519 (slim); Lee et al., arXiv:2010.07611 (lamp); Molchanov et
        al., arXiv:1906.10771 (taylor).
    """
    _check(model, ratio, score, scope, minimum, maximum, exclude, dataloader, seed)
    pruning = _torch_pruning()
    small = copy.deepcopy(model)
    kept = _named(small, exclude)
    inputs = on_device(example_inputs, device_of(small))
    modes = [training for _, training in modes_of([model])]
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    with evaluating(small), torch.enable_grad():
        for parameter in small.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        before = _run(small, inputs, "model must take example_inputs, and raises")
        graph, returned = traced(pruning, small, inputs)
        groups = list(groups_of(graph, returned, kept))
        if dataloader is not None:
            add_gradients(small, dataloader, adaptor)
        scores = _scores(groups, CHANNEL_SCORES[score](pruning), seed)
        masks = _choose(groups, scores, scope, ratio, minimum, maximum)
        for group in groups:
            group.prune(masks[group.name])
        after = _run(small, inputs, "exclude must name the layers whose widths other code counts on: pruned, it raises")
    for before_one, after_one in zip(before, after, strict=True):
        if before_one.shape != after_one.shape:
            raise ValueError(
                f"exclude must name the layers that write what the model returns, whose shape would change from "
                f"{tuple(before_one.shape)} to {tuple(after_one.shape)}"
            )
    for name, parameter in small.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in frozen)
    for (module, _), training in zip(modes_of([small]), modes, strict=True):
        module.training = training
    return small


def _scores(groups: Sequence[ChannelGroup], scorer: Scorer, seed: int) -> dict[str, Tensor]:
    """Return the scores of the units of each group that has some.

    Raises:
        ValueError: if one is not finite.
    """
    scores = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for group in groups:
            found = scorer(group.graph, group.items)
            if found is None:
                continue
            if not bool(found.isfinite().all()):
                raise ValueError(f"scores must be finite, got {found.tolist()} for {group.name!r}; look at the weights")
            scores[group.name] = found.detach().double().cpu().reshape(group.blocks, -1).mean(0)
    return scores


def _choose(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], scope: str, ratio: float, minimum: int, maximum: float
) -> dict[str, Tensor]:
    """Return which units of each group stay.

    Raises:
        ValueError: if none may go, or too few would stay.
    """
    sites = [group.site for group in groups if group.name in scores]
    if not sites:
        raise ValueError(
            'the model must have channels that can be taken out (for score="slim", that a BatchNorm normalises), got '
            "none beside those that it returns and those in exclude"
        )
    masks = choose_units(sites, scores, ratio, scope, minimum, maximum)
    if all(bool(mask.all()) for mask in masks.values()):
        largest = max(site.units for site in sites)
        raise ValueError(f"ratio must be large enough to take one of {largest} channels, got {ratio}: nothing would go")
    whole = {group.name: torch.ones(group.site.units, dtype=torch.bool) for group in groups}
    return whole | masks


def _run(model: nn.Module, inputs: Any, what: str) -> list[Tensor]:
    """Return the tensors that a model returns.

    Raises:
        ValueError: if it fails.
    """
    try:
        with torch.no_grad():
            return list(tensors_in(call(model, inputs, {})))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} {type(error).__name__}: {error}") from error


def _named(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    """Return the modules that patterns name, with all inside of them.

    Raises:
        KeyError: if one fits none.
    """
    found: set[nn.Module] = set()
    for pattern in patterns:
        checks.is_a(pattern, str, "an entry of exclude", "a dotted name or a pattern")
        fits = [module for name, module in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        if not fits:
            raise KeyError(f"exclude: the model ({type(model).__name__}) has no module {pattern!r}")
        found |= {inner for module in fits for inner in module.modules()}
    return found


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("prune_channels needs torch-pruning: pip install 'textbrewer[cnn]'") from error
    return torch_pruning


def _check(
    model: Any, ratio: Any, score: Any, scope: Any, minimum: Any, maximum: Any, exclude: Any, dataloader: Any, seed: Any
) -> None:
    """Raise for arguments that cannot work."""
    checks.is_a(model, nn.Module, "model", "a torch module")
    checks.number(ratio, "ratio", above=0, below=1)
    checks.one_of(score, CHANNEL_SCORES, "score")
    checks.one_of(scope, ("uniform", "global"), "scope")
    checks.integer(minimum, "minimum", minimum=1)
    checks.number(maximum, "maximum", above=0, maximum=1)
    if maximum < 1 and scope != "global":
        raise ValueError('maximum must be 1 unless scope="global": otherwise the same share goes everywhere')
    checks.is_a(exclude, (list, tuple), "exclude", "a list of names")
    checks.integer(seed, "seed")
    check_data(score, dataloader)
    if has_gates(model):
        raise ValueError("model must not be masked; shrink it first, and prune what comes out")
    for name in quantized_names(model):
        raise ValueError(f"model must not be quantised already, got int8 or fake-quantised {name!r}; prune it before")
    attention = next((name for name, module in model.named_modules() if _is_attention(module)), None)
    if kind_of(model) in STRUCTURES or attention is not None:
        where = f" (attention {attention!r})" if attention is not None else ""
        raise ValueError(
            f"model must be a convolutional or dense network, got the transformer {kind_of(model)!r}{where}; use "
            "compression.Prune(heads=..., ffn=...), which knows heads, and compression.register_structure for a model "
            "of your own"
        )


def _is_attention(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower() and any(hasattr(module, name) for name in _HEADS)
    return isinstance(module, nn.MultiheadAttention) or named
