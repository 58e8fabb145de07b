"""Models with fewer hidden features: masked and shrunk alike, and alike to models that were never any wider."""

import copy
import math

import pytest
import torch
import transformers

from tests.compression.families import NINE, cast, check_generation, double, gradients, mild, with_labels
from tests.students.models import HEADS, HIDDEN, LAYERS, MODELS, UNITS, WIDTH_OF_HEAD, batch_for, make, outputs_of
from textbrewer.compression import Masked, Masks, Prune, factorize_
from textbrewer.compression.sites import find_layout
from textbrewer.students import init_student_from_teacher, initialise

PLANS = {
    "half": Prune(hidden=0.5),
    "all": Prune(hidden=0.3, heads=0.4, ffn=0.6, layers=1, scope="global", score="random", seed=2),
    "one": Prune(hidden=0.99, score="random"),
}
KEPT = torch.tensor([0, 3, 4, 7, 8, 9, 13, 14, 17, 20, 21, 24, 26, 29, 30, 31])
SOME = torch.isin(torch.arange(HIDDEN), KEPT)


def assert_same(masked, small, mask, tolerance):
    """Compare outputs; those as wide as the hidden states have zeros where features are gone."""
    assert masked.keys() == small.keys()
    for key, value in masked.items():
        if value.shape != small[key].shape:
            assert not value[..., ~mask].any(), key
            value = value[..., mask]
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(value, small[key], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_shrunk_is_masked(name, plan):
    model = double(name)
    model.set_attn_implementation("eager" if plan == "half" else "sdpa")
    batch = cast(batch_for(model), torch.float64)
    before, state = outputs_of(model, batch), torch.get_rng_state()
    masked = PLANS[plan].apply(model)
    mask, small = masked.masks["hidden"], masked.shrink()
    assert torch.equal(torch.get_rng_state(), state)
    assert int(mask.sum()) == {"half": 16, "all": 23, "one": 1}[plan]
    assert_same(outputs_of(masked.model, batch), outputs_of(small, batch), mask, 1e-10)
    assert_same(outputs_of(model, batch), before, mask, 0)
    assert type(small) is type(model)
    logits = next(key for key, value in before.items() if value.shape[-1] != HIDDEN or value.dim() < 4)
    if before[logits].shape == outputs_of(small, batch)[logits].shape:
        assert float((outputs_of(small, batch)[logits] - before[logits]).abs().max()) > 0.01
    kept, total = (sum(parameter.numel() for parameter in one.parameters()) for one in (small, model))
    sparsity = masked.sparsity()
    assert sparsity["parameters"] == pytest.approx(1 - kept / total, abs=1e-12)
    assert sparsity["hidden"] == 1 - int(mask.sum()) / HIDDEN


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NINE)
def test_shrunk_is_masked_in_single_precision(name, attention):
    model = mild(name)
    model.set_attn_implementation(attention)
    masked = PLANS["half"].apply(model)
    small = masked.shrink()
    outputs = outputs_of(masked.model, batch_for(model))
    assert_same(outputs, outputs_of(small, batch_for(model)), masked.masks["hidden"], 1e-5)


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("name", NINE)
def test_gradients_of_what_stays_are_the_same_and_of_the_rest_zero(name, precision):
    dtype, tolerance = (torch.float32, 1e-5) if precision == "single" else (torch.float64, 1e-10)
    model = (mild if precision == "single" else double)(name)
    masked = Masked(model, {"hidden": SOME})
    small = masked.shrink()
    batch = cast(with_labels(small), dtype)
    loss, own = gradients(small, batch)
    loss_masked, theirs = gradients(masked.model, batch)
    torch.testing.assert_close(loss, loss_masked, rtol=tolerance, atol=tolerance)
    narrower = 0
    for key, parameter in small.named_parameters():
        if own[key] is None:
            assert theirs[key] is None
            continue
        kept = theirs[key]
        for axis in range(parameter.dim()):  # whatever is shorter has lost hidden features, as nothing else went
            if parameter.shape[axis] != kept.shape[axis]:
                kept, narrower = kept.index_select(axis, KEPT), narrower + 1
        scale = max(1.0, float(own[key].abs().max()))
        torch.testing.assert_close(kept, own[key], rtol=0, atol=tolerance * scale)
        # All that the whole gradient has is in the kept part: what is gone has none.
        assert float(theirs[key].abs().sum()) == pytest.approx(float(kept.abs().sum()), rel=tolerance, abs=1e-12)
    assert narrower >= 6 * LAYERS


