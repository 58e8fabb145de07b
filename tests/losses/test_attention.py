"""Losses between attention scores: against loops over heads and pairs of positions, and TextBrewer's numbers."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import att_ce_loss, att_ce_mean_loss, att_mse_loss, att_mse_sum_loss

SQUARED = [att_mse_loss, att_mse_sum_loss]
CROSS_ENTROPY = [att_ce_loss, att_ce_mean_loss]
SIGNED = wave(3, 2, 4, 4), wave(3, 2, 4, 4, phase=1.0)
POSITIVE = SIGNED[0] + 2.5, SIGNED[1] + 2.5
MASKED_COLUMNS = torch.where(MASK.bool(), 0.0, -10000.0).double()[:, None, None, :]
USUAL = SIGNED[0] + MASKED_COLUMNS, SIGNED[1] + MASKED_COLUMNS
INF = math.inf


def heads_of(loss, scores):
    """The scores of each head as nested lists; of the one head that the loss makes of them."""
    if loss is att_mse_sum_loss:
        return scores.sum(dim=1, keepdim=True).tolist()
    return (scores.mean(dim=1, keepdim=True) if loss is att_ce_mean_loss else scores).tolist()


def log_softmax(scores):
    total = math.log(sum(math.exp(score - max(scores)) for score in scores))
    return [score - max(scores) - total for score in scores]


def loop_loss(loss, attention_S, attention_T, mask):
    """Head by head, row by row, column by column; without a mask, TextBrewer's rule for scores of -0.001 and below."""
    total = count = 0.0
    for b, (heads_S, heads_T) in enumerate(zip(heads_of(loss, attention_S), heads_of(loss, attention_T), strict=True)):
        kept = [j for j in range(len(heads_S[0])) if mask is None or mask[b, j]]
        for rows_S, rows_T in zip(heads_S, heads_T, strict=True):
            for i in kept:
                s, t = [rows_S[i][j] for j in kept], [rows_T[i][j] for j in kept]
                if loss in SQUARED:
                    if mask is None:
                        s, t = ([0.0 if score <= -1e-3 else score for score in row] for row in (s, t))
                    total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True))
                    count += len(kept)
                else:
                    terms = zip(t, log_softmax(t), log_softmax(s), strict=True)
                    total -= sum(math.exp(p) * q for score, p, q in terms if mask is not None or score > -1e-3)
                    count += 1
    return total / count


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("scores", [SIGNED, POSITIVE, USUAL], ids=["signed", "positive", "-10000"])
def test_is_the_loop_over_heads_rows_and_columns(loss, scores, mask):
    student, teacher = scores
    assert loss(student, teacher, mask).item() == pytest.approx(loop_loss(loss, student, teacher, mask), rel=1e-10)


# Printed by TextBrewer 0.2.1.post1 for the same inputs.
PUBLISHED = [
    (att_mse_loss, POSITIVE, None, 1.73939125605),
    (att_mse_loss, SIGNED, None, 0.843155750528),
    (att_mse_loss, USUAL, MASK, 1.6600961838),
    (att_mse_sum_loss, POSITIVE, None, 3.44170023378),
    (att_mse_sum_loss, SIGNED, None, 1.533784733),
    (att_mse_sum_loss, USUAL, MASK, 3.2605515572),
    (att_ce_loss, POSITIVE, None, 1.50745278834),
    (att_ce_loss, SIGNED, None, 1.18069820121),
    (att_ce_loss, USUAL, MASK, 1.21430835306),
    (att_ce_mean_loss, POSITIVE, None, 1.30560587148),
    (att_ce_mean_loss, SIGNED, None, 0.87717731599),
    (att_ce_mean_loss, USUAL, MASK, 1.16635145998),
]


@pytest.mark.parametrize(("loss", "scores", "mask", "published"), PUBLISHED)
def test_is_textbrewers_number(loss, scores, mask, published):
    assert loss(*scores, mask).item() == pytest.approx(published, rel=1e-10)


@pytest.mark.parametrize("loss", CROSS_ENTROPY)
def test_masked_columns_do_not_leak_into_the_softmax(loss):
    """Models that return probabilities, or whose scores are not masked, have ordinary numbers in masked columns."""
    student, teacher = SIGNED
    expected = loss(*USUAL, MASK).item()
    for content in (0.0, 50.0, -50.0):
        spoilt_S = student.masked_fill(MASKED_COLUMNS < 0, content)
        spoilt_T = teacher.masked_fill(MASKED_COLUMNS < 0, -content)
        assert loss(spoilt_S, spoilt_T, MASK).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
