"""The layer maps and constants of each recipe, against those of the papers and the authors' code."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from tests.recipes.jobs import bert
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, recipes
from textbrewer.recipes.stage import is_causal

TWELVE_TO_FOUR = [(0, 0), (3, 1), (6, 2), (9, 3), (12, 4)]
TWELVE_TO_SIX = [(0, 0), (2, 1), (4, 2), (6, 3), (8, 4), (10, 5), (12, 6)]


def stages(name, layers_S, layers_T=12, **settings):
    return recipes.get(name)(bert(layers_T), bert(layers_S), **settings)


def pairs(stage, feature="hidden", loss=None):
    """The pairs of layers that a stage brings together, teacher's and student's."""
    found = []
    for match in stage.config.intermediate_matches:
        if match.feature != feature or (loss is not None and match.loss_name != loss):
            continue
        if isinstance(match.layer_T, list):
            found += zip(match.layer_T, match.layer_S, strict=True)
        else:
            found.append((match.layer_T, match.layer_S))
    return found


@pytest.mark.parametrize(("layers", "expected"), [(4, TWELVE_TO_FOUR), (6, TWELVE_TO_SIX)])
@pytest.mark.parametrize("name", ["tinybert", "tinybert-general"])
def test_tinybert(name, layers, expected):
    # Jiao et al. 2020, section 4.2: g(m) = 3m for 4 layers, 2m for 6; attention is counted from 0 here.
    first, *rest = stages(name, layers)
    assert pairs(first) == expected
    assert pairs(first, "scores") == [(layer_T - 1, layer_S - 1) for layer_T, layer_S in expected[1:]]
    assert {match.weight for match in first.config.intermediate_matches} == {1}
    assert (first.config.kd_loss_weight, first.config.hard_label_weight) == (0, 0)
    if name == "tinybert":
        (second,) = rest
        assert (second.config.kd_loss_type, second.config.temperature) == ("ce", 1)
        assert second.config.intermediate_matches == []
    else:
        assert not rest


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        # Sun et al. 2019, section 4.2 and the authors' scripts.
        ("pkd-skip", 6, [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]),
        ("pkd-last", 6, [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]),
        ("pkd-skip", 3, [(4, 1), (8, 2)]),
        ("pkd-last", 3, [(10, 1), (11, 2)]),
    ],
)
def test_pkd(name, layers, expected):
    (stage,) = stages(name, layers, alpha=0.7, temperature=20, beta=500)
    assert pairs(stage, loss="pkd") == expected
    config = stage.config
    assert (config.kd_loss_weight, config.temperature) == (0.7, 20)
    assert config.hard_label_weight == pytest.approx(0.3)
    # The authors' mean runs over layers and width as well; the width of the tiny models is 32.
    assert {match.weight for match in config.intermediate_matches} == {500 / (len(expected) * 32)}


def test_pkd_of_the_published_size():
    # losses.md: beta 500 of the authors' code is 500 / (5 * 768) = 0.13 in the form that sums over width and layers.
    (stage,) = recipes.get("pkd-skip")(bert(12, 768, 12), bert(6, 768, 12), beta=500)
    assert {round(match.weight, 2) for match in stage.config.intermediate_matches} == {0.13}


def test_distilbert():
    # Sanh et al. 2019 and the authors' script: 5 KD at temperature 2, 2 MLM, 1 cosine of the last states.
    (stage,) = stages("distilbert", 6)
    config = stage.config
    assert (config.kd_loss_weight, config.temperature, config.hard_label_weight) == (5, 2, 2)
    assert pairs(stage, loss="cos") == [(12, 6)]
    assert config.intermediate_matches[0].weight == 1


def test_minilm():
    # Wang et al. 2020, section 3: last layer of both, attention distributions and value relations, 1 to 1.
    relations, prediction = stages("minilm", 6)
    assert pairs(relations, "scores", "attention_kl") == [(11, 5)]
    assert pairs(relations, "value", "relation_kl") == [(11, 5)]
    assert {match.weight for match in relations.config.intermediate_matches} == {1}
    assert prediction.config.intermediate_matches == []
    assert [stage.name for stage in stages("minilm", 6, prediction=False)] == ["relations"]


@pytest.mark.parametrize(("width", "heads", "layers", "published"), [(768, 12, 12, 48), (1024, 16, 24, 64)])
def test_minilmv2(width, heads, layers, published):
    # Wang et al. 2020b, section 4.1: 48 relation heads for base-size teachers, 64 for large ones.
    teacher, student = bert(layers, width, heads), bert(2, 384, 12)
    first = recipes.get("minilmv2")(teacher, student)[0]
    assert [match.feature for match in first.config.intermediate_matches] == ["query", "key", "value"]
    assert all(match.loss == ["relation_kl", {"heads": published}] for match in first.config.intermediate_matches)
    chosen = recipes.get("minilmv2")(teacher, student, teacher_layer=layers - 3)[0]
    assert {match.layer_T for match in chosen.config.intermediate_matches} == {layers - 4}


def test_mobilebert():
    # Sun et al. 2020, the authors' code: 100, 5000, 5 and 1 over the number of layers.
    *layers, last = stages("mobilebert", 4, layers_T=4)
    assert [stage.name for stage in layers] == ["layer-1", "layer-2", "layer-3", "layer-4"]
    weights = {match.loss_name: match.weight * 4 for match in layers[1].config.intermediate_matches}
    assert weights == {"layer_norm_mse": 100, "state_mean": 5000, "state_variance": 5, "attention_kl": 1}
    assert pairs(layers[1], loss="state_mean") == [(2, 2)]
    assert pairs(layers[1], "scores") == [(1, 1)]
    assert (last.config.kd_loss_weight, last.config.hard_label_weight) == (1, 1)


def test_bert_emd():
    # Li et al. 2020: cls + beta (theta (att + hid) + emb), beta 0.01, theta 1, all layers of both.
    (stage,) = stages("bert-emd", 4)
    embeddings, hidden, scores = stage.config.intermediate_matches
    assert (embeddings.layer_T, embeddings.layer_S, embeddings.weight) == ([0], [0], 0.01)
    assert (hidden.layer_T, hidden.layer_S, hidden.weight) == (list(range(1, 13)), [1, 2, 3, 4], 0.01)
    assert (scores.layer_T, scores.layer_S, scores.weight) == (list(range(12)), [0, 1, 2, 3], 0.01)
    assert hidden.strategy == scores.strategy == "emd"
    assert (stage.config.temperature, stage.config.kd_loss_weight) == (1, 1)


def test_cofi():
    # Xia et al. 2022, the authors' scripts: 0.1 KD at temperature 2, 0.9 layers, teacher layers 3, 6, 9, 12.
    (stage,) = stages("cofi-dynamic", 6)
    (match,) = stage.config.intermediate_matches
    assert (match.layer_T, match.layer_S) == ([3, 6, 9, 12], [1, 2, 3, 4, 5, 6])
    assert (match.weight, stage.config.kd_loss_weight, stage.config.temperature) == (0.9, 0.1, 2)
    assert (match.strategy, match.proj) == ("ordered", "identity")
    assert stages("cofi-dynamic", 6, ordered=False)[0].config.intermediate_matches[0].strategy == "nearest"


@pytest.mark.parametrize(
    ("name", "layers", "width", "expected"),
    [
        # Yang et al. 2020, table of matches: T3, T4-tiny and T6 from a BERT of 12 layers.
        ("textbrewer-L3", 3, 32, [(0, 0), (4, 1), (8, 2), (12, 3)]),
        ("textbrewer-L3n", 3, 16, [(0, 0), (4, 1), (8, 2), (12, 3)]),
        ("textbrewer-L4t", 4, 16, TWELVE_TO_FOUR),
        ("textbrewer-L6", 6, 32, TWELVE_TO_SIX),
        ("textbrewer-small", 12, 16, [(layer, layer) for layer in range(0, 13, 2)]),
    ],
)
def test_textbrewers_own(name, layers, width, expected):
    (stage,) = recipes.get(name)(bert(12), bert(layers, width))
    assert pairs(stage, loss="hidden_mse") == expected
    nst = [match for match in stage.config.intermediate_matches if match.loss == "nst"]
    assert [(match.layer_T, match.layer_S) for match in nst] == [([t, t], [s, s]) for t, s in expected]
    states = [match for match in stage.config.intermediate_matches if match.loss == "hidden_mse"]
    assert {match.proj for match in states} == {None if width == 32 else "linear"}
    assert (stage.config.temperature, stage.config.kd_loss_type, stage.config.hard_label_weight) == (8, "ce", 0)


@pytest.mark.parametrize("name", ["rail-kd", "alp-kd"])
def test_labels_of_recipes_whose_papers_have_them(name):
    weights = [stages(name, 6, **settings)[0].config.hard_label_weight for settings in ({}, {"hard_label_weight": 0.3})]
    assert weights == [0, 0.3]
    with pytest.raises(ValueError, match="hard_label_weight"):
        stages(name, 6, hard_label_weight=-1)


def test_annealing():
    # Jafari et al. 2021: the annealed logits first, then the labels alone.
    first, second = stages("annealing-kd", 6, max_temperature=7)
    assert first.config.kd_loss_type == ["annealing", {"max_temperature": 7}]
    assert (first.config.temperature, first.config.hard_label_weight) == (1, 0)
    assert (second.config.kd_loss_weight, second.config.hard_label_weight) == (0, 1)


def tiny(kind):
    common = {"vocab_size": 30, "attn_implementation": "eager", "initializer_range": 0.5}
    if kind == "bart":
        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0, "init_std": 0.5}
        return BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=20, **common))
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=30, dropout_rate=0, attn_implementation="eager", **sizes)
        )
        nn.init.normal_(model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        return model
    if kind == "gpt2":
        no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, **no_dropout, **common))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=20, **common))
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return BertForMaskedLM(BertConfig(**sizes, **no_dropout, **common))


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        *(("minilm", kind) for kind in ("gpt2", "llama", "bert", "bart", "t5")),
        *(("mobilebert", kind) for kind in ("gpt2", "llama", "bert")),
    ],
)
def test_causal_models_are_matched_on_the_keys_that_they_see(recipe, kind, tmp_path):
    """The match between the last layers' scores is the divergence of the models' own attention probabilities."""
    torch.manual_seed(0)
    models = [tiny(kind) for _ in range(2)]
    [match] = [
        match
        for stage in recipes.get(recipe)(*models)
        for match in stage.config.intermediate_matches
        if match.feature == "scores" and match.layer_S == 1
    ]
    batch = {"input_ids": torch.randint(30, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    if kind == "t5":
        batch["labels"] = torch.randint(1, 30, (3, 6))
    with torch.no_grad():
        outputs = [model.eval()(**batch, output_attentions=True) for model in models]
    name = "decoder_attentions" if kind in ("bart", "t5") else "attentions"
    teacher, student = (output[name][1] for output in outputs)
    expected = 0.0
    for p, q in zip(teacher.flatten(0, 2), student.flatten(0, 2)):
        expected += sum(float(a * (a.log() - b.log())) for a, b in zip(p, q) if a > 0) / (3 * 2 * 6)
    found = []

    class Noting(GeneralDistiller):
        def compute_loss(self, *views):
            total, logs = super().compute_loss(*views)
            found.append(float(total.detach()))
            return total, logs

    match = dataclasses.replace(match, weight=1)
    learn = DistillationConfig(kd_loss_weight=0, intermediate_matches=[match])
    config = TrainingConfig(output_dir=str(tmp_path), progress_bar=False, device="cpu")
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    Noting(config, learn, *models, "auto", "auto").train(optimizer, [batch], num_steps=1)
    assert found[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recipe", ["minilm", "mobilebert", "tinybert", "tinybert-general", "bert-emd"])
def test_no_key_that_a_model_cannot_see_is_matched(recipe):
    """So it is as soon as one of the two models is causal: what the other sees of later keys has no counterpart."""

    def causal(*kinds):
        found = recipes.get(recipe)(*(tiny(kind) for kind in kinds))
        matches = [match for stage in found for match in stage.config.intermediate_matches]
        losses = [match.loss for match in matches if match.feature == "scores"]
        assert losses
        return {isinstance(loss, list) and loss[1] == {"causal": True} for loss in losses}

    assert causal("bert", "bert") == {False}
    for kinds in (("gpt2", "gpt2"), ("llama", "llama"), ("gpt2", "bert"), ("bert", "gpt2")):
        assert causal(*kinds) == {True}


def test_decoders_are_causal_by_their_config():
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    for is_decoder in (False, True):
        assert is_causal(BertForMaskedLM(BertConfig(**sizes, is_decoder=is_decoder))) is is_decoder
    config = T5Config(vocab_size=30, d_model=16, d_ff=32, num_layers=2, num_heads=2)
    assert is_causal(T5ForConditionalGeneration(config))
    assert not is_causal(T5EncoderModel(config))
