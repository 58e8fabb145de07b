"""What every recipe promises, whatever it does; a new recipe is tested here by being registered."""

import json

import pytest
import torch

from tests.recipes.jobs import (
    RECIPES,
    SETTINGS,
    batches,
    distil,
    largest_difference,
    student_of,
    teacher_of,
    weights,
)
from textbrewer import TeacherCache, recipes

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


class StopError(Exception):
    pass


@every_recipe
def test_trains_the_student_and_leaves_the_teacher(recipe, tmp_path):
    teacher, student = teacher_of(recipe), student_of(recipe)
    before_T, before_S = weights(teacher), weights(student)
    asked, seen = [parameter.requires_grad for parameter in teacher.parameters()], []
    returned = distil(recipe, tmp_path, teacher, student, callback=lambda model, step: seen.append((model, step)))
    assert returned is student
    assert largest_difference(weights(teacher), before_T) == 0
    assert [parameter.requires_grad for parameter in teacher.parameters()] == asked
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert largest_difference(weights(student), before_S) > 1e-4
    assert all(value.isfinite().all() for value in student.state_dict().values())
    assert seen
    assert all(model is student for model, _ in seen)
    # The stages share the length that was asked for.
    assert sum(json.loads((tmp_path / "distill.json").read_text())["steps"]) == 4 * len(batches())


@every_recipe
def test_an_interrupted_run_comes_to_the_same_weights(recipe, tmp_path):
    whole = weights(distil(recipe, tmp_path / "whole"))
    seen = []

    def stop_late(model, step):
        seen.append(step)
        if len(seen) == 3:
            raise StopError

    def stop_early(model, step):
        raise StopError

    for callback in (stop_early, stop_late):
        try:
            distil(recipe, tmp_path / "cut", callback=callback)
        except StopError:
            continue
        # A chain's student gets few checkpoints: it may be through by then.
        assert callback is stop_late
    assert largest_difference(weights(distil(recipe, tmp_path / "cut")), whole) == 0


@every_recipe
def test_outputs_stored_on_disk_change_nothing(recipe, tmp_path):
    pytest.importorskip("lmdb")
    plain = weights(distil(recipe, tmp_path / "plain"))
    cache = TeacherCache(tmp_path / "cache", dtype="float32")
    if recipe == "deep-mutual-learning":
        with pytest.raises(ValueError, match="whose models all change at every step; leave them out"):
            distil(recipe, tmp_path / "stored", teacher_cache=cache)
        return
    assert largest_difference(weights(distil(recipe, tmp_path / "stored", teacher_cache=cache)), plain) < 1e-4


@every_recipe
def test_outputs_kept_in_memory_change_nothing(recipe, tmp_path):
    # Of a single batch, since the order of kept batches is drawn anew.
    data = {"dataloader": batches(1), "num_epochs": 8}
    if recipe == "deep-mutual-learning":
        with pytest.raises(ValueError, match="whose models all change at every step; leave them out"):
            distil(recipe, tmp_path / "kept", is_caching_logits=True, **data)
        return
    plain = weights(distil(recipe, tmp_path / "plain", **data))
    assert largest_difference(weights(distil(recipe, tmp_path / "kept", is_caching_logits=True, **data)), plain) < 1e-6


@every_recipe
def test_has_a_docstring_with_arguments_and_source(recipe):
    text = recipes.RECIPES[recipe].__doc__
    assert "Args:" in text
    assert "Reference:" in text


@every_recipe
def test_is_made_of_stages(recipe):
    stages = recipes.get(recipe)(teacher_of(recipe), student_of(recipe), **SETTINGS.get(recipe, {}))
    assert stages
    assert len({stage.name for stage in stages}) == len(stages)
    assert sum(stage.share for stage in stages) == pytest.approx(1.0) or recipe == "born-again"


@every_recipe
def test_refuses_a_setting_that_it_has_not(recipe, tmp_path):
    with pytest.raises(TypeError, match=f"recipe '{recipe}'.*temprature"):
        distil(recipe, tmp_path, temprature=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["tinybert", "minilmv2", "bert-emd"])
def test_of_a_student_of_another_width(recipe, tmp_path):
    options = {"attention": False} if recipe != "minilmv2" else {"relation_heads": 2}
    student = student_of(recipe, width=16, heads=2)
    before = weights(student)
    distil(recipe, tmp_path, student=student, **options)
    assert largest_difference(weights(student), before) > 1e-4
    torch.testing.assert_close(student.config.hidden_size, 16)
