"""A student made of its teacher: fewer layers, narrower ones, and the teacher's weights in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from textbrewer import checks
from textbrewer.hooks.forward import device_of
from textbrewer.hooks.stacks import find_stack
from textbrewer.students.copying import copy_tensors, paired_tensors
from textbrewer.students.families import FAMILIES, Family, family_of
from textbrewer.students.importance import activation_scores, choose, weight_scores
from textbrewer.students.layers import Layers, Tower, chosen_layers, find_towers
from textbrewer.students.spaces import Space, hidden_space, inner_spaces
from textbrewer.students.widths import Request, student_widths, write_widths

__all__ = ["init_student_from_teacher"]


def init_student_from_teacher(
    teacher: nn.Module,
    layers: Layers | tuple[Layers, Layers] = None,
    hidden: int | None = None,
    *,
    heads: int | None = None,
    intermediate: int | None = None,
    dropout: float | None = None,
    dataloader: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a smaller model of the teacher's class with the teacher's weights.

    >>> student = init_student_from_teacher(teacher, layers=3)              # of 6 layers: 1, 3 and 5, counted from 0
    >>> student = init_student_from_teacher(teacher, layers=[0, 5])         # these two
    >>> student = init_student_from_teacher(teacher, layers=3, hidden=192)  # and narrower

    A transformers model of a known family (:data:`~textbrewer.students.families.FAMILIES`, with any prediction head)
    can lose layers and width; a model of your own can lose layers, if it has one stack of them or a transformers model
    inside.

    **Width.** Features are left out, the others keep their weights as they are: nothing is scaled, averaged or trained.
    What a model works out from its width itself follows the new one: the mean and variance of a norm, the root of the
    width by which some models scale embeddings or logits. Hidden features are the same ones everywhere; units of the
    feed-forward part are chosen in each layer; attention heads in each attention, whole, with their width (in T5 the
    same in all layers of a stack, which share a table of position biases), and in groups where several share keys and
    values. Kept are the most important ones, in their old order. The vocabulary stays.

    **Importance.** By the teacher's weights (:func:`~textbrewer.students.importance.weight_scores`), or with
    ``dataloader`` by the mean absolute activation (:func:`~textbrewer.students.importance.activation_scores`).

    Args:
        teacher: left as it is.
        layers: how many layers, picked by :func:`~textbrewer.students.layers.uniform_layers`, or a list of their
            numbers counted from 0, in the student's order; ``None``: all. For both stacks of a model with encoder and
            decoder, or a tuple ``(encoder, decoder)`` of such.
        hidden: the student's hidden width; ``None``: the teacher's.
        heads: its attention heads; by default in proportion to the hidden width. Only where the width of a head is
            a number of its own (Llama, T5) can they be others.
        intermediate: its feed-forward width; by default in proportion to the hidden width.
        dropout: set all dropout probabilities of the config to this; ``None``: as the teacher's.
        dataloader: batches as the teacher takes them, to choose features by their activations.

    Returns:
        A new model in training mode, of the teacher's dtype and on its device, with a config of its own. Weights that
        the teacher ties are tied. The random-number state is left as it is.

    Raises:
        ValueError: if the family is unknown, or the student would not fit its teacher; with the remedy.
        TypeError: if an argument is of the wrong kind, or the teacher cannot be made from its config.

    Reference:
        Sanh et al., "DistilBERT", 2019, arXiv:1910.01108, section 3 (layers of the teacher); Samragh et al., "Weight
        subcloning", 2023, arXiv:2312.09299 (features by their mean activation; without its scaling).
    """
    checks.is_a(teacher, nn.Module, "teacher", "a torch.nn.Module")
    request = Request(hidden, heads, intermediate)
    if dataloader is not None and not request.changes:
        raise ValueError("dataloader must be None where no width changes; pass hidden=, heads= or intermediate= too")
    model_type = getattr(getattr(teacher, "config", None), "model_type", None)
    if model_type is None:
        return _own_student(teacher, layers, request, dropout)
    return _student(teacher, family_of(model_type), layers, request, dropout, dataloader)


