"""Recipes that choose during the training which layers teach which: BERT-EMD, CoFi, RAIL-KD, ALP-KD."""

from __future__ import annotations

from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.matching import layer_map
from textbrewer.recipes.stage import RECIPES, Stage, attention_loss, depths, equal_heads, several


@RECIPES.add("bert-emd")
def bert_emd(
    teacher: nn.Module,
    student: nn.Module,
    beta: float = 0.01,
    theta: float = 1.0,
    temperature: float = 1.0,
    attention: bool = True,
) -> list[Stage]:
    r"""BERT-EMD: all layers of the student learn from all of the teacher, by optimal transport.

    .. math:: L = L_\mathrm{KD} + \beta \left(\theta\, (L_\mathrm{att} + L_\mathrm{hid}) + L_\mathrm{emb}\right)

    Where the authors' code differs: its KD term is divided by the number of classes too, it averages the layer weights
    of attention and states unless told otherwise, and one projection serves embeddings and layers. Here the KD term is
    the sum over the classes, and weights and projections are each match's own.

    **When:** it is not known which layers belong together, and the cost of all pairs does not matter. Needs the extra
    ``emd``.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        beta: published 0.01 (0.001 for CoLA; 0.005 for STS-B, QQP and RTE).
        theta: published 1.
        temperature: of the KD loss; published 1.
        attention: whether attention scores are matched too; needs equal numbers of heads.

    Reference:
        Li et al., "BERT-EMD", 2020, arXiv:2010.06133, sections 3 and 4; constants from the authors' code.
    """
    checks.number(beta, "beta", minimum=0)
    checks.number(theta, "theta", minimum=0)
    layers_T, layers_S = depths(teacher, student, "bert-emd")
    proj = ["linear"]
    embeddings = {"feature": "hidden", "loss": "hidden_mse", "weight": beta, "strategy": "pairwise", "proj": proj}
    hidden = {"feature": "hidden", "loss": "hidden_mse", "weight": beta * theta, "strategy": "emd", "proj": proj}
    matches = [
        several(embeddings, [0], [0]),
        several(hidden, range(1, layers_T + 1), range(1, layers_S + 1)),
    ]
    if attention:
        equal_heads(teacher, student, "bert-emd", "set attention=False, or give the student as many heads")
        loss = attention_loss("scores_mse", teacher, student)
        scores = {"feature": "scores", "loss": loss, "weight": beta * theta, "strategy": "emd"}
        matches.append(several(scores, range(layers_T), range(layers_S)))
    return _one("bert-emd", matches, temperature=temperature, kd_loss_type="ce")


@RECIPES.add("cofi-dynamic")
def cofi_dynamic(
    teacher: nn.Module,
    student: nn.Module,
    kd_weight: float = 0.1,
    layer_weight: float = 0.9,
    temperature: float = 2.0,
    ordered: bool = True,
    teacher_layers: list[int] | None = None,
) -> list[Stage]:
    """CoFi's distillation: each chosen layer of the teacher teaches the student's layer that is nearest to it.

    **When:** the student's layers change while it learns, as in pruning; or which layers belong together is not known.

    Args:
        teacher: the fine-tuned teacher.
        student: the student; here it is not pruned, see compression for that.
        kd_weight: published 0.1, in the authors' scripts.
        layer_weight: published 0.9.
        temperature: published 2.
        ordered: whether the order of the layers is kept (the authors' version 4); if not, each teacher layer takes the
            nearest (version 3).
        teacher_layers: counted from 1; published 3, 6, 9, 12 of 12, so by default the teacher's four quarters.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022, arXiv:2204.00408, section 3.2;
        constants from the authors' code.
    """
    layers_T, layers_S = depths(teacher, student, "cofi-dynamic")
    quarters = [layer for layer, _ in layer_map("uniform", layers_T, min(4, layers_T))]
    chosen = quarters if teacher_layers is None else list(teacher_layers)
    match = {
        "feature": "hidden",
        "loss": "hidden_mse",
        "weight": layer_weight,
        "strategy": "ordered" if ordered else "nearest",
        "proj": "identity",
    }
    matches = [several(match, chosen, range(1, layers_S + 1))]
    return _one("cofi-dynamic", matches, temperature=temperature, kd_loss_type="kl", kd_loss_weight=kd_weight)


@RECIPES.add("rail-kd")
def rail_kd(
    teacher: nn.Module,
    student: nn.Module,
    weight: float = 1.0,
    temperature: float = 4.0,
    seed: int = 0,
    hard_label_weight: float = 0.0,
) -> list[Stage]:
    """RAIL-KD: in every epoch another random subset of the teacher's layers, in order.

    Compared are the states at all positions. In the paper they are averaged over the positions and brought to length 1
    first, and the cross-entropy with the labels is a part of the loss; here it is with ``hard_label_weight``.

    **When:** a deep teacher whose every layer should be used at the price of few.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        weight: of the layers, beside weight 1 for the KD loss.
        temperature: of the KD loss.
        seed: of the draws.
        hard_label_weight: of the labels.

    Reference:
        Haidar et al., "RAIL-KD", 2021, arXiv:2109.10164, section 3 (layer by layer); the weights are ours.
    """
    layers_T, layers_S = depths(teacher, student, "rail-kd")
    strategy = ["random", {"seed": seed}]
    match = {"feature": "hidden", "loss": "hidden_mse", "weight": weight, "strategy": strategy, "proj": "linear"}
    matches = [several(match, range(1, layers_T + 1), range(1, layers_S + 1))]
    return _one("rail-kd", matches, temperature=temperature, kd_loss_type="kl", hard_label_weight=hard_label_weight)


@RECIPES.add("alp-kd")
def alp_kd(
    teacher: nn.Module,
    student: nn.Module,
    weight: float = 1.0,
    temperature: float = 4.0,
    hard_label_weight: float = 0.0,
) -> list[Stage]:
    """ALP-KD: each layer of the student learns from all of the teacher's, weighted by their likeness to it.

    In the paper the cross-entropy with the labels is a part of the loss; here it is with ``hard_label_weight``.

    **When:** all of the teacher's layers should count and none be chosen by hand.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        weight: of the layers, beside weight 1 for the KD loss.
        temperature: of the KD loss.
        hard_label_weight: of the labels.

    Reference:
        Passban et al., "ALP-KD", 2020, arXiv:2012.14022, section 3; the weights are ours.
    """
    layers_T, layers_S = depths(teacher, student, "alp-kd")
    match = {"feature": "hidden", "loss": "hidden_mse", "weight": weight, "strategy": "attention", "proj": "linear"}
    matches = [several(match, range(1, layers_T + 1), range(1, layers_S + 1))]
    return _one("alp-kd", matches, temperature=temperature, kd_loss_type="kl", hard_label_weight=hard_label_weight)


def _one(name: str, matches: list[dict[str, Any]], **settings: Any) -> list[Stage]:
    return [Stage(name, DistillationConfig(intermediate_matches=matches, **settings))]
