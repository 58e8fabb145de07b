"""What each of two processes does, joined by gloo on the CPU: trains, and writes down what it saw."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from .tiny import distiller, loader, logits_only, pair, sgd

exchanged = []


def exchange(state, bucket):
    """Average the gradients, as DistributedDataParallel does by itself, and count."""
    exchanged.append(1)
    world = distributed.get_world_size()
    return (
        distributed.all_reduce(bucket.buffer() / world, async_op=True).get_future().then(lambda done: done.value()[0])
    )


class OnCpu(DistributedDataParallel):
    """DistributedDataParallel that ignores device numbers, so that the original gets beyond them without GPUs."""

    def __init__(self, module, device_ids=None, output_device=None, **settings):
        super().__init__(module, **settings)
        if any(value.requires_grad for value in module.parameters()):
            self.register_comm_hook(None, exchange)


def prepare(folder, rank, **training):
    teacher, student = pair()
    training = {"local_rank": rank, "ckpt_steps": 2, **training}
    trainer = distiller("GeneralDistiller", folder, teacher, student, training=training)
    data = loader(32, 2, sampler=torch.utils.data.DistributedSampler(range(32)))
    return trainer, student, data


def check_cpu(folder, rank):
    trainer, student, data = prepare(folder, rank)
    trainer.train(sgd(student), data, num_steps=2)
    return "trained"


def check_frozen_teacher(folder, rank):
    trainer, student, data = prepare(folder, rank)
    trainer.model_T.requires_grad_(False)
    trainer.train(sgd(student), data, num_steps=2)
    return "trained"


def check_exchanges(folder, rank):
    exchanged.clear()
    trainer, student, data = prepare(folder, rank, gradient_accumulation_steps=4)
    trainer.train(sgd(student), data, num_steps=2)
    return len(exchanged)


def check_tasks(folder, rank):
    drawn = []

    def adaptor_of(task):
        def adaptor(batch, outputs):
            drawn.append(task)
            return logits_only(batch, outputs)

        return adaptor

    teacher, student = pair()
    adaptors = {task: adaptor_of(task) for task in "ab"}
    training = {"local_rank": rank, "ckpt_steps": 12}
    trainer = distiller(
        "MultiTaskDistiller", folder, {"a": teacher, "b": teacher}, student, adaptors, adaptors, training=training
    )
    np.random.seed(rank)
    trainer.train(sgd(student), {task: prepare(folder, rank)[2] for task in "ab"}, num_steps=12)
    return "".join(drawn)


def main():
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    for check in (check_cpu, check_frozen_teacher, check_exchanges, check_tasks):
        if check is check_frozen_teacher:
            torch.nn.parallel.DistributedDataParallel = OnCpu
        try:
            found[check.__name__] = check(folder / "saved", rank)
        except Exception as error:  # the test says what it is
            found[check.__name__] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
