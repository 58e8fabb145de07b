"""Losses between how alike the rows of a batch are, in the student and in the teacher; the widths may differ.

The rows are compared with each other, so these losses need batches of several rows, and those of micro-batches do not
add up to that of a large batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
from torch import Tensor

from textbrewer.losses.algebra import POOLED, above_zero, both_pooled, check_states, product, row_weights, unit
from textbrewer.losses.forms import teacher_form
from textbrewer.losses.masking import (
    averaged_over,
    clear_masked,
    full_precision,
    pair_weights,
    position_weights,
    weighted_mean,
)
from textbrewer.losses.widths import student_width
from textbrewer.registry import MATCH_LOSS_MAP

__all__ = ["cka_loss", "linear_cka", "rkd_angle_loss", "rkd_distance_loss", "sp_loss"]


def _weighted(state: Tensor, mask: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
    """Return a state in full precision with zeros where it is masked, and the weights of its positions (or rows)."""
    check_states(state, side)
    (state,) = full_precision(state)
    weight = row_weights(mask, state) if state.dim() == 2 else position_weights(mask, state, state.shape[:2])
    return clear_masked(state, weight), weight


def _same_batch(state_S: Tensor, state_T: Tensor, positions_too: bool = False) -> None:
    """Raise ValueError unless both states have the same rows, and where it says so the same positions."""
    dimensions = slice(0, -1) if positions_too else slice(0, 1)
    if state_S.shape[dimensions] != state_T.shape[dimensions]:
        raise ValueError(
            f"hidden states of student and teacher must have the same batch{' and length' * positions_too}, "
            f"got {tuple(state_S.shape)} and {tuple(state_T.shape)}; both models must read the same rows"
        )


@MATCH_LOSS_MAP.add("sp")
@averaged_over("batch")
@student_width("any")
def sp_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Squared distance between the similarities of the rows of a batch (similarity preserving).

    .. math::
        L = \frac1{B^2} \sum_{b,c} \left(
        \frac{G^S_{bc}}{\lVert G^S_b \rVert} - \frac{G^T_{bc}}{\lVert G^T_b \rVert} \right)^2, \qquad
        G_{bc} = \sum_n m_{bn} m_{cn}\, f_{bn} \cdot f_{cn}

    Args:
        state_S: student states, ``(batch, length, width)``, or ``(batch, width)``.
        state_T: teacher states, likewise; their width may differ, so no projection is needed.
        mask: ``(batch, length)``, zero where a position does not count; None: all count. A row without any kept
            position does not count.

    Returns:
        Scalar mean over the pairs of kept rows, from 0 to 4 over the number of these, float32 or wider; 0 where no
        position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv:1907.09682, section 3, equations 2 to 4.
    """
    grams: list[Tensor] = []
    for state, side in ((state_S, "student"), (state_T, "teacher")):
        values, weight = _weighted(state, mask, side)
        flat = (values if weight is None else values * weight.unsqueeze(-1)).flatten(1)
        grams.append(unit(product(flat, flat.transpose(0, 1))))
    _same_batch(state_S, state_T)
    gram_S, gram_T = full_precision(*grams)
    rows = row_weights(mask, gram_S)
    return weighted_mean((gram_S - gram_T).square(), None if rows is None else pair_weights(rows))


def _relative_distances(vectors: Tensor, pairs: Tensor | None) -> Tensor:
    """Return ``(batch, batch)``: the distances of all pairs of rows, divided by the mean of the positive ones."""
    distances: Tensor = torch.linalg.vector_norm(vectors.unsqueeze(0) - vectors.unsqueeze(1), dim=-1)
    counted = (distances > 0).to(distances.dtype)
    counted = counted if pairs is None else counted * pairs
    mean = (distances * counted).sum() / above_zero(counted.sum())
    return distances / above_zero(mean)


