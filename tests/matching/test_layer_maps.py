"""Layer maps by name, the matches made of them, and how deep a model is."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import Encoder
from textbrewer import IntermediateMatch
from textbrewer.matching import LAYER_MAPS, layer_map, match_layers, number_of_layers

PUBLISHED = [
    # PKD's code: --fc_layer_idx 1,3,5,7,9 and 6,7,8,9,10, counted from 0; for 3 layers 3,7 and 9,10.
    ("skip", 12, 6, [2, 4, 6, 8, 10]),
    ("last", 12, 6, [7, 8, 9, 10, 11]),
    ("skip", 12, 3, [4, 8]),
    ("last", 12, 3, [10, 11]),
    # TinyBERT, section 4.2: g(m) = 3m for 4 layers, 2m for 6.
    ("uniform", 12, 4, [3, 6, 9, 12]),
    ("uniform", 12, 6, [2, 4, 6, 8, 10, 12]),
    # MobileBERT: as many layers on both sides.
    ("first", 24, 24, list(range(1, 25))),
    ("first", 12, 3, [1, 2, 3]),
    ("uniform", 6, 1, [6]),
]
SIZES = [(layers_T, layers_S) for layers_T in range(1, 26) for layers_S in range(1, layers_T + 1)]


@pytest.mark.parametrize(("name", "layers_T", "layers_S", "teacher"), PUBLISHED)
def test_published_maps(name, layers_T, layers_S, teacher):
    pairs = list(zip(teacher, range(1, len(teacher) + 1), strict=True))
    assert layer_map(name, layers_T, layers_S) == pairs
    assert layer_map(name, layers_T, layers_S, embeddings=True) == [(0, 0), *pairs]


@pytest.mark.parametrize("name", ["uniform", "skip", "last", "first"])
def test_every_map_rises_through_layers_that_exist(name):
    for layers_T, layers_S in SIZES:
        if layers_S == 1 and name in ("skip", "last"):
            continue
        teacher, student = zip(*layer_map(name, layers_T, layers_S), strict=True)
        assert list(student) == list(range(1, len(student) + 1))
        assert len(student) == (layers_S - 1 if name in ("skip", "last") else layers_S)
        assert list(teacher) == sorted(set(teacher))
        assert teacher[0] >= 1
        assert teacher[-1] <= layers_T


def test_uniform_is_the_nearest_layer():
    for layers_T, layers_S in SIZES:
        for teacher, student in layer_map("uniform", layers_T, layers_S):
            exact = Fraction(student * layers_T, layers_S)
            assert abs(teacher - exact) <= Fraction(1, 2)
        assert layer_map("uniform", layers_T, layers_S)[-1] == (layers_T, layers_S)


def test_halves_are_rounded_up():
    assert layer_map("uniform", 6, 4) == [(2, 1), (3, 2), (5, 3), (6, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("unifrom", 12, 6), KeyError, "uniform"),
        (("uniform", 4, 6), ValueError, "at most as many layers as its teacher.*6 and 4"),
        (("skip", 12, 1), ValueError, "at least 2 layers.*uniform"),
        (("last", 12, 1), ValueError, "at least 2 layers.*uniform"),
        (("first", 0, 1), ValueError, "layers_T must be at least 1, got 0"),
        (("first", 12, 0), ValueError, "layers_S must be at least 1, got 0"),
        (("first", 12, 2.5), ValueError, "layers_S must be a whole number"),
        (("first", "12", 6), TypeError, "layers_T must be a whole number"),
    ],
)
def test_what_cannot_be_mapped(arguments, error, words):
    with pytest.raises(error, match=words):
        layer_map(*arguments)


def test_a_map_of_ones_own(monkeypatch):
    monkeypatch.setitem(LAYER_MAPS, "top", lambda layers_T, layers_S: [(layers_T, layers_S)])
    assert layer_map("top", 12, 3) == [(12, 3)]
    (match,) = match_layers("top", 12, 3)
    assert (match["layer_T"], match["layer_S"]) == (12, 3)


def test_matches_of_hidden_states():
    matches = match_layers("uniform", 12, 4, proj=["linear", 312, 768], weight=2, embeddings=True)
    assert [(match["layer_T"], match["layer_S"]) for match in matches] == [(0, 0), (3, 1), (6, 2), (9, 3), (12, 4)]
    parsed = [IntermediateMatch.from_dict(match) for match in matches]
    assert {(match.feature, match.loss, match.weight) for match in parsed} == {("hidden", "hidden_mse", 2)}
    assert all(match.proj == ["linear", 312, 768] for match in parsed)


@pytest.mark.parametrize("feature", ["attention", "query", "key", "value", "scores"])
def test_matches_inside_layers_are_counted_from_0(feature):
    # TinyBERT: attention of layers 3, 6, 9, 12, which are the entries 2, 5, 8, 11.
    matches = match_layers("uniform", 12, 4, feature=feature, loss="attention_mse")
    assert [(match["layer_T"], match["layer_S"]) for match in matches] == [(2, 0), (5, 1), (8, 2), (11, 3)]
    assert all("proj" not in match for match in matches)
    assert all(IntermediateMatch.from_dict(match).loss == "attention_mse" for match in matches)


@pytest.mark.parametrize("feature", ["hidden", "attention"])
def test_matches_pick_layers_that_the_models_have(feature):
    teacher, student = Encoder(layers=4), Encoder(layers=2)
    ids = torch.ones(1, 3, dtype=torch.long)
    views_T, views_S = teacher(ids, torch.ones(1, 3)), student(ids, torch.ones(1, 3))
    matches = match_layers("uniform", teacher, student, feature)
    assert matches == match_layers("uniform", 4, 2, feature)
    assert views_T[feature][matches[-1]["layer_T"]] is views_T[feature][-1]
    assert views_S[feature][matches[-1]["layer_S"]] is views_S[feature][-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"feature": "hiden"}, "hidden"), ({"feature": "attention", "embeddings": True}, "must be 'hidden'")],
)
def test_matches_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        match_layers("uniform", 4, 2, **arguments)


def with_config(**entries):
    """A module with a configuration, and a list of layers that is not to be believed."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(1, 1)])
    model.config = SimpleNamespace(**entries)
    return model


