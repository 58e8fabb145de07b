"""What the experiments were to show, held against their figures."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from recipe_grid import Grid
from recipe_methods import METHODS, Ensemble, MoreText, SeveralTeachers
from recipe_models import LAYERS
from recipe_tasks import TASKS

BASELINE, FINE_TUNED = "pretrained", "finetuned"
FIVE = [name for name, task in TASKS.items() if not task.headline]
LEAST_GAIN, HALF, QUARTER = 1.5, 98.0, 95.0


def scores(grid: Grid, task: str, method: str) -> dict[int, float]:
    """Return a method's final scores by seed."""
    return {seed: result["score"] for seed, result in grid.finals(task, method).items()}


def deviation(values: dict[int, float]) -> float:
    """Return the standard deviation over the seeds, 0 of a single one."""
    return stdev(values.values()) if len(values) > 1 else 0.0


def gain(grid: Grid, task: str, method: str, baseline: str) -> tuple[float, float] | None:
    """Return the difference of two methods' mean scores, and the larger of their standard deviations."""
    own, other = scores(grid, task, method), scores(grid, task, baseline)
    if not own or not other:
        return None
    return mean(own.values()) - mean(other.values()), max(deviation(own), deviation(other))


def recipes_of_one_teacher() -> list[str]:
    """Return the methods with a teacher whose student is that of the baselines, trained on the same rows."""
    return [
        name
        for name, method in METHODS.items()
        if method.start == "finetuned"
        and name not in (FINE_TUNED, "teacher")
        and method.layers == LAYERS
        and method.width is None
        and not isinstance(method, (SeveralTeachers, Ensemble, MoreText))
    ]


def best_recipe(grid: Grid) -> str | None:
    """Return the recipe with the best mean over the five tasks, among those with as many seeds as the baseline."""
    means = {}
    seeds = [len(scores(grid, task, BASELINE)) for task in FIVE]
    for name in recipes_of_one_teacher():
        found = [scores(grid, task, name) for task in FIVE]
        if all(len(values) >= max(1, count) for values, count in zip(found, seeds, strict=True)):
            means[name] = mean(mean(values.values()) for values in found)
    return max(means, key=lambda name: means[name]) if means else None


def mark(holds: bool) -> str:
    """Return a verdict."""
    return "met" if holds else "**not met**"


def against_baselines(grid: Grid) -> list[str]:
    """Return what the best recipe gains on the students without a teacher."""
    best = best_recipe(grid)
    if best is None:
        return ["- Best recipe against the baselines: not all of the five tasks are there yet."]
    lines = []
    found: list[Any] = [gain(grid, task, best, BASELINE) for task in FIVE]
    if all(found):
        average = mean(difference for difference, _ in found)
        beyond = [difference > spread for difference, spread in found]
        each = ", ".join(
            f"{TASKS[task].title} {difference:+.1f} (spread {spread:.1f})"
            for task, (difference, spread) in zip(FIVE, found, strict=True)
        )
        verdict = mark(average >= LEAST_GAIN and all(beyond))
        lines.append(
            f"- The best recipe ({METHODS[best].title}) beats the tuned baseline of pretrained layers by at least "
            f"{LEAST_GAIN} points on average, and on every task by more than the spread: {average:+.2f}; {each}: "
            f"{verdict}."
        )
    found = [gain(grid, task, best, FINE_TUNED) for task in FIVE]
    if all(found):
        average = mean(difference for difference, _ in found)
        lines.append(f"- It beats the baseline of fine-tuned layers on average: {average:+.2f}: {mark(average > 0)}.")
    found = [gain(grid, task, "kd", BASELINE) for task in FIVE]
    if all(found):
        each = ", ".join(
            f"{TASKS[task].title} {difference:+.1f} (spread {spread:.1f})"
            for task, (difference, spread) in zip(FIVE, found, strict=True)
        )
        verdict = mark(all(difference >= -spread for difference, spread in found))
        lines.append(f"- Plain KD is never worse than that baseline beyond the spread: {each}: {verdict}.")
    return lines


def several_teachers(grid: Grid) -> list[str]:
    """Return how the student of three teachers does beside the best student of one, and beside the ensemble.

    Of the students of one teacher those count that were trained with as many seeds.
    """
    rows = []
    for task in FIVE:
        several, together = scores(grid, task, "several-teachers"), scores(grid, task, "ensemble")
        single = [scores(grid, task, name) for name in recipes_of_one_teacher()]
        # The best of many single figures would be luck: a recipe counts that has as many seeds.
        means = [mean(values.values()) for values in single if len(values) >= max(1, len(several))]
        if several and means:
            rows.append((task, mean(several.values()), max(means), mean(together.values()) if together else None))
    if not rows:
        return ["- Several teachers: nothing is there yet."]
    good = [task for task, several, single, _ in rows if several >= single]
    each = "; ".join(
        f"{TASKS[task].title} {several:.1f}, best student of one teacher {single:.1f}"
        + ("" if together is None else f", ensemble {together:.1f}")
        for task, several, single, together in rows
    )
    what = "- The student of three teachers is at least as good as the best of one on 3 tasks"
    return [f"{what}: {each}: {mark(len(good) >= 3)}."]


def shares(grid: Grid) -> list[str]:
    """Return what students of all of SST-2's rows keep of their teacher."""
    lines = []
    for method, what, least in (
        ("hidden", "half the layers", HALF),
        ("narrow-6", "a quarter of the parameters outside the embeddings", QUARTER),
    ):
        own, teacher = scores(grid, "sst2-full", method), scores(grid, "sst2-full", "teacher")
        both = sorted(own.keys() & teacher.keys())
        if both:
            share = mean(100 * own[seed] / teacher[seed] for seed in both)
            lines.append(
                f"- A SST-2 student with {what} keeps at least {least:.0f}% of its teacher (all training rows, "
                f"{len(both)} seed{'s' * (len(both) > 1)}): {share:.1f}%: {mark(share >= least)}."
            )
    return lines or ["- Shares of the teacher on all of SST-2: nothing is there yet."]


def verdicts(grid: Grid) -> str:
    """Return all of it as a Markdown list; the spread is the larger of two standard deviations over the seeds."""
    return "\n".join([*against_baselines(grid), *several_teachers(grid), *shares(grid)])
