"""Recipes for outputs that are not classes which exclude each other: a regression, several labels at once."""

import warnings

import pytest
import torch
from torch import nn

from tests.recipes.jobs import RECIPES, SETTINGS, batches, bert, distil, largest_difference, layers_of, weights
from textbrewer import recipes

WITHOUT = ("tinybert-general", "annealing-kd")  # no loss between probabilities


def with_labels(make):
    return [{**batch, "labels": make(torch.Generator().manual_seed(3))} for batch in batches()]


def numbers():
    return with_labels(lambda generator: torch.randn(4, generator=generator))


def several_at_once():
    return with_labels(lambda generator: torch.randint(0, 2, (4, 3), generator=generator).float())


def distributions():
    return with_labels(lambda generator: torch.rand(4, 3, generator=generator).softmax(-1))


def pair(recipe="kd", labels=1):
    """Return a teacher whose outputs differ from row to row, and a student."""
    teacher = bert(max(4, layers_of(recipe)), seed=1, labels=labels).eval()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
        teacher.classifier.bias.add_(2)
    student = bert(layers_of(recipe), seed=2, labels=labels)
    if labels > 1:
        teacher.config.problem_type = student.config.problem_type = "multi_label_classification"
    return teacher, student


def distance(teacher, student):
    """Return the mean squared difference of the outputs."""
    with torch.no_grad():
        both = [
            [model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in batches()]
            for model in (teacher.eval(), student.eval())
        ]
    return float((torch.cat(both[0]) - torch.cat(both[1])).square().mean())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in WITHOUT])
def test_a_regression_learns_the_teachers_numbers(recipe, tmp_path):
    teacher, student = pair(recipe)
    with torch.no_grad():  # a teacher that knows its task: some recipes learn the labels too
        data = [{**batch, "labels": teacher(**{**batch, "labels": None}).logits[:, 0]} for batch in batches()]
    given = {"dataloader": data, "num_epochs": 8, "learning_rate": 3e-3}
    with pytest.raises(ValueError, match=r"textbrewer\.distill: kd_loss_type='mse'"):
        distil(recipe, tmp_path / "classes", teacher, student, **given)
    teacher, student = pair(recipe)
    before = distance(teacher, student)
    distil(recipe, tmp_path / "numbers", teacher, student, kd_loss_type="mse", **given)
    assert distance(teacher, student) < 0.6 * before


@pytest.mark.parametrize(
    ("kind", "own"),
    [("mse", {"loss": "mse", "temperature": 1}), ("sigmoid", {"loss": "sigmoid"})],
)
def test_equals_the_recipe_with_that_loss(kind, own, tmp_path):
    first = weights(distil("kd", tmp_path / "first", *pair(), dataloader=numbers(), kd_loss_type=kind))
    second = weights(distil("kd", tmp_path / "second", *pair(), dataloader=numbers(), **own))
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_stages_with_a_loss_between_classes_change(recipe):
    made = recipes.get(recipe)(*pair(recipe), **SETTINGS.get(recipe, {}))
    before = [(stage.config.kd_loss_type, stage.config.temperature) for stage in made]
    if recipe in WITHOUT:
        with pytest.raises(ValueError, match=f"recipe '{recipe}' has none here; leave it out"):
            recipes.with_kd_loss(made, "mse", recipe)
        return
    found = recipes.with_kd_loss(made, "mse", recipe)
    assert before == [(stage.config.kd_loss_type, stage.config.temperature) for stage in made]
    assert any(stage.config.kd_loss_type == "mse" for stage in found)
    for old, new in zip(made, found, strict=True):
        if old.config.kd_loss_weight == 0:
            assert new is old
        elif new is not old:
            assert (new.config.kd_loss_type, new.config.temperature) == ("mse", 1)
            assert new.config.intermediate_matches == old.config.intermediate_matches
            assert (new.name, new.share, new.frozen) == (old.name, old.share, old.frozen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kd_loss_type": "mes"}, "did you mean 'mse'"),
        ({"kd_loss_type": "mse", "loss": "mse"}, "recipe 'kd' has none here"),
    ],
)
def test_what_cannot_be_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distil("kd", tmp_path, *pair(), **given)
    assert not list(tmp_path.iterdir())


def test_another_loss_is_another_distillation(tmp_path):
    distil("kd", tmp_path, *pair(labels=3), dataloader=several_at_once(), kd_loss_type="sigmoid")
    with pytest.raises(ValueError, match=r"holds another distillation .kd_loss_type 'sigmoid', here 'mse'"):
        distil("kd", tmp_path, *pair(labels=3), dataloader=several_at_once(), kd_loss_type="mse")


def test_several_labels_at_once_and_a_softmax_warn(tmp_path):
    with pytest.warns(UserWarning, match="a row may have several, or none; use 'sigmoid'") as caught:
        distil("kd", tmp_path, *pair(labels=3), dataloader=several_at_once())
    assert sum("may have several" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(("data", "kind"), [(several_at_once, "sigmoid"), (distributions, None), (batches, None)])
def test_others_do_not_warn(data, kind, tmp_path):
    models = pair(labels=3)
    for model in models:
        model.config.problem_type = "multi_label_classification" if data is several_at_once else None
    if data is distributions:  # the models of transformers have no loss of them
        models = [WithoutLoss(model) for model in models]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*may have several")
        distil("kd", tmp_path, *models, dataloader=data(), kd_loss_type=kind, adaptor_T=adaptor, adaptor_S=adaptor)


class WithoutLoss(nn.Module):
    """A model that does not read the labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def adaptor(batch, outputs):
    return {"logits": outputs.logits, "labels": batch["labels"]}
