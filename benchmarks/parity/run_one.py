"""Run the cases with whichever textbrewer this environment imports, and write what became of the student's weights.

Each case writes ``<case>.pt`` with the student's weights before and after (flat, in the order of its parameters), the
projections' likewise, eight projections of the movement after every optimiser step, and the next random number of
each generator; or ``<case>.error``, the traceback. Exit status 1 if a case raised.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import tiny
import torch
from cases import CASES, MASKED_GRAM_NOTE, Case
from torch import Tensor, nn

SEED, DIRECTIONS, ORIGINAL = 20, 8, "0.2.1"


def flat(parameters: Sequence[Tensor]) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters]) if parameters else torch.zeros(0)


def directions(size: int) -> Tensor:
    """Return eight fixed random directions, ``(8, size)``, that keep a vector's length on average."""
    return torch.randn(DIRECTIONS, size, generator=torch.Generator().manual_seed(1)) / DIRECTIONS**0.5


class Recorder:
    """Notes the weights that an optimiser trains: at first, when groups are added, and after each step."""

    def __init__(self, student: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.student, self.optimiser = list(student.parameters()), optimiser
        self.initial, self.path = flat(self.student), []
        self.directions, self.known = directions(self.initial.numel()), {id(p) for p in self.student}
        self.projections: list[Tensor] = []
        self.projections_initial: list[Tensor] = []
        add = optimiser.add_param_group

        def add_and_note(group: dict[str, Any]) -> None:
            add(group)
            new = [p for p in optimiser.param_groups[-1]["params"] if id(p) not in self.known]
            self.projections += new
            self.projections_initial += [p.detach().clone() for p in new]

        optimiser.add_param_group = add_and_note  # type: ignore[method-assign]
        optimiser.register_step_post_hook(
            lambda *_: self.path.append(self.directions @ (flat(self.student) - self.initial))
        )

    def result(self) -> dict[str, Tensor]:
        """Return what was noted, and the weights as they are now."""
        return {
            "initial": self.initial,
            "final": flat(self.student),
            "path": torch.stack(self.path),
            "projections_initial": flat(self.projections_initial),
            "projections_final": flat(self.projections),
            "random": torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64),
        }


