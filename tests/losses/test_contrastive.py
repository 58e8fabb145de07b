"""The in-batch contrast: loops over rows, and the bounds of its value."""

import math

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer.losses import crd_loss

STUDENT, TEACHER = wave(3, 4, 6), wave(3, 4, 6, phase=1.0)


def loop(student, teacher, rows, tau):
    """From lists of vectors, of the kept rows alone."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    total = 0.0
    for b in rows:
        own = math.exp(cosine(student[b], teacher[b]) / tau)
        total -= math.log(own / sum(math.exp(cosine(student[b], teacher[j]) / tau) for j in rows))
        total -= math.log(own / sum(math.exp(cosine(student[j], teacher[b]) / tau) for j in rows))
    return total / (2 * len(rows))


def pooled(states, mask):
    kept = torch.ones(3, 4) if mask is None else mask
    return [
        [
            sum(kept[b, n].item() * states[b, n, k].item() for n in range(4)) / max(kept[b].sum().item(), 1)
            for k in range(states.shape[2])
        ]
        for b in range(3)
    ]


@pytest.mark.parametrize("tau", [0.07, 1.0])
@pytest.mark.parametrize(
    ("mask", "rows"), [(None, [0, 1, 2]), (MASK, [0, 1, 2]), (MASK * torch.tensor([[1], [0], [1]]), [0, 2])]
)
def test_is_the_loop_over_rows(tau, mask, rows):
    expected = loop(pooled(STUDENT, mask), pooled(TEACHER, mask), rows, tau)
    assert crd_loss(STUDENT, TEACHER, mask, tau).item() == pytest.approx(expected, rel=1e-9)


def test_the_published_temperature_is_the_default():
    assert crd_loss(STUDENT, TEACHER).item() == crd_loss(STUDENT, TEACHER, None, 0.07).item()


def test_values_at_the_ends():
    """Rows at right angles: the student's own teacher stands out as far as the temperature lets it."""
    eye = torch.eye(5, dtype=torch.float64)
    assert crd_loss(3 * eye, 2 * eye, None, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))
    assert crd_loss(torch.ones(5, 5), torch.ones(5, 5)).item() == pytest.approx(math.log(5))
    assert crd_loss(STUDENT[:1], TEACHER[:1]).item() == 0.0


def test_each_row_is_drawn_to_its_own_teacher():
    student = wave(4, 6, phase=2.0).requires_grad_()
    teacher = wave(4, 6)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        crd_loss(student, teacher).backward()
        optimizer.step()
    cosines = torch.nn.functional.cosine_similarity(student.detach()[:, None], teacher[None], dim=-1)
    assert cosines.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"'proj': \['linear', 6, 8\]"):
        crd_loss(STUDENT, wave(3, 4, 8))
    with pytest.raises(ValueError, match="contrast_temperature must be greater than 0, got 0"):
        crd_loss(STUDENT, TEACHER, contrast_temperature=0)