def _student(
    teacher: nn.Module,
    family: Family,
    layers: Layers | tuple[Layers, Layers],
    request: Request,
    dropout: float | None,
    dataloader: Iterable[Any] | None,
) -> nn.Module:
    """Return a student of a transformers model."""
    towers = find_towers(teacher, family, layers)
    config: Any = copy.deepcopy(teacher.config)
    widths = student_widths(config, family, towers, request) if request.changes else None
    _write_layers(config, family, towers)
    if widths is not None:
        write_widths(config, family, towers, widths)
    if dropout is not None:
        _write_dropout(config, dropout)
    student = _built(teacher, config)
    pairs = paired_tensors(teacher, student, towers)
    spaces: list[Space] = []
    if widths is not None:
        inner = inner_spaces(family, towers, widths)
        spaces = [hidden_space(widths.hidden, towers, inner, pairs), *inner]
        if dataloader is None:
            scores = [weight_scores(space, teacher) for space in spaces]
        else:
            scores = activation_scores(spaces, teacher, dataloader)
        for space, score in zip(spaces, scores, strict=True):
            choose(space, score)
    copy_tensors(pairs, spaces)
    return student.train()


def _built(teacher: nn.Module, config: Any) -> nn.Module:
    """Return a model of the teacher's class, on its device, without the parts that the teacher was made without."""
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced
            student: nn.Module = type(teacher)(config)
    except TypeError as error:
        raise TypeError(
            f"{type(teacher).__name__} must be made from its config alone, as transformers' models are; pass the model "
            f"inside, with adapters merged, if it wraps one ({error})"
        ) from error
    counterparts = dict(teacher.named_modules())
    for name, module in list(student.named_modules()):
        for part in module._modules:
            if getattr(counterparts.get(name), part, module) is None:
                setattr(module, part, None)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(device_of(teacher))


def _write_layers(config: Any, family: Family, towers: list[Tower]) -> None:
    """Write the chosen layers into the student's config."""
    for tower in towers:
        moved = tower.picked != tuple(range(len(tower.picked)))
        for field in family.by_position:
            if moved and getattr(config, field, False):
                raise ValueError(
                    f"layers must be the first ones where the teacher's config.{field} is set, as its layers compute "
                    f"otherwise at another place, got {list(tower.picked)}"
                )
        for field in family.per_layer:
            values = getattr(config, field, None)
            if isinstance(values, (list, tuple)) and len(values) == len(tower.blocks):
                setattr(config, field, [values[number] for number in tower.picked])
        setattr(config, tower.stack.layers, len(tower.picked))


def _write_dropout(config: Any, dropout: float) -> None:
    """Set all dropout probabilities of a config; how often whole layers are dropped is none."""
    checks.number(dropout, "dropout", minimum=0)
    if dropout >= 1:
        raise ValueError(f"dropout must be less than 1, got {dropout!r}")
    for field, value in config.to_dict().items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and ("dropout" in field or "pdrop" in field):
            setattr(config, field, float(dropout))


def _own_student(
    teacher: nn.Module, layers: Layers | tuple[Layers, Layers], request: Request, dropout: float | None
) -> nn.Module:
    """Return a student of a model that has no config: one with a transformers model inside, or with one stack."""
    if request.changes:
        raise ValueError(
            f"hidden, heads and intermediate must be None for {type(teacher).__name__}, which has no config of a "
            "transformers model that says how wide it is; build the narrower student yourself"
        )
    student = copy.deepcopy(teacher)
    inside = [(name, module) for name, module in teacher.named_modules() if _is_known(module)]
    outermost = [item for item in inside if not any(item[0].startswith(other + ".") for other, _ in inside)]
    if len(outermost) == 1:
        name, model = outermost[0]
        parent, _, child = name.rpartition(".")
        student.get_submodule(parent)._modules[child] = init_student_from_teacher(model, layers, dropout=dropout)
    elif dropout is not None:
        raise ValueError(
            f"dropout must be None for {type(teacher).__name__}, which has no config; set it on its modules"
        )
    else:
        stack = find_stack(student)
        if stack is None:
            raise ValueError(
                f"{type(teacher).__name__} must have one nn.ModuleList of layers of one class that is longer than all "
                "others, or one transformers model of a known family inside; build the student yourself, and copy the "
                "layers with load_state_dict"
            )
        if isinstance(layers, tuple):
            raise ValueError(f"layers must be a number or a list for {type(teacher).__name__}, got {layers!r}")
        blocks = list(stack.blocks)
        picked = [blocks[number] for number in chosen_layers(layers, len(blocks))]
        stack.blocks._modules = {str(number): block for number, block in enumerate(picked)}
    if not any(parameter.requires_grad for parameter in teacher.parameters()):
        student.requires_grad_(True)  # a frozen teacher; its student is to be trained
    return student.train()


def _is_known(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "model_type", None) in FAMILIES
