"""Published recipes: ``get(name)(teacher, student) -> list of Stage``; :func:`textbrewer.distill` runs them."""

# Imported for their entries: each module registers its recipes when it is loaded.
from textbrewer.recipes import annealing, chains, classic, dynamic, kd, minilm, mobilebert, pkd, tinybert  # noqa: F401
from textbrewer.recipes.lengths import lengths_of
from textbrewer.recipes.optimisation import make_optimizer
from textbrewer.recipes.stage import RECIPES, Recipe, Stage, get, with_kd_loss

__all__ = ["RECIPES", "Recipe", "Stage", "get", "lengths_of", "make_optimizer", "with_kd_loss"]
