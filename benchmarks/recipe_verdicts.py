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
    """Return how the student of three teachers does beside students of one, and beside the ensemble.

    Beside that of the same recipe, and beside the best one of any recipe; each on the seeds that both have.
    """
    among = {
        "the student of one in the same recipe": ["hidden"],
        "the best of one in any recipe": recipes_of_one_teacher(),
    }
    lines = [line for what, methods in among.items() if (line := _beside(grid, what, methods))]
    if not lines:
        return ["- Several teachers: nothing is there yet."]
    lines[-1] += " (The best of many recipes with two or three seeds each owes something to luck.)"
    return lines


def _beside(grid: Grid, what: str, methods: list[str]) -> str | None:
    """Return the comparison with the best of some methods, ``None`` if there is nothing to compare."""
    good, each = 0, []
    for task in FIVE:
        several, together = scores(grid, task, "several-teachers"), scores(grid, task, "ensemble")
        pairs = []
        for name in methods:
            single = scores(grid, task, name)
            # Of a single seed only where there is no other: the best of many single figures would be luck.
            if len(both := sorted(several.keys() & single.keys())) >= min(2, max(1, len(several))):
                pairs.append((mean(single[seed] for seed in both), mean(several[seed] for seed in both), len(both)))
        if not pairs:
            continue
        single_mean, own, seeds = max(pairs)
        good += own >= single_mean
        ensemble = "" if not together else f", ensemble {mean(together.values()):.1f}"
        each.append(f"{TASKS[task].title} {own:.1f} and {single_mean:.1f} (seeds: {seeds}){ensemble}")
    if not each:
        return None
    return (
        f"- The student of three teachers is at least as good as {what} on 3 tasks: {'; '.join(each)}: "
        f"on {good}, {mark(good >= 3)}."
    )


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
