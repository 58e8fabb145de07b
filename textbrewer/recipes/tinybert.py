"""TinyBERT: attention scores and hidden states first, predictions after them."""

from __future__ import annotations

from typing import Any

from torch import nn

from textbrewer import checks
from textbrewer.configurations import DistillationConfig
from textbrewer.matching import layer_map
from textbrewer.recipes.stage import RECIPES, Stage, attention_loss, depths, equal_heads, several


def transformer_matches(teacher: nn.Module, student: nn.Module, attention: bool, recipe: str) -> list[dict[str, Any]]:
    """Return TinyBERT's matches of layers: hidden states through one shared projection, and attention scores.

    Args:
        teacher: the teacher.
        student: the student.
        attention: whether the attention scores are matched.
        recipe: the recipe's name, for messages.

    Raises:
        ValueError: if attention is to be matched between models with other numbers of heads.
    """
    checks.is_a(attention, bool, "attention", "True or False")
    pairs = layer_map("uniform", *depths(teacher, student, recipe))
    layers_T, layers_S = ([pair[side] for pair in pairs] for side in (0, 1))
    hidden = {"feature": "hidden", "loss": "hidden_mse", "weight": 1, "strategy": "pairwise", "proj": "linear"}
    matches = [several(hidden, [0, *layers_T], [0, *layers_S])]
    if attention:
        equal_heads(teacher, student, recipe, "set attention=False, or give the student as many heads")
        loss = attention_loss("scores_mse", teacher, student)
        scores = {"feature": "scores", "loss": loss, "weight": 1, "strategy": "pairwise"}
        # Scores have no entry for the embeddings: layer 1 is at place 0.
        matches.append(several(scores, [layer - 1 for layer in layers_T], [layer - 1 for layer in layers_S]))
    return matches


@RECIPES.add("tinybert-general")
def tinybert_general(
    teacher: nn.Module, student: nn.Module, attention: bool = True, learning_rate: float | None = None
) -> list[Stage]:
    """TinyBERT's general distillation: intermediate layers alone, from a teacher that is not fine-tuned, on plain text.

    Published: 3 epochs of the pretraining corpus, batches of 256. The student is fine-tuned or distilled on a task
    afterwards, see ``"tinybert"``.

    **When:** the student starts at random and there is much text without labels.

    Args:
        teacher: the pretrained teacher.
        student: the student.
        attention: whether attention scores are matched; needs equal numbers of heads.
        learning_rate: the run's by default.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, sections 3.1, 3.2 (general distillation) and 4.2.
    """
    matches = transformer_matches(teacher, student, attention, "tinybert-general")
    config = DistillationConfig(kd_loss_weight=0, intermediate_matches=matches)
    return [Stage("general", config, learning_rate=learning_rate)]


@RECIPES.add("tinybert")
def tinybert(
    teacher: nn.Module,
    student: nn.Module,
    attention: bool = True,
    temperature: float = 1.0,
    intermediate_share: float = 0.75,
    intermediate_learning_rate: float | None = None,
    prediction_learning_rate: float | None = None,
) -> list[Stage]:
    """TinyBERT's task distillation: intermediate layers of the fine-tuned teacher first, then its predictions.

    The first stage matches the hidden states (embeddings included, through one projection shared by all layers) and
    the raw attention scores of uniformly mapped layers, all with weight 1; the second has the soft cross-entropy alone.
    Published for BERT: 10 to 20 epochs at 5e-5 and 3 epochs at 3e-5 (learning rates for a student that has been through
    general distillation), on augmented data. The authors' code divides the soft cross-entropy by the number of classes
    as well; this one does not.

    **When:** a narrow or randomly started student, many steps, augmented or unlabelled text. With few steps a recipe of
    one stage makes better use of them.

    Args:
        teacher: the fine-tuned teacher.
        student: the student.
        attention: whether attention scores are matched; needs equal numbers of heads.
        temperature: of the prediction stage; 1 in the paper.
        intermediate_share: the first stage's share of the steps; published: 10 of 13 epochs and more.
        intermediate_learning_rate: the run's by default.
        prediction_learning_rate: the run's by default.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, sections 3.1, 3.2 and 4.2.
    """
    checks.number(intermediate_share, "intermediate_share", above=0, below=1)
    matches = transformer_matches(teacher, student, attention, "tinybert")
    return [
        Stage(
            "intermediate",
            DistillationConfig(kd_loss_weight=0, intermediate_matches=matches),
            share=intermediate_share,
            learning_rate=intermediate_learning_rate,
        ),
        Stage(
            "prediction",
            DistillationConfig(temperature=temperature, kd_loss_type="ce"),
            share=1 - intermediate_share,
            learning_rate=prediction_learning_rate,
        ),
    ]
