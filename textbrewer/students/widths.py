"""How wide a student is, everywhere: read off the teacher, checked, and written into the student's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from textbrewer import checks
from textbrewer.layouts.families import Family
from textbrewer.layouts.inner import features_in, module_of
from textbrewer.students.layers import Tower

__all__ = ["Request", "TowerWidths", "Width", "Widths", "student_widths", "write_widths"]


class Width(NamedTuple):
    """A number of the teacher's, and the student's."""

    teacher: int
    student: int

    @property
    def changes(self) -> bool:
        """Whether the student's differs."""
        return self.teacher != self.student


@dataclass(frozen=True)
class TowerWidths:
    """The widths inside the layers of one stack."""

    heads: Width
    key_value_heads: Width
    units: Width


@dataclass(frozen=True)
class Widths:
    """All widths of teacher and student; ``towers`` in the order of the stacks."""

    hidden: Width
    head_width: int
    towers: tuple[TowerWidths, ...]


@dataclass(frozen=True)
class Request:
    """The widths that the user asks for; ``None``: as the hidden width implies."""

    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                checks.integer(value, name, minimum=1)

    @property
    def changes(self) -> bool:
        """Whether anything is asked for."""
        return any(value is not None for value in vars(self).values())


def student_widths(config: Any, family: Family, towers: Sequence[Tower], request: Request) -> Widths:
    """Return the widths of teacher and student.

    Args:
        config: the teacher's.
        family: how its models are built.
        towers: its stacks.
        request: what the user asks for.

    Raises:
        ValueError: if the student would be wider than the teacher, or its heads would not fit; with the remedy.
    """
    teacher_hidden = int(getattr(config, family.hidden))
    hidden = _at_most("hidden", teacher_hidden, request.hidden, teacher_hidden)
    first_heads = int(getattr(config, towers[0].stack.heads))
    stated = getattr(config, family.head_width, None) if family.head_width else None
    head_width = int(stated or teacher_hidden // first_heads)
    return Widths(
        hidden, head_width, tuple(_tower_widths(config, family, tower, request, hidden, head_width) for tower in towers)
    )


def _tower_widths(
    config: Any, family: Family, tower: Tower, request: Request, hidden: Width, head_width: int
) -> TowerWidths:
    teacher_heads = int(getattr(config, tower.stack.heads))
    heads = _heads(teacher_heads, family, request, hidden, head_width)
    field = tower.stack.key_value_heads
    teacher_groups = int((getattr(config, field, None) if field else None) or teacher_heads)
    per_group = teacher_heads // teacher_groups
    if heads.student % per_group:
        raise ValueError(
            f"heads must be a multiple of {per_group}, as that many share keys and values in the teacher, "
            f"got {heads.student}; pass heads={-(-heads.student // per_group) * per_group}"
        )
    units = next(
        (features_in(module) for path in readers_of(family) if (module := module_of(tower.blocks[0], path))), None
    )
    if units is None:
        raise ValueError(
            f"a layer of {tower.path} must have a feed-forward part named as its Family says, "
            f"{' or '.join(readers_of(family))}, got {', '.join(dict(tower.blocks[0].named_children()))}"
        )
    ratio = max(1, round(units * hidden.student / hidden.teacher))
    return TowerWidths(
        heads,
        Width(teacher_groups, heads.student // per_group),
        _at_most("intermediate", units, request.intermediate, ratio),
    )


def readers_of(family: Family) -> list[str]:
    """Return the modules that may read the units of the feed-forward part."""
    return [path for inner in family.feed_forwards for path in inner.readers]


def _heads(teacher: int, family: Family, request: Request, hidden: Width, head_width: int) -> Width:
    """Return the heads of teacher and student; the width of a head stays what it is."""
    if family.head_width is not None:
        if request.heads is None and teacher * hidden.student % hidden.teacher:
            raise ValueError(
                f"hidden must leave a whole number of the teacher's {teacher} heads, got {hidden.student} of "
                f"{hidden.teacher}; pass heads="
            )
        return _at_most("heads", teacher, request.heads, teacher * hidden.student // hidden.teacher)
    if hidden.student % head_width:
        below = hidden.student // head_width * head_width
        near = [str(width) for width in (below, below + head_width) if 0 < width <= hidden.teacher]
        raise ValueError(
            f"hidden must be a multiple of the width of a head, {head_width}, which is not changed, "
            f"got {hidden.student}; pass hidden={' or '.join(near)}"
        )
    implied = hidden.student // head_width
    if request.heads not in (None, implied):
        raise ValueError(
            f"heads must be hidden / width of a head = {hidden.student} / {head_width} = {implied} in this family, "
            f"got {request.heads}; leave heads out, or pass hidden={head_width * (request.heads or 1)}"
        )
    return Width(teacher, implied)


def _at_most(name: str, teacher: int, asked: int | None, default: int) -> Width:
    student = default if asked is None else int(asked)
    if student > teacher:
        raise ValueError(f"{name} must be at most the teacher's {teacher}, got {student}: weights are only left out")
    return Width(teacher, student)


def write_widths(config: Any, family: Family, towers: Sequence[Tower], widths: Widths) -> None:
    """Write the student's widths into its config, a copy of the teacher's."""
    for field in family.follows:
        if getattr(config, field, None) == widths.hidden.teacher:
            setattr(config, field, widths.hidden.student)
    setattr(config, family.hidden, widths.hidden.student)
    if family.head_width is not None:
        setattr(config, family.head_width, widths.head_width)
    for tower, inner in zip(towers, widths.towers, strict=True):
        setattr(config, tower.stack.heads, inner.heads.student)
        setattr(config, tower.stack.intermediate, inner.units.student)
        field = tower.stack.key_value_heads or ""
        if getattr(config, field, None) is not None:
            setattr(config, field, inner.key_value_heads.student)
