"""Patient knowledge distillation: the first position's hidden state, layer by layer."""

from __future__ import annotations

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.matching import match_layers
from textbrewer.recipes.stage import RECIPES, Stage, depths, projection, width_of


@RECIPES.add("pkd-skip")
def pkd_skip(
    teacher: nn.Module, student: nn.Module, alpha: float = 0.5, temperature: float = 10.0, beta: float = 100.0
) -> list[Stage]:
    r"""PKD-Skip: every k-th layer of the teacher teaches the student's layers but its last.

    .. math:: L = (1 - \alpha)\, \mathrm{CE}(y, q) + \alpha\, \tau^2 \mathrm{KL} + \beta\, L_\mathrm{PT}

    :math:`L_\mathrm{PT}` is the squared distance between the directions of the first position's states. The authors'
    code divides the KD term by the number of classes too; the formula here is the paper's.

    **When:** classification from the first position (``[CLS]``), with labels and few layers taken from the teacher.

    Args:
        teacher: the teacher.
        student: the student, of at least 2 layers; published: it starts from the teacher's first layers.
        alpha: weight of the KD loss against the labels'; searched among 0.2, 0.5, 0.7 by the authors.
        temperature: :math:`\tau`; searched among 5, 10, 20.
        beta: searched among 10, 100, 500, 1000, in the scale of the authors' code, whose mean also divides by the
            layers and the width; the match weights here are that scale's ``beta / (layers * width)``.

    Reference:
        Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv:1908.09355, sections 3.2
        and 4.2; scale of beta from the authors' code.
    """
    return _pkd("skip", teacher, student, alpha, temperature, beta)


@RECIPES.add("pkd-last")
def pkd_last(
    teacher: nn.Module, student: nn.Module, alpha: float = 0.5, temperature: float = 10.0, beta: float = 100.0
) -> list[Stage]:
    """PKD-Last: as PKD-Skip, with the teacher's upper layers.

    **When:** as PKD-Skip, which was better in most of the paper's tasks.

    Args:
        teacher: the teacher.
        student: the student, of at least 2 layers.
        alpha: as :func:`pkd_skip`.
        temperature: as :func:`pkd_skip`.
        beta: as :func:`pkd_skip`.

    Reference:
        Sun et al., 2019, arXiv:1908.09355, section 3.2.
    """
    return _pkd("last", teacher, student, alpha, temperature, beta)


def _pkd(
    layers: str, teacher: nn.Module, student: nn.Module, alpha: float, temperature: float, beta: float
) -> list[Stage]:
    name = f"pkd-{layers}"
    checks.number(alpha, "alpha", minimum=0, maximum=1)
    checks.number(beta, "beta", minimum=0)
    layers_T, layers_S = depths(teacher, student, name)
    weight = beta / (max(layers_S - 1, 1) * width_of(teacher, "teacher", name))
    proj = projection(teacher, student, name)
    matches = match_layers(layers, layers_T, layers_S, loss="pkd", weight=weight, proj=proj)
    config = DistillationConfig(
        temperature=temperature,
        kd_loss_type="kl",
        kd_loss_weight=alpha,
        hard_label_weight=1 - alpha,
        intermediate_matches=matches,
    )
    return [Stage(name, config)]
