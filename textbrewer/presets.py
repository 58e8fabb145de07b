"""The tables of losses, projections and schedules under TextBrewer's names, and ``register_new``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Imported for their entries: each module registers its functions when it is loaded.
from textbrewer import checks, losses, projections, schedulers  # noqa: F401
from textbrewer.adaptors import ADAPTOR_KEYS, FEATURES
from textbrewer.registry import (
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    Registry,
)

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MAPS",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "register_new",
]

MAPS: dict[str, Registry] = {
    "kd_loss": KD_LOSS_MAP,
    "match_loss": MATCH_LOSS_MAP,
    "projection": PROJ_MAP,
    "weight_scheduler": WEIGHT_SCHEDULER,
    "temperature_scheduler": TEMPERATURE_SCHEDULER,
}
"""The tables by the names that :func:`register_new` takes."""


def register_new(map_name: str, name: str, func: Callable[..., Any]) -> None:
    """Register a function of your own, as ``MAPS[map_name][name] = func``; an entry of that name is replaced.

    Args:
        map_name: ``"kd_loss"``, ``"match_loss"``, ``"projection"``, ``"weight_scheduler"`` or
            ``"temperature_scheduler"``, in any capitals.
        name: the name to use in configurations.
        func: the function; the tables of :mod:`textbrewer.presets` say what each calls it with.

    Raises:
        ValueError: if there is no such table.
        TypeError: if ``func`` is not callable or ``name`` not a string.
    """
    checks.one_of(map_name.lower() if isinstance(map_name, str) else map_name, MAPS, "map_name")
    MAPS[map_name.lower()][name] = func
