"""Projections: the numbers of TextBrewer for a seed, and activations of their own."""

import math

import pytest
import torch
from torch import nn

from textbrewer.projections import GaussianProjection, linear_projection, projection_with_activation
from textbrewer.registry import PROJ_MAP

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}

# Printed by TextBrewer 0.2.1.post1 after torch.manual_seed(7): the weights of a projection from 2 to 3, and the number
# that torch.rand draws next.
WEIGHTS = [0.00755019206554, -0.0190182458609, -0.02382594347, -0.0330353155732, -0.0343539938331, -0.0201470218599]
NEXT = 0.413172721863


def linear_of(module):
    if isinstance(module, GaussianProjection):
        return module.mean
    return module if isinstance(module, nn.Linear) else module[0]


@pytest.mark.parametrize("name", ["linear", "relu", "tanh", "gaussian"])
def test_draws_textbrewers_random_numbers(name):
    torch.manual_seed(7)
    linear = linear_of(PROJ_MAP[name](2, 3))
    assert linear.weight.flatten().tolist() == pytest.approx(WEIGHTS, rel=1e-6)
    assert linear.bias.tolist() == [0.0] * 3
    assert torch.rand(()).item() == pytest.approx(NEXT, rel=1e-6)


def test_weights_are_normal_with_deviation_0_02():
    torch.manual_seed(0)
    weights = linear_projection(300, 400).weight.flatten().tolist()
    mean = sum(weights) / len(weights)
    deviation = math.sqrt(sum((weight - mean) ** 2 for weight in weights) / len(weights))
    assert abs(mean) < 0.02 * 5 / math.sqrt(len(weights))
    assert deviation == pytest.approx(0.02, rel=0.01)
    assert sum(abs(weight) < 0.02 for weight in weights) / len(weights) == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("name", ["linear", "relu", "tanh"])
def test_maps_the_last_dimension_by_an_affine_map_and_the_activation(name):
    torch.manual_seed(1)
    module = PROJ_MAP[name](2, 3)
    weight, bias = linear_of(module).weight.tolist(), [0.1, -0.2, 0.3]
    with torch.no_grad():
        linear_of(module).bias.copy_(torch.tensor(bias))
    x = torch.tensor([[[1.0, -2.0], [30.0, 4.0]]])
    out = module(x)
    assert out.shape == (1, 2, 3)
    function = {"linear": lambda v: v, "relu": lambda v: max(v, 0.0), "tanh": math.tanh}[name]
    for position in range(2):
        for k in range(3):
            affine = sum(weight[k][i] * x[0, position, i].item() for i in range(2)) + bias[k]
            assert out[0, position, k].item() == pytest.approx(function(affine), rel=1e-5)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_each_projection_has_its_own_activation(name):
    first, second = PROJ_MAP[name](2, 3), PROJ_MAP[name](2, 3)
    assert type(first[1]) is type(second[1]) is ACTIVATIONS[name]
    assert first[1] is not second[1]


def test_activations_with_parameters_are_not_shared():
    projection = projection_with_activation("PReLU")
    first, second = projection(2, 3), projection(2, 3)
    with torch.no_grad():
        first[1].weight.fill_(9.0)
    assert second[1].weight.item() == 0.25


def test_an_activation_may_be_a_module_class():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = projection_with_activation(Double)(2, 3)
    x = torch.ones(1, 2)
    assert isinstance(module[1], Double)
    assert torch.equal(module(x), 2 * module[0](x))


@pytest.mark.parametrize(
    ("act_fn", "error", "message"),
    [
        ("LeakyRelu", ValueError, r"got 'LeakyRelu'; did you mean 'LeakyReLU'\? known: .*GELU"),
        ("MultiheadAttention", ValueError, "must be the name of an activation in torch.nn"),
        ("F", ValueError, "known: .*Tanh"),
        (nn.Threshold, TypeError, "must be a module class that takes no arguments, got Threshold"),
        (nn.ReLU(), TypeError, r"must be the name of an activation or a module class, got ReLU\(\); .*known: .*GELU"),
        (None, TypeError, "must be the name of an activation or a module class, got None"),
    ],
)
def test_refuses_what_is_not_an_activation(act_fn, error, message):
    with pytest.raises(error, match=message):
        projection_with_activation(act_fn)


def test_gaussian_gives_an_affine_mean_and_a_variance_of_five_at_first():
    module = PROJ_MAP["gaussian"](2, 3)
    x = torch.tensor([[[1.0, -2.0], [30.0, 4.0]]])
    out = module(x)
    assert out.shape == (1, 2, 6)
    assert torch.equal(out[..., :3], module.mean(x))
    assert out[..., 3:].flatten().tolist() == pytest.approx([5.0] * 6, rel=1e-6)
    assert [tuple(parameter.shape) for parameter in module.parameters()] == [(3,), (3, 2), (3,)]


@pytest.mark.parametrize("raw", [-100.0, -1.0, 0.0, 3.0, 60.0])
def test_the_variance_is_the_softplus_and_never_zero(raw):
    module = PROJ_MAP["gaussian"](2, 3)
    with torch.no_grad():
        module.raw_variance.fill_(raw)
    expected = math.log1p(math.exp(raw)) + 1e-5
    assert module(torch.zeros(2))[3:].tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_the_variance_keeps_its_precision_under_autocast():
    module = PROJ_MAP["gaussian"](2, 3)
    with torch.no_grad():
        module.raw_variance.fill_(1.2345678)
    expected = module(torch.zeros(2))[3:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(torch.zeros(2))[3:], expected)


@pytest.mark.parametrize("name", ["linear", "relu", "tanh", "gaussian"])
@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [((0, 3), ValueError, "dim_in must be at least 1"), ((2, 2.5), ValueError, "dim_out must be a whole number")],
)
def test_refuses_widths_that_are_not_positive_whole_numbers(name, widths, error, message):
    with pytest.raises(error, match=message):
        PROJ_MAP[name](*widths)


def test_whole_numbers_written_as_floats_are_widths():
    assert linear_projection(2.0, 3.0).weight.shape == (3, 2)