@pytest.mark.parametrize("mask", [None, MASK])
def test_scores_of_minus_infinity_add_nothing(loss, mask):
    """Causal attention: -inf above the diagonal is the same as a score so low that its probability is 0."""
    future = torch.ones(4, 4).triu(1).bool()
    infinite = [scores.masked_fill(future, -INF).requires_grad_() for scores in POSITIVE]
    value = loss(*infinite, mask)
    value.backward()
    expected = loss(*(scores.masked_fill(future, -1e5) for scores in POSITIVE), mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for leaf in infinite:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[..., future].abs().max().item() == 0.0


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
@pytest.mark.parametrize("mask", [None, MASK])
def test_minus_infinity_on_one_side_only_stays_finite(loss, mask):
    student, teacher = (scores.clone() for scores in POSITIVE)
    student[:, :, 1, 2], teacher[:, :, 2, 1] = -INF, -INF
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", CROSS_ENTROPY)
@pytest.mark.parametrize(("mask", "columns", "count"), [(None, 4, 12), (MASK, 3, 9)])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_row_that_attends_to_nothing_is_worth_zero(loss, mask, columns, count, side):
    student, teacher = (scores.clone() for scores in POSITIVE)
    rows = zip(heads_of(loss, student)[0], heads_of(loss, teacher)[0], strict=True)
    logarithms = [(log_softmax(s[1][:columns]), log_softmax(t[1][:columns])) for s, t in rows]
    removed = sum(-sum(math.exp(b) * a for a, b in zip(q, p, strict=True)) for q, p in logarithms) / len(logarithms)
    expected = loop_loss(loss, student, teacher, mask) - removed / count
    if side != "teacher":
        student[0, :, 1] = -INF
    if side != "student":
        teacher[0, :, 1] = -INF
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", CROSS_ENTROPY)
def test_a_masked_score_next_to_a_huge_one_has_finite_gradients(loss):
    student, teacher = (scores.float().requires_grad_() for scores in POSITIVE)
    huge = torch.zeros(3, 2, 4, 4).index_fill(3, torch.tensor([0]), 1e38)
    loss(student + huge, teacher, MASK).backward()
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()


@pytest.mark.parametrize("loss", [att_mse_sum_loss, att_ce_mean_loss])
@pytest.mark.parametrize("mask", [None, MASK])
def test_numbers_of_heads_may_differ_where_heads_are_merged(loss, mask):
    student, teacher = SIGNED[0], wave(3, 5, 4, 4, phase=2.0)
    expected = loop_loss(loss, student, teacher, mask)
    assert loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-10)
    merge = torch.sum if loss is att_mse_sum_loss else torch.mean
    assert loss(merge(student, 1), merge(teacher, 1), mask).item() == pytest.approx(expected, rel=1e-10)
    assert loss(student, merge(teacher, 1), mask).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [att_mse_loss, att_ce_loss])
@pytest.mark.parametrize("mask", [None, MASK])
def test_scores_without_heads_are_those_of_one_head(loss, mask):
    student, teacher = SIGNED[0][:, :1], SIGNED[1][:, :1]
    assert loss(student[:, 0], teacher[:, 0], mask).item() == pytest.approx(loss(student, teacher, mask).item())


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
def test_fractions_in_the_mask_weigh_rows_and_columns(loss):
    student, teacher = POSITIVE
    weights = wave(3, 4, phase=0.5).abs() + 0.1
    total = count = 0.0
    for b, (heads_S, heads_T) in enumerate(zip(heads_of(loss, student), heads_of(loss, teacher), strict=True)):
        m = weights[b].tolist()
        for rows_S, rows_T in zip(heads_S, heads_T, strict=True):
            for i in range(4):
                q, p = log_softmax(rows_S[i]), log_softmax(rows_T[i])
                for j in range(4):
                    if loss in SQUARED:
                        total += m[i] * m[j] * (rows_S[i][j] - rows_T[i][j]) ** 2
                        count += m[i] * m[j]
                    else:
                        total -= m[i] * m[j] * math.exp(p[j]) * q[j]
                        count += m[i] / 4
    assert loss(student, teacher, weights).item() == pytest.approx(total / count, rel=1e-10)


@pytest.mark.parametrize(("loss", "other"), [(att_mse_loss, "attention_mse_sum"), (att_ce_loss, "attention_ce_mean")])
def test_different_numbers_of_heads_name_the_other_loss(loss, other):
    with pytest.raises(ValueError, match=f"use '{other}' where the numbers of heads differ"):
        loss(SIGNED[0], wave(3, 5, 4, 4))


@pytest.mark.parametrize("loss", [att_mse_sum_loss, att_ce_mean_loss])
def test_different_lengths_are_an_error(loss):
    with pytest.raises(ValueError, match=r"got \(3, 4, 4\) and \(3, 5, 5\); both models must read the same tokens"):
        loss(SIGNED[0], wave(3, 2, 5, 5))


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
def test_attention_between_two_sequences_takes_no_mask(loss):
    student, teacher = wave(3, 2, 5, 4), wave(3, 2, 5, 4, phase=1.0)
    assert loss(student, teacher).isfinite()
    with pytest.raises(ValueError, match="must be square where a mask is given"):
        loss(student, teacher, MASK)


@pytest.mark.parametrize("loss", SQUARED + CROSS_ENTROPY)
def test_refuses_scores_of_other_ranks_and_lists(loss):
    with pytest.raises(ValueError, match="attention scores must have the shape"):
        loss(wave(4, 4), wave(4, 4))
    with pytest.raises(TypeError, match="attention scores of the student must be one tensor, got list"):
        loss(list(SIGNED), list(SIGNED))
