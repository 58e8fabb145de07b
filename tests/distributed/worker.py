"""What each of two processes does in the tests of distributed training; the tests do the same alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from tests.conftest import Encoder, Rows, adaptor, make_config, make_loader, seed_all
from tests.engine.runs import PROJECTED, SCENARIOS, Run, TwoHeads, checkpoints, distil, equal, other_head, weights
from textbrewer import BasicTrainer, DistillationConfig, MultiTaskDistiller, MultiTeacherDistiller, engine
from textbrewer.distillers import multi_task

MATCHES = {"intermediate_matches": PROJECTED, "hard_label_weight": 1}
EPOCHS = {"num_epochs": 2}


# The same student, by two processes or by one with batches of twice the size (``times``: 1 or 2)


def general(folder: Path, times: int) -> Tensor:
    return weights(distil(folder, make_loader(24, 4 * times, full=True), EPOCHS, distill=MATCHES))


def clipped(folder: Path, times: int) -> Tensor:
    loader = make_loader(24, 4 * times, full=True)
    return weights(distil(folder, loader, EPOCHS, distill=MATCHES, train={"max_grad_norm": 0.2}))


def shuffled(folder: Path, times: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    loader = make_loader(24, 4 * times, full=True, shuffle=True, generator=generator)
    return weights(distil(folder, loader, EPOCHS, distill=MATCHES))


def accumulated(folder: Path, times: int) -> Tensor:
    """In two processes also over two micro-batches; the last window of an epoch has only one."""
    size, accumulation = (2, 2) if times == 1 else (8, 1)
    loader = make_loader(20, size, full=True)
    return weights(distil(folder, loader, EPOCHS, distill=MATCHES, gradient_accumulation_steps=accumulation))


def exact(folder: Path, times: int) -> Tensor:
    """Rows, positions and labels that differ between micro-batches and processes."""
    size, accumulation = (2, 2) if times == 1 else (8, 1)
    return weights(
        distil(
            folder,
            make_loader(20, size, by_token=True),
            EPOCHS,
            distill=MATCHES,
            student=Encoder(dropout=0.0, by_token=True, seed=1),
            teacher=Encoder(width=48, by_token=True, seed=2),
            gradient_accumulation_steps=accumulation,
            accumulation_weighting="positions",
        )
    )


def cached(folder: Path, times: int) -> Tensor:
    loader = make_loader(24, 4 * times, full=True)
    return weights(distil(folder, loader, {"num_epochs": 3}, distill={**MATCHES, "is_caching_logits": True}))


def steps(folder: Path, times: int) -> Tensor:
    return weights(distil(folder, make_loader(24, 4 * times, full=True), {"num_steps": 7}, distill=MATCHES))


def multi_teacher(folder: Path, times: int) -> Tensor:
    student, teachers = Encoder(dropout=0.0, seed=1), [Encoder(seed=2), Encoder(width=48, seed=3)]
    distiller = MultiTeacherDistiller(
        make_config(folder), DistillationConfig(hard_label_weight=1), teachers, student, adaptor, adaptor
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.train(optimizer, make_loader(24, 4 * times, full=True), num_epochs=2)
    return weights(distiller)


def _target(folder: Path, times: int, target: Any, **settings: Any) -> Tensor:
    """Two teachers, one of them with a projection, and what the target learns."""
    student, teachers = Encoder(dropout=0.0, seed=1), [Encoder(seed=2), Encoder(width=48, seed=3)]
    config = DistillationConfig(hard_label_weight=1, intermediate_matches=[{**PROJECTED[0], "teacher": 1}])
    seed_all(0)
    distiller = MultiTeacherDistiller(
        make_config(folder, **settings), config, teachers, student, adaptor, adaptor, target=target
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.train(optimizer, make_loader(24, 4 * times, full=True), num_epochs=2)
    learned = [] if distiller.learner is None else [item.detach().flatten() for item in distiller.learner.parameters()]
    return torch.cat([weights(distiller), *learned])


def sampled(folder: Path, times: int) -> Tensor:
    """One teacher a batch, the same on both processes; DDP wants a gradient for the projection to the other."""
    return _target(folder, times, ["sample", {"seed": 4}], find_unused_parameters=False)


def gated(folder: Path, times: int) -> Tensor:
    return _target(folder, times, ["gate", {"lr": 0.1, "size": 8}], find_unused_parameters=False)


def agreed(folder: Path, times: int) -> Tensor:
    """The weights follow from the gradients on both processes."""
    return _target(folder, times, "agree")


def uncertain(folder: Path, times: int) -> Tensor:
    """Also where DDP looks for parameters without a gradient."""
    return _target(folder, times, ["uncertainty", {"lr": 0.1}], find_unused_parameters=True)


def trainer(folder: Path, times: int) -> Tensor:
    model = Encoder(dropout=0.0, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BasicTrainer(make_config(folder), model, adaptor).train(
        optimizer, make_loader(24, 4 * times), num_epochs=2, max_grad_norm=0.5
    )
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def tasks(folder: Path, times: int, seed: int = 0, **settings: Any) -> Tensor:
    student = TwoHeads(seed=1)
    student.dropout.p = 0.0
    for layer in student.layers:
        layer.feed[-1].p = 0.0
    teachers = {"a": Encoder(seed=2), "b": Encoder(width=48, seed=3)}
    distiller = MultiTaskDistiller(
        make_config(folder),
        DistillationConfig(intermediate_matches=[PROJECTED[2]], **settings),
        teachers,
        student,
        {"a": adaptor, "b": adaptor},
        {"a": adaptor, "b": lambda batch, outputs: {**adaptor(batch, outputs), **other_head(batch, outputs)}},
    )
    loaders = {"a": make_loader(32, 4 * times, full=True), "b": make_loader(16, 4 * times, full=True, seed=4)}
    seed_all(seed)
    distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), loaders, num_steps=9)
    return weights(distiller)


def cached_tasks(folder: Path, times: int) -> Tensor:
    return tasks(folder, times, is_caching_logits=True)


class Permutation(Sampler):
    """What the processes of a shuffling ``DistributedSampler`` read together, each round's rows side by side."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def own_sampler(folder: Path, times: int) -> Tensor:
    """The user shards the data, as TextBrewer's scripts do."""
    rows = Rows(24, full=True)
    if times == 1:
        rank = int(os.environ["RANK"])
        sampler: Sampler = DistributedSampler(rows, num_replicas=2, rank=rank, shuffle=True, seed=0)
    else:
        sampler = Permutation(24)
    loader = DataLoader(rows, batch_size=4 * times, sampler=sampler)
    return weights(distil(folder, loader, {"num_epochs": 3}, distill=MATCHES))


