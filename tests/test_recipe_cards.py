"""The recipes' cards in the documentation: every setting described, formulas converted, results read."""

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

from textbrewer.recipes import RECIPES

EXTENSIONS = Path(__file__).parent.parent / "docs" / "_ext"


@pytest.fixture(scope="module")
def cards():
    sys.path.insert(0, str(EXTENSIONS))
    try:
        yield importlib.import_module("cards")
    finally:
        sys.path.remove(str(EXTENSIONS))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_card_with_its_settings_and_source(cards, name):
    text = cards.card(name, RECIPES[name], "so and so.")
    assert text.startswith(f"## {name}\n")
    for parameter in list(inspect.signature(RECIPES[name]).parameters)[2:]:
        assert f"| `{parameter}` |" in text
    assert "**When:**" in text
    assert "arXiv:" in text.partition("**Source:**")[2]
    assert "**Here:** so and so." in text
    assert ".. math::" not in text
    assert ":func:" not in text.replace("{py:func:}", "")


def test_formulas_become_those_of_the_page(cards):
    found = cards.with_dollars(
        "Before.\n\n.. math:: a = b\n\nBetween :math:`x_1`.\n\n.. math::\n    c = d \\\\\n    e\n\nAfter."
    )
    assert found == "Before.\n\n$$\na = b\n$$\n\nBetween $x_1$.\n\n$$\nc = d \\\\\ne\n$$\n\nAfter."


def test_a_setting_that_is_not_described_is_an_error(cards):
    def recipe(teacher, student, weight=1):
        """Do it.

        Args:
            teacher: one.
            student: another.
        """

    with pytest.raises(ValueError, match=r"must name each argument: \['weight'\]"):
        cards.settings_table(recipe)


def test_results_are_differences_of_means(cards, tmp_path):
    for method, scores in {"kd": [90, 92], "pretrained": [88.5, 89]}.items():
        for seed, score in enumerate(scores):
            path = tmp_path / "trec" / f"{method}-seed{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"score": score}))
    assert "trec +2.2 (2 seeds)" in cards.result_of(tmp_path, "kd")
    assert cards.result_of(tmp_path, "tinybert") == "not measured yet."


def test_the_readme_counts_the_recipes():
    assert f"[{len(RECIPES)} published ones]" in (EXTENSIONS.parent.parent / "README.md").read_text(encoding="utf-8")
