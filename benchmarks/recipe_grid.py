"""The grid of the experiments: its cells, what each waits for, where its result is, and the locks of processes at work.

A cell is one training. Its result is one JSON file, written whole; a cell whose file is there is done. A sweep's cells
train on nine tenths of the training rows and are scored on the rest; final cells use the best rate of a sweep.
A teacher whose result is there, but not its weights, is trained again; that result comes beside the first.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import recipe_cells
import recipe_models
import recipe_tasks
import torch
import transformers
from recipe_cells import Work
from recipe_methods import METHODS
from recipe_tasks import TASKS

import textbrewer

BORROWED = "hidden"  # methods without a sweep of their own take the rate found for this one


@dataclass(frozen=True)
class Cell:
    """One training: of a sweep if ``rate`` is given (and then ``dropout``), else a final one."""

    task: str
    method: str
    seed: int
    rate: float | None = None
    dropout: float | None = None

    @property
    def sweep(self) -> bool:
        """Whether it is one of a sweep's."""
        return self.rate is not None

    @property
    def name(self) -> str:
        """Its result's path in the task's folder, without ending."""
        if self.rate is None:
            return f"{self.method}-seed{self.seed}"
        name = f"sweeps/{self.method}-rate{self.rate:g}"
        if self.dropout != METHODS[self.method].dropouts[0]:
            name += f"-dropout{self.dropout:g}"
        return f"{name}-seed{self.seed}" if self.seed else name

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"