def narrower_student(model, monkeypatch):
    """Return a student that the model's class made from a narrower config, with the weights of the features in KEPT."""

    def choose(space, scores):
        blocks = {"hidden": KEPT, "heads": torch.arange(space.blocks.student) * 2, "units": torch.arange(UNITS)}
        space.kept = blocks[space.kind]

    monkeypatch.setattr(initialise, "choose", choose)
    return init_student_from_teacher(model, hidden=len(KEPT), intermediate=UNITS).eval()


@pytest.mark.parametrize("name", [*NINE, "mt5", "vit-pooled", "deit", "mbart", "electra-base", "roberta-lm", "bert-lm"])
def test_narrowed_is_a_model_that_its_class_made_narrow(name, monkeypatch):
    """Every second head goes too, so that heads of their old width make up half of the width in any family."""
    model = double(name)
    student = narrower_student(model, monkeypatch)
    heads = {site.name: torch.arange(site.units) % 2 == 0 for site in find_layout(model).of("heads")}
    batch = cast(batch_for(model), torch.float64)
    masked = Masked(model, {"hidden": SOME, **heads})
    small, expected = masked.shrink(), outputs_of(student, batch)
    assert_same(outputs_of(small, batch), expected, SOME, 1e-11)
    assert_same(outputs_of(masked.model, batch), expected, SOME, 1e-11)
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (small, student)]
    assert shapes[0] == shapes[1]


