"""The one module that is trained: the student with its projections; and how models are called."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from tests.conftest import Encoder, adaptor, make_loader
from textbrewer import CustomMatch, IntermediateMatch
from textbrewer.distillers.student import StudentModule
from textbrewer.hooks.forward import call
from textbrewer.matching import plan_matches


class Echo(nn.Module):
    """Returns how it was called."""

    def forward(self, *inputs, **named):
        return inputs, named


Pair = namedtuple("Pair", ["a", "b"])
TENSOR = torch.ones(2, 3)
PACKED = pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])


@pytest.mark.parametrize(
    ("batch", "inputs", "named"),
    [
        ({"a": 1, "b": 2}, (), {"a": 1, "b": 2}),
        (OrderedDict(a=1), (), {"a": 1}),
        (UserDict(a=1), (), {"a": 1}),
        ((1, 2), (1, 2), {}),
        ([1, 2], (1, 2), {}),
        (Pair(1, 2), (1, 2), {}),
        (TENSOR, (TENSOR,), {}),
        (PACKED, (PACKED,), {}),
        ("text", ("text",), {}),
    ],
    ids=["dict", "ordered dict", "like a dict", "tuple", "list", "namedtuple", "tensor", "packed", "else"],
)
def test_call(batch, inputs, named):
    found_inputs, found_named = call(Echo(), batch, {"scale": 3})
    assert len(found_inputs) == len(inputs)
    assert all(found is given for found, given in zip(found_inputs, inputs, strict=True))
    assert found_named == {**named, "scale": 3}


def make_module(matches=(), projections=None, custom=(), names=(), **settings):
    student = Encoder(layers=2, dropout=0.0, **settings)
    modules = [dict(student.named_modules())[name] for name in names]
    plan = plan_matches([IntermediateMatch(**match) for match in matches])
    return student, StudentModule(student, {"": adaptor}, projections or {}, plan, custom, modules)


BATCH = next(iter(make_loader()))
MATCH = {"layer_T": 0, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


def test_forward_gives_plain_dicts():
    """Accelerate makes float32 of what lies in plain containers only."""
    student, module = make_module()
    output = module(BATCH, {})
    assert {type(output), *(type(part) for part in output.values())} == {dict}
    assert output["projected"] == output["captured"] == {}
    expected = student(**BATCH)
    assert torch.equal(output["views"]["logits"][0], expected["logits"])
    assert torch.equal(output["views"]["hidden"][2], expected["hidden"][2])


def test_projections_are_trained_and_saved_with_it():
    projections = {0: nn.Linear(32, 8), 2: nn.Linear(32, 4)}
    student, module = make_module([MATCH, MATCH, {**MATCH, "layer_S": 2}], projections)
    output = module(BATCH, {})
    hidden = student(**BATCH)["hidden"]
    assert set(output["projected"]) == {0, 2}
    assert torch.allclose(output["projected"][0], projections[0](hidden[1]))
    assert torch.allclose(output["projected"][2], projections[2](hidden[2]))
    names = {name for name, _ in module.named_parameters()}
    assert names == {
        *(f"student.{name}" for name, _ in student.named_parameters()),
        *(f"projections.{number}.{part}" for number in (0, 2) for part in ("weight", "bias")),
    }


def test_a_pair_of_layers_is_projected_layer_by_layer():
    projection = nn.Linear(32, 8)
    match = {**MATCH, "loss": "fsp", "layer_T": [0, 1], "layer_S": [2, 0]}
    student, module = make_module([match], {0: projection})
    found = module(BATCH, {})["projected"][0]
    hidden = student(**BATCH)["hidden"]
    assert len(found) == 2
    assert torch.allclose(found[0], projection(hidden[2]))
    assert torch.allclose(found[1], projection(hidden[0]))


def test_a_projection_of_another_width():
    _, module = make_module([{**MATCH, "proj": ["linear", 16, 8]}], {0: nn.Linear(16, 8)})
    message = r"proj \['linear', 16, 8\] of match 'hidden_hidden_mse_1_0' must name the student's width 32 .*, got 16"
    with pytest.raises(ValueError, match=message):
        module(BATCH, {})


def test_captured_outputs():
    projection = nn.Linear(32, 8)
    custom = [
        CustomMatch("x", "layers.0", 1.0, "cos"),
        CustomMatch("x", "layers.1", 1.0, "cos", proj_func=projection),
        CustomMatch("x", "embedding", 1.0, "cos", proj_func=lambda states: 2 * states),
    ]
    student, module = make_module(custom=custom, names=["layers.0", "layers.1", "embedding"])
    captured = module(BATCH, {})["captured"]
    hidden = student(**BATCH)["hidden"]
    assert torch.equal(captured[0], hidden[1])
    assert torch.allclose(captured[1], projection(hidden[2]))
    assert torch.equal(captured[2], 2 * hidden[0])


def test_captured_modules_are_not_registered_again():
    custom = [CustomMatch("x", "layers.0", 1.0, "cos", proj_func=nn.Linear(32, 8))]
    student, module = make_module(custom=custom, names=["layers.0"])
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(
        [
            *(f"student.{name}" for name, _ in student.named_parameters()),
            "custom_projections.0.weight",
            "custom_projections.0.bias",
        ]
    )


def test_tasks_have_their_adaptors():
    student = Encoder(dropout=0.0)
    adaptors = {"a": adaptor, "b": lambda batch, outputs: {"logits": -outputs["logits"]}}
    module = StudentModule(student, adaptors, {})
    assert torch.equal(module(BATCH, {}, "b")["views"]["logits"][0], -student(**BATCH)["logits"])
    assert set(module(BATCH, {}, "b")["views"]) == {"logits"}
    assert "hidden" in module(BATCH, {}, "a")["views"]
