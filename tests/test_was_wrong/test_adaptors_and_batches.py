"""Adaptors and batches"""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from .tiny import (
    batches,
    distiller,
    everything,
    loader,
    logits_only,
    make,
    pair,
    refused,
    sgd,
    soft_cross_entropy,
    watching,
    weights,
)

MATCH = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


def test_misspelt_key(tmp_path):
    """A misspelt key silently turns the KD loss off."""
    teacher, student = pair()

    def misspelt(batch, outputs):
        return {"logit": outputs["logits"], "losses": outputs["logits"].mean()}

    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, logits_only, misspelt, hard_label_weight=1)
    refused(
        lambda: trainer.train(sgd(student), loader(), num_epochs=1), "adaptor_S", "'logit'", "did you mean 'logits'"
    )


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller"])
def test_numbers_of_heads(kind, tmp_path):
    """Lists of logits of different length are silently cut."""
    teacher, student = pair()

    def two_heads(batch, outputs):
        return {"logits": [outputs["logits"], outputs["logits"]]}

    trainer = distiller(kind, tmp_path, teacher, student, two_heads, logits_only)
    refused(lambda: trainer.train(sgd(student), loader(), num_epochs=1), "logits", "heads", "1 and 2")


def test_one_mask_for_two_heads(tmp_path):
    """One mask with two 3-D heads fails.

    The loss of the first batch is compared with explicit loops over the kept positions.
    """
    teacher, student = pair()

    def two_heads(batch, outputs):
        return {"logits": [outputs["tags"], -outputs["tags"]], "logits_mask": batch["mask"]}

    (batch,) = batches(2, 2)
    with torch.no_grad():
        logits_S, logits_T = student(batch["x"])["tags"], teacher.eval()(batch["x"])["tags"]
    kept = batch["mask"].bool()
    expected = sum(soft_cross_entropy(sign * logits_S[kept], sign * logits_T[kept]) for sign in (1, -1))
    trainer = distiller(watching("GeneralDistiller"), tmp_path, teacher, student, two_heads)
    trainer.train(sgd(student), [batch], num_epochs=1)
    assert trainer.seen[0]["unweighted_kd_loss"] == pytest.approx(expected, rel=1e-5)


def shifted(logits, label):
    """One row with the label's and the largest number swapped; a negative label swaps nothing."""
    row = list(logits)
    if label >= 0:
        top = max(range(len(row)), key=row.__getitem__)
        row[top], row[label] = row[label], row[top]
    return row


@pytest.mark.parametrize("case", ["logits mask", "negative label"])
def test_probability_shift(case, tmp_path):
    """Probability shift with a logits mask or negative labels fails.

    The loss of the first batch is compared with explicit loops.
    """
    teacher, student = pair()
    (batch,) = batches(3, 3)
    by_position = case == "logits mask"
    batch["labels"] = torch.tensor([[0, 1, 2, -100]] * 3 if by_position else [1, -100, 2])
    head = "tags" if by_position else "logits"

    def adaptor(batch, outputs):
        mask = {"logits_mask": batch["mask"]} if by_position else {}
        return {"logits": outputs[head], "labels": batch["labels"], **mask}

    with torch.no_grad():
        logits_S, logits_T = student(batch["x"])[head], teacher.eval()(batch["x"])[head]
    kept = batch["mask"].bool() if by_position else torch.ones(3, dtype=torch.bool)
    pairs = zip(logits_T[kept].tolist(), batch["labels"][kept].tolist(), strict=True)
    target = torch.tensor([shifted(row, label) for row, label in pairs])
    trainer = distiller(
        watching("GeneralDistiller"), tmp_path, teacher, student, adaptor, probability_shift=True, temperature=1
    )
    trainer.train(sgd(student), [batch], num_epochs=1)
    expected = soft_cross_entropy(logits_S[kept], target, 1.0)
    assert trainer.seen[0]["unweighted_kd_loss"] == pytest.approx(expected, rel=1e-5)


def test_stored_logits_stay(tmp_path):
    """Probability shift edits the teacher's (cached) logits in place."""
    teacher, student = pair()
    items = []
    for batch in batches():
        with torch.no_grad():
            items.append({"teacher": batch, "student": batch, "teacher_cache": teacher.eval()(batch["x"])})
    before = [item["teacher_cache"]["logits"].clone() for item in items]

    def adaptor(batch, outputs):
        return {"logits": outputs["logits"], "labels": batch["labels"]}

    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, adaptor, probability_shift=True)
    trainer.train(sgd(student), items, num_epochs=1)
    changed = sum(
        not torch.equal(item["teacher_cache"]["logits"], old) for item, old in zip(items, before, strict=True)
    )
    assert changed == 0, f"the stored logits of {changed} of {len(items)} batches were changed"


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller"])
def test_empty_losses(kind, tmp_path):
    """`losses: []` crashes."""
    teacher, student = pair()
    before = weights(student)

    def adaptor(batch, outputs):
        return {"logits": outputs["logits"], "losses": []}

    distiller(kind, tmp_path, teacher, student, adaptor).train(sgd(student), loader(), num_epochs=1)
    assert not torch.equal(weights(student), before)


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "BasicTrainer"])
def test_bare_tensor(kind, tmp_path):
    """A bare tensor batch is star-unpacked."""
    teacher, student = pair()
    before = weights(student)

    def adaptor(batch, outputs):
        return {"logits": outputs["logits"], "losses": outputs["logits"].square()}

    trainer = distiller(kind, tmp_path, teacher, student, adaptor)
    trainer.train(sgd(student), [batch["x"] for batch in batches()], num_epochs=1)
    assert not torch.equal(weights(student), before)