class OwnShare(IterableDataset):
    """Every second group of four rows: those of this process, or all."""

    def __init__(self, count: int, rank: int | None) -> None:
        self.rows, self.rank = Rows(count, full=True), rank

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self.rows)):
            if self.rank is None or number // 4 % 2 == self.rank:
                yield self.rows[number]


def stream(folder: Path, times: int) -> Tensor:
    """No length: the end of a pass, within a window of two micro-batches, is a surprise."""
    rank = int(os.environ["RANK"]) if times == 1 else None
    loader = DataLoader(OwnShare(24, rank), batch_size=4 * times)
    return weights(distil(folder, loader, EPOCHS, distill=MATCHES, gradient_accumulation_steps=2))


SAME: dict[str, Callable[[Path, int], Tensor]] = {
    function.__name__: function
    for function in (
        general,
        clipped,
        shuffled,
        accumulated,
        exact,
        cached,
        steps,
        multi_teacher,
        sampled,
        gated,
        agreed,
        uncertain,
        trainer,
        tasks,
        cached_tasks,
        own_sampler,
        stream,
    )
}


def run_all(rank: int, folder: Path, names: list[str]) -> None:
    """Train each of the named students, one after the other in the same processes."""
    for name in names:
        torch.save(SAME[name](folder / name, 1), folder / f"{name}-{rank}.pt")


