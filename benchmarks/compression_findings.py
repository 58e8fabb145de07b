"""What the compression experiments were to show, held against their figures."""

from __future__ import annotations

from statistics import mean
from typing import Any

from compression_methods import TASK
from recipe_grid import Grid
from recipe_report import paired
from recipe_verdicts import mark

MOST_LOST = {50: 1.0, 70: 2.5}
"""Points that pruning while distilling may cost, by the percentage pruned."""
SCORES = {"magnitude": "gradual", "Taylor": "taylor", "movement": "movement", "CoFi": "cofi"}
"""Names of the methods' middles."""
KEPT, FASTER = 98, 1.8
"""Percent of the predecessor's score that Theseus is to keep, and how many times faster it is to be."""


def findings(grid: Grid, latencies: dict[str, Any]) -> str:
    """Return all that there are figures for, as a Markdown list.

    Args:
        grid: where the results are.
        latencies: by size, then by shape; empty if not measured.
    """
    lines = [line for percent in MOST_LOST for line in pruned(grid, percent)]
    return "\n".join([*lines, *theseus(grid, latencies), *low_rank(grid)])


def lost(grid: Grid, name: str) -> float | None:
    """Return how many points a method loses to the teachers of its seeds."""
    pairs = paired(grid.finals(TASK, "teacher"), grid.finals(TASK, name))
    return mean(theirs - mine for theirs, mine in pairs) if pairs else None


def pruned(grid: Grid, percent: int) -> list[str]:
    """Return what pruning while distilling loses, by each score, and beside magnitude at once."""
    found = {title: lost(grid, f"prune-{name}-distil-{percent}") for title, name in SCORES.items()}
    points = {title: value for title, value in found.items() if value is not None}
    lines = []
    if points:
        each = ", ".join(f"{title} {value:+.1f}" for title, value in points.items())
        verdict = mark(max(points.values()) <= MOST_LOST[percent])
        what = f"{percent}% pruned while distilling loses at most {MOST_LOST[percent]} points, by each score"
        lines.append(f"- {what}: {each}: {verdict}.")
    once = lost(grid, f"prune-magnitude-{percent}")
    if once is not None and "Taylor" in points:
        lines.append(
            f"- {percent}% pruned: by Taylor's score, distilled, {points['Taylor']:+.1f} points are lost, by magnitude "
            f"at once and with the labels alone {once:+.1f}: {mark(points['Taylor'] < once)}."
        )
    return lines


def theseus(grid: Grid, latencies: dict[str, Any]) -> list[str]:
    """Return what module replacement keeps, how fast its layers are, and plain KD beside it."""
    teacher = grid.finals(TASK, "teacher")
    own, plain = (paired(grid.finals(TASK, name), teacher) for name in ("theseus", "kd"))
    if not own or not plain or not latencies:
        return []
    share = mean(100 * mine / theirs for mine, theirs in own)
    times = [size["6 layers"]["median"] / size["3 layers"]["median"] for size in latencies.values()]
    scores = [mean(mine for mine, _ in pairs) for pairs in (own, plain)]
    faster = " and ".join(f"{value:.2f}" for value in times)
    line = (
        f"- Theseus, 6 to 3 layers, keeps at least {KEPT}% of the score at {FASTER} times the speed: {share:.1f}%, "
        f"{faster} times ({', '.join(latencies)}): {mark(share >= KEPT and min(times) >= FASTER)}. Its accuracy is "
        f"{scores[0]:.1f}, that of plain KD in as many steps {scores[1]:.1f}. (The paper has 98% at 1.94 times the "
        "speed, for BERT-base on GLUE: Xu et al., 2020, arXiv:2002.02925.)"
    )
    return [line]


def low_rank(grid: Grid) -> list[str]:
    """Return what both factorisations lose without training."""
    whitened, plain = lost(grid, "whitened-50"), lost(grid, "svd-50")
    if whitened is None or plain is None:
        return []
    what = "Half of the encoder's maps by low rank, not trained"
    return [f"- {what}: whitened {whitened:+.1f} points lost, plain SVD {plain:+.1f}: {mark(whitened < plain)}."]
