"""Weights in groups: their sums, and which of them stay, against plain loops."""

import pytest
import torch
from torch import nn

from tests.students.models import HEADS, HIDDEN, UNITS, make
from textbrewer.compression.choosing import keep_largest
from textbrewer.compression.trained.choosing import largest, share_gone
from textbrewer.compression.trained.groups import BlockGroups
from textbrewer.compression.trained.targets import unit_groups, weight_groups


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 1), (None, 3), (2, None)])
def test_blocks(block, transposed):
    outputs, inputs = 4, 6
    weight = torch.randn(outputs, inputs)
    parameter = nn.Parameter(weight.T.contiguous() if transposed else weight)
    groups = BlockGroups("weight", parameter, block, transposed)
    rows, columns = block[0] or outputs, block[1] or inputs
    expected = {}
    for row in range(outputs):
        for column in range(inputs):
            place = (row // rows, column // columns)
            expected[place] = expected.get(place, 0.0) + float(weight[row, column])
    order = sorted(expected, key=lambda place: place[::-1] if transposed else place)
    torch.testing.assert_close(groups.sums([parameter.detach()]), torch.tensor([expected[place] for place in order]))
    assert groups.count == len(expected)
    (numbers,) = groups.spread(torch.arange(groups.count))
    numbers = numbers.T if transposed else numbers
    for row in range(outputs):
        for column in range(inputs):
            assert order[int(numbers[row, column])] == (row // rows, column // columns)


def test_blocks_that_do_not_divide():
    with pytest.raises(ValueError, match=r"block must divide 'w', of 4 outputs and 6 inputs, got \(3, 2\)"):
        BlockGroups("w", nn.Parameter(torch.zeros(4, 6)), (3, 2))
    with pytest.raises(ValueError, match="which is no matrix"):
        BlockGroups("w", nn.Parameter(torch.zeros(4, 6, 3)), (2, 2))


@pytest.mark.parametrize("readers", [True, False])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama", "t5"])
def test_units(name, readers):
    """A unit's weights are those in which a shrunk model differs: found by slicing the tensors by hand."""
    model = make(name)
    values = {key: parameter.detach() for key, parameter in model.named_parameters(remove_duplicate=False)}
    for groups in unit_groups(model, ["heads", "ffn"], (), readers):
        width = HIDDEN // HEADS if groups.kind == "heads" else 1
        expected = torch.zeros(groups.count)
        for key in groups.parameters:
            expected += slices(key, values[key], groups.count, width)
        found = groups.sums([values[key] for key in groups.parameters])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for parameter, numbers in zip(groups.parameters.values(), groups.spread(torch.arange(groups.count))):
            ones = [numbers.expand_as(parameter) == unit for unit in range(groups.count)]
            sums = torch.stack([parameter.detach()[one].sum() for one in ones])
            own = groups.sums(
                [
                    other.detach() if other is parameter else torch.zeros_like(other)
                    for other in groups.parameters.values()
                ]
            )
            torch.testing.assert_close(own, sums, rtol=1e-4, atol=1e-4)


def slices(key, value, count, width):
    """Return the sums of the units' slices of one weight, told by its name."""
    inputs = ("c_attn", "c_fc")
    if key.endswith(tuple(f"{one}.weight" for one in (*inputs, "c_proj"))):
        value = value.T  # GPT-2 has its weights the other way round
    reads = ("o_proj", "down_proj", "c_proj", "attention.output.dense", ".o", ".wo")
    module = key.removesuffix(".weight")
    reading = module.endswith(reads) or (module.endswith("output.dense") and value.shape[1] in (UNITS, HIDDEN))
    lines = value.T if reading else value
    if module.endswith("c_attn"):
        return sum(part.reshape(count, -1).sum(1) for part in lines.split(HIDDEN))
    return lines.reshape(count, -1).sum(1)


@pytest.mark.parametrize("count", [0, 1, 4, 9, 10])
def test_the_largest_stay(count):
    scores = torch.tensor([0.0, 2.0, 1.0, 0.0, 1.0, 3.0, 1.0, -1.0, 0.0, 2.0])
    order = sorted(range(10), key=lambda place: (-float(scores[place]), place))
    mask = keep_largest(scores, count)
    assert mask.nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_weights_go_by_their_scores(scope):
    model = make("bert-classifier")
    groups = weight_groups(model, ["*.layer.0.*"], ["*.output.dense"])
    assert len(groups) == 4
    scores = [torch.rand(one.count) for one in groups]
    masks = largest(groups, scores, {"weights": 0.3}, scope)
    if scope == "uniform":
        for one, score, mask in zip(groups, scores, masks):
            gone = int(0.3 * one.count)
            assert int((~mask).sum()) == gone
            assert score[~mask].max() < score[mask].min()
    else:
        score, mask = torch.cat(scores), torch.cat(masks)
        assert int((~mask).sum()) == int(0.3 * len(score))
        assert score[~mask].max() < score[mask].min()
    zeros = sum(int((~mask).sum()) for mask in masks)
    assert float(share_gone(groups, masks)) == pytest.approx(zeros / sum(one.count for one in groups))


def test_what_is_pruned_when_nothing_is_named():
    """The linear maps of attentions and feed-forward parts, no pooler, classifier, norm or embedding."""
    names = {one.name for one in weight_groups(make("bert-classifier", num_hidden_layers=1), None, ())}
    layer = "bert.encoder.layer.0"
    attention = {f"{layer}.attention.self.{one}.weight" for one in ("query", "key", "value")}
    others = {f"{layer}.{one}.dense.weight" for one in ("attention.output", "intermediate", "output")}
    assert names == attention | others


def test_what_a_pattern_fits():
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3), "head": nn.Linear(3, 2)})
    assert {one.name for one in weight_groups(model, ["*"], ())} == {"conv.weight", "head.weight"}
    assert {one.name for one in weight_groups(model, ["*"], ["head"])} == {"conv.weight"}
    with pytest.raises(ValueError, match="must name linear modules or convolutions"):
        weight_groups(model, ["norm"], ())
    with pytest.raises(KeyError, match=r"modules: the model .* has no module 'tail'"):
        weight_groups(model, ["tail"], ())
    with pytest.raises(ValueError, match="whose family is unknown"):
        weight_groups(model, None, ())