@pytest.mark.parametrize(
    ("entries", "layers"),
    [
        ({"num_hidden_layers": 5}, 5),
        ({"n_layer": 5}, 5),
        ({"n_layers": 5}, 5),
        ({"num_layers": 5}, 5),
        ({"num_hidden_layers": 5, "decoder_layers": 7, "is_encoder_decoder": False}, 5),
        ({"num_hidden_layers": 5, "decoder_layers": 7, "is_encoder_decoder": True}, 7),
        ({"num_layers": 5, "num_decoder_layers": 7, "is_encoder_decoder": True}, 7),
        ({"decoder": SimpleNamespace(n_layer=4), "is_encoder_decoder": True}, 4),
        ({"text_config": SimpleNamespace(num_hidden_layers=6)}, 6),
        ({"num_hidden_layers": "five"}, 1),
        ({"num_hidden_layers": True}, 1),
        ({"num_hidden_layers": 0}, 1),
        ({}, 1),
    ],
)
def test_layers_that_a_configuration_tells(entries, layers):
    assert number_of_layers(with_config(**entries)) == layers


def test_layers_without_a_configuration():
    assert number_of_layers(Encoder(layers=3)) == 3
    model = nn.Module()
    model.mixed = nn.ModuleList([nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU()])
    model.heads = nn.ModuleList([nn.Linear(1, 1)])
    model.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 2)
    assert number_of_layers(model) == 2


def test_a_model_that_does_not_tell_its_layers():
    with pytest.raises(ValueError, match="Sequential without either; pass the number of layers"):
        number_of_layers(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="model must be a torch module, got 12"):
        number_of_layers(12)


SMALL = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 3}
TRANSFORMERS = {
    "Bert": SMALL,
    "Electra": {**SMALL, "embedding_size": 8},
    "DistilBert": {"vocab_size": 20, "dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 3},
    "GPT2": {"vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 3},
    "Llama": {**SMALL, "num_key_value_heads": 2},
    "Bart": {
        "vocab_size": 20,
        "d_model": 8,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "pad_token_id": 1,
    },
    "T5": {
        "vocab_size": 20,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "decoder_start_token_id": 0,
    },
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_layers_of_transformers_are_their_hidden_states(family):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**TRANSFORMERS[family]))
    ids = torch.tensor([[3, 4, 5]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    outputs = model(input_ids=ids, output_hidden_states=True, **more)
    hidden = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    assert number_of_layers(model) == len(hidden) - 1 == 3
