"""Caching"""

import collections
import gc
import weakref

import pytest
import torch

import textbrewer
from textbrewer import DistillationConfig

from .tiny import (
    batches,
    counting,
    distiller,
    everything,
    loader,
    logits_only,
    pair,
    refused,
    sgd,
    soft_cross_entropy,
    watching,
    weights,
)


@pytest.mark.parametrize("kind", ["GeneralDistiller", "MultiTaskDistiller"])
def test_caching_is_done(kind, tmp_path):
    """General and MultiTask turn it off silently.

    In three passes over four batches the teacher runs four times.
    """
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, is_caching_logits=True, training={"ckpt_steps": 12})
    if kind == "MultiTaskDistiller":
        trainer.train(sgd(student), {"task": loader(8, 2)}, num_steps=12)
    else:
        trainer.train(sgd(student), loader(8, 2), num_epochs=3)
    assert len(teacher.calls) == 4, f"the teacher ran {len(teacher.calls)} times over 4 batches"


@pytest.mark.parametrize("kind", ["GeneralDistiller", "MultiTaskDistiller"])
def test_config_keeps_caching(kind, tmp_path):
    """General and MultiTask turn it off in the user's config."""
    config = DistillationConfig(is_caching_logits=True)
    teacher, student = pair()
    train_config = textbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu")
    by_task = kind == "MultiTaskDistiller"
    named = [{"task": item} if by_task else item for item in (teacher, logits_only, logits_only)]
    getattr(textbrewer, kind)(train_config, config, named[0], student, *named[1:])
    assert config.is_caching_logits is True, f"is_caching_logits is {config.is_caching_logits} afterwards"


def test_truthy_caching(tmp_path):
    """Truthy non-bool trains on nothing."""
    teacher, student = pair()

    def train():
        trainer = distiller("BasicDistiller", tmp_path, teacher, student, is_caching_logits=1)
        trainer.train(sgd(student), loader(), num_epochs=1)

    refused(train, "is_caching_logits", "True or False", "1")


@pytest.mark.filterwarnings("ignore:output_dir")  # the second training writes where the first did
@pytest.mark.parametrize("kind", ["BasicDistiller", "MultiTeacherDistiller"])
def test_second_train(kind, tmp_path):
    """The cache grows at a second train."""
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, is_caching_logits=True)
    done = []
    for _ in range(2):
        optimizer = sgd(student)
        steps = counting(optimizer)
        trainer.train(optimizer, loader(8, 2), num_epochs=1)
        done.append(len(steps))
    assert done == [4, 4], f"{done[1]} steps in the second epoch over 4 batches"


@pytest.mark.parametrize("kind", ["BasicDistiller", "MultiTeacherDistiller"])
def test_batches_by_side(kind, tmp_path):
    """Teacher/student batches are lost."""
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, is_caching_logits=True)
    items = [{"teacher": batch, "student": {**batch, "x": -batch["x"]}} for batch in batches()]
    before = weights(student)
    trainer.train(sgd(student), items, num_epochs=1)
    assert not torch.equal(weights(student), before)


def test_teacher_mask(tmp_path):
    """Teacher masks are lost.

    The teacher's mask picks the last two positions, the student's the first two; the loss of the first batch is
    compared with explicit loops.
    """
    teacher, student = pair()
    (batch,) = batches(2, 2)
    first, last = torch.tensor([[1, 1, 0, 0]] * 2), torch.tensor([[0, 0, 1, 1]] * 2)
    trainer = distiller(
        watching("BasicDistiller"),
        tmp_path,
        teacher,
        student,
        lambda batch, outputs: {"logits": outputs["tags"], "logits_mask": last},
        lambda batch, outputs: {"logits": outputs["tags"], "logits_mask": first},
        is_caching_logits=True,
    )
    with torch.no_grad():
        tags_S, tags_T = student(batch["x"])["tags"], teacher.eval()(batch["x"])["tags"]
    expected = soft_cross_entropy(tags_S[:, :2].flatten(0, 1), tags_T[:, 2:].flatten(0, 1))
    trainer.train(sgd(student), [batch], num_epochs=1)
    found = trainer.seen[0]["unweighted_kd_loss"]
    assert found == pytest.approx(expected, rel=1e-5), f"loss {found:.5f} instead of {expected:.5f}"


class Recorded(torch.Tensor):
    """A tensor whose copies on the device are remembered, as long as they live."""

    copies = []

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_subclass(cls, tensor)

    def to(self, *arguments, **settings):
        copy = self.as_subclass(torch.Tensor).clone()
        Recorded.copies.append(weakref.ref(copy))
        return copy


def test_cached_batches_leave_the_device(tmp_path):
    """Cached batches stay on the GPU.

    Simulated: of every tensor moved to the device, the test knows whether it is still alive.
    """
    teacher, student = pair()
    items = [{"x": Recorded(batch["x"])} for batch in batches(16, 2)]
    alive = []

    def count(batch, outputs):
        gc.collect()
        alive.append(sum(copy() is not None for copy in Recorded.copies))
        return logits_only(batch, outputs)

    trainer = distiller("BasicDistiller", tmp_path, teacher, student, logits_only, count, is_caching_logits=True)
    Recorded.copies.clear()
    trainer.train(sgd(student), items, num_epochs=1)
    assert len(alive) == 8
    assert max(alive) <= 2, f"{max(alive)} of 8 batches on the device at once"


class Encoding(collections.UserDict):
    """A batch as tokenizers of transformers return it: like a dict, but not one."""

    def to(self, device, **settings):
        return Encoding({name: value.to(device) for name, value in self.items()})


@pytest.mark.parametrize("caching", [False, True], ids=["not cached", "cached"])
def test_batch_encoding(caching, tmp_path):
    """BatchEncoding batches fail in multi-teacher."""
    teacher, student = pair()
    trainer = distiller("MultiTeacherDistiller", tmp_path, teacher, student, everything, is_caching_logits=caching)
    before = weights(student)
    trainer.train(sgd(student), [Encoding(batch) for batch in batches()], num_epochs=1)
    assert not torch.equal(weights(student), before)