@dataclass(frozen=True)
class Grid:
    """Where everything is, and how cells are trained.

    Args:
        results: folder of the JSON files.
        work: folder of the teachers' weights, checkpoints and locks.
        data: folder of the datasets.
        model: folder of the pretrained model.
        threads: of torch.
        tiny: with a few rows and small random models.
    """

    results: Path
    work: Path
    data: Path
    model: str
    threads: int = 1
    tiny: bool = False

    # ---- what there is

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell's result."""
        return self.results / cell.task / f"{cell.name}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result, ``None`` if it is not done."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def again(self, cell: Cell) -> Path:
        """Return the file of the result of a teacher that was trained again, because its weights had gone."""
        return self.results / cell.task / "again" / f"{cell.name}.json"

    def score_of_weights(self, teacher: Cell) -> float:
        """Return the score of the teacher whose weights are there: of the training that wrote them."""
        path = self.again(teacher)
        score: float = json.loads((path if path.exists() else self.path(teacher)).read_text(encoding="utf-8"))["score"]
        return score

    def finals(self, task: str, method: str) -> dict[int, dict[str, Any]]:
        """Return a method's final results by seed."""
        found = {seed: self.read(Cell(task, method, seed)) for seed in METHODS[method].seeds(TASKS[task])}
        return {seed: result for seed, result in found.items() if result is not None}

    def weights(self, cell: Cell) -> Path:
        """Return the file of a teacher's weights."""
        name = f"teacher-seed{cell.seed}" + (f"-sweep-rate{cell.rate:g}" if cell.sweep else "")
        return self.work / cell.task / name / "model.pt"

    def done(self, cell: Cell, with_weights: bool = False) -> bool:
        """Whether a cell's result is there, and its weights if they are asked for.

        A final result of another rate than the sweep's best is one of an unfinished sweep: it is made anew.
        """
        if not self.path(cell).exists() or (with_weights and not self.weights(cell).exists()):
            return False
        if cell.sweep:
            return True
        task = self.sweep_task(cell.task)
        swept = self.sweep_is_done(task, self.source(task, cell.method))
        return swept and (self.read(cell) or {})["rate"] == self.rate(cell)[0]

    # ---- what belongs to what

    def sweep_cells(self, task: str, method: str) -> list[Cell]:
        """Return a sweep's cells: all rates, and when these are done, what their scores ask for.

        Where the best rate is the highest or the lowest, the next one beyond is tried as well, up to twice on each
        side; then the best one with the other dropouts.
        """
        chosen = METHODS[method]
        rates = list(TASKS[task].rates or chosen.rates)[: 2 if self.tiny else None]
        seeds = range(TASKS[task].sweep_seeds)

        def cells(rates: Sequence[float], dropout: float) -> list[Cell]:
            return [Cell(task, method, seed, rate, dropout) for rate in rates for seed in seeds]

        first = cells(rates, chosen.dropouts[0])
        for _ in range(0 if self.tiny or len(rates) == 1 else 2):
            if not all(map(self.done, first)):
                return first
            best, _ = self._best(first)
            if min(rates) < best < max(rates):
                break
            rates.append(round(best * 2, 9) if best == max(rates) else round(best / 2, 9))
            first = cells(rates, chosen.dropouts[0])
        if len(chosen.dropouts) == 1 or not all(map(self.done, first)):
            return first
        return first + [cell for value in chosen.dropouts[1:] for cell in cells([self._best(first)[0]], value)]

    def sweep_is_done(self, task: str, method: str) -> bool:
        """Whether a sweep has nothing left to do."""
        return all(map(self.done, self.sweep_cells(task, method)))

    def best(self, task: str, method: str) -> tuple[float, float]:
        """Return the rate and the dropout of a finished sweep."""
        return self._best(self.sweep_cells(task, method))

    def _best(self, cells: list[Cell]) -> tuple[float, float]:
        """Return rate and dropout of the best mean score; of equals the lower rate, then the first dropout."""
        scores: dict[tuple[float, float], list[float]] = {}
        for cell in cells:
            assert cell.rate is not None  # a sweep's cells
            assert cell.dropout is not None
            scores.setdefault((cell.rate, cell.dropout), []).append((self.read(cell) or {})["score"])
        return max(sorted(scores, key=lambda pair: (pair[0], -pair[1])), key=lambda pair: round(mean(scores[pair]), 6))

    def sweep_task(self, task: str) -> str:
        """Return the task whose sweeps give a task its rates."""
        return TASKS[task].rates_of or task

    def source(self, task: str, method: str) -> str:
        """Return the method whose sweep gives a method its rate: itself, if it was ever swept."""
        if METHODS[method].swept or any(map(self.done, self.sweep_cells(task, method))):
            return method
        return BORROWED

    def teachers(self, cell: Cell) -> list[Cell]:
        """Return the teachers' cells of a student's cell, its own first; a sweep's must be done."""
        if cell.sweep:
            return [Cell(cell.task, "teacher", cell.seed, *self.best(cell.task, "teacher"))]
        return [Cell(cell.task, "teacher", seed) for seed in METHODS[cell.method].teacher_seeds(cell.seed)]

    def needs(self, cell: Cell) -> list[tuple[Cell, bool]]:
        """Return what must be done before a cell, and whether its weights must be there."""
        found: list[tuple[Cell, bool]] = []
        if not cell.sweep:
            task = self.sweep_task(cell.task)
            found += [(other, False) for other in self.sweep_cells(task, self.source(task, cell.method))]
        if METHODS[cell.method].needs_teacher:
            if cell.sweep:
                found += [(other, False) for other in self.sweep_cells(cell.task, "teacher")]
                if not self.sweep_is_done(cell.task, "teacher"):
                    return found
            found += [(teacher, True) for teacher in self.teachers(cell)]
        return found

    def todo(self, wanted: Iterable[Cell]) -> dict[Cell, bool]:
        """Return the cells to train, with what they need before them, and whether their weights are needed."""
        found: dict[Cell, bool] = {}

        def add(cell: Cell, with_weights: bool) -> None:
            if self.done(cell, with_weights):
                return
            for need in self.needs(cell):
                add(*need)
            found[cell] = found.get(cell, False) or with_weights

        for cell in wanted:
            add(cell, False)
        return found

    def ready(self, cell: Cell) -> bool:
        """Whether everything that a cell needs is there."""
        return all(self.done(*need) for need in self.needs(cell))

    @contextmanager
    def lock(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell's lock; gives ``False`` if another process has it. A lock ends with its process, however."""
        path = self.work / "locks" / f"{cell.task}-{cell.name.replace('/', '-')}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield True

    # ---- training

    def load(self, cell: Cell) -> recipe_tasks.Data:
        """Return a cell's data."""
        return recipe_tasks.load(cell.task, self.data, cell.sweep, self.tiny, self.model)

    def load_teacher(self, cell: Cell) -> Any:
        """Return the model of a teacher's cell."""
        teacher = recipe_models.pretrained(TASKS[cell.task], self.model, cell.seed, self.tiny)
        teacher.load_state_dict(torch.load(self.weights(cell), weights_only=True))
        return teacher.eval()

    def rate(self, cell: Cell) -> tuple[float, float, str]:
        """Return a cell's learning rate and dropout, and whose sweep they are of."""
        if cell.rate is not None and cell.dropout is not None:
            return cell.rate, cell.dropout, cell.method
        task = self.sweep_task(cell.task)
        source = self.source(task, cell.method)
        rate, dropout = self.best(task, source)
        return rate, dropout, source

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train a cell, write its result and return it."""
        task, method = TASKS[cell.task], METHODS[cell.method]
        rate, dropout, source = self.rate(cell)
        data, epochs = self.load(cell), 1 if self.tiny else method.epochs(task)
        base = recipe_models.pretrained(task, self.model, cell.seed, self.tiny)
        cells = self.teachers(cell) if method.needs_teacher else []
        teacher_scores = [self.score_of_weights(teacher) for teacher in cells]
        teachers = [self.load_teacher(teacher) for teacher in cells]
        folder = self.work / cell.task / "checkpoints"
        work = Work(task, data, cell.seed, rate, dropout, epochs, base, teachers, folder, lambda model, step: None)
        model, found = recipe_cells.train(method, work)
        result = {
            "task": cell.task,
            "method": cell.method,
            "seed": cell.seed,
            "kind": "sweep" if cell.sweep else "final",
            "metric": task.metric,
            "rate": rate,
            "dropout": dropout,
            "rate_from": source,
            "epochs": epochs,
            "train_rows": data.train_rows,
            "held_out_rows": data.held_out_rows,
            "teacher_score": teacher_scores[0] if teacher_scores else None,
            "teacher_scores": teacher_scores,
            **found,
            "settings": {**method.settings(), **COMMON, "precision": recipe_cells.precision()},
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        if cell.method == "teacher":
            save(model, self.weights(cell))
        write(self.again(cell) if self.done(cell) else self.path(cell), json.dumps(result, indent=1) + "\n")
        return result


COMMON = {
    "optimizer": "AdamW, weight decay 0.01 on matrices",
    "schedule": "linear, 10% warm-up",
    "max_grad_norm": 1.0,
    "batch": recipe_tasks.BATCH,
}


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "textbrewer": textbrewer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, text: str) -> None:
    """Write a file whole or, if interrupted, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def save(model: Any, path: Path) -> None:
    """Keep a model's weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
