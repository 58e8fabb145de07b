"""GeneralDistiller's step against a hand-written PyTorch loop that does the same work, alternating in one run.

Both sides: teacher forward without gradients, student forward, KD cross-entropy (temperature 4) plus masked hidden MSE
on the embeddings and every student layer, backward, clipping to 1.0, AdamW, a progress bar, and a check of each loss.
The alternation goes chunk by chunk; the time of a step is the time between two requests for a batch, the first steps of
each chunk are left out. The last losses of both sides must agree, or the work was not the same.

    python benchmarks/step_overhead.py                 # all sizes, prints a table
    python benchmarks/step_overhead.py --size tiny --chunks 20
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification

import textbrewer
from textbrewer.engine import Runtime

TEMPERATURE, MAX_NORM, LEARNING_RATE, CLASSES = 4.0, 1.0, 1e-4, 2


@dataclass(frozen=True)
class Size:
    """A teacher and student shape, and the batch they see."""

    width: int
    heads: int
    teacher_layers: int
    student_layers: int
    vocabulary: int
    batch: int
    length: int
    steps: int


SIZES = {
    "tiny": Size(32, 2, 4, 2, 1000, 32, 32, 60),
    "minilm": Size(384, 12, 6, 3, 30522, 32, 32, 10),
}
WARM_UP = 4


@dataclass
class Timed:
    """Batches that note when each was asked for."""

    batches: list[dict[str, Tensor]]
    times: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            self.times.append(time.perf_counter())
            yield batch

    def step_times(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        return [after - before for before, after in itertools.pairwise(self.times)][WARM_UP:]


def model(size: Size, layers: int) -> nn.Module:
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        num_labels=CLASSES,
        output_hidden_states=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def batches(size: Size) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(size.steps):
        lengths = torch.randint(size.length // 2, size.length + 1, (size.batch, 1), generator=generator)
        ids = torch.randint(size.vocabulary, (size.batch, size.length), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(size.length) < lengths).long()})
    return made


def adaptor(batch: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


def layer_map(size: Size) -> list[tuple[int, int]]:
    ratio = size.teacher_layers // size.student_layers
    return [(ratio * layer, layer) for layer in range(size.student_layers + 1)]


def by_library(
    size: Size, student: nn.Module, teacher: nn.Module, data: Timed, folder: str, precision: str = "no"
) -> None:
    matches = [
        {"layer_T": layer_T, "layer_S": layer_S, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for layer_T, layer_S in layer_map(size)
    ]
    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(output_dir=folder, device="cpu", precision=precision),
        textbrewer.DistillationConfig(temperature=TEMPERATURE, intermediate_matches=matches),
        teacher,
        student,
        adaptor,
        adaptor,
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    distiller.train(optimizer, data, num_epochs=1, max_grad_norm=MAX_NORM)


def by_hand(size: Size, student: nn.Module, teacher: nn.Module, data: Timed) -> float:
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    teacher.eval()
    student.train()
    value = math.nan
    with tqdm(total=len(data), dynamic_ncols=True) as bar:
        for batch in data:
            with torch.no_grad():
                results_T = teacher(**batch)
            results_S = student(**batch)
            soft = F.softmax(results_T.logits / TEMPERATURE, dim=-1)
            loss = -(soft * F.log_softmax(results_S.logits / TEMPERATURE, dim=-1)).sum(dim=-1).mean()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            for layer_T, layer_S in layer_map(size):
                state_S, state_T = results_S.hidden_states[layer_S], results_T.hidden_states[layer_T]
                squared = F.mse_loss(state_S, state_T, reduction="none") * mask
                loss = loss + squared.sum() / (mask.sum() * state_S.shape[-1])
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(value)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(1)
    return value


def loss_of(size: Size, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> float:
    """The KD loss of a trained student, to compare the two sides."""
    student.eval()
    with torch.no_grad():
        soft = F.softmax(teacher(**batch).logits / TEMPERATURE, dim=-1)
        return float(-(soft * F.log_softmax(student(**batch).logits / TEMPERATURE, dim=-1)).sum(dim=-1).mean())


class CountReads(TorchDispatchMode):
    """Counts operations that wait for a device: reading a scalar, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused and func.overloadpacket.__name__ in self.WAITING:
            self.count += 1
        return func(*args, **(kwargs or {}))


def waits_per_step(size: Size) -> list[int]:
    """Operations outside the models that wait for the device in each step, where, as on a GPU, only logs read."""
    teacher, student = model(size, size.teacher_layers).eval(), model(size, size.student_layers)
    counter, counts = CountReads(), []
    for each in (teacher, student):
        # Transformers reads whether the mask is all ones, in each forward pass and on both sides of the comparison.
        each.register_forward_pre_hook(lambda *_: setattr(counter, "paused", True))
        each.register_forward_hook(lambda *_: setattr(counter, "paused", False))

    class Noting(Timed):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in self.batches:
                counts.append(counter.count)
                yield batch

    original, step = Runtime.__init__, Runtime.step

    def update(self: Runtime, optimizer: Any) -> bool:
        # AdamW reads its step counters, which are tensors on the CPU also where the parameters are on a GPU.
        counter.paused = True
        updated = step(self, optimizer)
        counter.paused = False
        return updated

    def as_on_a_gpu(self: Runtime, config: textbrewer.TrainingConfig) -> None:
        original(self, config)
        self.reads_are_free = False

    Runtime.__init__, Runtime.step = as_on_a_gpu, update  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, counter:
            by_library(size, student, teacher, Noting(batches(size)[:9]), folder)
    finally:
        Runtime.__init__, Runtime.step = original, step  # type: ignore[method-assign]
    return [after - before for before, after in itertools.pairwise(counts)]


def compare(name: str, size: Size, chunks: int) -> str:
    torch.manual_seed(0)
    teacher, first = model(size, size.teacher_layers).eval(), model(size, size.student_layers)
    data = batches(size)
    ratios, ours, theirs = [], [], []
    difference = 0.0
    for _ in range(chunks):
        a, b = copy.deepcopy(first), copy.deepcopy(first)
        library, hand = Timed(data), Timed(data)
        with tempfile.TemporaryDirectory() as folder:
            by_library(size, a, teacher, library, folder)
        by_hand(size, b, teacher, hand)
        difference = max(difference, abs(loss_of(size, a, teacher, data[0]) - loss_of(size, b, teacher, data[0])))
        ours += library.step_times()
        theirs += hand.step_times()
        ratios.append(statistics.median(library.step_times()) / statistics.median(hand.step_times()))
    if difference > 1e-5:
        raise SystemExit(f"{name}: the two sides did other work, their losses differ by {difference:.1e}")
    ratio = statistics.median(ours) / statistics.median(theirs)
    waits = waits_per_step(size)
    return (
        f"| {name} | {1e3 * statistics.median(ours):.2f} | {1e3 * statistics.median(theirs):.2f} | {ratio:.3f} | "
        f"{min(ratios):.3f} to {max(ratios):.3f} | {difference:.0e} | {max(waits[1:])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--chunks", type=int, default=12, help="alternations")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [compare(name, SIZES[name], options.chunks) for name in SIZES if options.size in (name, "all")]
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}, {options.chunks} alternations")
    print("| size | library, ms | by hand, ms | ratio of medians | ratio by chunk | loss difference | waits a step |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
