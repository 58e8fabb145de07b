"""MobileBERT: one layer after the other, with the layers below frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.hooks.stacks import find_stack
from textbrewer.matching import layer_map
from textbrewer.recipes.stage import RECIPES, Stage, attention_loss, depths, equal_heads, projection


@RECIPES.add("mobilebert")
def mobilebert(
    teacher: nn.Module,
    student: nn.Module,
    attention: bool = True,
    freeze: bool = True,
    progressive_share: float = 0.5,
    temperature: float = 1.0,
    hard_label_weight: float = 1.0,
) -> list[Stage]:
    """MobileBERT: progressive transfer of feature maps and attention, a layer a stage, then the predictions.

    In the stage of layer l, its normalised state is matched (weight 100), with the mean (5000) and the variance (5) of
    each state and the attention distributions (1); the embeddings and the layers below are frozen. The weights are
    those of the authors' code, divided there by the number of layers as all layers are summed, and so here. Published
    for sides of the same depth and width; otherwise the layers are mapped uniformly and the state is projected (without
    the statistics, which a projection changes at will). The last stage is half labels, half teacher, as published for
    the masked language model.

    **When:** thin, deep students of the teacher's depth, and many steps: each layer has a stage of its own.

    Args:
        teacher: the teacher.
        student: the student.
        attention: whether attention is matched; needs equal numbers of heads.
        freeze: whether the layers below are frozen.
        progressive_share: share of the steps for all layers together; published: 240,000 of 740,000 steps.
        temperature: of the last stage.
        hard_label_weight: of the labels in the last stage, beside weight 1 for the teacher.

    Reference:
        Sun et al., "MobileBERT", 2020, arXiv:2004.02984, sections 3.4 and 3.5; weights from the authors' code, whose
        mean and variance terms read the whole list of the teacher's states: here they read the layer's.
    """
    checks.number(progressive_share, "progressive_share", above=0, below=1)
    pairs = layer_map("uniform", *depths(teacher, student, "mobilebert"))
    if attention:
        equal_heads(teacher, student, "mobilebert", "set attention=False, or give the student as many heads")
    loss = attention_loss("attention_kl", teacher, student) if attention else None
    proj = projection(teacher, student, "mobilebert")
    stages = []
    for layer_T, layer_S in pairs:
        config = DistillationConfig(
            kd_loss_weight=0, intermediate_matches=_matches(layer_T, layer_S, len(pairs), loss, proj)
        )
        frozen = below(student, layer_S) if freeze and layer_S > 1 else []
        stages.append(Stage(f"layer-{layer_S}", config, share=progressive_share / len(pairs), frozen=frozen))
    last = DistillationConfig(temperature=temperature, kd_loss_type="kl", hard_label_weight=hard_label_weight)
    return [*stages, Stage("prediction", last, share=1 - progressive_share)]


def _matches(layer_T: int, layer_S: int, layers: int, attention: Any, proj: str | None) -> list[dict[str, Any]]:
    """Return the matches of one layer, with that loss between attentions or none."""
    place: dict[str, Any] = {"layer_T": layer_T, "layer_S": layer_S, "feature": "hidden"}
    state = {**place, "loss": "layer_norm_mse", "weight": 100 / layers}
    matches = [state if proj is None else {**state, "proj": proj}]
    if proj is None:
        matches.append({**place, "loss": "state_mean", "weight": 5000 / layers})
        matches.append({**place, "loss": "state_variance", "weight": 5 / layers})
    if attention is not None:
        place = {"layer_T": layer_T - 1, "layer_S": layer_S - 1, "feature": "scores"}
        matches.append({**place, "loss": attention, "weight": 1 / layers})
    return matches


def below(student: nn.Module, layer: int) -> list[str]:
    """Return the dotted names of the modules that come before a layer: the blocks below, and what lies before them.

    Args:
        student: the student.
        layer: counted from 1.

    Raises:
        ValueError: if the student has no single stack of blocks.
    """
    stack = find_stack(student)
    names = {module: name for name, module in student.named_modules()}
    if stack is None:
        raise ValueError(
            f"recipe 'mobilebert' freezes the layers below, but {type(student).__name__} has no single stack of "
            "blocks; set freeze=False"
        )
    path = names[stack.blocks].split(".")
    found = []
    for depth, child in enumerate(path):
        parent = student.get_submodule(".".join(path[:depth]))
        for name, _ in parent.named_children():
            if name == child:
                break
            found.append(".".join([*path[:depth], name]))
    return [*found, *(f"{'.'.join(path)}.{number}" for number in range(layer - 1))]
