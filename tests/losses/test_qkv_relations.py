"""Divergences between attentions and between relations: loops over heads, rows and keys."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import att_ce_loss, attention_kl_loss, relation_kl_loss

SCORES_S, SCORES_T = wave(3, 2, 4, 4), wave(3, 2, 4, 4, phase=1.0)
STUDENT, TEACHER = wave(3, 2, 4, 6), wave(3, 2, 4, 9, phase=1.0)
HOLES = MASK * torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
masks = pytest.mark.parametrize("mask", [None, MASK, HOLES], ids=["none", "mask", "holes"])


def softmax(scores):
    top = max(scores)
    total = sum(math.exp(x - top) for x in scores)
    return [math.exp(x - top) / total for x in scores]


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def loop(scores_S, scores_T, mask, causal=False):
    """``scores(b, h, i, j)`` of each side; two heads or more by the lists' ``heads``."""
    heads = scores_S.heads
    total = count = 0.0
    for b in range(3):
        kept = [n for n in range(4) if mask is None or mask[b, n]]
        for h in range(heads):
            for i in kept:
                keys = [j for j in kept if not (causal and j > i)]
                q = softmax([scores_S(b, h, i, j) for j in keys])
                p = softmax([scores_T(b, h, i, j) for j in keys])
                total, count = total + kl(p, q), count + 1
    return total / count


class Scores:
    def __init__(self, tensor):
        self.values, self.heads = tensor.tolist(), tensor.shape[1]

    def __call__(self, b, h, i, j):
        return self.values[b][h][i][j]


class Relations:
    """Scaled products of positions, of the heads side by side and split into ``heads``."""

    def __init__(self, tensor, heads):
        self.heads = tensor.shape[1] if heads is None else heads
        batch, _, length, _ = tensor.shape
        self.rows = [[[x for head in tensor[b] for x in head[n].tolist()] for n in range(length)] for b in range(batch)]
        self.width = len(self.rows[0][0]) // self.heads

    def __call__(self, b, h, i, j):
        part = slice(h * self.width, (h + 1) * self.width)
        pairs = zip(self.rows[b][i][part], self.rows[b][j][part], strict=True)
        return sum(x * y for x, y in pairs) / math.sqrt(self.width)


@masks
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_compared_row_by_row(mask, causal):
    expected = loop(Scores(SCORES_S), Scores(SCORES_T), mask, causal)
    assert attention_kl_loss(SCORES_S, SCORES_T, mask, causal).item() == pytest.approx(expected, rel=1e-10)


def test_weights_of_positions_weigh_their_rows():
    weights = 0.5 + wave(3, 4).abs()
    rows = torch.stack([attention_rows(b, i) for b in range(3) for i in range(4)]).reshape(3, 4)
    expected = ((weights * rows).sum() / weights.sum()).item()
    assert attention_kl_loss(SCORES_S, SCORES_T, weights).item() == pytest.approx(expected, rel=1e-10)


def attention_rows(b, i):
    """The mean over the heads of one row's divergence."""
    found = [kl(softmax(SCORES_T[b, h, i].tolist()), softmax(SCORES_S[b, h, i].tolist())) for h in range(2)]
    return torch.tensor(sum(found) / 2, dtype=torch.float64)


@masks
def test_scores_of_minus_infinity_are_absent(mask):
    """As a causal model gives them; what only the teacher leaves out costs the student its share."""
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    causal_S, causal_T = (scores.masked_fill(later, -math.inf) for scores in (SCORES_S, SCORES_T))
    expected = attention_kl_loss(SCORES_S, SCORES_T, mask, True).item()
    assert attention_kl_loss(causal_S, causal_T, mask).item() == pytest.approx(expected, rel=1e-12)
    assert attention_kl_loss(causal_S, SCORES_T, mask).item() == pytest.approx(expected, rel=1e-12)
    total = count = 0.0
    for b in range(3):
        kept = [n for n in range(4) if mask is None or mask[b, n]]
        for h in range(2):
            for i in kept:
                p = softmax([causal_T[b, h, i, j].item() for j in kept])
                total += kl(p, softmax([SCORES_S[b, h, i, j].item() for j in kept]))
                count += 1
    assert attention_kl_loss(SCORES_S, causal_T, mask).item() == pytest.approx(total / count, rel=1e-10)


def test_is_the_cross_entropy_less_the_teachers_entropy():
    own = att_ce_loss(SCORES_T, SCORES_T, MASK)
    expected = (att_ce_loss(SCORES_S, SCORES_T, MASK) - own).item()
    assert attention_kl_loss(SCORES_S, SCORES_T, MASK).item() == pytest.approx(expected, rel=1e-10)
    assert attention_kl_loss(SCORES_T + wave(3, 2, 4, 1), SCORES_T, MASK).item() == pytest.approx(0.0, abs=1e-12)


@masks
@pytest.mark.parametrize("heads", [None, 1, 2, 3, 6])
def test_relations_are_compared_row_by_row(mask, heads):
    expected = loop(Relations(STUDENT, heads), Relations(TEACHER, heads), mask)
    assert relation_kl_loss(STUDENT, TEACHER, mask, heads).item() == pytest.approx(expected, rel=1e-10)


@masks
def test_numbers_of_heads_may_differ_where_relation_heads_are_named(mask):
    student = wave(3, 3, 4, 4)
    expected = loop(Relations(student, 6), Relations(TEACHER, 6), mask)
    assert relation_kl_loss(student, TEACHER, mask, 6).item() == pytest.approx(expected, rel=1e-10)
    # With as many relation heads as both have, naming them changes nothing.
    same = relation_kl_loss(STUDENT, TEACHER, mask, 2).item()
    assert same == pytest.approx(relation_kl_loss(STUDENT, TEACHER, mask).item(), rel=1e-12)


def test_a_rotation_of_each_head_changes_nothing():
    turn = torch.linalg.qr(wave(6, 6))[0]
    expected = relation_kl_loss(STUDENT, TEACHER, MASK).item()
    assert relation_kl_loss(STUDENT @ turn, TEACHER, MASK).item() == pytest.approx(expected, rel=1e-10)


def test_relations_are_not_rounded_by_autocast():
    student, teacher = STUDENT.float(), TEACHER.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = relation_kl_loss(student, teacher, MASK)
    assert value.item() == pytest.approx(relation_kl_loss(STUDENT, TEACHER, MASK).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "heads", "error", "message"),
    [
        (STUDENT, TEACHER[:, :1], None, ValueError, r"as many heads, got .*\['relation_kl', \{'heads': 12\}\]"),
        (STUDENT, TEACHER, 4, ValueError, r"heads must divide the teacher's width 18 \(2 heads of 9\), got 4"),
        (STUDENT, TEACHER, 9, ValueError, r"heads must divide the student's width 12 \(2 heads of 6\), got 9"),
        (STUDENT, TEACHER, 0, ValueError, "heads must be at least 1"),
        (STUDENT, TEACHER[:, :, :3], None, ValueError, "the same batch and length"),
        (STUDENT[0], TEACHER, None, ValueError, r'of the student must have the shape .*"query"'),
        ([STUDENT], TEACHER, None, TypeError, "feature of the student must be one tensor, got list"),
    ],
)
def test_relations_that_cannot_be_compared(student, teacher, heads, error, message):
    with pytest.raises(error, match=message):
        relation_kl_loss(student, teacher, None, heads)


def test_attention_of_other_heads_is_refused():
    with pytest.raises(ValueError, match="use 'relation_kl' with 'heads'"):
        attention_kl_loss(SCORES_S, SCORES_T[:, :1])