def start_group_myself(rank: int, folder: Path) -> None:
    """Start the processes as TextBrewer's scripts do, and without the launcher's variables."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    loader = DataLoader(
        Rows(24, full=True),
        batch_size=4,
        sampler=DistributedSampler(Rows(24), shuffle=False, num_replicas=2, rank=rank),
    )
    distiller = distil(folder / "out", loader, EPOCHS, distill=MATCHES, local_rank=rank)
    torch.save(weights(distiller), folder / f"{rank}.pt")
    assert torch.distributed.is_initialized()


# Resuming


def resume(rank: int, folder: Path, name: str) -> None:
    """Train to the end, resume from the middle with other seeds, and compare; each process has its own dropout."""
    whole = Run(name, folder / "whole", seed=0)
    seed_all(10 + rank)
    state = whole.train().state()
    found = checkpoints(folder / "whole")
    for path in (found[len(found) // 3], found[-2]):
        run = Run(name, folder / path.name, seed=0)
        run.student.load_state_dict(Encoder(seed=9).state_dict(), strict=False)
        seed_all(50 + rank)
        again = run.train(resume_from=path).state()
        wrong = [key for key in state if not equal(state[key], again[key])]
        assert not wrong, f"rank {rank}, {path.name}: {wrong}"
    torch.save(state, folder / f"state-{rank}.pt")


def resume_elsewhere(rank: int, folder: Path, name: str, path: Path) -> None:
    """Resume in new processes."""
    torch.save(Run(name, folder / "again", seed=3).train(resume_from=path).state(), folder / f"again-{rank}.pt")


def expect_refusal(rank: int, folder: Path, path: Path) -> None:
    """Try to resume from a checkpoint of one process."""
    with pytest.raises(ValueError, match="written by 1 processes and must be resumed with as many, got 2"):
        Run("basic, epochs, shuffled", folder).train(resume_from=path)


def callback_of_one_rank(rank: int, folder: Path) -> None:
    """The end came after rank 0 had done its callback and before rank 1 had: when resumed, both do it again."""
    name, calls = "random callback", []
    draw = SCENARIOS[name].train["callback"]
    state = Run(name, folder / "whole").train().state()
    torch.distributed.barrier()
    if rank == 1:
        (folder / "whole" / "checkpoint-2" / "rank-1-after-callback.pt").unlink()
    torch.distributed.barrier()

    def callback(model: Any, step: int) -> None:
        calls.append(step)
        draw(model, step)

    run = Run(name, folder / "again", seed=3)
    again = run.train(resume_from=folder / "whole" / "checkpoint-2", callback=callback).state()
    assert calls == [2, 3, 4, 5, 6]
    assert equal(again, state)


# Signals, errors, counts


def interrupted(rank: int, folder: Path) -> None:
    """Both processes get SIGTERM, as from a launcher, at different moments; they stop after the same step."""
    name, batches = "basic, steps, shuffled", []
    state = Run(name, folder / "whole", every_step=False, logging_steps=4).train().state()

    def postprocess(batch: Any) -> Any:
        batches.append(batch)
        if len(batches) == (2 if rank == 0 else 3):
            signal.raise_signal(signal.SIGTERM)
        return batch

    with pytest.raises(SystemExit, match="143"):
        Run(name, folder / "run", every_step=False, logging_steps=4).train(batch_postprocessor=postprocess)
    assert [path.name for path in checkpoints(folder / "run")] == ["checkpoint-4"]
    again = Run(name, folder / "run", seed=3, every_step=False).train(resume_from="latest").state()
    assert equal(again, state)


def not_finite(rank: int, folder: Path, where: str) -> None:
    """The loss, or its gradient, of one process is not finite in step 3."""
    seen = []

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        views = adaptor(batch, outputs)
        seen.append(batch)
        if rank == 1 and len(seen) >= 3:
            bad = float("nan") if where == "loss" else (views["logits"] * 0).square().sum().sqrt()
            views["losses"] = views["losses"] + bad
        return views

    distil(folder, make_loader(24), {"num_steps": 5}, adaptor_S=adapt, distill={"hard_label_weight": 1}, ckpt_steps=1)


def count_exchanges(rank: int, folder: Path) -> None:
    """Count how often gradients are exchanged, and between which backward passes."""
    events = []
    prepare, backward = engine.Runtime.prepare, engine.Runtime.backward

    def hooked(self, module, optimizer, teachers=()):
        module, optimizer = prepare(self, module, optimizer, teachers)

        def exchange(state, bucket):
            if bucket.is_last():
                events.append("exchange")
            future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        module.register_comm_hook(None, exchange)
        return module, optimizer

    def noted(self, loss, optimizer):
        events.append("backward")
        backward(self, loss, optimizer)

    engine.Runtime.prepare, engine.Runtime.backward = hooked, noted
    loader = make_loader(44, 2, full=True)
    distiller = distil(folder, loader, {"num_epochs": 1}, gradient_accumulation_steps=4, distill=MATCHES)
    # 22 batches, 11 for each process: windows of 4, 4 and 3.
    window = ["backward"] * 4 + ["exchange"]
    assert sorted(events[:5]) == sorted(window), events
    assert events == window * 2 + window[1:], events
    torch.save(weights(distiller), folder / f"hooked-{rank}.pt")


def draw_tasks(rank: int, folder: Path) -> None:
    """Note the tasks drawn with other seeds in every process."""
    drawn = []
    original = multi_task.TaskBatch

    def note(task, batch):
        drawn.append(task)
        return original(task, batch)

    multi_task.TaskBatch = note
    result = tasks(folder, 1, seed=100 + rank)
    torch.save((drawn, result), folder / f"drawn-{rank}.pt")


def read_rows(rank: int, folder: Path) -> None:
    """Note the rows that a process reads."""
    loader = make_loader(24, shuffle=True)
    model = Encoder()
    seed_all(rank)
    trainer = BasicTrainer(make_config(folder), model, adaptor)
    trainer.train(torch.optim.SGD(model.parameters(), lr=0.1), loader, num_epochs=3)
    torch.save(loader.dataset.reads, folder / f"rows-{rank}.pt")


def different_starts(rank: int, folder: Path) -> None:
    """The processes make students and projections from other seeds; all train rank 0's."""
    seed_all(rank)
    student = Encoder(dropout=0.0, seed=1 + rank)
    distiller = distil(folder, make_loader(24, full=True), EPOCHS, student=student, distill=MATCHES)
    torch.save(weights(distiller), folder / f"{rank}.pt")


def files_and_logs(rank: int, folder: Path) -> None:
    """Write checkpoints and logs; note the callback of each process."""
    calls = []
    student = Encoder(dropout=0.0, seed=1)
    distil(
        folder / "out",
        make_loader(24, full=True),
        {"num_epochs": 2},
        student=student,
        log_dir=str(folder / "log"),
        train={"callback": lambda model, step: calls.append((model is student, step))},
    )
    assert calls == [(True, 3), (True, 6)]
    torch.save(student.state_dict(), folder / f"student-{rank}.pt")


def precisions(rank: int, folder: Path) -> None:
    """Runs of different precisions, one after the other in the same processes."""
    ends = [
        weights(distil(folder / str(number), make_loader(24), EPOCHS, precision=precision, distill=MATCHES))
        for number, precision in enumerate(["no", "bf16", "no"])
    ]
    assert torch.equal(ends[0], ends[2])
    difference = (ends[0] - ends[1]).abs().max()
    assert 0 < difference < 0.05
    torch.save(ends, folder / f"{rank}.pt")


if __name__ == "__main__":
    run_all(int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2:])
