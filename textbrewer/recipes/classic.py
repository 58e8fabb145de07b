"""TextBrewer's own sets of matches, by the names of the students that they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from textbrewer.configurations import DistillationConfig
from textbrewer.matching import layer_map
from textbrewer.recipes.stage import RECIPES, Stage, depths, projection

# By name: layers; every which of them is matched; what the student is; the original's list of the nst matches.
_STUDENTS = {
    "L3": (3, 1, "the first student of its paper: 3 layers as wide as the teacher's (T3)", "L3_hidden_smmd"),
    "L3n": (3, 1, "3 narrow layers (T3-small)", "L3_hidden_smmd"),
    "L4t": (4, 1, "4 narrow layers of width 312, as TinyBERT's (T4-tiny)", "L4_hidden_smmd"),
    "L6": (6, 1, "6 layers as wide as the teacher's (T6)", "L6_hidden_smmd"),
    "small": (12, 2, "12 narrow layers of width 256, as ELECTRA-small's (T12-nano)", "small_hidden_smmd"),
}


def _recipe(key: str, layers: int, every: int, what: str, relations: str) -> Callable[..., list[Stage]]:
    name = f"textbrewer-{key}"
    which = " Of the layers every second one is matched: 0, 2, 4 and so on." if every == 2 else ""

    def recipe(
        teacher: nn.Module,
        student: nn.Module,
        temperature: float = 8.0,
        hidden_weight: float = 1.0,
        relation_weight: float = 1.0,
    ) -> list[Stage]:
        layers_T, layers_S = depths(teacher, student, name)
        if layers_S != layers:
            wanted = [f"textbrewer-{other}" for other, (count, *_) in _STUDENTS.items() if count == layers_S]
            remedy = f"use {' or '.join(map(repr, wanted))}" if wanted else "use 'hidden', for any number of layers"
            raise ValueError(f"recipe {name!r} is for students of {layers} layers, got {layers_S}; {remedy}")
        proj = projection(teacher, student, name)
        matches: list[dict[str, Any]] = []
        for layer_T, layer_S in layer_map("uniform", layers_T, layers_S, embeddings=True)[::every]:
            place: dict[str, Any] = {"feature": "hidden", "layer_T": layer_T, "layer_S": layer_S}
            state = {**place, "loss": "hidden_mse", "weight": hidden_weight}
            matches.append(state if proj is None else {**state, "proj": proj})
            pair = {"layer_T": [layer_T, layer_T], "layer_S": [layer_S, layer_S]}
            matches.append({**place, **pair, "loss": "nst", "weight": relation_weight})
        config = DistillationConfig(temperature=temperature, kd_loss_type="ce", intermediate_matches=matches)
        return [Stage(name, config)]

    recipe.__name__ = name.replace("-", "_")
    recipe.__doc__ = f"""TextBrewer's matches for {what}.

    Cross-entropy at temperature 8 without labels, mean squared error between uniformly mapped hidden states (projected
    where the widths differ) and ``nst`` between the products of the positions, all with weight 1.{which}

    **When:** results of TextBrewer are to be reproduced, or a student without any labels is wanted.

    Args:
        teacher: the fine-tuned teacher.
        student: the student, of {layers} layers.
        temperature: of the KD loss; published 8.
        hidden_weight: of each match of states.
        relation_weight: of each ``nst`` match.

    Reference:
        Yang et al., "TextBrewer", 2020, arXiv:2002.12620, section 4.1; matches from the examples of its repository
        (``{key}_hidden_mse`` and ``{relations}``).
    """
    return recipe


for _key, _student in _STUDENTS.items():
    RECIPES[f"textbrewer-{_key}"] = _recipe(_key, *_student)
