"""A teacher's tensors put into a student: those of the chosen layers, along each axis only what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from textbrewer.students.layers import Tower, is_dropped, source_name
from textbrewer.students.spaces import Axis, Space

__all__ = ["copy_tensors", "paired_tensors", "sliced", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and saved buffers under all their names."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if name in saved}


def paired_tensors(teacher: nn.Module, student: nn.Module, towers: Sequence[Tower]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by the teacher's name, each of the student's tensors with the teacher's that it comes from.

    Raises:
        ValueError: if one of the student's has none, or one of the teacher's outside the dropped layers would be lost.
    """
    mine, theirs = tensors_of(teacher), tensors_of(student)
    sources = {name: source_name(name, towers) for name in theirs}
    new = [name for name, source in sources.items() if source not in mine]
    lost = [name for name in mine.keys() - set(sources.values()) if not is_dropped(name, towers)]
    if new or lost:
        what = f"the teacher has no {new[0]!r}" if new else f"the student has no {min(lost)!r}"
        raise ValueError(
            f"a {type(student).__name__} made of the teacher's config must have the teacher's tensors, but {what}; "
            "choose other widths, or build the student yourself"
        )
    return {source: (mine[source], theirs[name]) for name, source in sources.items()}


def copy_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], spaces: Iterable[Space]) -> None:
    """Fill the student's tensors with the teacher's, unscaled, of the teacher's dtype and on its device.

    Raises:
        ValueError: if a tensor of the student has another shape than what is kept of the teacher's.
    """
    owner = {axis: space for space in spaces for axis in space.axes}
    for name, (mine, theirs) in pairs.items():
        kept = sliced(name, mine.detach(), owner)
        if kept.shape != theirs.shape:
            raise ValueError(
                f"{name!r} must keep the shape {tuple(theirs.shape)} that the student's config says, "
                f"got {tuple(kept.shape)}; the Family does not describe this model"
            )
        theirs.data = kept


def sliced(name: str, tensor: Tensor, owner: Mapping[Axis, Space]) -> Tensor:
    """Return a copy of one of the teacher's tensors without what the spaces of its axes leave out."""
    kept = tensor
    for axis in range(tensor.dim()):
        space = owner.get(Axis(name, axis))
        if space is not None:
            kept = kept.index_select(axis, space.positions(kept.shape[axis]).to(kept.device))
    return kept.clone()
