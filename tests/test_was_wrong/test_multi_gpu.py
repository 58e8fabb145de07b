"""Multi-GPU

On the CPU, where two processes stand for two GPUs. The original's DistributedDataParallel does not start there; but for
the test of just that, it is made to ignore the device numbers that it is given.
"""

import pytest
import torch
from torch import nn

from .launch import outcome
from .tiny import Net, distiller, loader, pair, refused, sgd, weights


@pytest.mark.distributed
def test_gloo():
    """Gloo/CPU DDP is impossible."""
    found = outcome("check_cpu")
    assert found == ["trained"] * 2, found[0]


@pytest.mark.distributed
def test_frozen_teacher():
    """A frozen teacher in DDP raises."""
    found = outcome("check_frozen_teacher")
    assert found == ["trained"] * 2, found[0]


@pytest.mark.distributed
def test_tasks():
    """Ranks can draw different tasks."""
    first, second = outcome("check_tasks")
    assert len(first) == 24, first  # each of 12 steps draws a task, and asks both its adaptors
    assert first == second, f"the ranks drew {first[::2]} and {second[::2]}"


@pytest.mark.distributed
def test_gradient_exchanges():
    """Every accumulation micro-batch all-reduces.

    Counted are the exchanges of gradients in two steps of four micro-batches.
    """
    counts = outcome("check_exchanges")
    assert counts == [2, 2], f"{counts[0]} exchanges in 2 steps"


def test_half_precision(tmp_path):
    """fp16 needs Apex.

    With a GPU a step is trained. Without one, where no fp16 is to be had, the error says so and names what there is.
    """
    teacher, student = pair()
    before = weights(student)

    def train():
        training = {"fp16": True, "device": "cuda" if torch.cuda.is_available() else "cpu"}
        distiller("GeneralDistiller", tmp_path, teacher, student, training=training).train(
            sgd(student), loader(), num_epochs=1
        )

    if torch.cuda.is_available():
        train()
        assert not torch.equal(weights(student).cpu(), before)
    else:
        refused(train, "GPU", "bf16")


@pytest.mark.filterwarnings("ignore:output_dir")  # the second training writes where the first did
def test_data_parallel_twice(tmp_path):
    """DataParallel twice gives unloadable keys."""
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, training={"data_parallel": True})
    for _ in range(2):
        trainer.train(sgd(student), loader(), num_epochs=1)
    state = torch.load(tmp_path / "gs4.pkl", weights_only=True)
    assert set(state) == set(Net().state_dict()), f"the file has {next(iter(state))}"
    assert not isinstance(trainer.model_S, nn.DataParallel)
