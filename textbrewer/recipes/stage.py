"""What a recipe is made of: stages, each a configuration with what differs from stage to stage; and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.hooks.forward import is_encoder_decoder
from textbrewer.losses.softened import OF_CLASSES
from textbrewer.matching import number_of_layers
from textbrewer.registry import Registry, name_of

__all__ = ["RECIPES", "Recipe", "Stage", "attention_loss", "depths", "get", "is_causal", "width_of", "with_kd_loss"]

RECIPES = Registry("recipe")
"""Recipes: ``f(teacher, student, **settings) -> [Stage, ...]``."""

Recipe = Callable[..., "list[Stage]"]


@dataclass
class Stage:
    """One training of a recipe.

    Args:
        name: what to call it in folders and messages, such as ``"intermediate"``.
        config: what the student learns.
        share: how much of the run's steps it takes, beside those of the other stages.
        learning_rate: the published one, where there is one; ``None``: the run's.
        teacher: who teaches, if not the run's teacher.
        student: who learns, if not the run's student.
        peers: further students that learn from each other with it, without a teacher (deep mutual learning).
        frozen: dotted names of the student's modules that do not train in this stage.

    Raises:
        TypeError, ValueError: if a value is of another type or out of range.
    """

    name: str
    config: DistillationConfig
    share: float = 1.0
    learning_rate: float | None = None
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    peers: Sequence[nn.Module] = ()
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        checks.is_a(self.config, DistillationConfig, "config of a stage", "a DistillationConfig")
        checks.number(self.share, "share of a stage", above=0)
        if self.learning_rate is not None:
            checks.number(self.learning_rate, "learning_rate of a stage", above=0)


def get(name: str) -> Recipe:
    """Return a recipe by its name: ``get("tinybert")(teacher, student) -> list of Stage``.

    Raises:
        KeyError: if there is none of that name; the message lists them.
    """
    recipe: Recipe = RECIPES[name]
    return recipe


def with_kd_loss(stages: Sequence[Stage], loss: str | list[Any] | None, recipe: str) -> list[Stage]:
    """Return a recipe's stages with another loss between the logits, in place of that between probabilities of classes.

    ``"mse"`` comes with temperature 1: the outputs of a regression are compared as they are.

    Args:
        stages: the recipe's.
        loss: a name of ``KD_LOSS_MAP`` or ``[name, {constant: value}]``; ``None``: the stages stay as they are.
        recipe: its name, for messages.

    Raises:
        ValueError: if the loss is unknown, or no stage has one to replace.
    """
    if loss is None:
        return list(stages)
    of_classes = [bool(it.config.kd_loss_weight) and name_of(it.config.kd_loss_type) in OF_CLASSES for it in stages]
    if not any(of_classes):
        raise ValueError(
            f"kd_loss_type={loss!r} would replace a loss between probabilities of classes, and recipe {recipe!r} has "
            "none here; leave it out"
        )
    given: dict[str, Any] = {"kd_loss_type": loss} | ({"temperature": 1.0} if loss == "mse" else {})
    return [
        replace(stage, config=replace(stage.config, **given)) if other else stage
        for stage, other in zip(stages, of_classes, strict=True)
    ]


def depths(teacher: nn.Module, student: nn.Module, recipe: str) -> tuple[int, int]:
    """Return the teacher's and the student's number of layers.

    Raises:
        ValueError: if they cannot be told, or the student is deeper than its teacher.
    """
    layers_T, layers_S = number_of_layers(teacher), number_of_layers(student)
    if layers_S > layers_T:
        raise ValueError(
            f"recipe {recipe!r} needs a student with at most as many layers as its teacher ({layers_T}), got {layers_S}"
        )
    return layers_T, layers_S


def width_of(model: nn.Module, who: str, recipe: str) -> int:
    """Return the width of a model's hidden states.

    Raises:
        ValueError: if its configuration does not tell.
    """
    config = getattr(model, "config", None)
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    raise ValueError(
        f"recipe {recipe!r} must know the width of the {who}'s hidden states, and {type(model).__name__} has no config "
        "that tells it; write the matches yourself, with a GeneralDistiller"
    )


def projection(teacher: nn.Module, student: nn.Module, recipe: str) -> str | None:
    """Return the projection of the student's hidden states that a recipe needs: ``None`` where the widths are equal."""
    same = width_of(teacher, "teacher", recipe) == width_of(student, "student", recipe)
    return None if same else "linear"


def heads_of(model: nn.Module, who: str, recipe: str) -> int:
    """Return the number of a model's attention heads.

    Raises:
        ValueError: if its configuration does not tell.
    """
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "n_heads", "n_head", "num_heads", "decoder_attention_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int):
            return heads
    raise ValueError(
        f"recipe {recipe!r} must know the number of attention heads of the {who}, and {type(model).__name__} has no "
        "config that tells it; write the matches yourself, with a GeneralDistiller"
    )


def attention_loss(name: str, *models: nn.Module) -> str | list[Any]:
    """Return a loss between attention scores; where one of the models is causal, without the keys after each query."""
    return [name, {"causal": True}] if any(is_causal(model) for model in models) else name


def is_causal(model: nn.Module) -> bool:
    """Return whether the layers that matches name attend to no later position.

    So do decoders, by their config or their attention modules; of a model with encoder and decoder the matches name the
    decoder's layers, see :func:`~textbrewer.hooks.attention_modules`.

    Args:
        model: the model.
    """
    if is_encoder_decoder(model) or getattr(getattr(model, "config", None), "is_decoder", False) is True:
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def equal_heads(teacher: nn.Module, student: nn.Module, recipe: str, remedy: str) -> None:
    """Raise ValueError unless both models have as many attention heads."""
    heads = heads_of(teacher, "teacher", recipe), heads_of(student, "student", recipe)
    if heads[0] != heads[1]:
        raise ValueError(
            f"recipe {recipe!r} compares attention head by head: student and teacher must have as many, got {heads[1]} "
            f"and {heads[0]}; {remedy}"
        )


def several(match: dict[str, Any], layers_T: Sequence[int], layers_S: Sequence[int]) -> dict[str, Any]:
    """Return a match with the given lists of layers."""
    return {**match, "layer_T": list(layers_T), "layer_S": list(layers_S)}
