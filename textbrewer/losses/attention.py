r"""Losses between attention scores, ``(batch, heads, length, length)``: row ``i`` is what position ``i`` attends to.

Scores are those before the softmax. A score of :math:`-\infty` marks a position that cannot be attended to, and adds
nothing. Without a mask, scores of -0.001 and below are taken for such marks (TextBrewer's rule), so models that return
scores of both signs need the mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer.losses.forms import TeacherForm, teacher_form
from textbrewer.losses.masking import (
    averaged_over,
    full_precision,
    one_tensor,
    pair_weights,
    position_weights,
    same_shape,
    weighted_mean,
)
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = [
    "att_ce_loss",
    "att_ce_mean_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "same_scores",
    "weights_of_rows",
]

_MASKED_SCORE = -1e-3


def same_scores(attention_S: Tensor, attention_T: Tensor, remedy: str) -> None:
    """Raise ValueError unless both are attention scores of one shape."""
    same_shape(attention_S, attention_T, "attention scores", remedy)
    if attention_S.dim() not in (3, 4):
        raise ValueError(
            "attention scores must have the shape (batch, heads, length, length) or (batch, length, length), "
            f"got {tuple(attention_S.shape)}"
        )


def weights_of_rows(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """Return the mask as weights of the rows of the scores: ``(batch, 1, length)``, or as it is without heads."""
    if mask is None:
        return None
    if scores.shape[-2] != scores.shape[-1]:
        raise ValueError(
            "attention scores must be square where a mask is given, which counts for both sides, "
            f"got {tuple(scores.shape)}; match attention between two sequences without a mask"
        )
    rows = position_weights(mask, scores, (scores.shape[0], scores.shape[-1]))
    return rows if rows is None or scores.dim() == 3 else rows.unsqueeze(1)


def _squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the squared differences over the heads and the kept pairs of positions."""
    rows = weights_of_rows(mask, student)
    if rows is None:
        student = student.masked_fill(student <= _MASKED_SCORE, 0.0)
        teacher = teacher.masked_fill(teacher <= _MASKED_SCORE, 0.0)
        return weighted_mean((student - teacher).square(), None)
    pairs = pair_weights(rows)
    dropped = (pairs == 0) | student.isneginf() | teacher.isneginf()
    return weighted_mean((student - teacher).masked_fill(dropped, 0.0).square(), pairs)


def _cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the heads and the kept rows of the cross-entropy of the student's row under the teacher's."""
    rows = weights_of_rows(mask, student)
    absent_S, absent_T = student.isneginf(), teacher.isneginf()
    if rows is None:
        dropped = absent_S | (teacher <= _MASKED_SCORE)
    else:
        absent_S = absent_S | (pair_weights(rows) == 0)
        dropped = absent_S | absent_T
    # A low number instead of -inf: what is absent still gets the probability 0, and a row without anything is finite.
    low = torch.finfo(student.dtype).min / 2
    log_q = F.log_softmax(student.masked_fill(absent_S, low), dim=-1)
    log_p = F.log_softmax(teacher.masked_fill(absent_S | absent_T, low), dim=-1)
    terms = (log_p.exp() * log_q).masked_fill(dropped, 0.0)
    if rows is not None:
        terms = terms * rows.unsqueeze(-2)
    return weighted_mean(-terms.sum(dim=-1), rows)


@MATCH_LOSS_MAP.add("attention_mse")
@averaged_over("pairs")
def att_mse_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between attention scores, head by head.

    .. math:: L = \frac{\sum_{b,h,i,j} m_{bi} m_{bj} (s_{bhij} - t_{bhij})^2}{A \sum_b (\sum_i m_{bi})^2}

    Without a mask, the mean over all pairs, scores of -0.001 and below counted as 0.

    Args:
        attention_S: student scores, ``(batch, heads, length, length)``.
        attention_T: teacher scores, same shape; ``attention_mse_sum`` serves where the numbers of heads differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the heads and the kept pairs of positions, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, section 3.1.
    """
    same_scores(attention_S, attention_T, "use 'attention_mse_sum' where the numbers of heads differ")
    student, teacher = full_precision(attention_S, attention_T)
    return _squared_error(student, teacher, mask)


