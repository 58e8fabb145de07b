"""What a callback prunes, and whether it can: the weights or units that settings name, checked against the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.callbacks import TrainingRun
from textbrewer.compression.gates import has_gates
from textbrewer.compression.prune_places import check_whole, chosen_modules, touches
from textbrewer.compression.pruning_schedules import PruningSchedule
from textbrewer.compression.sites import Layout, Site, find_layout
from textbrewer.compression.structure import STRUCTURES
from textbrewer.compression.structure.structure import kind_of
from textbrewer.compression.trained.groups import Block, BlockGroups, Groups, UnitGroups
from textbrewer.layouts.inner import is_transposed

__all__ = [
    "UNITS",
    "amounts",
    "check_patterns",
    "check_run",
    "check_settings",
    "chosen_sites",
    "steps_of",
    "unit_groups",
    "weight_groups",
]

UNITS = ("heads", "ffn")
"""The kinds of units that are pruned while training."""


def amounts(value: float | Mapping[str, float], structure: str, name: str) -> dict[str, float]:
    """Return a setting by kind: of ``"weights"``, or of ``"heads"`` and ``"ffn"`` with ``structure="units"``.

    Raises:
        ValueError: if a number is not from 0 to below 1, or all are 0.
        KeyError: if a kind is unknown.
        TypeError: if an argument is of the wrong kind.
    """
    kinds = UNITS if structure == "units" else ("weights",)
    if isinstance(value, Mapping):
        if structure != "units":
            raise TypeError(f'{name} must be a number unless structure="units", got {dict(value)!r}')
        checks.known_keys(value, UNITS, name)
        found = dict(value)
    else:
        found = dict.fromkeys(kinds, value)
    for kind, number in found.items():
        checks.number(number, f"{name}[{kind!r}]" if isinstance(value, Mapping) else name, minimum=0, below=1)
    if not any(found.values()):
        raise ValueError(f"{name} must be more than 0, got {value!r}: nothing would be pruned")
    return {kind: float(number) for kind, number in found.items() if number}


def check_patterns(patterns: Sequence[str] | None, name: str) -> None:
    """Raise TypeError unless patterns are a list of names."""
    if patterns is not None:
        checks.is_a(patterns, (list, tuple), name, "a list of dotted names of modules, or patterns of them")
        for pattern in patterns:
            checks.is_a(pattern, str, f"an item of {name}", "a dotted name of a module, or a pattern")


def steps_of(schedule: PruningSchedule, run: TrainingRun) -> tuple[int, int]:
    """Return the first and last step of a pruning.

    Raises:
        ValueError: if they are not known, not in order, or the run is over before.
    """
    begin, end = schedule.steps(run.total_steps)
    if end <= begin and schedule.name != "one_shot":
        raise ValueError(
            f"end must be after begin, got {schedule.end} and {schedule.begin}: steps {end} and {begin}; train longer"
        )
    return begin, end


def check_run(run: TrainingRun, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless a run trains some parameters of a model without masks.

    Args:
        run: the run.
        parameters: by name.
    """
    if has_gates(run.student):
        raise ValueError("the model must not be masked already; shrink it first, and prune what comes out")
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held or not parameter.requires_grad:
            why = "is frozen" if not parameter.requires_grad else "is not in the optimizer"
            raise ValueError(
                f"what is pruned while training must be trained, but {name!r} {why}; give it to the optimizer, or "
                "leave its module out"
            )


def check_settings(own: Mapping[str, Any], stored: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless a checkpoint's settings are those of the callback that is to go on from it.

    Args:
        own: plain values by name.
        stored: the checkpoint's.
        name: the callback's class.
    """
    for key, value in own.items():
        if stored.get(key) != value:
            raise ValueError(
                f"{name} must have the settings that the checkpoint was written with, got {key}={value!r} and not "
                f"{stored.get(key)!r}"
            )


def chosen_sites(layout: Layout, model: nn.Module, kinds: Sequence[str], exclude: Sequence[str]) -> list[Site]:
    """Return the sites of some kinds that are not excluded.

    Raises:
        ValueError: if a kind has none.
        KeyError: if ``exclude`` names what the model has not.
    """
    excluded = chosen_modules(model, exclude, "exclude")
    found = []
    for kind in kinds:
        sites = [site for site in layout.of(kind) if not touches(site, excluded)]
        if not sites:
            raise ValueError(f"exclude must leave something to prune of {kind}, got {list(exclude)}")
        found += sites
    return found


def unit_groups(model: nn.Module, kinds: Sequence[str], exclude: Sequence[str], readers: bool) -> list[Groups]:
    """Return the units of a model by site.

    Raises:
        ValueError: if the model's family is unknown, or nothing is left of a kind.
        KeyError: if ``exclude`` names what the model has not.
    """
    sites = chosen_sites(find_layout(model), model, kinds, exclude)
    check_whole(model, sites)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [UnitGroups(site, parameters, readers) for site in sites]


def weight_groups(
    model: nn.Module, modules: Sequence[str] | None, exclude: Sequence[str], block: Block = (1, 1)
) -> list[Groups]:
    """Return the weights of some modules, in blocks.

    Args:
        model: any model.
        modules: names or patterns; linear modules and convolutions in them count. ``None``: the linear modules of the
            heads and feed-forward parts, of a model of a known family.
        exclude: names or patterns.
        block: outputs and inputs of a block.

    Raises:
        ValueError: if nothing is named or left, or the blocks do not divide a weight.
        KeyError: if a pattern fits no module.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if modules is not None:
        names = chosen_modules(model, modules, "modules")
    elif kind_of(model) in STRUCTURES:
        sites = [site.inner for site in find_layout(model).sites if site.kind in UNITS and site.inner is not None]
        names = {name for inner in sites for name in (*inner.readers, *inner.writers)}
    else:
        raise ValueError(
            f"modules must name what to prune of {type(model).__name__}, whose family is unknown, got None"
        )
    names -= chosen_modules(model, exclude, "exclude")
    found: dict[int, Groups] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = parameters.get(f"{name}.weight")
        if name in names and weight is not None and _is_map(module):
            found.setdefault(id(weight), BlockGroups(f"{name}.weight", weight, block, is_transposed(module)))
    if not found:
        raise ValueError(f"modules must name linear modules or convolutions, got {modules} without {list(exclude)}")
    return list(found.values())


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_transposed(module)