@MATCH_LOSS_MAP.add("rkd_distance")
@averaged_over("batch")
@student_width("any")
@teacher_form(POOLED)
def rkd_distance_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Huber distance between the relative distances of the rows of a batch (relational knowledge distillation).

    .. math::
        L = \frac1{B^2} \sum_{b,c} h\left(
        \frac{\lVert s_b - s_c \rVert}{\mu^S} - \frac{\lVert t_b - t_c \rVert}{\mu^T} \right), \qquad
        h(x) = \begin{cases} x^2 / 2 & |x| \le 1 \\ |x| - 1/2 & |x| > 1 \end{cases}

    where :math:`s_b` is the mean of the row's kept positions and :math:`\mu` the mean of the distances above zero. The
    mean is over all pairs, a row with itself included, as in the authors' code.

    Args:
        state_S: student states, ``(batch, length, width)``, or ``(batch, width)``: taken as they are.
        state_T: teacher states, likewise; their width may differ, so no projection is needed.
        mask: ``(batch, length)``, zero where a position does not count; None: all count. A row without any kept
            position does not count.

    Returns:
        Scalar mean over the pairs of kept rows, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Park et al., "Relational Knowledge Distillation", 2019, arXiv:1904.05068, section 3.2.1.
    """
    student, teacher, rows = both_pooled(state_S, state_T, mask)
    pairs = None if rows is None else pair_weights(rows)
    gaps = F.smooth_l1_loss(_relative_distances(student, pairs), _relative_distances(teacher, pairs), reduction="none")
    return weighted_mean(gaps, pairs)


def _angles(vectors: Tensor) -> Tensor:
    """Return ``(batch, batch, batch)``: at row j (first), the cosine of the angle between rows i and k."""
    directions = unit(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return product(directions, directions.transpose(1, 2))


@MATCH_LOSS_MAP.add("rkd_angle")
@averaged_over("batch")
@student_width("any")
@teacher_form(POOLED)
def rkd_angle_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Huber distance between the angles that triples of rows form (relational knowledge distillation).

    .. math::
        L = \frac1{B^3} \sum_{i,j,k} h\left( \cos\angle s_i s_j s_k - \cos\angle t_i t_j t_k \right), \qquad
        \cos\angle s_i s_j s_k =
        \frac{(s_i - s_j) \cdot (s_k - s_j)}{\lVert s_i - s_j \rVert \lVert s_k - s_j \rVert}

    with :math:`h` as in :func:`rkd_distance_loss` and :math:`s_b` the mean of the row's kept positions. Where two rows
    of a triple are the same the cosine is 0, or 1 for i = k; these count in the mean, as in the authors' code. Takes
    memory for :math:`B^3` numbers.

    Args:
        state_S: student states, ``(batch, length, width)``, or ``(batch, width)``: taken as they are.
        state_T: teacher states, likewise; their width may differ, so no projection is needed.
        mask: ``(batch, length)``, zero where a position does not count; None: all count. A row without any kept
            position does not count.

    Returns:
        Scalar mean over the triples of kept rows, float32 or wider; 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Park et al., "Relational Knowledge Distillation", 2019, arXiv:1904.05068, section 3.2.2.
    """
    student, teacher, rows = both_pooled(state_S, state_T, mask)
    triples = None if rows is None else rows[:, None, None] * pair_weights(rows)
    gaps = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
    return weighted_mean(gaps, triples)


def _centred(vectors: Tensor, weight: Tensor | None) -> Tensor:
    """Return vectors less their mean, times the roots of their weights, scaled to the Frobenius norm 1."""
    if weight is None:
        moved = vectors - vectors.mean(dim=0)
    else:
        mean = (vectors * weight.unsqueeze(-1)).sum(dim=0) / above_zero(weight.sum())
        moved = (vectors - mean) * weight.sqrt().unsqueeze(-1)
    return moved / above_zero(torch.linalg.vector_norm(moved))


def linear_cka(first: Tensor, second: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Return how alike two representations of the same items are, whatever their rotation and scale.

    .. math:: \frac{\lVert X^\top Y \rVert_F^2}{\lVert X^\top X \rVert_F \lVert Y^\top Y \rVert_F}

    of the centred :math:`X` and :math:`Y`.

    Args:
        first: ``(items, width)``, floating, finite.
        second: ``(items, other width)``.
        weight: ``(items,)``, how much each item counts; None: all the same.

    Returns:
        Scalar from 0 to 1; 0 where all items of one side are the same.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414, section 3.
    """
    x, y = _centred(first, weight), _centred(second, weight)
    norms = [torch.linalg.vector_norm(product(left.transpose(0, 1), left)) for left in (x, y)]
    return product(x.transpose(0, 1), y).square().sum() / above_zero(norms[0] * norms[1])


@MATCH_LOSS_MAP.add("cka")
@averaged_over("batch")
@student_width("any")
def cka_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""One minus the linear centred kernel alignment of the states, the positions of all rows taken together.

    .. math::
        L = 1 - \frac{\lVert S^\top T \rVert_F^2}{\lVert S^\top S \rVert_F \lVert T^\top T \rVert_F}

    with the kept positions' states, less their mean, as the rows of :math:`S` and :math:`T`. It does not change when
    either side is rotated or scaled.

    Args:
        state_S: student states, ``(batch, length, width)``, or ``(batch, width)``.
        state_T: teacher states of the same positions; their width may differ, so no projection is needed.
        mask: ``(batch, length)``, zero where a position does not count; None: all count.

    Returns:
        Scalar from 0 to 1, float32 or wider; 1 where all states of one side are the same, 0 where no position is kept.

    Raises:
        TypeError: if a side is no tensor.
        ValueError: if shapes do not fit.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414, section 3;
        as a loss Saha et al., "Distilling Representational Similarity using Centered Kernel Alignment", BMVC 2022.
    """
    values_S, weight = _weighted(state_S, mask, "student")
    values_T, _ = _weighted(state_T, mask, "teacher")
    _same_batch(state_S, state_T, positions_too=True)
    student, teacher = full_precision(values_S, values_T)
    weight = None if weight is None else weight.flatten().to(student.dtype)
    alignment = linear_cka(student.flatten(0, -2), teacher.flatten(0, -2), weight)
    return 1.0 - alignment if weight is None else (1.0 - alignment) * (weight.sum() > 0)
