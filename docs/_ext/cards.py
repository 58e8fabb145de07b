"""Writes a card for each recipe: what it does, when to use it, its settings, its source, and what it gave here."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import tables

_MATH = re.compile(r"^\.\. math::(?P<line>[^\n]*)\n?(?P<block>(?:\n|[ ]{4}[^\n]*(?:\n|$))*)", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Returns|Raises|Reference):\s*$", re.MULTILINE)


def parts_of(docstring: str) -> dict[str, str]:
    """Return the text of a docstring and of its sections, by their names (``""``: what comes before them)."""
    text = inspect.cleandoc(docstring)
    found = [*_SECTION.finditer(text)]
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    names = ["", *(match.group(1) for match in found)]
    return {name: text[start:end].strip("\n") for name, start, end in zip(names, starts, ends, strict=True)}


def with_dollars(text: str) -> str:
    """Return reStructuredText's displayed formulas as a MyST page has them."""

    def replace(match: re.Match[str]) -> str:
        formula = f"{match['line'].strip()}\n{inspect.cleandoc(match['block'])}".strip()
        return f"$$\n{formula}\n$$\n\n"

    inline = re.sub(r":math:`([^`]+)`", r"$\1$", _MATH.sub(replace, text + "\n"))
    return tables.to_myst(inline).strip()


def settings_table(recipe: Callable[..., Any]) -> str:
    """Return a table of a recipe's settings, empty without any.

    Raises:
        ValueError: if the docstring does not describe each of them.
    """
    meanings = tables.args_of(recipe.__doc__ or "")
    parameters = list(inspect.signature(recipe).parameters.values())
    odd = {parameter.name for parameter in parameters} ^ set(meanings)
    if odd:
        raise ValueError(f"the Args section of {recipe.__name__} must name each argument: {sorted(odd)}")
    rows = [
        (f"`{parameter.name}`", f"`{parameter.default!r}`", with_dollars(meanings[parameter.name]))
        for parameter in parameters
        if parameter.default is not parameter.empty
    ]
    return tables.table(("Setting", "Default", "Meaning"), rows) if rows else ""


def card(name: str, recipe: Callable[..., Any], result: str) -> str:
    """Return the card of one recipe."""
    parts = parts_of(recipe.__doc__ or "")
    lines = [f"## {name}", "", with_dollars(parts[""]), "", settings_table(recipe)]
    lines += ["**Source:** " + " ".join(parts["Reference"].split()), "", f"**Here:** {result}", ""]
    return "\n".join(lines)


def scores(folder: Path, method: str) -> dict[str, list[float]]:
    """Return a method's final scores in the experiments, by task."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob(f"*/{method}-seed*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text(encoding="utf-8"))["score"])
    return found


def result_of(folder: Path, method: str, baseline: str = "pretrained") -> str:
    """Return in words what a method gave, beside the same student without a teacher."""
    own, other = scores(folder, method), scores(folder, baseline)
    shared = [task for task in own if task in other]
    if not shared:
        return "not measured yet."
    gains = ", ".join(f"{task} {mean(own[task]) - mean(other[task]):+.1f}" for task in shared)
    counts = sorted({len(own[task]) for task in shared})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    return f"in points, against the tuned student without a teacher: {gains} ({seeds}); see [](experiments.md)."


def all_cards(recipes: Mapping[str, Callable[..., Any]], folder: Path) -> str:
    """Return the cards of all recipes."""
    return "\n".join(card(name, recipe, result_of(folder, name)) for name, recipe in recipes.items())


def overview(recipes: Mapping[str, Callable[..., Any]]) -> str:
    """Return a table of all recipes: name, what it does, settings."""
    rows: list[Sequence[str]] = []
    for name, recipe in recipes.items():
        parameters = list(inspect.signature(recipe).parameters)[2:]
        settings = ", ".join(f"`{parameter}`" for parameter in parameters)
        rows.append((f"[{name}](#{name.lower()})", with_dollars(tables.first_line(recipe)), settings))
    return tables.table(("Recipe", "What it is", "Settings"), rows)
