"""Scores of hidden features against explicit loops over the tensors of BERT and GPT-2, and another way to get them."""

import math

import pytest
import torch

from tests.compression.families import cast, double, with_labels
from tests.compression.test_scores import distance
from tests.students.models import HIDDEN, LAYERS, batch_for
from textbrewer.compression import Prune
from textbrewer.compression.data_scores import DATA_SCORES
from textbrewer.compression.hidden_scores import hidden_score
from textbrewer.compression.sites import find_layout
from textbrewer.students import importance
from textbrewer.students.spaces import Space
from textbrewer.students.widths import Width

READERS = {
    "bert-classifier": [
        *(f"bert.encoder.layer.{n}.attention.self.{part}" for n in range(LAYERS) for part in ("query", "key", "value")),
        *(f"bert.encoder.layer.{n}.intermediate.dense" for n in range(LAYERS)),
        "bert.pooler.dense",
        "classifier",
    ],
    "gpt2": [*(f"transformer.h.{n}.{part}" for n in range(LAYERS) for part in ("attn.c_attn", "mlp.c_fc")), "lm_head"],
}
WRITERS = {
    "bert-classifier": [
        *(f"bert.encoder.layer.{n}.{part}output.dense" for n in range(LAYERS) for part in ("attention.", "")),
        "bert.pooler.dense",
    ],
    "gpt2": [f"transformer.h.{n}.{part}.c_proj" for n in range(LAYERS) for part in ("attn", "mlp")],
}
TABLES = {
    "bert-classifier": [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
    "gpt2": ["transformer.wpe"],  # the words' table is the head's, which reads
}
NORMS = {
    "bert-classifier": [
        "bert.embeddings.LayerNorm",
        *(f"bert.encoder.layer.{n}.{part}output.LayerNorm" for n in range(LAYERS) for part in ("attention.", "")),
    ],
    "gpt2": ["transformer.ln_f", *(f"transformer.h.{n}.ln_{which}" for n in range(LAYERS) for which in (1, 2))],
}


def hidden_site(model):
    (site,) = find_layout(model, hidden=True).of("hidden")
    return site


def rows_of(model, name):
    """Return for each tensor the list of numbers of each feature."""

    def turned(path, reads):
        module = model.get_submodule(path)
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.detach()
        return (weight if transposed == reads else weight.T).tolist()

    tensors = [turned(path, True) for path in READERS[name]] + [turned(path, False) for path in WRITERS[name]]
    tensors += [model.get_submodule(path).weight.detach().T.tolist() for path in TABLES[name]]
    return tensors + [[[value] for value in model.get_submodule(path).weight.tolist()] for path in NORMS[name]]


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_scores_by_weights_are_those_of_loops(name):
    model = double(name)
    site, sums, squares, joined = hidden_site(model), [0.0] * HIDDEN, [0.0] * HIDDEN, [[] for _ in range(HIDDEN)]
    for rows in rows_of(model, name):
        assert len(rows) == HIDDEN
        mean = sum(abs(value) for row in rows for value in row) / HIDDEN
        root = math.sqrt(sum(value**2 for row in rows for value in row) / HIDDEN)
        for feature, row in enumerate(rows):
            sums[feature] += sum(abs(value) for value in row) / mean
            squares[feature] += sum(value**2 for value in row) / root**2
            joined[feature] += [value / root for value in row]
    expected = {
        "l1": sums,
        "level": [value / len(joined[0]) for value in sums],
        "l2": [math.sqrt(value) for value in squares],
        "fpgm": [sum(distance(one, other) for other in joined) for one in joined],
    }
    for score, values in expected.items():
        torch.testing.assert_close(hidden_score(model, site, score), torch.tensor(values, dtype=torch.float64))
        masks = Prune(hidden=0.25, score=score).apply(model).masks
        gone = sorted(range(HIDDEN), key=values.__getitem__)[: HIDDEN // 4]
        assert (~masks["hidden"]).nonzero().flatten().tolist() == sorted(gone)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_slim_is_the_mean_scale_of_the_norms(name):
    model = double(name)
    scales = [model.get_submodule(path).weight.tolist() for path in NORMS[name]]
    expected = [sum(abs(scale[feature]) for scale in scales) / len(scales) for feature in range(HIDDEN)]
    score = hidden_score(model, hidden_site(model), "slim")
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64))
    mask = Prune(hidden=0.5, score="slim").apply(model).masks["hidden"]
    assert set(mask.nonzero().flatten().tolist()) == set(score.topk(HIDDEN // 2).indices.tolist())


def test_a_tensor_of_zeros_has_no_say():
    model = double("bert-classifier")
    before = hidden_score(model, hidden_site(model), "l1")
    table = model.bert.embeddings.token_type_embeddings.weight
    share = table.detach().abs().sum(0)
    table.data.zero_()
    after = hidden_score(model, hidden_site(model), "l1")
    torch.testing.assert_close(before - after, share / share.mean())


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_taylor_is_gradient_times_the_weights_that_read(name):
    model = double(name)
    data = [with_labels(model, seed) for seed in range(3)]
    site = hidden_site(model)
    scores = DATA_SCORES["taylor"](model, [site], data)["hidden"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    if name == "gpt2":  # of the table that words have in common with the head, only the head reads
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    expected = torch.zeros(HIDDEN, dtype=torch.float64)
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for path in READERS[name]:
            module = model.get_submodule(path)
            product = module.weight.grad * module.weight.detach()
            total += product.sum(1 if type(module).__name__ == "Conv1D" else 0)
        expected += total.square()
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "bart", "vit"])
def test_mean_activation_is_that_of_students_of_their_teachers(name):
    """The importance by which another part of the library chooses the features of a narrower student."""
    model = double(name)
    data = [cast(batch_for(model, seed), torch.float64) for seed in range(2)]
    if name != "vit":
        for batch in data:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, 5:] = 0
    site = hidden_site(model)
    layers = [f"{stack.path}.{number}" for stack in find_layout(model).stacks for number in range(LAYERS)]
    space = Space("hidden", "hidden", HIDDEN, Width(HIDDEN, HIDDEN // 2), readers=layers)
    (expected,) = importance.activation_scores([space], model, data)
    scores = DATA_SCORES["mean_activation"](model, [site], data)["hidden"]
    torch.testing.assert_close(scores, expected)
    mask = Prune(hidden=0.5, score="mean_activation").apply(model, data).masks["hidden"]
    importance.choose(space, expected)
    assert torch.equal(mask.nonzero().flatten(), space.kept)


def test_taylor_of_all_kinds_at_once_is_that_of_each():
    model = double("bert-classifier")
    data = [with_labels(model, seed) for seed in range(2)]
    sites = list(find_layout(model, hidden=True).sites)
    together = DATA_SCORES["taylor"](model, sites, data)
    for kind in ("heads", "hidden"):
        for site in (site for site in sites if site.kind == kind):
            torch.testing.assert_close(together[site.name], DATA_SCORES["taylor"](model, [site], data)[site.name])
    masks = Prune(hidden=0.5, heads=0.5, ffn=0.5, layers=1, score="taylor").apply(model, data).masks
    assert set(masks["hidden"].nonzero().flatten().tolist()) == set(together["hidden"].topk(16).indices.tolist())


def test_scores_that_hidden_features_do_not_have():
    model = double("bert-classifier")
    with pytest.raises(ValueError, match='must not be "apoz" for hidden features'):
        DATA_SCORES["apoz"](model, [hidden_site(model)], [batch_for(model)])
    for name in NORMS["bert-classifier"]:
        norm = torch.nn.LayerNorm(HIDDEN, elementwise_affine=False)
        model.get_submodule(name.rpartition(".")[0]).LayerNorm = norm
    with pytest.raises(ValueError, match='must not be "slim" for BertForSequenceClassification, whose norms have no'):
        Prune(hidden=0.5, score="slim").apply(model)
