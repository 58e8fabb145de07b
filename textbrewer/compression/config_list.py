"""NNI's lists of pruning configs read as plans of this library, for those who come from there.

>>> plan = from_config_list([{"op_types": ["Linear"], "sparse_ratio": 0.8},
...                          {"exclude": True, "op_names": ["classifier"]}], model)
>>> sparse = plan.apply(model)                         # zeros at once
>>> distiller.train(..., step_callbacks=plan.gradual(end=0.6))   # or while training

What becomes of NNI's keys:

- ``op_types``, ``op_names``, ``op_names_re``, ``op_partial_names``, ``exclude`` and ``exclude_op_...`` choose modules.
- ``sparse_ratio``, ``sparsity`` and ``sparsity_per_layer`` are ``SparsePruning(amount, scope="uniform")``.
- ``total_sparsity``, and ``sparse_ratio`` with a ``global_group_id``, are ``scope="global"``; ``max_sparse_ratio`` and
  ``max_sparsity_per_layer`` are its ``maximum``.
- ``granularity`` is ``block``: of ``[4, 4]`` it is ``(4, 4)``, of ``"out_channel"`` ``(1, None)``, of ``"in_channel"``
  ``(None, 1)``.
- ``target_names`` and ``target_settings`` may name ``weight``.

All of that sets weights to zero, as NNI's masks do. No entry is guessed to mean the heads and feed-forward units of a
transformer, or channels of convolutions, though only taking these out makes a model smaller: that is
``Prune(heads=0.5, ffn=0.5)``, and ``prune_channels(model, images, ratio=0.5)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor
from textbrewer.compression.config_list_modules import selected
from textbrewer.compression.config_list_settings import Settings, read_settings
from textbrewer.compression.weights import GradualSparsity, SparsePruning, SparseWeights, WeightMasks

__all__ = ["ConfigListPlan", "from_config_list"]


@dataclass(frozen=True)
class ConfigListPlan:
    """The plans that a config list stands for; no two are about the same weights.

    Args:
        plans: one for each entry, or for each group of entries.
    """

    plans: tuple[SparsePruning, ...]

    def apply(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, adaptor: Adaptor | str = "auto"
    ) -> SparseWeights:
        """Return a copy of a model with zeros for what goes; see :meth:`SparsePruning.apply`.

        Args:
            model: left as it is.
            dataloader: batches for ``score="taylor"``, read once for each plan.
            adaptor: for ``score="taylor"``.

        Raises:
            ValueError, KeyError: if a plan does not fit the model, or the score's data is missing.
        """
        done = [plan.apply(model, dataloader, adaptor) for plan in self.plans]
        masks = {name: mask for one in done for name, mask in one.masks.items()}
        return SparseWeights(done[0].model, WeightMasks(masks))

    def gradual(self, **schedule: Any) -> list[GradualSparsity]:
        """Return callbacks that follow the plans while training.

        Args:
            **schedule: ``schedule``, ``begin``, ``end``, ``every``, ``initial``, ``power``, ``decay`` of
                :class:`~textbrewer.compression.weights.GradualSparsity`, the same for all.
        """
        return [GradualSparsity(plan, **schedule) for plan in self.plans]


def from_config_list(config_list: Sequence[Mapping[str, Any]], model: nn.Module, score: str = "l1") -> ConfigListPlan:
    """Return the plans that a config list of NNI (2.x or 3.0) stands for.

    Unlike in NNI, names that the model does not have are errors, and so are modules that two entries choose; what an
    entry with ``exclude`` chooses is excluded from all others, wherever it stands.

    Args:
        config_list: NNI's entries.
        model: the model that they are about; left as it is.
        score: which weights go; NNI's pruners are scores here: ``"l1"`` is its level, L1 and L2 norm pruners for single
            weights, ``"taylor"`` its Taylor pruner.

    Raises:
        TypeError: if an entry or a value is of the wrong kind.
        KeyError: if a key, or a name of a module, is unknown.
        ValueError: if a value cannot work, a key has no counterpart here (the message says what to use), no weights are
            chosen, or some twice.

    Reference:
        NNI's documentation, "Compression Config Specification", releases 2.10 and 3.0.
    """
    checks.is_a(config_list, (list, tuple), "config_list", "a list of dicts")
    checks.is_a(model, nn.Module, "model", "a torch module")
    if not config_list:
        raise ValueError("config_list must have at least one entry, got none")
    excluded: set[str] = set()
    chosen: list[tuple[Settings, list[str]]] = []
    for number, entry in enumerate(config_list):
        what = f"config_list[{number}]"
        checks.is_a(entry, Mapping, what, "a dict")
        settings = read_settings(entry, what)
        names = selected(entry, model, what)
        if settings is None:
            excluded.update(names)
        else:
            chosen.append((settings, names))
    left = [(settings, [name for name in names if name not in excluded]) for settings, names in chosen]
    _check_once(left)
    plans = [
        SparsePruning(settings.amount, settings.block, score, settings.scope, settings.maximum, modules=names)
        for settings, names in _grouped(left)
    ]
    if not plans:
        raise ValueError(
            "config_list must have an entry with a sparsity, such as sparse_ratio=0.5, got only exclusions"
        )
    return ConfigListPlan(tuple(plans))


def _check_once(chosen: Sequence[tuple[Settings, Sequence[str]]]) -> None:
    """Raise ValueError unless each entry has modules of its own."""
    first: dict[str, str] = {}
    for settings, names in chosen:
        if not names:
            raise ValueError(f"{settings.what} must choose modules that no other entry excludes, got none")
        for name in names:
            if name in first:
                raise ValueError(
                    f"{name!r} must be chosen by one entry, got {first[name]} and {settings.what}; exclude it from one "
                    "by exclude_op_names"
                )
            first[name] = settings.what


def _grouped(chosen: Sequence[tuple[Settings, list[str]]]) -> list[tuple[Settings, list[str]]]:
    """Join the entries of each group.

    Raises:
        ValueError: if their settings differ.
    """
    joined: list[tuple[Settings, list[str]]] = []
    places: dict[str, int] = {}
    for settings, names in chosen:
        place = None if settings.group is None else places.get(settings.group)
        if place is None:
            if settings.group is not None:
                places[settings.group] = len(joined)
            joined.append((settings, list(names)))
            continue
        other = joined[place][0]
        for field in ("amount", "block", "maximum"):
            if getattr(settings, field) != getattr(other, field):
                raise ValueError(
                    f"entries of global_group_id={settings.group!r} must have the same settings, got {field} "
                    f"{getattr(other, field)} in {other.what} and {getattr(settings, field)} in {settings.what}"
                )
        joined[place][1].extend(names)
    return joined
