"""Which features of teacher and student to bring together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from textbrewer import checks
from textbrewer.adaptors import FEATURES
from textbrewer.losses import fsp_loss, mmd_loss
from textbrewer.registry import MATCH_LOSS_MAP, PROJ_MAP, name_of


@dataclass(frozen=True)
class Projection:
    """The parsed ``proj`` of a match: kind, widths (``None``: to be read from the models) and optimiser options."""

    kind: str
    dim_S: int | None = None
    dim_T: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_projection(proj: str | Sequence[Any] | None) -> Projection | None:
    """Return the parsed ``proj`` of a match, ``None`` for ``None``.

    Raises:
        TypeError, ValueError: if it is not of one of the forms that :class:`IntermediateMatch` names.
    """
    if proj is None:
        return None
    parts: list[Any] = [proj] if isinstance(proj, str) else list(proj)
    options = dict(parts.pop()) if parts and isinstance(parts[-1], Mapping) else {}
    if len(parts) not in (1, 3):
        raise ValueError(
            f"proj must be a name, [name, dim_S, dim_T] or [name, dim_S, dim_T, {{optimiser options}}], got {proj!r}"
        )
    checks.one_of(parts[0], PROJ_MAP, "the first item of proj")
    for size, name in zip(parts[1:], ("dim_S", "dim_T"), strict=False):
        checks.integer(size, f"{name} of proj {proj!r}", minimum=1)
    if len(parts) == 1:
        return Projection(parts[0], options=options)
    return Projection(parts[0], int(parts[1]), int(parts[2]), options)


@dataclass
class IntermediateMatch:
    """One pair of features to bring together.

    Args:
        layer_T: the teacher's layer: its place in the adaptor's ``hidden`` or ``attention`` list. For ``fsp`` and
            ``nst`` a list of two; with a strategy a list of any length.
        layer_S: the student's layer, likewise.
        weight: factor of this loss in the total.
        loss: a name of ``MATCH_LOSS_MAP``, or ``[name, {constant: value}]``.
        feature: ``"hidden"``, ``"attention"``, or another of ``FEATURES``.
        proj: brings the student's feature to the teacher's width: ``None``, a name of ``PROJ_MAP`` alone (widths are
            read from the models), ``[name, dim_S, dim_T]``, or ``[name, dim_S, dim_T, {optimiser options}]``.
        teacher: the teacher's number in the list of a ``MultiTeacherDistiller``.
        strategy: how several layers of the student meet several of the teacher: a name of ``STRATEGIES`` such as
            ``"pairwise"``, ``"emd"`` or ``"ordered"``, or ``[name, {option: value}]``. One projection serves all of
            the student's layers. ``None``: one layer meets one.

    Raises:
        TypeError, ValueError: if a value is of another type, unknown or out of range; the message names it.
    """

    layer_T: int | list[int]
    layer_S: int | list[int]
    weight: float
    loss: str | Sequence[Any]
    feature: str
    proj: str | Sequence[Any] | None = None
    teacher: int = 0
    strategy: str | Sequence[Any] | None = None

    def __post_init__(self) -> None:
        checks.one_of(self.feature, FEATURES, "feature of an intermediate match")
        checks.one_of(name_of(self.loss), MATCH_LOSS_MAP, "loss of an intermediate match")
        MATCH_LOSS_MAP.bound(self.loss)
        checks.number(self.weight, "weight of an intermediate match", minimum=0)
        checks.integer(self.teacher, "teacher of an intermediate match", minimum=0)
        self.layer_T = _layers(self.layer_T, "layer_T")
        self.layer_S = _layers(self.layer_S, "layer_S")
        pair = MATCH_LOSS_MAP[self.loss_name] in (fsp_loss, mmd_loss)
        for name, layers in (("layer_T", self.layer_T), ("layer_S", self.layer_S)):
            if self.strategy is not None:
                self._check_strategy(name, layers, pair)
            elif pair and not (isinstance(layers, list) and len(layers) == 2):
                raise ValueError(
                    f"{name} of a match with loss {self.loss!r} must be a list of two layers, got {layers!r}"
                )
        if isinstance(self.layer_T, list) != isinstance(self.layer_S, list):
            raise ValueError(
                f"layer_T and layer_S must both be numbers or both be lists, got {self.layer_T!r} and {self.layer_S!r}"
            )
        if not isinstance(self.proj, str) and self.proj is not None:
            self.proj = [dict(item) if isinstance(item, Mapping) else item for item in self.proj]
        parse_projection(self.proj)

    def _check_strategy(self, name: str, layers: int | list[int], pair: bool) -> None:
        checks.is_a(
            self.strategy, (str, list, tuple), "strategy of an intermediate match", "a name, or [name, options]"
        )
        if pair:
            raise ValueError(f"loss {self.loss_name!r} takes two layers of each side and has no use for a strategy")
        if not isinstance(layers, list) or not layers:
            raise ValueError(
                f"{name} of a match with strategy {self.strategy!r} must be a list of layers, got {layers!r}"
            )

    @property
    def loss_name(self) -> str:
        """The loss's name, without its constants."""
        return str(name_of(self.loss))

    @property
    def loss_function(self) -> Callable[..., Any]:
        """The loss between two features, with its constants."""
        return MATCH_LOSS_MAP.bound(self.loss)

    @property
    def projection(self) -> Projection | None:
        """The parsed ``proj``; ``None`` without one."""
        return parse_projection(self.proj)

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any] | None) -> IntermediateMatch | None:
        """Construct a match from a dict (``None`` gives ``None``).

        Raises:
            KeyError: if a key is unknown or missing.
        """
        if dict_object is None:
            return None
        checks.is_a(dict_object, (dict, Mapping), "an intermediate match", "a dict")
        known = [item.name for item in dataclasses.fields(cls)]
        checks.known_keys(dict_object, known, "intermediate match")
        missing = [name for name in known[:5] if name not in dict_object]
        if missing:
            raise KeyError(f"intermediate match {dict(dict_object)!r} must have the key {missing[0]!r}")
        return cls(**dict_object)


def _layers(layers: Any, name: str) -> int | list[int]:
    """Return layer numbers as an int or a list of ints."""
    if isinstance(layers, (list, tuple)):
        return [int(_layers(layer, name)) for layer in layers]  # type: ignore[arg-type]
    checks.integer(layers, name)
    return int(layers)