def _sum_form(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's scores summed over the heads, as :func:`att_mse_sum_loss` also takes them."""
    one_tensor(scores, "attention scores of the teacher")
    return full_precision(scores)[0].sum(dim=1) if scores.dim() == 4 else scores


def _mean_form(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's scores averaged over the heads, as :func:`att_ce_mean_loss` also takes them."""
    one_tensor(scores, "attention scores of the teacher")
    return full_precision(scores)[0].mean(dim=1) if scores.dim() == 4 else scores


@MATCH_LOSS_MAP.add("attention_mse_sum")
@averaged_over("pairs")
@teacher_form(TeacherForm("sum_of_heads", _sum_form, positions=(1, 2)))
def att_mse_sum_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared error between attention scores summed over the heads.

    .. math::
        L = \frac{\sum_{b,i,j} m_{bi} m_{bj} \left(\sum_h s_{bhij} - \sum_h t_{bhij}\right)^2}{\sum_b (\sum_i m_{bi})^2}

    Without a mask, the mean over all pairs, sums of -0.001 and below counted as 0.

    Args:
        attention_S: student scores, ``(batch, heads, length, length)``, or ``(batch, length, length)``: summed already.
        attention_T: teacher scores, either shape; the numbers of heads may differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept pairs of positions, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, section 3.1 (there head by head).
    """
    one_tensor(attention_S, "attention scores of the student")
    one_tensor(attention_T, "attention scores of the teacher")
    student, teacher = full_precision(attention_S, attention_T)
    student = student.sum(dim=1) if student.dim() == 4 else student
    teacher = teacher.sum(dim=1) if teacher.dim() == 4 else teacher
    same_scores(student, teacher, "both models must read the same tokens")
    return _squared_error(student, teacher, mask)


@MATCH_LOSS_MAP.add("attention_ce")
@averaged_over("positions")
def att_ce_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-entropy of the student's attention under the teacher's, head by head.

    .. math::
        L = -\frac{\sum_{b,h,i} m_{bi} \sum_j m_{bj}\, p_{bhij} \log q_{bhij}}{A \sum_{b,i} m_{bi}}, \qquad
        p_{bhi} = \mathrm{softmax}(t_{bhi}), \quad q_{bhi} = \mathrm{softmax}(s_{bhi})

    Masked positions take no part in the softmaxes. Without a mask, the mean over all rows, without the terms where the
    teacher's score is -0.001 or below.

    Args:
        attention_S: student scores before the softmax, ``(batch, heads, length, length)``.
        attention_T: teacher scores, same shape; ``attention_ce_mean`` serves where the numbers of heads differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the heads and the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Wang et al., "MiniLM", 2020, arXiv:2002.10957, section 3.1 (there the KL divergence: the same gradient).
    """
    same_scores(attention_S, attention_T, "use 'attention_ce_mean' where the numbers of heads differ")
    student, teacher = full_precision(attention_S, attention_T)
    return _cross_entropy(student, teacher, mask)


@MATCH_LOSS_MAP.add("attention_ce_mean")
@averaged_over("positions")
@teacher_form(TeacherForm("mean_of_heads", _mean_form, positions=(1, 2)))
def att_ce_mean_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-entropy of the student's attention under the teacher's, of scores averaged over the heads.

    .. math::
        L = -\frac{\sum_{b,i} m_{bi} \sum_j m_{bj}\, p_{bij} \log q_{bij}}{\sum_{b,i} m_{bi}}, \qquad
        p_{bi} = \mathrm{softmax}\Big(\frac1A \sum_h t_{bhi}\Big), \quad
        q_{bi} = \mathrm{softmax}\Big(\frac1A \sum_h s_{bhi}\Big)

    Masked positions take no part in the softmaxes. Without a mask, the mean over all rows, without the terms where the
    teacher's mean score is -0.001 or below.

    Args:
        attention_S: student scores before the softmax, ``(batch, heads, length, length)``, or
            ``(batch, length, length)``: averaged already.
        attention_T: teacher scores, either shape; the numbers of heads may differ.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar mean over the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        ValueError: if shapes do not fit.

    Reference:
        Wang et al., "MiniLM", 2020, arXiv:2002.10957, section 3.1 (there head by head, and the KL divergence).
    """
    one_tensor(attention_S, "attention scores of the student")
    one_tensor(attention_T, "attention scores of the teacher")
    student, teacher = full_precision(attention_S, attention_T)
    student = student.mean(dim=1) if student.dim() == 4 else student
    teacher = teacher.mean(dim=1) if teacher.dim() == 4 else teacher
    same_scores(student, teacher, "both models must read the same tokens")
    return _cross_entropy(student, teacher, mask)
