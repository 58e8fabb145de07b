"""Tests of captured queries, keys, values and scores: transformers' eager attention maps, and explicit loops."""

import math

import pytest
import torch
from torch import nn

from textbrewer.hooks.attention import attention_maps, attention_scores, capture_qkv

BATCH, LENGTH = 2, 7
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
IDS = torch.randint(1, 40, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def build(name, **changes):
    """A small model of transformers and the names of its attention modules."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "bert":
        config = transformers.BertConfig(**small, intermediate_size=32, **changes)
        return transformers.BertModel(config).eval(), [f"encoder.layer.{n}.attention.self" for n in range(2)]
    if name == "albert":
        config = transformers.AlbertConfig(**small, embedding_size=8, intermediate_size=32, **changes)
        return transformers.AlbertModel(config).eval(), ["encoder.albert_layer_groups.0.albert_layers.0.attention"]
    if name == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=32, **changes)
        return transformers.DistilBertModel(config).eval(), [f"transformer.layer.{n}.attention" for n in range(2)]
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, **changes)
        return transformers.GPT2Model(config).eval(), [f"h.{n}.attn" for n in range(2)]
    if name == "opt":
        config = transformers.OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16, **changes)
        return transformers.OPTModel(config).eval(), [f"decoder.layers.{n}.self_attn" for n in range(2)]
    if name == "neox":
        config = transformers.GPTNeoXConfig(**small, intermediate_size=32, **changes)
        return transformers.GPTNeoXModel(config).eval(), [f"layers.{n}.attention" for n in range(2)]
    if name == "phi3":
        config = transformers.Phi3Config(
            **small, num_key_value_heads=2, intermediate_size=32, pad_token_id=0, **changes
        )
        return transformers.Phi3Model(config).eval(), [f"layers.{n}.self_attn" for n in range(2)]
    config = transformers.LlamaConfig(**small, num_key_value_heads=2, intermediate_size=32, **changes)
    return transformers.LlamaModel(config).eval(), [f"layers.{n}.self_attn" for n in range(2)]


@pytest.mark.parametrize(
    ("name", "causal"), [("bert", False), ("albert", False), ("distilbert", False), ("gpt2", True), ("opt", True)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_maps_of_an_sdpa_model_are_those_of_the_eager_one(name, causal, padded):
    eager, _ = build(name, attn_implementation="eager")
    student, names = build(name, attn_implementation="sdpa")
    student.load_state_dict(eager.state_dict())
    mask = MASK if padded else None
    with torch.no_grad(), capture_qkv(student, names) as inner:
        expected = eager(IDS, attention_mask=mask, output_attentions=True).attentions
        student(IDS, attention_mask=mask)
    captured = inner.views()
    assert len(expected) == len(captured["query"]) == 2
    for query, key, reference in zip(captured["query"], captured["key"], expected, strict=True):
        maps = attention_maps(query, key, mask, causal=causal)
        torch.testing.assert_close(maps, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_values_give_the_attention_output(name):
    """softmax(scores) @ value, with the heads side by side, is what enters the output projection."""
    student, names = build(name, attn_implementation="sdpa")
    output = {"bert": "encoder.layer.0.attention.output.dense", "gpt2": "h.0.attn.c_proj"}[name]
    entered = []
    student.get_submodule(output).register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad(), capture_qkv(student, names) as inner:
        student(IDS)
    query, key, value = (inner.views()[feature][0] for feature in ("query", "key", "value"))
    assert query.shape == key.shape == value.shape == (BATCH, 4, LENGTH, 4)
    mixed = (attention_maps(query, key, causal=name == "gpt2") @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, entered[0], atol=1e-5, rtol=0)


def test_grouped_queries_share_repeated_keys_and_values():
    student, names = build("llama")
    layer, states = student.layers[0], []
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.no_grad(), capture_qkv(student, names) as inner:
        student(IDS)
        captured = {feature: tensors[0] for feature, tensors in inner.views().items()}
    for feature, own_heads in (("query", 4), ("key", 2), ("value", 2)):
        weight = getattr(layer.self_attn, f"{feature[0]}_proj").weight
        assert captured[feature].shape == (BATCH, 4, LENGTH, 4)
        for head in range(4):
            rows = slice(head * own_heads // 4 * 4, (head * own_heads // 4 + 1) * 4)
            torch.testing.assert_close(captured[feature][:, head], states[0] @ weight[rows].T)


def test_scores_of_a_llama_after_rotation_differ_but_rotating_them_gives_its_maps():
    """What the documentation says of rotary embeddings, and that the projections are the right ones."""
    student, names = build("llama", attn_implementation="eager")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad(), capture_qkv(student, names) as inner:
        expected = student(IDS, output_attentions=True).attentions
        cos, sin = student.rotary_emb(inner.views()["query"][0], torch.arange(LENGTH)[None])
    for query, key, reference in zip(inner.views()["query"], inner.views()["key"], expected, strict=True):
        assert (attention_maps(query, key, causal=True) - reference).abs().max() > 1e-3
        rotated = attention_maps(*apply_rotary_pos_emb(query, key, cos, sin), causal=True)
        torch.testing.assert_close(rotated, reference, atol=1e-5, rtol=0)


def test_fused_projection_with_grouped_queries():
    student, names = build("phi3")
    states = []
    student.layers[0].self_attn.qkv_proj.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.no_grad(), capture_qkv(student, names) as inner:
        student(IDS)
    # Rows of the weight: 4 query heads, 2 key heads, 2 value heads, of width 4.
    weight = student.layers[0].self_attn.qkv_proj.weight
    for feature, heads in (("query", (0, 1, 2, 3)), ("key", (4, 4, 5, 5)), ("value", (6, 6, 7, 7))):
        for place, head in enumerate(heads):
            expected = states[0] @ weight[4 * head : 4 * head + 4].T
            torch.testing.assert_close(inner.views()[feature][0][:, place], expected)


def test_fused_projection_by_head():
    student, names = build("neox")
    states = []
    fused = student.layers[1].attention.query_key_value
    fused.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.no_grad(), capture_qkv(student, names, "query_key_value", num_heads=4, by_head=True) as inner:
        student(IDS)
    for index, feature in enumerate(("query", "key", "value")):
        for head in range(4):
            rows = slice((3 * head + index) * 4, (3 * head + index + 1) * 4)
            expected = states[0] @ fused.weight[rows].T + fused.bias[rows]
            torch.testing.assert_close(inner.views()[feature][1][:, head], expected)


def test_gradients_reach_the_projections():
    student, names = build("gpt2")
    with capture_qkv(student, names) as inner:
        student(IDS)
        scores = attention_scores(inner.views()["query"][1], inner.views()["key"][1], MASK, causal=True)
    assert torch.isfinite(scores).all()
    scores.softmax(-1).square().sum().backward()
    gradient = student.h[1].attn.c_attn.weight.grad
    assert gradient[:, :32].abs().sum() > 0
    assert not gradient[:, 32:].any()  # the values take no part in the scores
    assert student.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def scores_by_loops(query, key, scale):
    batch, heads, rows, _ = query.shape
    result = torch.zeros(batch, heads, rows, key.shape[2], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                for j in range(key.shape[2]):
                    result[b, h, i, j] = scale * math.fsum((query[b, h, i] * key[b, h, j]).tolist())
    return result


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return query, torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [None, 1, 0.25])
def test_scores_by_loops(pair, scale):
    expected = scores_by_loops(*pair, 1 / math.sqrt(5) if scale is None else scale)
    torch.testing.assert_close(attention_scores(*pair, scale=scale), expected)


def masks():
    kept = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]])
    return {
        "whole numbers": kept,
        "booleans": kept.bool(),
        "four-dimensional": kept.bool()[:, None, None],
        "added, infinite": torch.where(kept.bool(), 0.0, -math.inf)[:, None, None],
        "added, lowest": torch.where(kept.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None].double(),
        "added, full": torch.where(kept.bool(), 0.0, -math.inf)[:, None, None].expand(2, 3, 4, 6),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masks(pair, name, causal, dtype):
    query, key = (tensor.to(dtype) for tensor in pair)
    scores = attention_scores(query, key, masks()[name], causal=causal)
    maps = attention_maps(query, key, masks()[name], causal=causal)
    assert scores.dtype == maps.dtype == dtype
    assert torch.isfinite(scores).all()
    plain, tolerance = attention_scores(query, key).double(), 4 * torch.finfo(dtype).eps
    for b in range(2):
        for i in range(4):
            # Of 6 keys, the first of 4 queries meets the first 3 under causal attention.
            met = [j for j in range(6) if masks()["booleans"][b, j] and not (causal and j > i + 2)]
            for h in range(3):
                weights = {j: math.exp(plain[b, h, i, j]) for j in met}
                expected = [weights.get(j, 0.0) / sum(weights.values()) if met else 1 / 6 for j in range(6)]
                if met or not name.startswith("added, lowest"):
                    found = maps[b, h, i].double()
                    target = torch.tensor(expected, dtype=torch.float64)
                    torch.testing.assert_close(found, target, atol=tolerance, rtol=0)


def test_an_additive_mask_is_added(pair):
    bias = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = scores_by_loops(*pair, 5**-0.5) + bias
    torch.testing.assert_close(attention_scores(*pair, bias), expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 4, dtype=torch.long),  # the query's length
        torch.ones(3, 6, dtype=torch.long),
        torch.zeros(2, 6),  # is it 0 and 1, or added?
        torch.zeros(2, 4, 6),
        torch.zeros(2, 2, 4, 6),
        torch.zeros(6, dtype=torch.bool),
    ],
)
def test_masks_that_do_not_fit(pair, mask):
    with pytest.raises(ValueError, match="mask must be"):
        attention_scores(*pair, mask)


def test_queries_and_keys_that_do_not_fit(pair):
    query, key = pair
    for wrong in (key[0], key[:1], key[:, :1], key[..., :4]):
        with pytest.raises(ValueError, match="query and key must be"):
            attention_scores(query, wrong)
    with pytest.raises(TypeError, match="scale must be a number"):
        attention_scores(query, key, scale="1")


class Attention(nn.Module):
    def __init__(self, key_width=8, **attributes):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, key_width), nn.Linear(8, key_width)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def test_the_model_itself_may_be_the_attention_module():
    model, x = Attention(num_heads=2), torch.randn(2, 3, 8)
    with capture_qkv(model, [""]) as inner:
        query, _, _ = model(x)
    torch.testing.assert_close(inner.views()["query"][0], query.view(2, 3, 2, 4).transpose(1, 2))
    with capture_qkv(model, [model], ["k", "q", "v"], num_heads=4) as inner:
        model(x)
    torch.testing.assert_close(inner.views()["key"][0], query.view(2, 3, 4, 2).transpose(1, 2))


@pytest.mark.parametrize(
    ("attributes", "arguments", "error", "message"),
    [
        ({}, {}, ValueError, "pass num_heads"),
        ({}, {"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"num_heads": 4}, {"num_key_value_heads": 3}, ValueError, "must divide num_heads, got 3 and 4"),
        ({"num_heads": 4}, {"by_head": True}, ValueError, "by_head must be False"),
        ({"num_heads": 4}, {"projections": ["q", "k"]}, ValueError, "projections must be one name, or the three"),
        ({"num_heads": 4}, {"projections": ["q", "k", "w"]}, KeyError, "has no module 'w'"),
        ({"num_heads": 4, "q": None}, {}, KeyError, "none of the usual projections"),
    ],
)
def test_attention_modules_that_cannot_be_read(attributes, arguments, error, message):
    with pytest.raises(error, match=message):
        capture_qkv(Attention(**attributes), [""], **arguments)


@pytest.mark.parametrize("modules", [[], "layer"])
def test_modules_must_be_a_list(modules):
    with pytest.raises((ValueError, TypeError), match="modules must"):
        capture_qkv(Attention(num_heads=2), modules)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Attention(num_heads=3), torch.zeros(1, 2, 8), "must give 3 times the width of a head"),
        (Attention(num_heads=2), torch.zeros(2, 8), r"must give \(batch, length, width\)"),
        # Keys shared by two heads each, which only the width of a head gives away.
        (Attention(key_width=4, num_heads=2, head_dim=4), torch.zeros(1, 2, 8), "check num_heads, num_key_value_heads"),
    ],
)
def test_projections_that_do_not_fit_the_heads(model, x, message):
    with capture_qkv(model, [""]) as inner:
        model(x)
    with pytest.raises(ValueError, match=message):
        inner.views()
