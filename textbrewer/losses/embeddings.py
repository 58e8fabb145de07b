"""Losses between embeddings of whole texts, and between scores of candidates, for retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.algebra import POOLED, both_pooled, unit
from textbrewer.losses.forms import teacher_form
from textbrewer.losses.masking import averaged_over, same_states, weighted_mean
from textbrewer.losses.softened import soften
from textbrewer.registry import KD_LOSS_MAP, MATCH_LOSS_MAP

__all__ = ["embed_distill_loss", "margin_mse_loss"]

_DISTANCES = ("mse", "l2", "cosine")


@MATCH_LOSS_MAP.add("embed_distill")
@averaged_over("rows")
@teacher_form(POOLED)
def embed_distill_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None, distance: str = "mse") -> Tensor:
    r"""Distance between the embeddings of whole rows.

    .. math::
        L = \frac1B \sum_b d(s_b, t_b), \qquad d(s, t) = \begin{cases}
        \lVert s - t \rVert^2 / H & \text{mse} \\ \lVert s - t \rVert & \text{l2} \\
        1 - \frac{s \cdot t}{\lVert s \rVert \lVert t \rVert} & \text{cosine} \end{cases}

    where :math:`s_b` is the mean of the row's kept positions.

    Args:
        state_S: student states, ``(batch, length, hidden)``, or embeddings, ``(batch, hidden)``: taken as they are.
        state_T: teacher states, likewise; where the widths differ, the match names ``'proj'``.
        mask: ``(batch, length)``, zero where a position does not count; None: all count. A row without any kept
            position does not count.
        distance: ``"mse"``, ``"l2"`` or ``"cosine"``.

    Returns:
        Scalar mean over the kept rows, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit or the distance is unknown.

    Reference:
        Kim et al., "EmbedDistill", 2023, arXiv:2301.12005, section 4.2; mse: Reimers, Gurevych, "Making Monolingual
        Sentence Embeddings Multilingual using Knowledge Distillation", 2020, arXiv:2004.09813, section 2.
    """
    checks.one_of(distance, _DISTANCES, "distance")
    student, teacher, rows = both_pooled(state_S, state_T, mask)
    same_states(student, teacher)
    if distance == "cosine":
        values = 1.0 - (unit(student) * unit(teacher)).sum(dim=-1)
    elif distance == "l2":
        values = torch.linalg.vector_norm(student - teacher, dim=-1)
    else:
        values = (student - teacher).square().mean(dim=-1)
    return weighted_mean(values, rows)


@KD_LOSS_MAP.add("margin_mse")
@averaged_over("positions")
def margin_mse_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Mean squared error between margins: how much better the first candidate is than each of the others.

    .. math::
        L = \frac1{N (C - 1)} \sum_n \sum_{c=1}^{C-1} \left(
        \frac{(s_{n0} - s_{nc}) - (t_{n0} - t_{nc})}{\tau_n} \right)^2

    The scores themselves may be of another height on each side. A score of :math:`-\infty` stands for a candidate that
    is not there, where queries have different numbers of them; the mean is then over those that are.

    Args:
        logits_S: student's scores of each query's candidates, ``(batch, candidates)``: the relevant one first, then at
            least one other. Also ``(batch, length, candidates)``.
        logits_T: teacher's scores, same shape.
        temperature: positive number, 0-dim tensor, or tensor of shape ``logits_S.shape[:-1]``; 1 in the paper.
        mask: ``logits_S.shape[:-1]``, zero where a row does not count; None: all count.

    Returns:
        Scalar mean over the kept rows and their margins, float32 or wider; 0 where no row is kept.

    Raises:
        ValueError: if shapes do not fit, there is but one candidate, or ``temperature`` is a number that is not
            positive.

    Reference:
        Hofstaetter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        2020, arXiv:2010.02666, section 3.2.
    """
    soft = soften(logits_S, logits_T, temperature, mask)
    if logits_S.shape[-1] < 2:
        raise ValueError(f"logits must have at least two candidates for 'margin_mse', got {tuple(logits_S.shape)}")
    gap = soft.student - soft.teacher
    absent = soft.absent[..., 1:] | soft.absent[..., :1]
    squares = (gap[..., :1] - gap[..., 1:]).square().masked_fill(absent, 0.0)
    margins = (~absent).sum(dim=-1).clamp(min=1)
    return weighted_mean(squares.sum(dim=-1) / margins, soft.weight)
