"""Masked models, and what is left of them when shrunk: the same outputs and gradients, fewer numbers."""

import copy

import pytest
import torch
from torch import nn

from tests.compression.families import (
    GROUPED,
    NINE,
    READERS,
    cast,
    check_generation,
    double,
    gradients,
    mild,
    with_labels,
)
from tests.students.models import HEADS, HIDDEN, LAYERS, MODELS, UNITS, batch_for, make, outputs_of
from textbrewer.compression import Masked, Masks, Prune
from textbrewer.students import init_student_from_teacher

PLANS = {
    "halves": Prune(heads=0.5, ffn=0.5),
    "global": Prune(heads=0.4, ffn=0.6, scope="global", score="l2"),
    "layers": Prune(heads=0.25, ffn=0.5, layers=2, score="random", seed=1),
}


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    for key in one:
        scale = max(1.0, float(one[key].abs().max()))
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_shrunk_is_masked(name, plan):
    model = double(name)
    model.set_attn_implementation("eager" if plan == "halves" else "sdpa")
    batch = cast(batch_for(model), torch.float64)
    before = outputs_of(model, batch)
    masked = PLANS[plan].apply(model)
    small = masked.shrink()
    close(outputs_of(masked.model, batch), outputs_of(small, batch), 1e-11)
    close(outputs_of(model, batch), before, 0)
    assert type(small) is type(model)
    assert max(float((value - before[key]).abs().max()) for key, value in outputs_of(small, batch).items()) > 0.01
    kept, total = (sum(parameter.numel() for parameter in one.parameters()) for one in (small, model))
    assert masked.sparsity()["parameters"] == pytest.approx(1 - kept / total, abs=1e-12)
    assert kept < 0.8 * total


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NINE)
def test_shrunk_is_masked_in_single_precision(name, attention):
    model = mild(name)
    model.set_attn_implementation(attention)
    masked = PLANS["global"].apply(model)
    close(outputs_of(masked.model, batch_for(model)), outputs_of(masked.shrink(), batch_for(model)), 1e-5)


def reduced(dense, small):
    """Return the kept part of a gradient, found by the values of the weights and not by masks: no two are alike."""
    weight, gradient = dense.detach(), dense.grad
    for axis in range(weight.dim()):
        if weight.shape[axis] == small.shape[axis]:
            continue
        rows, wanted = (tensor.detach().movedim(axis, 0) for tensor in (weight, small))
        rows, wanted = rows.reshape(len(rows), -1), wanted.reshape(len(wanted), -1)
        places = torch.tensor([int((rows == row).all(1).nonzero()) for row in wanted])
        weight, gradient = weight.index_select(axis, places), gradient.index_select(axis, places)
    return gradient


@pytest.mark.parametrize("plan", ["halves", "global"])
@pytest.mark.parametrize("name", NINE)
def test_gradients_of_what_stays_are_the_same_and_of_the_rest_zero(name, plan):
    masked = PLANS[plan].apply(double(name))
    small = masked.shrink()
    batch = cast(with_labels(small), torch.float64)
    loss, own = gradients(small, batch)
    loss_masked, theirs = gradients(masked.model, batch)
    torch.testing.assert_close(loss, loss_masked, rtol=0, atol=1e-10)
    parameters = dict(masked.model.named_parameters())
    reached = 0
    for key, parameter in small.named_parameters():
        if own[key] is None:
            assert theirs[key] is None
            continue
        kept = reduced(parameters[key], parameter)
        torch.testing.assert_close(kept, own[key], rtol=0, atol=1e-9)
        # All that the whole gradient has is in the kept part: what was switched off has none.
        torch.testing.assert_close(theirs[key].abs().sum(), own[key].abs().sum(), rtol=1e-9, atol=1e-9)
        reached += parameter.shape != parameters[key].shape
    assert reached >= 4 * LAYERS