Fields = namedtuple("Fields", ["x", "mask", "labels"])


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "BasicTrainer"])
def test_namedtuple(kind, tmp_path):
    """Namedtuples are destroyed."""
    teacher, student = pair()

    def adaptor(batch, outputs):
        return {"logits": outputs["logits"], "losses": nn.functional.cross_entropy(outputs["logits"], batch.labels)}

    trainer = distiller(kind, tmp_path, teacher, student, adaptor)
    trainer.train(sgd(student), [Fields(**batch) for batch in batches()], num_epochs=1)


class Recurrent(nn.Module):
    """A recurrent network over packed sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, packed):
        assert isinstance(packed, PackedSequence)
        return {"logits": self.head(self.body(packed)[1][0])}


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller"])
def test_packed_sequence(kind, tmp_path):
    """PackedSequence is destroyed."""
    torch.manual_seed(0)
    teacher, student = Recurrent(), Recurrent()
    items = [pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]) for _ in range(3)]
    before = weights(student)
    distiller(kind, tmp_path, teacher, student).train(sgd(student), items, num_epochs=1)
    assert not torch.equal(weights(student), before)


@pytest.mark.parametrize("missing", ["no key", "None", "empty", "tuple of None"])
def test_missing_feature(missing, tmp_path):
    """Requested features that are missing (transformers' sdpa attention returns none) give a bare IndexError."""
    teacher, student = pair()

    def adaptor(batch, outputs):
        values = {"None": None, "empty": (), "tuple of None": (None, None)}
        given = {} if missing == "no key" else {"attention": values[missing]}
        return {"logits": outputs["logits"], **given}

    match = {**MATCH, "feature": "attention", "loss": "attention_mse"}
    trainer = distiller(
        "GeneralDistiller", tmp_path, teacher, student, everything, adaptor, intermediate_matches=[match]
    )
    refused(lambda: trainer.train(sgd(student), loader(), num_epochs=1), "attention", "student", "eager")


def test_matches_of_basic(tmp_path):
    """Intermediate matches given to Basic are silently ignored."""
    teacher, student = pair()

    def train():
        trainer = distiller("BasicDistiller", tmp_path, teacher, student, everything, intermediate_matches=[MATCH])
        trainer.train(sgd(student), loader(), num_epochs=1)

    refused(train, "intermediate_matches", "GeneralDistiller")


def test_matches_of_multi_teacher(tmp_path):
    """Intermediate matches given to MultiTeacher are silently ignored.

    With the match alone (no weight on the KD loss) the student's first layer moves.
    """
    teacher, student = pair()
    before = student.first.weight.detach().clone()
    trainer = distiller(
        "MultiTeacherDistiller",
        tmp_path,
        [teacher, make(5)],
        student,
        everything,
        kd_loss_weight=0,
        intermediate_matches=[MATCH],
    )
    trainer.train(sgd(student), loader(), num_epochs=1)
    assert not torch.equal(student.first.weight, before), "the matched layer did not move"


def test_mask_of_each_teacher(tmp_path):
    """Only the first teacher's mask is used.

    The first teacher's mask picks the first two positions, the second's the last two. The student's movement is that
    of a distillation from the mean of the picked logits, written out by hand.
    """
    teachers, student = [make(1), make(5)], make(2)
    by_hand = make(2)
    (batch,) = batches(2, 2)
    first, last = torch.tensor([[1, 1, 0, 0]] * 2), torch.tensor([[0, 0, 1, 1]] * 2)

    def masked(mask):
        return lambda batch, outputs: {"logits": outputs["tags"], "logits_mask": mask}

    trainer = distiller(
        "MultiTeacherDistiller", tmp_path, teachers, student, [masked(first), masked(last)], masked(first)
    )
    trainer.train(sgd(student), [batch], num_epochs=1)
    with torch.no_grad():
        mean = (teachers[0](batch["x"])["tags"][:, :2] + teachers[1](batch["x"])["tags"][:, 2:]) / 2
    logits = by_hand(batch["x"])["tags"][:, :2]
    loss = -((mean / 4).softmax(-1) * (logits / 4).log_softmax(-1)).sum(-1).mean()
    loss.backward()
    with torch.no_grad():
        for value in by_hand.parameters():
            value -= 0.1 * value.grad
    difference = (weights(student) - weights(by_hand)).abs().max().item()
    assert difference < 1e-6, f"weights differ by {difference:.1e}"
