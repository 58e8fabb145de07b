"""Loop"""

import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler

from .tiny import (
    Net,
    Stream,
    batches,
    counting,
    distiller,
    everything,
    loader,
    pair,
    refused,
    rows,
    saved,
    sgd,
    weights,
    within,
)

SINGLE = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "BasicTrainer"]


def with_loss(batch, outputs):
    return {"logits": outputs["logits"], "losses": nn.functional.cross_entropy(outputs["logits"], batch["labels"])}


@pytest.mark.parametrize("kind", SINGLE)
def test_last_window(kind, tmp_path):
    """The last partial accumulation window is dropped.

    Five batches in windows of two are three steps, and the last one sees the fifth batch.
    """
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, with_loss, training={"gradient_accumulation_steps": 2})
    optimizer = sgd(student)
    steps, before_last = counting(optimizer), []
    optimizer.register_step_pre_hook(lambda *ignored: before_last.append(weights(student)))
    trainer.train(optimizer, loader(10), num_epochs=1)
    assert len(steps) == 3, f"{len(steps)} steps"
    assert not torch.equal(weights(student), before_last[-1])
    assert saved(tmp_path) == [3]


@pytest.mark.parametrize("kind", SINGLE)
def test_window_longer_than_the_loader(kind, tmp_path):
    """Accumulation longer than the loader trains nothing and saves nothing, silently."""
    teacher, student = pair()
    before = weights(student)
    trainer = distiller(kind, tmp_path, teacher, student, with_loss, training={"gradient_accumulation_steps": 8})
    trainer.train(sgd(student), loader(8, 2), num_epochs=1)
    assert not torch.equal(weights(student), before), "the student was not trained"
    assert saved(tmp_path) == [1]


def test_stale_gradients(tmp_path):
    """Stale gradients enter the first step of num_steps mode."""
    results = []
    for stale in (False, True):
        teacher, student = pair()
        if stale:
            student(batches()[0]["x"])["logits"].sum().backward()
        trainer = distiller("GeneralDistiller", tmp_path / str(stale), teacher, student, training={"ckpt_steps": 1})
        trainer.train(sgd(student), loader(), num_steps=1)
        results.append(weights(student))
    assert torch.equal(*results), "the first step used the gradients that were there before"


@pytest.mark.parametrize("data", ["empty", "exhausted"])
def test_no_more_batches(data, tmp_path):
    """An empty or exhausted loader loops forever."""
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, training={"ckpt_steps": 100})
    items = Stream([]) if data == "empty" else (batch for batch in batches())
    with within(3):
        refused(lambda: trainer.train(sgd(student), items, num_steps=100), "dataloader", "empty")


@pytest.mark.parametrize("kind", [*SINGLE, "MultiTaskDistiller"])
def test_no_ckpt_steps(kind, tmp_path):
    """num_steps without ckpt_steps crashes."""
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, with_loss)
    data = {"task": loader()} if kind == "MultiTaskDistiller" else loader()
    arguments = {"num_epochs": None} if kind == "BasicTrainer" else {}
    trainer.train(sgd(student), data, num_steps=3, **arguments)
    assert saved(tmp_path) == [3]


def test_fraction_of_a_step(tmp_path):
    """Non-integer num_steps loses the final checkpoint.

    A number of steps that is not whole is refused.
    """
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, training={"ckpt_steps": 100})
    refused(lambda: trainer.train(sgd(student), loader(), num_steps=3.5), "num_steps", "whole", "3.5")


@pytest.mark.parametrize("kind", SINGLE)
def test_loader_without_length(kind, tmp_path):
    """A loader without `__len__` fails with num_epochs."""
    teacher, student = pair()
    trainer = distiller(kind, tmp_path, teacher, student, with_loss)
    optimizer = sgd(student)
    steps = counting(optimizer)
    trainer.train(optimizer, Stream(batches()), num_epochs=2)
    assert len(steps) == 2 * len(batches())
    assert saved(tmp_path)[-1] == len(steps)


@pytest.mark.filterwarnings("ignore:output_dir")  # the second training writes where the first did
def test_projections_twice(tmp_path):
    """Training twice registers projections twice."""
    teacher, student = pair()
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    trainer = distiller(
        "GeneralDistiller",
        tmp_path,
        teacher,
        student,
        everything,
        intermediate_matches=[{**match, "proj": ["linear", 4, 4]}],
    )
    optimizer = sgd(student)
    for _ in range(2):
        trainer.train(optimizer, loader(), num_epochs=1)
    sizes = [sum(value.numel() for value in group["params"]) for group in optimizer.param_groups]
    assert sizes == [weights(student).numel(), 4 * 4 + 4]