@pytest.mark.parametrize("name", NINE)
def test_gradients_in_single_precision(name):
    masked = PLANS["halves"].apply(mild(name))
    small = masked.shrink()
    batch = with_labels(small)
    loss, own = gradients(small, batch)
    loss_masked, theirs = gradients(masked.model, batch)
    torch.testing.assert_close(loss, loss_masked, rtol=1e-5, atol=1e-5)
    for key, gradient in own.items():
        if gradient is not None and gradient.shape == theirs[key].shape:
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(gradient, theirs[key], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [name for name in NINE if name != "t5"])
def test_masked_is_the_model_with_the_readers_weights_at_zero(name):
    model = make(name)
    masked = PLANS["global"].apply(model)
    readers, units = READERS.get(model.config.model_type, READERS["bert"])
    zeroed = copy.deepcopy(model)
    seen = set()
    for key, mask in masked.masks.items():
        module = zeroed.get_submodule(key)
        features = mask.repeat_interleave((HIDDEN if key.endswith(readers) else UNITS) // len(mask))
        if key.endswith(units) and not key.endswith(readers):
            assert len(mask) == UNITS
        else:
            assert len(mask) == (HEADS // 2 if name in GROUPED else HEADS)
        weight = module.weight.data if type(module).__name__ == "Conv1D" else module.weight.data.T
        weight[~features] = 0
        seen.add(key)
    assert len(seen) == LAYERS * (5 if name == "bart" else 2)
    close(outputs_of(masked.model, batch_for(model)), outputs_of(zeroed, batch_for(model)), 1e-5)


def test_t5_loses_the_same_heads_in_a_whole_stack():
    model = make("t5")
    masked = PLANS["halves"].apply(model)
    heads = [key for key in masked.masks if key.endswith((".o", "*"))]
    assert heads == [
        "encoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.1.EncDecAttention.o",
    ]
    zeroed = copy.deepcopy(model)
    for key in heads:
        features = masked.masks[key].repeat_interleave(HIDDEN // HEADS)
        for number in range(LAYERS):
            zeroed.get_submodule(key.replace("*", str(number))).weight.data[:, ~features] = 0
    units = [key for key in masked.masks if key.endswith(".wo")]
    assert len(units) == 2 * LAYERS
    for key in units:
        zeroed.get_submodule(key).weight.data[:, ~masked.masks[key]] = 0
    close(outputs_of(masked.model, batch_for(model)), outputs_of(zeroed, batch_for(model)), 1e-5)
    small = masked.shrink()
    table = small.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.weight.shape == (32, HEADS // 2)
    assert table.embedding_dim == HEADS // 2


@pytest.mark.parametrize("name", [*NINE, "t5-encoder", "bart-decoder"])
def test_dropped_layers_are_those_of_a_student_without_them(name):
    """Against the other way to such a model: a student made of the layers that stay."""
    model = double(name)
    masked = Prune(layers=2, score="random", seed=3).apply(model)
    stays = {key: [number for number, kept in enumerate(mask.tolist()) if kept] for key, mask in masked.masks.items()}
    assert all(len(numbers) == LAYERS - 2 for numbers in stays.values())
    layers = tuple(stays.values()) if len(stays) == 2 else next(iter(stays.values()))
    student = init_student_from_teacher(model, layers=layers).eval()
    batch = cast(with_labels(model) if name != "t5-encoder" else batch_for(model), torch.float64)
    small = masked.shrink()
    close(outputs_of(small, batch), outputs_of(student, batch), 1e-12)
    close(outputs_of(masked.model, batch), outputs_of(student, batch), 1e-12)
    assert small.state_dict().keys() == student.state_dict().keys()
    for field in ("num_hidden_layers", "num_decoder_layers", "decoder_layers", "layer_types"):
        assert getattr(small.config, field, None) == getattr(student.config, field, None)
    if name != "t5-encoder":
        _, theirs = gradients(masked.model, batch)
        _, own = gradients(small, batch)
        for key in own:  # of what is not in the layers, which are renumbered
            if (
                key in theirs
                and own[key] is not None
                and ".block." not in key
                and ".layer" not in key
                and ".h." not in key
            ):
                torch.testing.assert_close(own[key], theirs[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "bart", "t5", "mt5", "bert-decoder"])
@pytest.mark.parametrize("plan", PLANS)
def test_generation_with_a_cache(name, plan):
    masked = PLANS[plan].apply(double(name))
    check_generation(masked)


def test_what_modules_and_config_say_follows():
    small = Prune(heads=0.5, ffn=0.5, layers=1).apply(make("bert-classifier")).shrink()
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        assert (attention.num_attention_heads, attention.all_head_size) == (HEADS // 2, HIDDEN // 2)
        assert (attention.query.out_features, layer.attention.output.dense.in_features) == (HIDDEN // 2, HIDDEN // 2)
        assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (UNITS // 2, UNITS // 2)
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (LAYERS - 1, UNITS // 2)
    assert small.config.num_attention_heads == HEADS  # by which the width of a head is worked out

    small = Prune(heads=0.5, ffn=0.5).apply(make("gpt2")).shrink()
    attention = small.transformer.h[0].attn
    assert (attention.num_heads, attention.embed_dim, attention.split_size) == (HEADS // 2, HIDDEN // 2, HIDDEN // 2)
    assert (attention.c_attn.nx, attention.c_attn.nf, attention.c_proj.nx) == (HIDDEN, 3 * HIDDEN // 2, HIDDEN // 2)
    assert small.config.n_inner == UNITS // 2

    small = Prune(heads=0.5, layers=1, score="random").apply(make("llama")).shrink()
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS // 2, HEADS // 4)
    assert config.head_dim == HIDDEN // HEADS
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == list(range(LAYERS - 1))

    small = Prune(heads=0.25, ffn=0.5, layers=1).apply(make("t5")).shrink()
    assert (small.config.num_heads, small.config.d_ff, small.config.d_kv) == (6, UNITS // 2, HIDDEN // HEADS)
    assert small.decoder.config.num_layers == small.config.num_decoder_layers == LAYERS - 1
    assert small.encoder.block[0].layer[0].SelfAttention.n_heads == 6


def test_config_has_the_widest_layer_and_refuses_no_heads():
    small = Prune(ffn=0.5, scope="global", score="random").apply(make("bert-classifier")).shrink()
    widths = [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer]
    assert len(set(widths)) > 1
    assert small.config.intermediate_size == max(widths)
    small = Prune(heads=0.25).apply(make("llama")).shrink()  # 6 heads do not divide a width of 32
    assert small.config.num_attention_heads == HEADS
    assert small.model.layers[0].self_attn.q_proj.out_features == 6 * HIDDEN // HEADS


def test_pruned_alike_everywhere_loads_by_transformers_too(tmp_path):
    small = Prune(heads=0.5, ffn=0.5, layers=1).apply(make("llama")).shrink()
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    close(outputs_of(loaded, batch_for(small)), outputs_of(small, batch_for(small)), 1e-6)


def test_sparsity_counts_by_hand():
    model = make("bert-classifier")
    masks = {
        "bert.encoder.layer": torch.tensor([True, False, True, True]),
        "bert.encoder.layer.0.attention.output.dense": torch.arange(HEADS) < 2,
        "bert.encoder.layer.3.output.dense": torch.arange(UNITS) < 10,
    }
    masked = Masked(model, masks)
    sparsity = masked.sparsity()
    assert sparsity["heads"] == pytest.approx((HEADS + HEADS - 2) / (LAYERS * HEADS))
    assert sparsity["ffn"] == pytest.approx((UNITS + UNITS - 10) / (LAYERS * UNITS))
    assert sparsity["layers"] == 1 / 4
    norms, layer = 4 * HIDDEN, 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * UNITS + HIDDEN + UNITS
    features = 6 * HIDDEN // HEADS
    gone = layer + norms + 4 * features * HIDDEN + 3 * features + (UNITS - 10) * (2 * HIDDEN + 1)
    assert sparsity["stack_parameters"] == pytest.approx(gone / (LAYERS * (layer + norms)))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sparsity["parameters"] == pytest.approx(gone / total)
    assert sum(parameter.numel() for parameter in masked.shrink().parameters()) == total - gone


def test_masked_trains_and_shrinks_to_what_it_became():
    masked = PLANS["layers"].apply(make("bert-classifier"))
    optimizer = torch.optim.AdamW(masked.model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        masked.model(**with_labels(masked.model, seed)).loss.backward()
        optimizer.step()
    small = masked.shrink()
    close(outputs_of(masked.model, batch_for(small)), outputs_of(small, batch_for(small)), 1e-5)
    assert all(parameter.grad is None for parameter in small.parameters())


def test_shrunk_again():
    small = PLANS["global"].apply(make("llama")).shrink()
    masked = Prune(heads=0.4, ffn=0.5, layers=1, scope="global").apply(small)
    smaller = masked.shrink()
    close(outputs_of(masked.model, batch_for(small)), outputs_of(smaller, batch_for(small)), 1e-5)


def test_a_copy_of_a_masked_model_is_masked():
    model = make("bert-classifier")
    masked = PLANS["layers"].apply(model)
    copied = copy.deepcopy(masked.model)
    close(outputs_of(copied), outputs_of(masked.model), 0)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in masked.shrink().modules())


def test_masks_are_saved_and_put_on_another_copy(tmp_path):
    model = make("gpt2")
    masked = PLANS["layers"].apply(model)
    masked.masks.save(tmp_path / "deep" / "masks.safetensors")
    masks = Masks.load(tmp_path / "deep" / "masks.safetensors")
    assert masks.keys() == masked.masks.keys()
    assert all(torch.equal(masks[key], masked.masks[key]) for key in masks)
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["masks.safetensors"]
    again = Masked(copy.deepcopy(model), masks)
    close(outputs_of(again.model), outputs_of(masked.model), 0)
    assert "transformer.h: 2 of 4" in repr(masks)


READER = "bert.encoder.layer.0.attention.output.dense"


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({READER: torch.zeros(HEADS, dtype=torch.bool)}, ValueError, "keep at least one of 8 units.*whole layer out"),
        ({"bert.encoder.layer": torch.zeros(LAYERS, dtype=torch.bool)}, ValueError, "at least one of 4"),
        ({READER: torch.ones(HEADS + 1, dtype=torch.bool)}, ValueError, "each of the 8 units.*got 9.*another model"),
        ({"transformer.h": torch.ones(LAYERS, dtype=torch.bool)}, ValueError, "no 'transformer.h'.*another model"),
        ({READER: torch.ones(HEADS)}, TypeError, "booleans, true for what stays, got torch.float32"),
        ({READER: [True] * HEADS}, TypeError, "got list"),
        ({READER: torch.ones(2, 4, dtype=torch.bool)}, ValueError, "of one axis"),
        ([READER], TypeError, "a dict of tensors"),
    ],
)
def test_masks_that_do_not_fit(masks, error, message):
    model = make("bert-classifier")
    with pytest.raises(error, match=message):
        Masked(model, masks)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_files_of_masks_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of masks"):
        Masks.load(tmp_path / "none")
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"a file that Masks\.save wrote"):
        Masks.load(tmp_path / "text")


def test_a_masked_model_is_not_masked_again():
    masked = PLANS["halves"].apply(make("bert-classifier"))
    with pytest.raises(ValueError, match="shrink it first"):
        Masked(masked.model, masked.masks)
    with pytest.raises(ValueError, match="shrink it first"):
        PLANS["halves"].apply(masked.model)


def test_layers_that_compute_by_their_place_keep_it():
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    keep = {"transformer.h": torch.tensor([False, True, True, True])}
    with pytest.raises(ValueError, match=r"only the last layers.*scale_attn_by_inverse_layer_idx.*\[0\]"):
        Masked(model, keep)
    masked = Masked(model, {"transformer.h": torch.tensor([True, True, True, False])})
    close(outputs_of(masked.model), outputs_of(masked.shrink(), batch_for(model)), 1e-5)


def test_tensors_outside_the_layers_are_shared_by_nothing():
    model = make("bert-lm")
    small = PLANS["halves"].apply(model).shrink()
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in small.parameters())
    assert isinstance(small, nn.Module)
