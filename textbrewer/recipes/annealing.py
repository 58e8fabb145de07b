"""Annealing-KD: the teacher's logits at a strength that grows, then the labels."""

from __future__ import annotations

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.recipes.stage import RECIPES, Stage


@RECIPES.add("annealing-kd")
def annealing_kd(
    teacher: nn.Module,
    student: nn.Module,
    max_temperature: int = 10,
    annealing_share: float = 0.7,
    hard_label_weight: float = 1.0,
) -> list[Stage]:
    r"""Annealing-KD: mean squared error to the annealed logits of the teacher, then fine-tuning on the labels.

    .. math:: L_1 = \lVert z^S - \Phi(t) z^T \rVert^2, \quad \Phi(t) = 1 - \frac{t - 1}{\tau_\mathrm{max}}

    The temperature t falls from the highest to 1 in steps of equal length over the first stage. The batches need
    labels.

    **When:** the teacher is much larger than the student, and the rows have labels.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        max_temperature: where t starts, a whole number.
        annealing_share: the first stage's share of the steps; ours.
        hard_label_weight: of the second stage.

    Reference:
        Jafari et al., "Annealing Knowledge Distillation", 2021, arXiv:2104.07163, section 3.
    """
    checks.integer(max_temperature, "max_temperature", minimum=1)
    checks.number(annealing_share, "annealing_share", above=0, below=1)
    loss = ["annealing", {"max_temperature": max_temperature}]
    return [
        Stage("annealing", DistillationConfig(temperature=1, kd_loss_type=loss), share=annealing_share),
        Stage(
            "fine-tuning",
            DistillationConfig(kd_loss_weight=0, hard_label_weight=hard_label_weight),
            share=1 - annealing_share,
        ),
    ]
