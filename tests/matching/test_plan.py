"""Matches made ready: their names in the log, projections, widths, and which features they pick."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from textbrewer import MATCH_LOSS_MAP, IntermediateMatch
from textbrewer.configurations import parse_projection
from textbrewer.matching import build_projection, plan_matches, select, width_of_model


def match(layer_T=4, layer_S=2, feature="hidden", loss="hidden_mse", **more):
    return IntermediateMatch(layer_T, layer_S, 1.0, loss, feature, **more)


def test_names_are_text_brewer_s():
    plan = plan_matches([match(), match(loss="fsp", layer_T=[0, 4], layer_S=[0, 2]), match(1, 0, "attention", "cos")])
    assert [item.name for item in plan] == ["hidden_hidden_mse_2_4", "hidden_fsp_0-2_0-4", "attention_cos_0_1"]
    assert [item.number for item in plan] == [0, 1, 2]
    assert [item.loss for item in plan] == [MATCH_LOSS_MAP[name] for name in ("hidden_mse", "fsp", "cos")]


def test_names_are_unique():
    names = [item.name for item in plan_matches([match(), match(proj="linear"), match(loss="cos")])]
    assert names == ["hidden_hidden_mse_2_4", "hidden_hidden_mse_2_4_2", "hidden_cos_2_4"]
    several = [item.name for item in plan_matches([match(teacher=number) for number in (0, 1, 2)])]
    assert several == ["hidden_hidden_mse_2_4", "hidden_hidden_mse_2_4_2", "hidden_hidden_mse_2_4_3"]


def test_a_plan_of_nothing():
    assert plan_matches([]) == []


@pytest.mark.parametrize(
    ("model", "feature", "width"),
    [
        (SimpleNamespace(config=SimpleNamespace(hidden_size=24)), "hidden", 24),
        (SimpleNamespace(config=SimpleNamespace(hidden_size=24)), "attention", None),
        (SimpleNamespace(config=SimpleNamespace(hidden_size="24")), "hidden", None),
        (SimpleNamespace(config={"hidden_size": 24}), "hidden", None),
        (SimpleNamespace(config=None), "hidden", None),
        (nn.Linear(3, 4), "hidden", None),
    ],
)
def test_width_of_model(model, feature, width):
    assert width_of_model(model, feature) == width


@pytest.mark.parametrize(
    ("proj", "widths", "expected"),
    [
        (["linear", 6, 9], (None, None), (6, 9)),
        (["linear", 6, 9], (60, 90), (6, 9)),  # what the user named counts
        ("linear", (60, 90), (60, 90)),
        ("linear", (60, None), None),
        ("linear", (None, 90), None),
        (["linear", {"lr": 1.0}], (60, 90), (60, 90)),
    ],
)
def test_widths_of_projections(proj, widths, expected):
    module = build_projection(parse_projection(proj), *widths)
    if expected is None:
        assert module is None
    else:
        assert (module.in_features, module.out_features) == expected


def test_every_projection_is_new():
    first, second = (build_projection(parse_projection(["tanh", 4, 5])) for _ in range(2))
    assert not {id(part) for part in first.modules()} & {id(part) for part in second.modules()}
    assert isinstance(first[1], nn.Tanh)


# ---- select ------------------------------------------------------------------------------------------------------

LAYERS = [torch.full((2, 3, 4), float(number)) for number in range(4)]


def layer_of(tensor):
    return int(tensor.flatten()[0])


@pytest.mark.parametrize("sequence", [LAYERS, tuple(LAYERS), torch.stack(LAYERS)], ids=["list", "tuple", "stacked"])
def test_select(sequence):
    views = {"hidden": sequence}
    for layer in range(-4, 4):
        assert layer_of(select(views, "hidden", layer, "student")) == layer % 4
    picked = select(views, "hidden", [3, 0], "student")
    assert isinstance(picked, list)
    assert [layer_of(item) for item in picked] == [3, 0]


def test_select_does_not_need_the_other_layers():
    views = {"hidden": [None, None, LAYERS[2]]}
    assert layer_of(select(views, "hidden", 2, "teacher")) == 2
    with pytest.raises(KeyError, match="holds NoneType at layer 0"):
        select(views, "hidden", 0, "teacher")


@pytest.mark.parametrize(("who", "letter"), [("student", "S"), ("teacher", "T")])
@pytest.mark.parametrize("layer", [4, -5, [0, 4]])
def test_layer_out_of_range(who, letter, layer):
    wrong = layer[1] if isinstance(layer, list) else layer
    message = f"layer_{letter}={wrong} is out of range: 'hidden' of the {who} has 4 entries, 0 to 3"
    with pytest.raises(IndexError, match=message):
        select({"hidden": LAYERS}, "hidden", layer, who)


@pytest.mark.parametrize(
    ("feature", "remedy"),
    [
        ("hidden", "output_hidden_states=True"),
        ("attention", "attn_implementation='eager'"),
        ("values", "return a list of tensors under that key"),
    ],
)
@pytest.mark.parametrize("views", [{"logits": 1}, {"logits": 1, "FEATURE": ()}], ids=["missing", "empty"])
def test_missing_feature(feature, remedy, views):
    views = {key.replace("FEATURE", feature): value for key, value in views.items()}
    with pytest.raises(KeyError) as raised:
        select(views, feature, 0, "student")
    message = raised.value.args[0]
    assert repr(feature) in message
    assert "student" in message
    assert remedy in message


STRATEGY = {"layer_T": [1, 2], "layer_S": [0, 1], "feature": "hidden", "loss": "hidden_mse", "weight": 1}


def test_a_strategy_gets_the_loss_with_its_constants_and_the_numbers_of_layers():
    loss = ["embed_distill", {"distance": "cosine"}]
    match = IntermediateMatch(**{**STRATEGY, "loss": loss, "layer_T": [0, 1, 2], "strategy": ["random", {"seed": 4}]})
    (planned,) = plan_matches([match])
    assert planned.name == "hidden_embed_distill_random"
    assert planned.compare is planned.strategy
    assert (planned.strategy.layers_S, planned.strategy.layers_T, planned.strategy.seed) == (2, 3, 4)
    state = torch.randn(3, 4, 5)
    expected = MATCH_LOSS_MAP["embed_distill"](state, state.flip(0), distance="cosine")
    assert planned.strategy.loss(state, state.flip(0)) == expected


def test_a_strategys_name_is_unique_too():
    match = IntermediateMatch(**STRATEGY, strategy="pairwise")
    names = [planned.name for planned in plan_matches([match, match])]
    assert names == ["hidden_hidden_mse_pairwise", "hidden_hidden_mse_pairwise_2"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": "pairwize"}, KeyError, "unknown matching strategy 'pairwize'; did you mean 'pairwise'"),
        ({"strategy": ["random", {"sed": 1}]}, ValueError, "'random' has no constant 'sed'; did you mean 'seed'"),
        (
            {"strategy": "pairwise", "layer_T": 1},
            ValueError,
            "layer_T of a match with strategy 'pairwise' must be a list",
        ),
        (
            {"strategy": "pairwise", "layer_S": []},
            ValueError,
            "layer_S of a match with strategy 'pairwise' must be a list",
        ),
        ({"strategy": "pairwise", "layer_S": [1]}, ValueError, "pairwise"),
        ({"strategy": "pairwise", "loss": "nst"}, ValueError, "'nst' takes two layers of each side"),
        ({"strategy": 3}, TypeError, "strategy of an intermediate match must be a name"),
        (
            {"loss": ["hidden_mse", {"power": 2}]},
            ValueError,
            "match loss 'hidden_mse' has no constant 'power'; it has none",
        ),
        ({"loss": ["embed_distill", {"distans": "l2"}]}, ValueError, "did you mean 'distance'"),
    ],
)
def test_bad_strategies_and_constants(change, error, message):
    with pytest.raises(error, match=message):
        plan_matches([IntermediateMatch(**{**STRATEGY, **change})])
