"""Where the self-attention of nine families is, and that what is captured there is theirs."""

import pytest
import torch
from torch import nn

from textbrewer.hooks import attention_maps, attention_modules, capture_qkv

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, LAYERS, HEADS, WIDTH = 2, 5, 3, 4, 16
IDS = torch.randint(3, 40, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
USUAL = {
    "vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 32,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": LAYERS, "encoder_attention_heads": 2,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": LAYERS,
    "num_heads": HEADS, "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Bert": (USUAL, "bert.encoder.layer.{}.attention.self"),
    "Roberta": (USUAL, "roberta.encoder.layer.{}.attention.self"),
    "DistilBert": (
        {"vocab_size": 40, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32},
        "distilbert.transformer.layer.{}.attention",
    ),
    "Electra": ({**USUAL, "embedding_size": 8}, "electra.encoder.layer.{}.attention.self"),
    "GPT2": ({"vocab_size": 40, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}, "transformer.h.{}.attn"),
    "Llama": ({**USUAL, "num_key_value_heads": 2}, "model.layers.{}.self_attn"),
    "Bart": (BART, "model.decoder.layers.{}.self_attn"),
    "T5": (T5, "decoder.block.{}.layer.0.SelfAttention"),
    "ViT": ({**USUAL, "image_size": 8, "patch_size": 4}, None),
}
KIND = {"Bart": "ForConditionalGeneration", "T5": "ForConditionalGeneration", "ViT": "ForImageClassification"}
LM = {"GPT2": "LMHeadModel", "Llama": "ForCausalLM"}


def build(family, **changes):
    settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, family + {**KIND, **LM}.get(family, "ForSequenceClassification"))
    return model(getattr(transformers, f"{family}Config")(**settings, **changes)).eval()


def inputs(family):
    if family == "ViT":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    more = {"decoder_input_ids": IDS} if family in ("Bart", "T5") else {}
    return {"input_ids": IDS, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_nine_families(family):
    model, pattern = build(family), FAMILIES[family][1]
    names = attention_modules(model)
    assert len(names) == LAYERS
    if pattern is not None:  # that of ViT differs from one version of transformers to the next
        assert names == [pattern.format(number) for number in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_has_a_row_for_every_position(family):
    model = build(family)
    with torch.no_grad(), capture_qkv(model, attention_modules(model)) as inner:
        model(**inputs(family))
    length = LENGTH if family != "ViT" else 5  # four patches and the class
    for feature in ("query", "key", "value"):
        assert [tuple(item.shape) for item in inner.views()[feature]] == [(BATCH, HEADS, length, 4)] * LAYERS


OWN_MAPS = {
    "Bert": "attentions",
    "Roberta": "attentions",
    "DistilBert": "attentions",
    "Electra": "attentions",
    "GPT2": "attentions",
    "Bart": "decoder_attentions",
    "ViT": "attentions",
}
"""Those that neither rotate nor add a bias to their scores."""


@pytest.mark.parametrize("family", OWN_MAPS)
def test_captured_scores_are_those_of_the_models_own_attention(family):
    model = build(family, attn_implementation="eager")
    with torch.no_grad(), capture_qkv(model, attention_modules(model)) as inner:
        outputs = model(**inputs(family), output_attentions=True)
    captured = inner.views()
    causal = family in ("GPT2", "Bart")
    for query, key, expected in zip(captured["query"], captured["key"], outputs[OWN_MAPS[family]], strict=True):
        torch.testing.assert_close(attention_maps(query, key, causal=causal), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_attention_to_another_sequence_is_left_out(family):
    settings = FAMILIES[family][0]
    config = getattr(transformers, f"{family}Config")(**settings, is_decoder=True, add_cross_attention=True)
    model = getattr(transformers, f"{family}LMHeadModel")(config)
    pattern = FAMILIES[family][1]
    assert attention_modules(model) == [pattern.format(number) for number in range(LAYERS)]


def test_an_encoder_alone_and_one_that_is_inside_another_model():
    encoder = transformers.T5EncoderModel(transformers.T5Config(**T5))
    assert attention_modules(encoder) == [f"encoder.block.{n}.layer.0.SelfAttention" for n in range(2)]
    inside = nn.ModuleDict({"crossencoder": build("Bert"), "head": nn.Linear(3, 3)})
    assert attention_modules(inside) == [f"crossencoder.bert.encoder.layer.{n}.attention.self" for n in range(LAYERS)]


def test_blocks_that_share_one_module_are_named_once():
    model = transformers.AlbertModel(transformers.AlbertConfig(**USUAL, embedding_size=8))
    assert attention_modules(model) == ["encoder.albert_layer_groups.0.albert_layers.0.attention"]


def test_blocks_are_in_their_order_beyond_ten():
    config = transformers.BertConfig(**{**USUAL, "num_hidden_layers": 12})
    names = attention_modules(transformers.BertModel(config))
    assert names == [f"encoder.layer.{n}.attention.self" for n in range(12)]


def test_two_stacks_cannot_be_told_apart():
    two = nn.ModuleDict({"text": build("Bert"), "picture": build("ViT")})
    with pytest.raises(ValueError, match=r"must have one stack of self-attention modules, got text\..*, picture\."):
        attention_modules(two)


def test_a_model_without_attention_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"of Linear cannot be found by the usual names; .*capture_qkv"):
        attention_modules(nn.Linear(2, 2))
