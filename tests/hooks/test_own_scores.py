"""Scores as attention modules compute them, against the maps that eager attention returns; and what is left out."""

import warnings

import pytest
import torch

from textbrewer.distillers.inner_features import InnerFeatures

transformers = pytest.importorskip("transformers")

LENGTH = 7
IDS = torch.randint(4, 40, (2, LENGTH), generator=torch.Generator().manual_seed(0))
USUAL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**USUAL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
NEO = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
OWN = {
    "Bert": USUAL,
    "GPT2": GPT2,
    "GPT2 scaled by layer": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "GPTNeo": {**NEO, "bos_token_id": 1, "eos_token_id": 2},
    "Llama": GROUPED,
    "Llama of one layer": {**GROUPED, "num_hidden_layers": 1},
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Gemma": {**GROUPED, "head_dim": 4},
    "Phi3": USUAL,
    "Esm": {**USUAL, "position_embedding_type": "absolute"},
    "T5": T5,
    "MT5": T5,
}
OTHER = {
    "Qwen3": ({**GROUPED, "head_dim": 4}, "the normalisation of queries and keys and the rotation of queries and keys"),
    "Gemma2": ({**GROUPED, "head_dim": 4}, "the rotation of queries and keys"),
    "GPTJ": ({**GPT2, "rotary_dim": 4}, "the rotation of queries and keys"),
    "ModernBert": (USUAL, "the rotation of queries and keys"),
    "DebertaV2": ({**USUAL, "relative_attention": True, "pos_att_type": ["c2p"]}, "a bias by position"),
    "MPNet": (USUAL, "a bias by position"),
    "UMT5": (T5, "a bias by position"),
}


def build(name, settings):
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def maps_of(model, inner, **inputs):
    """The softmax over the scores that were heard, and the model's own attention."""
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    with inner.attached():
        outputs = model(**inputs, output_attentions=True)
    own = outputs["decoder_attentions" if model.config.is_encoder_decoder else "attentions"]
    scores = outputs["scores"]
    if not torch.triu(own[0], 1).any():
        scores = [item.masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, -torch.inf) for item in scores]
    assert len(own) == len(scores)
    return [item.softmax(-1) for item in scores], own


@pytest.mark.parametrize("name", OWN)
def test_the_softmax_over_the_scores_is_the_models_attention(name):
    model = build(name, OWN[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = InnerFeatures(model, {"scores": range(len(attention_layers(model)))})
    with torch.no_grad():
        maps, own = maps_of(model, inner, input_ids=IDS)
    for found, expected in zip(maps, own, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def attention_layers(model):
    return range(getattr(model.config, "num_decoder_layers", None) or model.config.num_hidden_layers)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_the_gradient_is_that_of_the_models_attention(name):
    model = build(name, OWN[name])
    maps, own = maps_of(model, InnerFeatures(model, {"scores": [0, 1]}), input_ids=IDS)
    weights = torch.randn(own[1].shape, generator=torch.Generator().manual_seed(1))
    parameters = [item for item in model.parameters() if item.dim() > 1]
    found, expected = (
        torch.autograd.grad((item[1] * weights).sum(), parameters, allow_unused=True, retain_graph=True)
        for item in (maps, own)
    )
    used = 0
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            used += 1
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert used > 5


def test_the_rotation_is_by_the_positions_that_the_model_is_called_with():
    model = build("Llama", GROUPED)
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 2, 4, 6, 8, 10, 12]])
    # With a mask, as transformers takes positions that begin anew for another sequence without one.
    inputs = {"input_ids": IDS, "position_ids": positions, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        maps, own = maps_of(model, InnerFeatures(model, {"scores": [0, 1]}), **inputs)
        plain = model(IDS, output_attentions=True).attentions
    assert not torch.allclose(own[1], plain[1], atol=1e-3)
    torch.testing.assert_close(maps[1], own[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_left_out_is_told(name):
    settings, what = OTHER[name]
    model = build(name, settings)
    with pytest.warns(UserWarning, match=f"heard in {name}Model are .* without {what}, so .*eager") as caught:
        InnerFeatures(model, {"scores": [0, 1], "value": [0]})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InnerFeatures(model, {"query": [0], "key": [0], "value": [0]})
