"""Divergences between attention distributions, and between relations of queries, keys or values with themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer import checks
from textbrewer.losses.algebra import product
from textbrewer.losses.attention import same_scores, weights_of_rows
from textbrewer.losses.masking import (
    averaged_over,
    clear_masked,
    full_precision,
    one_tensor,
    pair_weights,
    position_weights,
    weighted_mean,
)
from textbrewer.losses.widths import student_width
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["attention_kl_loss", "relation_kl_loss"]


def _divergence(student: Tensor, teacher: Tensor, rows: Tensor | None, causal: bool) -> Tensor:
    """Mean over heads and kept rows of the KL divergence of the student's softmax over the keys from the teacher's.

    Args:
        student: scores, ``(batch, heads, length, length)`` or ``(batch, length, length)``; an absent key has -inf.
        teacher: the same shape.
        rows: weights of the positions, as queries and as keys, ``(batch, 1, length)`` or ``(batch, length)``.
        causal: whether the keys after each query are absent.
    """
    absent = student.isneginf() if rows is None else student.isneginf() | (pair_weights(rows) == 0)
    if causal:
        later = torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device)
        absent = absent | later.triu(1 + student.shape[-1] - student.shape[-2])
    absent_T = absent | teacher.isneginf()
    # A low number instead of -inf: what is absent still gets the probability 0, and a row without anything is finite.
    low = torch.finfo(student.dtype).min / 2
    log_q = F.log_softmax(student.masked_fill(absent, low), dim=-1).masked_fill(absent_T, 0.0)
    log_p = F.log_softmax(teacher.masked_fill(absent_T, low), dim=-1)
    p, log_p = log_p.exp().masked_fill(absent_T, 0.0), log_p.masked_fill(absent_T, 0.0)
    return weighted_mean((p * (log_p - log_q)).sum(dim=-1), rows)


@MATCH_LOSS_MAP.add("attention_kl")
@averaged_over("positions")
def attention_kl_loss(
    attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    r"""KL divergence of the student's attention from the teacher's, head by head, of scores before the softmax.

    .. math::
        L = \frac1{A \sum_{b,i} m_{bi}} \sum_{b,h,i} m_{bi} \sum_{j: m_{bj} \ne 0}
        p_{bhij} \log \frac{p_{bhij}}{q_{bhij}}, \qquad
        p_{bhi} = \mathrm{softmax}(t_{bhi}), \quad q_{bhi} = \mathrm{softmax}(s_{bhi})

    Masked positions take no part in the softmaxes, nor do keys whose score is :math:`-\infty`. Unlike
    ``attention_ce``, whose gradient is the same under a mask, it reaches 0, and takes negative scores as they are where
    there is no mask.

    Args:
        attention_S: student scores before the softmax, ``(batch, heads, length, length)``: the feature ``"scores"``.
        attention_T: teacher scores, same shape; where the numbers of heads differ, ``relation_kl`` serves.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.
        causal: leave out the keys after each query, as causal language models do after their scores.

    Returns:
        Scalar mean over the heads and the kept positions, in nats, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Wang et al., "MiniLM", 2020, arXiv:2002.10957, section 3.1, equation 6; Sun et al., "MobileBERT", 2020,
        arXiv:2004.02984, section 3.4.
    """
    same_scores(attention_S, attention_T, "use 'relation_kl' with 'heads' where the numbers of heads differ")
    student, teacher = full_precision(attention_S, attention_T)
    return _divergence(student, teacher, weights_of_rows(mask, student), causal)


def _split(feature: Tensor, heads: int | None, side: str) -> Tensor:
    """Return ``(batch, relation heads, length, width)``: the heads as they are, or side by side and split again."""
    if heads is None:
        return feature
    batch, own, length, width = feature.shape
    if own * width % heads:
        raise ValueError(
            f"heads must divide the {side}'s width {own * width} ({own} heads of {width}), got {heads}; "
            "name a divisor of both sides' widths"
        )
    together = feature.transpose(1, 2).reshape(batch, length, own * width)
    return together.reshape(batch, length, heads, own * width // heads).transpose(1, 2)


def _check_features(feature_S: Tensor, feature_T: Tensor, heads: int | None) -> None:
    """Raise unless both are ``(batch, heads, length, width)`` of one batch and length, and heads that can be compared.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: otherwise.
    """
    for feature, side in ((feature_S, "student"), (feature_T, "teacher")):
        one_tensor(feature, f"feature of the {side}")
        if feature.dim() != 4:
            raise ValueError(
                f'feature of the {side} must have the shape (batch, heads, length, width), as "query", "key" and '
                f'"value" have, got {tuple(feature.shape)}'
            )
    shapes = f"got {tuple(feature_S.shape)} and {tuple(feature_T.shape)}"
    if feature_S.shape[0] != feature_T.shape[0] or feature_S.shape[2] != feature_T.shape[2]:
        raise ValueError(f"features of student and teacher must have the same batch and length, {shapes}")
    if heads is not None:
        checks.integer(heads, "heads", minimum=1)
    elif feature_S.shape[1] != feature_T.shape[1]:
        raise ValueError(
            f"features of student and teacher must have as many heads, {shapes}; name a number of relation heads "
            "that divides both widths: ['relation_kl', {'heads': 12}]"
        )


@MATCH_LOSS_MAP.add("relation_kl")
@averaged_over("positions")
@student_width("any")
def relation_kl_loss(
    feature_S: Tensor, feature_T: Tensor, mask: Tensor | None = None, heads: int | None = None
) -> Tensor:
    r"""KL divergence of the student's self-attention relation from the teacher's (MiniLM, MiniLMv2).

    .. math::
        L = \frac1{A \sum_{b,i} m_{bi}} \sum_{b,a,i} m_{bi} \, \mathrm{KL}\left(R^T_{bai} \,\Vert\, R^S_{bai}\right),
        \qquad R_{ba} = \mathrm{softmax}\left(\frac{X_{ba} X_{ba}^\top}{\sqrt{d}}\right)

    with :math:`d` the width of a relation head. Of the values with the models' own heads, it is MiniLM's value
    relation; of queries, keys and values with more heads, one match each, the three of MiniLMv2. Masked positions take
    no part in the softmaxes.

    Args:
        feature_S: queries, keys or values of the student, ``(batch, heads, length, head width)``.
        feature_T: those of the teacher; head widths may differ, and with ``heads`` the numbers of heads too, so no
            projection is needed.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.
        heads: number of relation heads :math:`A`: the heads are put side by side and split again into as many; it
            divides both widths. MiniLMv2 takes 48 for a base teacher and 64 for a large one. None: the models' heads.

    Returns:
        Scalar mean over the relation heads and the kept positions, in nats, float32 or wider; 0 where no position is
        kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit, or ``heads`` does not divide a width.

    Reference:
        Wang et al., "MiniLM", 2020, arXiv:2002.10957, section 3.2; Wang et al., "MiniLMv2", 2021, arXiv:2012.15828,
        section 3.
    """
    _check_features(feature_S, feature_T, heads)
    student, teacher = full_precision(feature_S, feature_T)
    weight = position_weights(mask, student, (student.shape[0], student.shape[2]))
    rows = None if weight is None else weight.unsqueeze(1)
    relations = []
    for feature, side in ((student, "student"), (teacher, "teacher")):
        states = clear_masked(_split(feature, None if heads is None else int(heads), side), rows)
        relations.append(product(states, states.transpose(-1, -2)) * states.shape[-1] ** -0.5)
    return _divergence(relations[0], relations[1], rows, causal=False)