def test_narrowed_bert_by_hand():
    model = make("bert-classifier").double()
    masked = Masked(copy.deepcopy(model), {"hidden": SOME})
    config = copy.deepcopy(model.config)
    tokens, state = batch_for(model)["input_ids"], model.state_dict()
    assert masked.shrink().config.hidden_size == len(KEPT)

    def read(name):
        return state[f"bert.{name}" if not name.startswith("classifier") else name]

    def norm(states, name):
        mean = sum(states[..., place] for place in range(len(KEPT))) / len(KEPT)
        variance = sum((states[..., place] - mean) ** 2 for place in range(len(KEPT))) / len(KEPT)
        scaled = (states - mean[..., None]) / (variance[..., None] + config.layer_norm_eps).sqrt()
        return scaled * read(f"{name}.weight")[KEPT] + read(f"{name}.bias")[KEPT]

    def linear(states, name, reads=KEPT, writes=None):
        weight, bias = read(f"{name}.weight"), read(f"{name}.bias")
        weight = weight if reads is None else weight[:, reads]
        return states @ (weight if writes is None else weight[writes]).T + (bias if writes is None else bias[writes])

    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    words, places, kinds = (read(table)[:, KEPT] for table in tables)
    states = norm(words[tokens] + places[: tokens.shape[1]] + kinds[0], "embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        parts = [linear(states, f"{layer}.attention.self.{part}") for part in ("query", "key", "value")]
        heads = []
        for head in range(HEADS):
            query, key, value = (part[..., head * WIDTH_OF_HEAD : (head + 1) * WIDTH_OF_HEAD] for part in parts)
            heads.append((query @ key.transpose(1, 2) / math.sqrt(WIDTH_OF_HEAD)).softmax(-1) @ value)
        attended = linear(torch.cat(heads, -1), f"{layer}.attention.output.dense", None, KEPT)
        states = norm(states + attended, f"{layer}.attention.output.LayerNorm")
        units = torch.nn.functional.gelu(linear(states, f"{layer}.intermediate.dense"))
        states = norm(states + linear(units, f"{layer}.output.dense", None, KEPT), f"{layer}.output.LayerNorm")
    logits = linear(linear(states[:, 0], "pooler.dense", KEPT, KEPT).tanh(), "classifier")
    for one in (masked.model, masked.shrink()):
        torch.testing.assert_close(one(tokens).logits, logits, rtol=0, atol=1e-11)


def test_sizes_that_happen_to_be_equal_mislead_nobody():
    """A vocabulary, a number of positions and of units, all as large as the hidden width."""
    same = {"vocab_size": HIDDEN, "max_position_embeddings": HIDDEN, "intermediate_size": HIDDEN, "num_labels": HIDDEN}
    model = make("bert-classifier", **same).double()
    tokens = {"input_ids": torch.randint(3, HIDDEN, (2, 9))}
    masked = Masked(model, {"hidden": SOME})
    small = masked.shrink()
    assert_same(outputs_of(masked.model, tokens), outputs_of(small, tokens), SOME, 1e-11)
    assert outputs_of(small, tokens)["logits"].shape == (2, HIDDEN)
    assert small.bert.embeddings.position_embeddings.weight.shape == (HIDDEN, 16)
    assert small.bert.encoder.layer[0].intermediate.dense.weight.shape == (HIDDEN, 16)


@pytest.mark.parametrize("kept", [1, 2, 9, 10, 30])
@pytest.mark.parametrize("name", ["electra", "bert-classifier", "gpt2", "vit"])
def test_pruned_twice(name, kept):
    """Widths that are those of something else by now: ELECTRA's embeddings are 10 wide, classes are 2, units 30."""
    model = double(name)
    first = Masked(model, {"hidden": torch.arange(HIDDEN) < kept + 1}).shrink()
    masked = Masked(first, {"hidden": torch.arange(kept + 1) > 0})
    once = Masked(double(name), {"hidden": (torch.arange(HIDDEN) <= kept) & (torch.arange(HIDDEN) > 0)})
    batch = cast(batch_for(model), torch.float64)
    expected = outputs_of(once.shrink(), batch)
    for outputs in (outputs_of(masked.shrink(), batch), outputs_of(masked.model, batch)):
        assert_same(outputs, expected, torch.arange(kept + 1) > 0, 1e-11)


def test_what_modules_and_config_say_follows():
    keep = torch.arange(HIDDEN) < 10
    small = Masked(make("bert-classifier"), {"hidden": keep}).shrink()
    attention = small.bert.encoder.layer[0].attention
    assert (small.config.hidden_size, small.config.num_attention_heads) == (10, HEADS)
    assert (attention.self.query.in_features, attention.self.query.out_features) == (10, HIDDEN)
    assert (attention.output.dense.out_features, attention.output.LayerNorm.normalized_shape) == (10, (10,))
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (HEADS, HIDDEN)
    assert small.bert.embeddings.word_embeddings.embedding_dim == 10

    small = Masked(make("gpt2-classifier"), {"hidden": keep}).shrink()
    attention = small.transformer.h[0].attn
    assert (small.config.n_embd, small.config.n_inner, small.transformer.embed_dim) == (10, 4 * HIDDEN, 10)
    assert (attention.embed_dim, attention.split_size, attention.c_attn.nx) == (HIDDEN, HIDDEN, 10)

    small = Masked(make("t5"), {"hidden": keep}).shrink()
    assert {small.config.d_model, small.encoder.config.d_model, small.decoder.config.d_model, small.model_dim} == {10}
    assert small.encoder.block[0].layer[0].SelfAttention.inner_dim == HIDDEN

    small = Masked(make("bart"), {"hidden": keep}).shrink()
    assert small.model.encoder.embed_tokens.embed_scale == pytest.approx(math.sqrt(10))
    assert (small.model.encoder.layers[0].embed_dim, small.model.encoder.layers[0].self_attn.embed_dim) == (10, HIDDEN)

    small = Masked(make("qwen2"), {"hidden": keep}).shrink()
    assert (small.config.hidden_size, small.config.head_dim, small.model.layers[0].mlp.hidden_size) == (10, 4, 10)

    small = Masked(make("electra-base"), {"hidden": keep}).shrink()
    assert (small.config.hidden_size, small.config.embedding_size) == (10, 10)
    small = Masked(make("electra"), {"hidden": keep}).shrink()
    assert (small.electra.embeddings_project.in_features, small.electra.embeddings_project.out_features) == (10, 10)
    small = Masked(make("vit-pooled"), {"hidden": keep}).shrink()
    assert (small.config.pooler_output_size, small.embeddings.cls_token.shape) == (10, (1, 1, 10))
    assert small.embeddings.patch_embeddings.projection.out_channels == 10


@pytest.mark.parametrize("name", ["mistral", "qwen2", "llama", "t5", "mt5"])
def test_where_the_config_says_all_transformers_loads_it_too(name, tmp_path):
    small = Masked(make(name), {"hidden": SOME}).shrink()
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert_same(outputs_of(loaded, batch_for(small)), outputs_of(small, batch_for(small)), SOME, 0)


def test_a_masked_t5_counts_as_the_shrunk_one_only_while_it_computes():
    masked = Masked(make("t5"), {"hidden": SOME})
    seen = []
    masked.model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(masked.model.model_dim))
    outputs_of(masked.model)
    assert (seen, masked.model.model_dim) == ([16], HIDDEN)
    with pytest.raises(ValueError, match="must specify exactly one"):
        masked.model()
    assert masked.model.model_dim == HIDDEN


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "bart", "t5", "bert-decoder"])
def test_generation_with_a_cache(name):
    masked = PLANS["half"].apply(double(name))
    check_generation(masked)


