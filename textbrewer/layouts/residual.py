"""Where a model's hidden features appear: those that embeddings, norms and every layer share.

They are told from all other widths by two models of the same class that differ in the hidden width alone: an axis that
is as wide as it in both is one of them. Sizes that happen to be equal (a vocabulary, a number of positions) mislead
nobody, and prediction heads of any kind need no names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from textbrewer.layouts.inner import Axis, Inner, is_transposed

__all__ = ["Residual", "Twins", "find_residual", "fits", "tensors_of"]

# Norms that take statistics over something else than the features of one position.
_OTHER_NORMS = ("Batch", "Group", "Instance", "Local")


@dataclass
class Residual(Inner):
    """The hidden features of a model, which are kept or left out everywhere at once.

    Beside what :class:`~textbrewer.layouts.inner.Inner` says:

    Args:
        norms: dotted names of the modules that normalise over them.
        owners: names of modules that put tensors of their own into them, as a class token or a table of positions.
        layers: names of the layers, which hand them on.
        attributes: modules and their attributes that hold how many there are.
        roots: modules and their attributes that hold the square root of how many there are.
        fields: the config's fields that hold how many there are.
    """

    norms: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    roots: list[tuple[str, str]] = field(default_factory=list)
    fields: tuple[str, ...] = ()

    @property
    def modules(self) -> set[str]:
        """The names of all modules that the features pass, but for whole layers."""
        return {*self.readers, *self.writers, *self.norms, *self.owners}


@dataclass(frozen=True)
class Twins:
    """Two models of one class that differ in the hidden width alone; their weights do not matter."""

    models: tuple[nn.Module, nn.Module]
    widths: tuple[int, int]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def fits(model: nn.Module, twin: nn.Module) -> str | None:
    """Return a tensor of a model that its twin does not have, ``None`` if it has all."""
    theirs = tensors_of(twin)
    return next((name for name in tensors_of(model) if name not in theirs), None)


def find_residual(model: nn.Module, twins: Twins, inner: Collection[Axis]) -> Residual:
    """Return the hidden features of a model.

    Args:
        model: in which widths inside the layers may differ from those of its twins.
        twins: of the model's class.
        inner: the axes of the features inside the layers, which are no hidden ones, whatever their size.

    Raises:
        ValueError: if what a module does with them cannot be told, or they are not as many everywhere.
    """
    mine, axes = tensors_of(model), list(_axes(model, twins, inner))
    by_module: dict[str, list[Axis]] = {}
    for axis in axes:
        by_module.setdefault(axis.tensor.rpartition(".")[0], []).append(axis)
    residual = Residual("hidden", 0, axes)
    for path, module in model.named_modules():
        if path in by_module:
            _place(residual, path, module, by_module[path], mine)
        elif _normalises(path, module, twins):
            residual.norms.append(path)
    sizes: dict[int, str] = {}
    for name, place in axes:
        sizes.setdefault(mine[name].shape[place], name)
    if len(sizes) != 1:
        raise ValueError(
            f"the hidden width must be the same everywhere in {type(model).__name__}, got "
            f"{', '.join(f'{size} in {name!r}' for size, name in sizes.items()) or 'no tensor of it'}"
        )
    (residual.features,) = sizes
    return residual


def _axes(model: nn.Module, twins: Twins, inner: Collection[Axis]) -> Iterator[Axis]:
    """Yield the axes along which hidden features lie."""
    missing = fits(model, twins.models[0])
    if missing is not None:
        raise ValueError(
            f"{missing!r} must be in every {type(model).__name__}, and one made anew has no such tensor: its hidden "
            "features cannot be told. Prune first, and factorise, quantise, wrap or add layers after that; for a "
            "model built otherwise say how, by Structure(resized=...)"
        )
    first, second = (tensors_of(twin) for twin in twins.models)
    for name in tensors_of(model):
        for axis, sizes in enumerate(zip(first[name].shape, second[name].shape, strict=True)):
            if sizes[0] == sizes[1] or Axis(name, axis) in inner:
                continue
            if sizes == twins.widths:
                yield Axis(name, axis)
            elif sizes[0] > twins.widths[0]:
                raise ValueError(
                    f"axis {axis} of {name!r} must be as wide as the hidden features or not depend on them, and is "
                    f"{sizes[0]} wide where they are {twins.widths[0]}; they cannot be pruned in this model"
                )


def _place(residual: Residual, path: str, module: nn.Module, axes: list[Axis], tensors: Mapping[str, Tensor]) -> None:
    """Note what a module does with the hidden features.

    Raises:
        ValueError: if it cannot be told.
    """
    kind = type(module).__name__
    along = {axis for name, axis in axes if name == f"{path}.weight"}
    flat = all(tensors[name].dim() == 1 for name, _ in axes)
    if "Norm" in kind and flat and not any(other in kind for other in _OTHER_NORMS):
        residual.norms.append(path)
        return
    linear, transposed = isinstance(module, nn.Linear), is_transposed(module)
    if linear or transposed or (isinstance(module, _ConvNd) and module.groups == 1 and not module.transposed):
        reads, writes = (0, 1) if transposed else (1, 0)
        residual.readers += [path] * (reads in along)
        residual.writers += [path] * (writes in along)
        return
    if isinstance(module, nn.Embedding) and along == {1}:
        residual.writers.append(path)
        return
    own = not type(module).__module__.startswith("torch.nn") and not along
    if own and all(axis == tensors[name].dim() - 1 for name, axis in axes):
        residual.owners.append(path)
        return
    raise ValueError(
        f"what {path!r}, a {kind}, does with the hidden features must be known to prune them, and is known of linear "
        "maps, embeddings, convolutions in one group, norms, and tensors that a module of one's own adds; they cannot "
        "be pruned in this model"
    )


def _normalises(path: str, module: nn.Module, twins: Twins) -> bool:
    """Return whether a module without weights normalises over the hidden features.

    Raises:
        ValueError: if it cannot be told.
    """
    if "Norm" not in type(module).__name__ or any(True for _ in module.parameters()) or any(module.children()):
        return False
    shapes = [getattr(twin.get_submodule(path), "normalized_shape", None) for twin in twins.models]
    if None in shapes:
        raise ValueError(
            f"{path!r}, a {type(module).__name__} without weights, must have a normalized_shape that says over what it "
            "normalises; hidden features cannot be pruned without"
        )
    return [tuple(shape) for shape in shapes if shape is not None] == [(width,) for width in twins.widths]
