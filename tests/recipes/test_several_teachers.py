"""Recipes with a list of teachers."""

import copy
import json

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.recipes.jobs import (
    RECIPES,
    bert,
    distil,
    largest_difference,
    student_of,
    teacher_of,
    weights,
)

TAUGHT = [name for name in RECIPES if name != "deep-mutual-learning"]


class Mean(torch.nn.Module):
    """Several models as one with the mean of their logits."""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, **batch):
        logits = [model(**batch).logits for model in self.models]
        return SequenceClassifierOutput(logits=sum(logits) / len(logits))


def logits_alone(batch, outputs):
    return {"logits": outputs.logits}


@pytest.mark.parametrize("recipe", TAUGHT)
def test_equal_teachers_teach_what_one_does(recipe, tmp_path):
    teacher = teacher_of(recipe)
    one = weights(distil(recipe, tmp_path / "one", teacher))
    two = weights(distil(recipe, tmp_path / "two", [teacher, copy.deepcopy(teacher)]))
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize("recipe", TAUGHT)
def test_another_teacher_beside_the_first_makes_a_difference(recipe, tmp_path):
    teacher, other = teacher_of(recipe), copy.deepcopy(teacher_of(recipe))
    with torch.no_grad():
        other.classifier.weight.mul_(30)
    given = {"num_epochs": 2}
    one = weights(distil(recipe, tmp_path / "one", teacher, **given))
    two = weights(distil(recipe, tmp_path / "two", [teacher, other], **given))
    reads_layers_alone = recipe == "tinybert-general"
    assert (largest_difference(one, two) == 0) == reads_layers_alone


def test_the_student_learns_the_mean_of_the_logits(tmp_path):
    teachers = [bert(4, seed=seed).eval() for seed in (1, 5, 6)]
    mean = distil("kd", tmp_path / "mean", Mean(teachers), adaptor_T=logits_alone)
    several = distil("kd", tmp_path / "several", torch.nn.ModuleList(teachers), adaptor_T=[logits_alone] * 3)
    assert largest_difference(weights(mean), weights(several)) < 1e-6


def test_another_target_is_another_distillation(tmp_path):
    teachers = [bert(4, seed=seed).eval() for seed in (1, 5)]
    logits = weights(distil("kd", tmp_path / "logits", teachers))
    probabilities = weights(distil("kd", tmp_path / "probs", teachers, target="mean_probs"))
    assert largest_difference(logits, probabilities) > 1e-6
    weighted = ["mean_logits", {"weights": [1, 0]}]
    first = weights(distil("kd", tmp_path / "first", teachers, target=weighted))
    assert largest_difference(first, weights(distil("kd", tmp_path / "one", teachers[0]))) < 1e-6
    with pytest.raises(ValueError, match=r"holds another distillation .*mean_probs"):
        distil("kd", tmp_path / "probs", teachers)
    with pytest.raises(ValueError, match=r"holds another distillation .*teacher"):
        distil("kd", tmp_path / "logits", teachers[:1])


def test_goes_on_where_it_was_interrupted(tmp_path):
    teachers = [bert(4, seed=seed).eval() for seed in (1, 5)]
    whole = weights(distil("tinybert", tmp_path / "whole", teachers))

    def stop(model, step):
        raise KeyboardInterrupt

    for _ in range(2):  # at the end of the first pass, and of the second
        with pytest.raises(KeyboardInterrupt):
            distil("tinybert", tmp_path / "cut", teachers, callback=stop)
    assert largest_difference(weights(distil("tinybert", tmp_path / "cut", teachers)), whole) == 0


def test_a_stage_of_layers_alone_asks_the_first_teacher_alone(tmp_path):
    first, second = teacher_of("tinybert"), bert(4, seed=5).eval()
    calls = {"first": 0, "second": 0}

    def count(name):
        def hook(module, inputs):
            calls[name] += 1

        return hook

    # In the embeddings: a teacher may stop before its last layer.
    first.bert.embeddings.register_forward_pre_hook(count("first"))
    second.bert.embeddings.register_forward_pre_hook(count("second"))
    distil("tinybert", tmp_path, [first, second], student_of("tinybert"), num_epochs=2)
    layers, logits = json.loads((tmp_path / "distill.json").read_text())["steps"]
    assert (calls["first"], calls["second"]) == (layers + logits, logits)
