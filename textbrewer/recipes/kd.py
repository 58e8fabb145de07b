"""Plain knowledge distillation, and distillation of the last hidden state beside it."""

from __future__ import annotations

from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.matching import match_layers
from textbrewer.recipes.stage import RECIPES, Stage, depths, projection


@RECIPES.add("kd")
def kd(
    teacher: nn.Module,
    student: nn.Module,
    temperature: float = 4.0,
    loss: str | list[Any] = "kl",
    hard_label_weight: float = 0.0,
    logit_transform: str = "none",
) -> list[Stage]:
    r"""Plain knowledge distillation: the student learns the teacher's softened predictions.

    .. math:: L = \tau^2\, \mathrm{KL}(p^\tau \Vert q^\tau) + \lambda\, \mathrm{CE}(y, q)

    **When:** always as the first thing to try, and wherever the two models have nothing in common but their logits.

    Args:
        teacher: the teacher.
        student: the student.
        temperature: :math:`\tau`; 4 as in TextBrewer's default (the paper uses 1 to 20).
        loss: the loss between the logits, a name of ``KD_LOSS_MAP`` or ``[name, {constant: value}]``.
        hard_label_weight: :math:`\lambda`, of the loss on the true labels.
        logit_transform: ``"standardize"`` for logit standardisation.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    config = DistillationConfig(
        temperature=temperature,
        kd_loss_type=loss,
        hard_label_weight=hard_label_weight,
        logit_transform=logit_transform,
    )
    return [Stage("kd", config)]


@RECIPES.add("hidden")
def hidden(
    teacher: nn.Module, student: nn.Module, weight: float = 3.0, temperature: float = 4.0, layers: str = "uniform"
) -> list[Stage]:
    """KD on the logits and mean squared error between the hidden states of mapped layers, embeddings included.

    TextBrewer's usual recipe for a student that starts from layers of its teacher, with weights tuned in our
    quickstart.

    **When:** the student starts from layers of its teacher, or is at least a model of the same kind: the default of
    :func:`textbrewer.distill`.

    Args:
        teacher: the teacher.
        student: the student.
        weight: of each pair of layers; 3, as tuned in the quickstart.
        temperature: of the KD loss.
        layers: the layer map, ``"uniform"``, ``"skip"``, ``"last"`` or ``"first"``.

    Reference:
        Yang et al., "TextBrewer", 2020, arXiv:2002.12620, section 4; for hidden states Romero et al., "FitNets", 2015,
        arXiv:1412.6550.
    """
    layers_T, layers_S = depths(teacher, student, "hidden")
    proj = projection(teacher, student, "hidden")
    matches = match_layers(layers, layers_T, layers_S, weight=weight, proj=proj, embeddings=True)
    config = DistillationConfig(temperature=temperature, kd_loss_type="kl", intermediate_matches=matches)
    return [Stage("hidden", config)]


@RECIPES.add("distilbert")
def distilbert(
    teacher: nn.Module,
    student: nn.Module,
    temperature: float = 2.0,
    kd_weight: float = 5.0,
    hard_label_weight: float = 2.0,
    cosine_weight: float = 1.0,
) -> list[Stage]:
    r"""DistilBERT: KD, the task's own loss, and the cosine between the last hidden states.

    .. math:: L = 5\, \tau^2 \mathrm{KL} + 2\, L_\mathrm{task} + 1\, (1 - \cos(h^S, h^T)), \quad \tau = 2

    The published weights, with the masked-language-model loss where the adaptor's ``losses`` are those of a masked
    language model; on another task its labels take that place. The student starts from every other layer of its
    teacher (:func:`~textbrewer.students.init_student_from_teacher`).

    **When:** a general student of half the layers, on plain text with a masked-language-model head; on a task with
    labels it is KD with a cosine term.

    Args:
        teacher: the teacher.
        student: the student, of the teacher's width (else its last state is projected).
        temperature: of the KD loss.
        kd_weight: of the KD loss.
        hard_label_weight: of the task's own loss.
        cosine_weight: of the cosine loss.

    Reference:
        Sanh et al., "DistilBERT", 2019, arXiv:1910.01108, section 2; weights and temperature from the authors' training
        script (``alpha_ce`` 5, ``alpha_mlm`` 2, ``alpha_cos`` 1, ``temperature`` 2).
    """
    checks.number(cosine_weight, "cosine_weight", minimum=0)
    layers_T, layers_S = depths(teacher, student, "distilbert")
    match = {"layer_T": layers_T, "layer_S": layers_S, "feature": "hidden", "loss": "cos", "weight": cosine_weight}
    proj = projection(teacher, student, "distilbert")
    config = DistillationConfig(
        temperature=temperature,
        kd_loss_type="kl",
        kd_loss_weight=kd_weight,
        hard_label_weight=hard_label_weight,
        intermediate_matches=[match if proj is None else {**match, "proj": proj}],
    )
    return [Stage("distilbert", config)]
