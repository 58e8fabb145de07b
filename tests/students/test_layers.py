import pytest
from torch import nn

from tests.students.models import make
from textbrewer.matching import layer_map
from textbrewer.students import FAMILIES, uniform_layers
from textbrewer.students.layers import chosen_layers, find_towers, source_name


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (3, 6, [1, 3, 5]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (5, 12, [1, 4, 6, 9, 11]),
        (1, 12, [11]),
        (4, 4, [0, 1, 2, 3]),
        (2, 5, [2, 4]),
    ],
)
def test_uniform_layers(count, total, expected):
    assert uniform_layers(count, total) == expected


@pytest.mark.parametrize("total", range(1, 14))
def test_uniform_layers_are_spread_evenly_and_end_with_the_last(total):
    for count in range(1, total + 1):
        layers = uniform_layers(count, total)
        steps = [after - before for before, after in zip([-1, *layers], layers)]
        assert len(layers) == count
        assert layers[-1] == total - 1
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("total", range(1, 14))
def test_a_students_layers_are_those_that_the_uniform_map_matches_them_with(total):
    for count in range(1, total + 1):
        teachers, students = zip(*layer_map("uniform", total, count))
        assert [layer + 1 for layer in uniform_layers(count, total)] == list(teachers)
        assert students == tuple(range(1, count + 1))


def test_chosen_layers_of_each_kind():
    assert chosen_layers(None, 3) == [0, 1, 2]
    assert chosen_layers(2, 4) == [1, 3]
    assert chosen_layers([3, 0], 4) == [3, 0]
    assert chosen_layers(range(0, 4, 3), 4) == [0, 3]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (5, ValueError, "at most the teacher's 4, got 5"),
        (0, ValueError, "at least 1"),
        (True, TypeError, "a number of layers, a list of layer numbers, or None"),
        ("2", TypeError, "got '2'"),
        (1.5, ValueError, "whole number"),
        ([], ValueError, "at least one layer"),
        ([1, 1], ValueError, "none twice"),
        ([4], ValueError, "at most 3, counted from 0, got 4"),
        ([-1], ValueError, "at least 0"),
    ],
)
def test_layers_that_are_not_there(layers, error, message):
    with pytest.raises(error, match=message):
        chosen_layers(layers, 4)


def test_a_tuple_is_for_encoder_and_decoder():
    bart = make("bart")
    towers = find_towers(bart, FAMILIES["bart"], (1, [0, 2]))
    assert [(tower.path, tower.picked) for tower in towers] == [
        ("model.encoder.layers", (3,)),
        ("model.decoder.layers", (0, 2)),
    ]
    assert source_name("model.decoder.layers.1.fc1.weight", towers) == "model.decoder.layers.2.fc1.weight"
    assert source_name("model.encoder.layers.0.fc1.weight", towers) == "model.encoder.layers.3.fc1.weight"
    assert source_name("model.shared.weight", towers) == "model.shared.weight"
    with pytest.raises(ValueError, match="name layers in a list"):
        find_towers(make("bert-lm"), FAMILIES["bert"], (0, 2))


def test_a_model_without_the_familys_stack():
    with pytest.raises(ValueError, match=r"must have its layers in a list named encoder\.layer, got none"):
        find_towers(nn.Linear(2, 2), FAMILIES["bert"], None)


def test_a_name_that_fits_two_stacks():
    model = nn.Module()
    model.one, model.two = nn.Module(), nn.Module()
    model.one.h, model.two.h = (nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))
    with pytest.raises(ValueError, match=r"one list of layers named h, got one\.h, two\.h"):
        find_towers(model, FAMILIES["gpt2"], None)
