"""Chains of teachers: a teacher assistant in between, and generations of the student itself."""

from __future__ import annotations

import copy

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.recipes.stage import RECIPES, Stage, depths
from textbrewer.students import init_student_from_teacher


@RECIPES.add("teacher-assistant")
def teacher_assistant(
    teacher: nn.Module,
    student: nn.Module,
    assistant: nn.Module | int | None = None,
    temperature: float = 4.0,
    assistant_share: float = 0.5,
    hard_label_weight: float = 0.0,
) -> list[Stage]:
    """Teacher assistant: the teacher teaches a model of middle size, and that one the student.

    **When:** teacher and student are far apart in size. The assistant takes its share of the steps.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        assistant: a model between the two, or its number of layers, taken from the teacher; by default halfway.
        temperature: of both KD losses.
        assistant_share: the assistant's share of the steps.
        hard_label_weight: of the labels in both stages.

    Raises:
        ValueError: if there is no number of layers between the two.

    Reference:
        Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", 2019, arXiv:1902.03393, section 3.
    """
    checks.number(assistant_share, "assistant_share", above=0, below=1)
    if not isinstance(assistant, nn.Module):
        layers_T, layers_S = depths(teacher, student, "teacher-assistant")
        layers = (layers_T + layers_S) // 2 if assistant is None else assistant
        checks.integer(layers, "assistant", minimum=1)
        if not layers_S < layers < layers_T:
            raise ValueError(
                f"assistant must have more layers than the student ({layers_S}) and fewer than the teacher "
                f"({layers_T}), got {layers}; give a model of another width as assistant=..., or use 'kd'"
            )
        assistant = init_student_from_teacher(teacher, layers=int(layers)).float()

    def config() -> DistillationConfig:
        return DistillationConfig(temperature=temperature, kd_loss_type="kl", hard_label_weight=hard_label_weight)

    return [
        Stage("assistant", config(), share=assistant_share, student=assistant),
        Stage("student", config(), share=1 - assistant_share, teacher=assistant),
    ]


@RECIPES.add("born-again")
def born_again(
    teacher: nn.Module,
    student: nn.Module,
    generations: int = 2,
    temperature: float = 1.0,
    hard_label_weight: float = 1.0,
) -> list[Stage]:
    """Born-again networks: each generation of the student teaches the next, which starts anew.

    The last generation is the student. The paper's ensemble of all generations is not made.

    **When:** the student is as large as the teacher and shall become better than it; labels are needed.

    Args:
        teacher: the first generation's teacher.
        student: what every generation starts as.
        generations: how many; the steps are shared equally.
        temperature: of the KD loss; the paper uses none.
        hard_label_weight: of the labels.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, arXiv:1805.04770, section 3.
    """
    checks.integer(generations, "generations", minimum=1)
    models = [*(copy.deepcopy(student) for _ in range(int(generations) - 1)), student]
    teachers = [teacher, *models[:-1]]
    return [
        Stage(
            f"generation-{number}",
            DistillationConfig(temperature=temperature, kd_loss_type="kl", hard_label_weight=hard_label_weight),
            teacher=own,
            student=model,
        )
        for number, (own, model) in enumerate(zip(teachers, models, strict=True), 1)
    ]


@RECIPES.add("deep-mutual-learning")
def deep_mutual_learning(
    teacher: nn.Module,
    student: nn.Module,
    peers: int = 1,
    teacher_joins: bool = True,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
) -> list[Stage]:
    r"""Deep mutual learning: students that learn from the labels and from each other, all at once.

    .. math:: L_i = \mathrm{CE}(y, q_i) + \frac{1}{N - 1} \sum_{j \ne i} \mathrm{KL}(q_j \Vert q_i)

    **When:** there is no good teacher yet, or teacher and student are to be trained together; labels are needed.

    Args:
        teacher: joins as a peer that goes on learning (a copy of it does: the teacher itself is left as it is).
        student: the student that is wanted.
        peers: how many more students of the same kind there are. They start as copies of the student, so what sets
            them apart is dropout: a student without any needs the teacher as its peer.
        teacher_joins: whether a copy of the teacher is a peer as well (the paper mixes sizes in section 3.3).
        temperature: of the KL divergence between peers; the paper uses none.
        kd_weight: of the mean divergence.

    Raises:
        ValueError: if there would be no peer.

    Reference:
        Zhang et al., "Deep Mutual Learning", 2018, arXiv:1706.00384, sections 2 and 3.
    """
    checks.integer(peers, "peers", minimum=0)
    checks.is_a(teacher_joins, bool, "teacher_joins", "True or False")
    cohort = [copy.deepcopy(student) for _ in range(int(peers))]
    if teacher_joins:
        cohort.append(copy.deepcopy(teacher).float().requires_grad_(True))
    if not cohort:
        raise ValueError("peers must be at least 1 where the teacher does not join, got 0; set teacher_joins=True")
    config = DistillationConfig(
        temperature=temperature, kd_loss_type="kl", kd_loss_weight=kd_weight, hard_label_weight=1.0
    )
    return [Stage("mutual", config, peers=cohort)]