def test_masked_trains_and_shrinks_to_what_it_became():
    masked = PLANS["half"].apply(make("bert-classifier"))
    optimizer = torch.optim.AdamW(masked.model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        masked.model(**with_labels(masked.model, seed)).loss.backward()
        optimizer.step()
    small = masked.shrink()
    batch, mask = batch_for(small), masked.masks["hidden"]
    assert_same(outputs_of(masked.model, batch), outputs_of(small, batch), mask, 1e-5)
    copied = copy.deepcopy(masked.model)
    assert_same(outputs_of(copied, batch), outputs_of(masked.model, batch), mask, 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_tied_weights_stay_tied():
    for name in ("bert-lm", "gpt2", "t5", "bart", "electra-generator"):
        model = make(name)
        small = Masked(model, {"hidden": SOME}).shrink()
        assert len({id(one) for one in small.parameters()}) == len({id(one) for one in model.parameters()})
    small = Masked(make("gpt2"), {"hidden": SOME}).shrink()
    assert small.lm_head.weight is small.transformer.wte.weight
    assert (small.lm_head.in_features, small.transformer.wte.embedding_dim) == (16, 16)


def test_sparsity_counts_by_hand():
    model = make("bert-classifier")
    sparsity = Masked(model, {"hidden": torch.arange(HIDDEN) < 10}).sparsity()
    # In each layer: what reads the hidden features (three of the attention, one of the feed-forward part), what writes
    # them (one of each, with a bias), and two norms. Outside: 37 words, 20 positions, 2 types, norm, pooler and head.
    layer = 22 * (3 * HIDDEN + UNITS) + 22 * (HIDDEN + UNITS + 2) + 4 * 22
    outside = 22 * (37 + 20 + 2 + 2) + (HIDDEN * HIDDEN - 100) + 22 + 22 * 2
    whole_layer = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * UNITS + HIDDEN + UNITS + 4 * HIDDEN
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sparsity["hidden"] == 22 / HIDDEN
    assert sparsity["stack_parameters"] == pytest.approx(layer / whole_layer)
    assert sparsity["parameters"] == pytest.approx((LAYERS * layer + outside) / total)
    assert (sparsity["heads"], sparsity["ffn"], sparsity["layers"]) == (0, 0, 0)
    assert Prune(ffn=0.5).apply(make("bert-classifier")).sparsity()["hidden"] == 0


def test_masks_are_saved_and_put_on_another_copy(tmp_path):
    model = make("gpt2")
    masked = PLANS["all"].apply(model)
    masked.masks.save(tmp_path / "masks.safetensors")
    masks = Masks.load(tmp_path / "masks.safetensors")
    assert "hidden: 23 of 32" in repr(masks)
    again = Masked(copy.deepcopy(model), masks)
    assert_same(outputs_of(again.model), outputs_of(masked.model), masks["hidden"], 0)
    with pytest.raises(ValueError, match=r"the mask of 'hidden' must have one item for each of the 32.*another model"):
        Masked(make("gpt2"), {"hidden": torch.ones(33, dtype=torch.bool)})
    with pytest.raises(ValueError, match="keep at least one of 32 units"):
        Masked(make("gpt2"), {"hidden": torch.zeros(32, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 1.0}, "hidden must be less than 1, got 1.0"),
        ({"hidden": -0.5}, "hidden must be at least 0"),
        ({"hidden": 0.5, "score": "apoz"}, 'must not be "apoz" for hidden features'),
        ({"hidden": 0.5, "heads": 0.5, "score": "slim"}, "'slim' must be for hidden features alone"),
        ({"layers": 1, "score": "slim"}, "'slim' must be for hidden features alone"),
    ],
)
def test_plans_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Prune(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0.01}, "hidden must be large enough to take one of 32, got 0.01"),
        ({"hidden": 0.5, "exclude": ["*.layer.0.*"]}, "exclude must leave something to prune of hidden"),
        ({"hidden": 0.5, "exclude": ["classifier"]}, "exclude must leave something to prune of hidden"),
        ({"hidden": 0.5, "score": {"heads": torch.ones(3)}}, "must have 32 numbers for 'hidden', got none"),
        ({"hidden": 0.5, "score": {"hidden": torch.ones(3)}}, r"must have 32 numbers for 'hidden', got \(3,\)"),
        ({"hidden": 0.5, "score": "taylor"}, "needs data"),
    ],
)
def test_plans_that_do_not_fit_the_model(settings, message):
    model = make("bert-classifier")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        Prune(**settings).apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_whose_hidden_features_cannot_be_told():
    model = make("bert-classifier")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 5), torch.nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"'classifier\.0\.weight' must be in every BertForSequenceClassification"):
        Prune(hidden=0.5).apply(model)
    Prune(heads=0.5).apply(model)  # which need none of it
    model = make("bert-classifier")
    factorize_(model, [batch_for(model)], ratio=0.3)
    with pytest.raises(ValueError, match="Prune first, and factorise"):
        Prune(hidden=0.5).apply(model)
    model = make("bert-classifier")
    model.bert.pooler.dense = torch.nn.Linear(HIDDEN, HIDDEN - 1)
    with pytest.raises(ValueError, match=r"the same everywhere .* 31 in 'bert\.pooler\.dense\.weight'"):
        Prune(hidden=0.5).apply(model)


def test_a_class_that_is_not_made_from_its_config_alone():
    class Wrapped(transformers.BertForSequenceClassification):
        def __init__(self, config, something):
            super().__init__(config)

    with pytest.raises(ValueError, match=r"Wrapped must be able to be made .* wide.*TypeError.*resized="):
        Prune(hidden=0.5).apply(Wrapped(make("bert-classifier").config, 1))


def test_scopes_limits_and_equal_scores():
    model = make("bert-classifier")
    scores = {"hidden": torch.zeros(HIDDEN)}
    for scope in ("uniform", "global"):
        masks = Prune(hidden=0.5, score=scores, scope=scope, minimum=20).apply(model).masks
        assert torch.equal(masks["hidden"], torch.arange(HIDDEN) < HIDDEN // 2)
    assert set(masks) == {"hidden"}
    one, same, other = (Prune(hidden=0.5, score="random", seed=seed).apply(model).masks["hidden"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