def masked_gram_mse(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the original's masked nst/mmd as in its main branch: each Gram matrix over its hidden width."""
    gram_S, gram_T = (a @ b.transpose(1, 2) / b.size(2) for a, b in (state_S, state_T))
    pairs = mask[:, :, None] * mask[:, None, :]
    return ((gram_S - gram_T).square() * pairs).sum() / pairs.sum()


@contextmanager
def main_branch_formula(textbrewer: Any, case: Case) -> Iterator[None]:
    """Give the original its main branch's masked nst/mmd, in the cases whose note says so."""
    table = textbrewer.MATCH_LOSS_MAP
    before = {name: table[name] for name in ("nst", "mmd")}
    if case.note == MASKED_GRAM_NOTE and textbrewer.__version__.startswith(ORIGINAL):
        table.update(dict.fromkeys(before, masked_gram_mse))
    try:
        yield
    finally:
        table.update(before)


def make_optimiser(case: Case, student: nn.Module) -> torch.optim.Optimizer:
    """Return the case's optimiser over the student."""
    kind, arguments = case.optimiser
    plain = [p for p in student.parameters() if p.dim() < 2]
    groups: Any = student.parameters()
    if case.groups:
        groups = [{"params": [p for p in student.parameters() if p.dim() > 1]}, {"params": plain, "weight_decay": 0.0}]
    return getattr(torch.optim, kind)(groups, **arguments)


def random_words(batch: Any) -> Any:
    """Return the tuple batch with a sixth of its words replaced: a batch_postprocessor that draws random numbers."""
    words, *rest = batch
    return (torch.where(torch.rand(words.shape) < 1 / 6, 1, words), *rest)


def make_callback(loader: Any) -> Callable[..., None]:
    """Return a callback that evaluates on a shuffled loader, so it draws random numbers and leaves eval mode on."""

    def callback(model: nn.Module, step: int) -> None:
        model.eval()
        with torch.no_grad():
            for batch in loader:
                model(**batch) if isinstance(batch, dict) else model(*batch)

    return callback


def train_arguments(case: Case, optimiser: torch.optim.Optimizer, rows: Any, collate: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``train`` that the case's fields ask for."""
    arguments = dict(case.train)
    decay = {"lr_lambda": lambda step: min(1.0, (step + 1) / 4) * (1 - step / 40)}
    if case.scheduler == "class":
        arguments |= {"scheduler_class": torch.optim.lr_scheduler.LambdaLR, "scheduler_args": decay}
    if case.scheduler == "object":
        arguments["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimiser, **decay)
    if case.postprocess:
        arguments["batch_postprocessor"] = random_words
    if case.callback:
        arguments["callback"] = make_callback(tiny.make_loader(rows[:20], collate, shuffle=True))
    return arguments


def seed_everything(seed: int) -> None:
    """Seed the three generators that a training run may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(case: Case, textbrewer: Any, folder: str, student: nn.Module, teachers: Sequence[nn.Module]) -> Any:
    """Return the case's distiller or trainer."""
    training = textbrewer.TrainingConfig(device="cpu", output_dir=folder, **case.training)
    make = getattr(textbrewer, case.distiller)
    adaptor_S = tiny.make_adaptor(case.keys)
    if case.distiller == "BasicTrainer":
        return make(training, student, adaptor_S)
    # A copy, since the original edits the lists it is given.
    config = textbrewer.DistillationConfig(**copy.deepcopy(dict(case.config)))
    teacher_keys = [key for key in case.keys if key not in ("losses", "labels")]
    adaptor_T = tiny.make_adaptor(teacher_keys)
    if case.distiller == "MultiTaskDistiller":
        names = ("a", "b")
        adaptors_T = {name: tiny.make_adaptor(teacher_keys, head) for head, name in enumerate(names)}
        adaptors_S = {name: tiny.make_adaptor(case.keys, head) for head, name in enumerate(names)}
        return make(training, config, dict(zip(names, teachers, strict=True)), student, adaptors_T, adaptors_S)
    if case.distiller == "MultiTeacherDistiller":
        return make(training, config, list(teachers), student, adaptor_T, adaptor_S)
    return make(training, config, teachers[0], student, adaptor_T, adaptor_S)


def run_case(case: Case, textbrewer: Any, nudge: float = 0.0) -> dict[str, Tensor]:
    """Train the case's student and return what became of its weights.

    Args:
        case: the case.
        textbrewer: the package, the original or the library.
        nudge: relative size of a random change to the student's first weights, to see how far rounding alone leads.
    """
    seed_everything(SEED)
    teachers = [tiny.make_teacher(width, case.head, case.outputs) for width in case.widths]
    student = tiny.TinyEncoder(2, 32, case.head, case.outputs)
    if nudge:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in student.parameters():
                p *= 1 + nudge * torch.randn(p.shape, generator=generator)
    rows = tiny.make_rows(case.head)
    collate = tiny.make_collate(case.batch, case.random_words, teachers[0])
    loader: Any = tiny.make_loader(rows, collate, case.shuffle)
    if case.distiller == "MultiTaskDistiller":
        fewer = tiny.make_rows(case.head, rows=24, classes=tiny.CLASSES_2, seed=8)
        loader = {"a": loader, "b": tiny.make_loader(fewer, collate, case.shuffle)}
    optimiser = make_optimiser(case, student)
    with tempfile.TemporaryDirectory() as folder, main_branch_formula(textbrewer, case):
        distiller = build(case, textbrewer, folder, student, teachers)
        arguments = train_arguments(case, optimiser, rows, collate)
        recorder = Recorder(student, optimiser)
        with distiller:
            distiller.train(optimiser, loader, **arguments)
        return recorder.result()


def main() -> int:
    """Run the cases named on the command line, all by default; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--nudge", type=float, default=0.0, help="relative random change of the student's first weights"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    import textbrewer

    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "versions").write_text(f"textbrewer {textbrewer.__version__}, torch {torch.__version__}\n")
    failed = 0
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            torch.save(run_case(case, textbrewer, options.nudge), options.folder / f"{case.name}.pt")
        except Exception:  # a case that raises is a result to report, and the others still run
            failed += 1
            (options.folder / f"{case.name}.error").write_text(traceback.format_exc())
            print(f"{case.name}: {traceback.format_exc(limit=-1)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
