"""What an entry of NNI's config lists says of how much is to go, and in which blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textbrewer import checks
from textbrewer.compression.config_list_modules import MODULE_KEYS

__all__ = ["Settings", "read_settings"]

Block = tuple[int | None, int | None]

_RATIOS = ("sparse_ratio", "sparsity", "sparsity_per_layer", "total_sparsity")
_LIMITS = ("max_sparse_ratio", "max_sparsity_per_layer")
_SETTINGS = (*_RATIOS, *_LIMITS, "global_group_id", "granularity", "apply_method")
_COMMON = ("exclude", "target_names", "target_settings")
_QUANTISATION = "to quantise, use compression.quantize_(model), or prepare_qat_ and convert_qat_ around a training"
_DISTILLATION = "to distil, use a DistillationConfig with intermediate_matches"
_ELSEWHERE = {
    "min_sparse_ratio": "leave it out, or give layers entries of their own",
    "sparse_threshold": "soft thresholds are MovementPruning's, of compression.trained",
    "dependency_group_id": "for channels that meet, use compression.prune_channels, which finds them itself",
    "internal_metric_block": "use Prune(heads=...), which scores whole heads",
    "align": "use Prune or compression.prune_channels, which take biases with their units",
    **dict.fromkeys(("quant_types", "quant_bits", "quant_start_step", "quant_dtype", "quant_scheme"), _QUANTISATION),
    **dict.fromkeys(("lambda", "link"), _DISTILLATION),
}


@dataclass(frozen=True)
class Settings:
    """What becomes of the weights that an entry chooses.

    Args:
        what: the entry, for messages.
        amount: the share that goes.
        scope: ``"uniform"`` or ``"global"``.
        maximum: the largest share of one weight.
        block: outputs and inputs of a block, ``None`` for single weights.
        group: entries of one group share one budget.
    """

    what: str
    amount: float
    scope: str
    maximum: float
    block: Block | None
    group: str | None


def read_settings(entry: Mapping[str, Any], what: str) -> Settings | None:
    """Return an entry's settings, ``None`` if it excludes what it chooses.

    Raises:
        KeyError: if a key is unknown.
        ValueError: if one has no counterpart, contradicts another, or has a value that cannot work.
        TypeError: if a value is of the wrong kind.
    """
    given = {key: value for key, value in entry.items() if value is not None}
    _check_keys(given, (*MODULE_KEYS, *_COMMON, *_SETTINGS), what)
    own = {key: value for key, value in given.items() if key in _SETTINGS}
    if "exclude" in given:
        checks.is_a(given["exclude"], bool, f"{what}['exclude']", "True")
        if given["exclude"]:
            for key in (*own, *(key for key in ("target_names", "target_settings") if key in given)):
                raise ValueError(f"{what} must have no {key!r} beside exclude=True; make two entries of it")
            return None
    _check_targets(given.get("target_names", ["weight"]), f"{what}['target_names']")
    for target, values in _targets(given, what).items():
        checks.is_a(values, Mapping, f"{what}['target_settings'][{target!r}]", "a dict")
        nested = {key: value for key, value in values.items() if value is not None}
        _check_keys(nested, _SETTINGS, f"{what}['target_settings'][{target!r}]")
        for key in nested.keys() & own.keys():
            raise ValueError(f"{what} must have {key!r} once, got it in target_settings too")
        own |= nested
    return _settings(own, what)


def _targets(given: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    targets = given.get("target_settings", {})
    checks.is_a(targets, Mapping, f"{what}['target_settings']", "a dict by target")
    _check_targets(list(targets), f"{what}['target_settings']")
    return dict(targets)


def _check_targets(targets: Any, what: str) -> None:
    """Raise unless targets are weights."""
    checks.is_a(targets, (list, tuple), what, "a list of names")
    for target in targets:
        if target != "weight":
            raise ValueError(
                f"{what} must be of 'weight' alone, got {target!r}: biases, inputs and outputs are not pruned by "
                "themselves; use Prune or compression.prune_channels, which take a unit out wherever it is"
            )


def _check_keys(entry: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    """Raise for the first key that is unknown, or has no counterpart here."""
    for key in entry:
        if key in _ELSEWHERE:
            raise ValueError(
                f"{what}: {key!r} of NNI must be left out, as nothing here does the same; {_ELSEWHERE[key]}"
            )
    checks.known_keys(entry, known, what)


def _settings(own: Mapping[str, Any], what: str) -> Settings:
    """Return what settings that are known stand for."""
    ratio, amount = _one_of(own, _RATIOS, what)
    if ratio is None:
        raise ValueError(f"{what} must say how much goes, by sparse_ratio (or exclude=True), got none of {_RATIOS}")
    checks.number(amount, f"{what}[{ratio!r}]", above=0, below=1)
    if own.get("apply_method", "mul") != "mul":
        raise ValueError(f"{what}['apply_method'] must be 'mul', which sets weights to 0, got {own['apply_method']!r}")
    group = own.get("global_group_id")
    if group is not None:
        checks.is_a(group, (str, int), f"{what}['global_group_id']", "a name or number")
        if ratio != "sparse_ratio":
            raise ValueError(f"{what}['global_group_id'] must come with 'sparse_ratio', got {ratio!r}")
    scope = "global" if ratio == "total_sparsity" or group is not None else "uniform"
    limit, maximum = _one_of(own, _LIMITS, what)
    if limit is not None:
        checks.number(maximum, f"{what}[{limit!r}]", minimum=amount, maximum=1)
    # Where each weight loses the same share, which is not above the limit, the limit says nothing.
    maximum = 1.0 if limit is None or scope == "uniform" else float(maximum)
    return Settings(what, float(amount), scope, maximum, _block(own.get("granularity"), what), _text(group))


def _one_of(own: Mapping[str, Any], keys: tuple[str, ...], what: str) -> tuple[str | None, Any]:
    """Return the one of some keys that is given, with its value; ``None`` if none is."""
    given = [key for key in keys if key in own]
    if len(given) > 1:
        raise ValueError(f"{what} must have one of {', '.join(keys)}, got {' and '.join(given)}")
    return (given[0], own[given[0]]) if given else (None, None)


def _block(granularity: Any, what: str) -> Block | None:
    """Return the block that a granularity stands for."""
    name = f"{what}['granularity']"
    if isinstance(granularity, (list, tuple)):
        sizes = list(granularity)
        if len(sizes) != 2 or any(type(size) is not int or (size < 1 and size != -1) for size in sizes):
            raise ValueError(
                f"{name} must be two whole numbers, outputs and inputs of a block (-1: all), got {granularity!r}; for "
                "channels of convolutions use compression.prune_channels"
            )
        outputs, inputs = (None if size == -1 else size for size in sizes)
        return outputs, inputs
    blocks: dict[Any, Block | None] = {None: None, "default": None, "out_channel": (1, None), "in_channel": (None, 1)}
    if granularity not in blocks:
        checks.one_of(granularity, ("default", "out_channel", "in_channel"), name)
    return blocks[granularity]


def _text(group: Any) -> str | None:
    return None if group is None else str(group)
