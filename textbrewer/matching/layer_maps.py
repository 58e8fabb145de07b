"""Fixed layer maps by name: which layer of the teacher each layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.adaptors import FEATURES
from textbrewer.layouts.spacing import evenly_spaced
from textbrewer.matching.depth import number_of_layers
from textbrewer.registry import Registry

__all__ = ["LAYER_MAPS", "first", "last", "layer_map", "match_layers", "skip", "uniform"]

LAYER_MAPS = Registry("layer map")
"""Layer maps: ``f(layers_T, layers_S) -> [(layer of the teacher, layer of the student), ...]``, numbered from 1."""


@LAYER_MAPS.add("uniform")
def uniform(layers_T: int, layers_S: int) -> list[tuple[int, int]]:
    """Spread the student's layers evenly over the teacher's, the last on the last.

    12 to 4 layers: 3, 6, 9, 12 to 1 ... 4. They are the layers that a student begins as which
    :func:`~textbrewer.students.init_student_from_teacher` makes of a number of layers.

    Args:
        layers_T: number of the teacher's layers.
        layers_S: number of the student's layers.

    Reference:
        :func:`~textbrewer.layouts.spacing.evenly_spaced`.
    """
    return list(zip(evenly_spaced(layers_S, layers_T), range(1, layers_S + 1), strict=True))


@LAYER_MAPS.add("skip")
def skip(layers_T: int, layers_S: int) -> list[tuple[int, int]]:
    """Every k-th layer of the teacher, but for the last: PKD-Skip.

    12 to 6 layers: 2, 4, 6, 8, 10 to 1 ... 5. The student's last layer is left out: the logits teach it.

    Args:
        layers_T: number of the teacher's layers.
        layers_S: number of the student's layers, at least 2.

    Reference:
        Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv:1908.09355, section 3.2.
    """
    return uniform(layers_T, layers_S)[:-1]


@LAYER_MAPS.add("last")
def last(layers_T: int, layers_S: int) -> list[tuple[int, int]]:
    """The teacher's upper layers, but for the last: PKD-Last.

    12 to 6 layers: 7, 8, 9, 10, 11 to 1 ... 5. The student's last layer is left out: the logits teach it.

    Args:
        layers_T: number of the teacher's layers.
        layers_S: number of the student's layers, at least 2.

    Reference:
        Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv:1908.09355, section 3.2.
    """
    return [(layers_T - layers_S + m, m) for m in range(1, layers_S)]


@LAYER_MAPS.add("first")
def first(layers_T: int, layers_S: int) -> list[tuple[int, int]]:
    """The teacher's lowest layers, one to one; of a teacher as deep as the student, all of them.

    12 to 6 layers: 1 ... 6 to 1 ... 6.

    Args:
        layers_T: number of the teacher's layers.
        layers_S: number of the student's layers.

    Reference:
        Sun et al., "MobileBERT", 2020, arXiv:2004.02984, section 3.4 (sides of the same depth).
    """
    return [(m, m) for m in range(1, layers_S + 1)]


def layer_map(name: str, layers_T: int, layers_S: int, embeddings: bool = False) -> list[tuple[int, int]]:
    """Return a layer map by its name.

    Args:
        name: ``"uniform"``, ``"skip"``, ``"last"``, ``"first"``, or another entry of :data:`LAYER_MAPS`.
        layers_T: number of the teacher's layers.
        layers_S: number of the student's layers.
        embeddings: whether the embeddings (layer 0) meet the teacher's as well, as in TinyBERT.

    Returns:
        Pairs of a layer of the teacher and one of the student, numbered from 1: the places of their outputs in
        ``hidden``, which starts with the embeddings.

    Raises:
        KeyError: if the name is unknown.
        ValueError: if the student has more layers than the teacher, or too few for the map.
        TypeError: if a number of layers is no whole number.
    """
    map_of = LAYER_MAPS[name]
    checks.integer(layers_T, "layers_T", minimum=1)
    checks.integer(layers_S, "layers_S", minimum=1)
    layers_T, layers_S = int(layers_T), int(layers_S)
    if layers_S > layers_T:
        raise ValueError(
            f"a student must have at most as many layers as its teacher for layer map {name!r}, got {layers_S} and "
            f"{layers_T}; name the layers in the matches, or use a strategy such as 'emd'"
        )
    pairs: list[tuple[int, int]] = map_of(layers_T, layers_S)
    if not pairs:
        raise ValueError(
            f"a student must have at least 2 layers for layer map {name!r}, which leaves out the last, got {layers_S}; "
            "use 'uniform'"
        )
    return [(0, 0), *pairs] if embeddings else pairs


def match_layers(
    name: str,
    teacher: nn.Module | int,
    student: nn.Module | int,
    feature: str = "hidden",
    loss: str | Sequence[Any] = "hidden_mse",
    weight: float = 1.0,
    proj: str | Sequence[Any] | None = None,
    embeddings: bool = False,
) -> list[dict[str, Any]]:
    """Return the intermediate matches of a layer map, one for each of its pairs.

    >>> DistillationConfig(intermediate_matches=match_layers("uniform", teacher, student, proj="linear"))

    Args:
        name: the layer map, see :func:`layer_map`.
        teacher: the teacher, or the number of its layers.
        student: the student, or the number of its layers.
        feature: what to match, one of ``FEATURES``. All but ``"hidden"`` have no entry for the embeddings: their
            layer 1 is at place 0.
        loss: the loss of each match.
        weight: its weight.
        proj: its projection; each match has its own. For one projection shared by all layers, name the layers in a
            single match with ``"strategy": "pairwise"``.
        embeddings: whether the embeddings are matched as well; with ``"hidden"`` only.

    Returns:
        Dicts with the fields of ``IntermediateMatch``.

    Raises:
        KeyError, ValueError, TypeError: as :func:`layer_map` and :func:`~textbrewer.matching.number_of_layers`, or if
            the feature is unknown or has no embeddings.
    """
    checks.one_of(feature, FEATURES, "feature")
    if embeddings and feature != "hidden":
        raise ValueError(f"feature must be 'hidden' where embeddings are matched, got {feature!r}")
    before = 0 if feature == "hidden" else 1
    layers_T, layers_S = (side if isinstance(side, int) else number_of_layers(side) for side in (teacher, student))
    matches = []
    for layer_T, layer_S in layer_map(name, layers_T, layers_S, embeddings):
        match: dict[str, Any] = {
            "layer_T": layer_T - before,
            "layer_S": layer_S - before,
            "feature": feature,
            "loss": loss,
            "weight": weight,
        }
        matches.append(match if proj is None else {**match, "proj": proj})
    return matches