def test_scheduler_without_arguments(tmp_path):
    """scheduler_class without args crashes."""
    teacher, student = pair()
    optimizer = sgd(student, rate=0.3)
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student)
    trainer.train(optimizer, loader(), num_epochs=1, scheduler_class=torch.optim.lr_scheduler.ConstantLR)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # a third, for the first five steps


class CountReads(TorchDispatchMode):
    """Counts the numbers read from the device, each of which waits for it."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_device_reads(tmp_path, monkeypatch):
    """A device sync every step with logging off.

    Counted as numbers read from tensors between two batches, on a CPU that is treated as a GPU.
    """
    if "textbrewer.engine.runtime" in sys.modules:
        runtime = sys.modules["textbrewer.engine.runtime"].Runtime
        start = runtime.__init__

        def as_on_a_gpu(self, config):
            start(self, config)
            self.reads_are_free = False

        monkeypatch.setattr(runtime, "__init__", as_on_a_gpu)
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student)
    with CountReads() as counter:
        at_batch = []

        def note(batch):
            at_batch.append(counter.reads)
            return batch

        trainer.train(sgd(student), loader(16), num_epochs=1, batch_postprocessor=note)
    assert len(at_batch) == 8
    assert at_batch[-1] == at_batch[0], f"{at_batch[-1] - at_batch[0]} reads in 7 steps"


def test_resume(tmp_path):
    """No resume (student weights only).

    A run that stops in its first epoch and is resumed ends with the weights of one that did not stop.
    """

    def train(folder, stop_after=None, **arguments):
        teacher, student = pair(dropout=0.3)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        trainer = distiller("GeneralDistiller", folder, teacher, student, training={"ckpt_frequency": 2})

        def stop(model, step):
            if step == stop_after:
                raise KeyboardInterrupt

        torch.manual_seed(3)
        trainer.train(optimizer, loader(shuffle=True), num_epochs=2, callback=stop, **arguments)
        return weights(student)

    expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_after=2)
    assert torch.equal(train(tmp_path / "parts", resume_from="latest"), expected)


def test_clipped_projections(tmp_path):
    """Clipping leaves projections out."""
    teacher, student = pair()
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 100}
    trainer = distiller(
        "GeneralDistiller",
        tmp_path,
        teacher,
        student,
        everything,
        intermediate_matches=[{**match, "proj": ["linear", 4, 4]}],
    )
    optimizer, norms = sgd(student), []

    def note(*ignored):
        values = [value.grad for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        norms.append(torch.cat([value.flatten() for value in values]).norm().item())

    optimizer.register_step_pre_hook(note)
    trainer.train(optimizer, loader(), num_epochs=1, max_grad_norm=0.01)
    assert max(norms) == pytest.approx(0.01, rel=1e-3), f"gradients of norm {max(norms):.2g} after clipping to 0.01"


def compiled(model):
    return torch.compile(model, backend="eager")


def partly_compiled(model):
    model.second = compiled(model.second)
    return model


@pytest.mark.parametrize(
    "wrap",
    [compiled, partly_compiled, lambda model: nn.DataParallel(compiled(model))],
    ids=["compiled", "partly compiled", "compiled in DataParallel"],
)
def test_wrapped_student(wrap, tmp_path):
    """Compiled or wrapped students save unloadable keys."""
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, wrap(student))
    trainer.train(sgd(student), loader(), num_epochs=1)
    state = torch.load(tmp_path / "gs4.pkl", weights_only=True)
    missing = set(Net().state_dict()) - set(state)
    assert not missing, f"no {sorted(missing)[0]} in the file"
    Net().load_state_dict(state)


@pytest.mark.parametrize("kind", [*SINGLE, "MultiTaskDistiller"])
def test_with(kind, tmp_path):
    """`with distiller as d` gives None."""
    trainer = distiller(kind, tmp_path, *pair())
    with trainer as entered:
        assert entered is trainer, f"it gives {entered}"


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller"])
def test_without_with(kind, tmp_path):
    """Without `with`, the teacher trains in train mode (dropout on)."""
    teacher, student = pair(dropout=0.5)
    trainer = distiller(kind, tmp_path, teacher, student, training={"ckpt_steps": 4})
    data = {"task": loader()} if kind == "MultiTaskDistiller" else loader()
    trainer.train(sgd(student), data, num_steps=4)
    assert teacher.calls == [False] * 4, "the teacher's dropout was on"


def test_sampler_epochs(tmp_path):
    """num_steps mode never reseeds the sampler."""
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, training={"ckpt_steps": 12})
    data = rows(8)
    order = []
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
    trainer.train(
        sgd(student),
        DataLoader(data, batch_size=2, sampler=sampler),
        num_steps=12,
        batch_postprocessor=lambda batch: order.append(tuple(batch["x"].flatten().tolist())) or batch,
    )
    passes = [tuple(order[start : start + 4]) for start in (0, 4, 8)]
    assert len(set(passes)) == 3, "the passes have the same order"
