"""MiniLM and MiniLMv2: the relations between positions in the attention of one layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.recipes.stage import RECIPES, Stage, attention_loss, depths, equal_heads, heads_of, width_of


def _last_layer(feature: str, loss: Any, layer_T: int, layer_S: int) -> dict[str, Any]:
    return {"layer_T": layer_T, "layer_S": layer_S, "feature": feature, "loss": loss, "weight": 1}


def _stages(matches: list[dict[str, Any]], prediction: bool, temperature: float, share: float) -> list[Stage]:
    """Return the stage of relations, and the one of predictions where it is wanted."""
    checks.is_a(prediction, bool, "prediction", "True or False")
    checks.number(share, "relations_share", above=0, below=1)
    relations = Stage(
        "relations",
        DistillationConfig(kd_loss_weight=0, intermediate_matches=matches),
        share=share if prediction else 1.0,
    )
    config = DistillationConfig(temperature=temperature, kd_loss_type="kl")
    return [relations, Stage("prediction", config, share=1 - share)] if prediction else [relations]


@RECIPES.add("minilm")
def minilm(
    teacher: nn.Module,
    student: nn.Module,
    prediction: bool = True,
    temperature: float = 4.0,
    relations_share: float = 0.5,
) -> list[Stage]:
    """MiniLM: the attention distributions and value relations of the last layer, then the predictions.

    Published is the first stage alone, from a teacher that is not fine-tuned on plain text; the student is fine-tuned
    afterwards. With ``prediction=False`` that is what you get; by default a stage of plain KD follows, so that a
    task's student comes out. The widths may differ, the numbers of heads not.

    **When:** the student is narrower than its teacher but has as many heads, and there is text without labels.

    Args:
        teacher: the teacher.
        student: the student, with as many heads.
        prediction: whether a stage of plain KD follows.
        temperature: of that stage.
        relations_share: the first stage's share of the steps.

    Reference:
        Wang et al., "MiniLM", 2020, arXiv:2002.10957, sections 3.1 and 3.2.
    """
    layers_T, layers_S = depths(teacher, student, "minilm")
    equal_heads(teacher, student, "minilm", "use 'minilmv2', which needs not, or give the student as many heads")
    matches = [
        _last_layer("scores", attention_loss("attention_kl", teacher, student), layers_T - 1, layers_S - 1),
        _last_layer("value", "relation_kl", layers_T - 1, layers_S - 1),
    ]
    return _stages(matches, prediction, temperature, relations_share)


@RECIPES.add("minilmv2")
def minilmv2(
    teacher: nn.Module,
    student: nn.Module,
    relation_heads: int | None = None,
    teacher_layer: int | None = None,
    prediction: bool = True,
    temperature: float = 4.0,
    relations_share: float = 0.5,
) -> list[Stage]:
    """MiniLMv2: query, key and value relations with any number of relation heads, then the predictions.

    The student's last layer learns from one layer of the teacher: published 12 of 12, 21 of 24 (BERT-large), 19 of 24
    (RoBERTa-large and XLM-R-large), with 48 relation heads for teachers of 12 heads and 64 for those of 16.

    **When:** width, depth or heads of the two differ, whatever the student's shape; no projection is needed.

    Args:
        teacher: the teacher.
        student: the student; neither its width nor its heads need to be the teacher's.
        relation_heads: must divide both widths; by default four times the teacher's heads, as for its 12 and 16.
        teacher_layer: the teacher's layer, counted from 1; by default the last.
        prediction: whether a stage of plain KD follows (published: fine-tuning on labels).
        temperature: of that stage.
        relations_share: the first stage's share of the steps.

    Reference:
        Wang et al., "MiniLMv2", 2020, arXiv:2012.15828, sections 3.1, 3.2 and 4.1.
    """
    layers_T, layers_S = depths(teacher, student, "minilmv2")
    heads = 4 * heads_of(teacher, "teacher", "minilmv2") if relation_heads is None else relation_heads
    checks.integer(heads, "relation_heads", minimum=1)
    for model, who in ((teacher, "teacher"), (student, "student")):
        width = width_of(model, who, "minilmv2")
        if width % heads:
            raise ValueError(
                f"relation_heads must divide the widths of both models, got {heads} and the {who}'s width {width}; "
                "give relation_heads=... a number that does"
            )
    layer = layers_T if teacher_layer is None else teacher_layer
    checks.integer(layer, "teacher_layer", minimum=1)
    if layer > layers_T:
        raise ValueError(f"teacher_layer must be at most the teacher's number of layers, {layers_T}, got {layer}")
    loss = ["relation_kl", {"heads": heads}]
    matches = [_last_layer(feature, loss, layer - 1, layers_S - 1) for feature in ("query", "key", "value")]
    return _stages(matches, prediction, temperature, relations_share)
