"""How long the trainings of the experiments will take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from statistics import mean
from typing import Any

import recipe_models
import torch
from recipe_cells import precision
from recipe_grid import Cell, Grid
from recipe_methods import METHODS
from recipe_tasks import TASKS


class Estimate:
    """Foretells seconds from the finished cells; a task without any is measured in a few steps.

    Args:
        grid: the grid.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._measured: dict[str, float] = {}

    def finished(self) -> list[dict[str, Any]]:
        """Return all results in this machine's precision; the others tell nothing about its speed."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.grid.results.rglob("*-*.json"))]
        return [result for result in found if result.get("settings", {}).get("precision") == precision()]

    def of(self, cells: Iterable[Cell]) -> float:
        """Return the seconds that the cells take one after another."""
        by_method: dict[tuple[str, str], list[float]] = {}
        by_task: dict[str, list[float]] = {}
        for result in self.finished():
            if result.get("epochs"):
                cell = Cell(result["task"], result["method"], 0, 0.0 if result["kind"] == "sweep" else None)
                cost = result["wall_seconds"] / units(cell)
                by_method.setdefault((cell.task, cell.method), []).append(cost)
                by_task.setdefault(cell.task, []).append(cost)
        total = 0.0
        for cell in cells:
            if METHODS[cell.method].epochs(TASKS[cell.task]) == 0:
                continue
            known = by_method.get((cell.task, cell.method)) or by_task.get(cell.task)
            total += units(cell) * (mean(known) if known else self.measure(cell))
        return total

    def measure(self, cell: Cell) -> float:
        """Return the seconds of an epoch of a student of three layers, from a few steps by hand."""
        if cell.task not in self._measured:
            data = self.grid.load(Cell(cell.task, cell.method, 0))
            model = recipe_models.shorten(
                recipe_models.pretrained(TASKS[cell.task], self.grid.model, 0, self.grid.tiny), 0.1
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            count = min(8, len(data.train))
            chosen = [data.train[(2 * number + 1) * len(data.train) // (2 * count)] for number in range(count)]
            seconds = []
            for batch in [chosen[0], *chosen]:
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16"):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - start)
            step = mean(seconds[1:])  # the first pays for what torch does only once
            self._measured[cell.task] = step * len(data.train)
            print(f"{cell.task}: {1 / step:.1f} steps/s measured, {len(data.train)} steps an epoch", flush=True)
        return self._measured[cell.task]


def units(cell: Cell) -> float:
    """Return a cell's size in epochs of a student of three layers."""
    method = METHODS.get(cell.method, METHODS["kd"])
    size = (
        method.epochs(TASKS[cell.task]) * len(method.layers) / len(recipe_models.LAYERS) * (0.9 if cell.sweep else 1.0)
    )
    return size + (1.0 if method.needs_teacher else 0.0)


def duration(seconds: float) -> str:
    """Return seconds as text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
