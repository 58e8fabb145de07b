"""Single weights and blocks set to zero: which, against plain loops; and while training, that they stay zero."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.compression.families import with_labels
from tests.engine.runs import equal
from tests.students.models import LAYERS, UNITS, batch_for, make, outputs_of
from textbrewer.compression.weights import SparsePruning, SparseWeights, WeightMasks

INSIDE = [
    f"bert.encoder.layer.{number}.{part}.weight"
    for number in range(LAYERS)
    for part in (
        *(f"attention.self.{which}" for which in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    )
]


def blocks_of(matrix, rows, columns):
    """Return each block's indices, row by row of blocks."""
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            yield [(row, column) for row in range(top, top + rows) for column in range(left, left + columns)]


BY_LOOP = {
    "l1": lambda values: sum(abs(value) for value in values),
    "level": lambda values: sum(abs(value) for value in values) / len(values),
    "l2": lambda values: math.sqrt(sum(value**2 for value in values)),
}


def lowest(matrix, block, share, measure):
    """Return which entries of a matrix go, by loops over its blocks."""
    entries = list(blocks_of(matrix, *block))
    numbers = matrix.tolist()
    order = sorted(
        range(len(entries)), key=lambda n: (measure([numbers[row][column] for row, column in entries[n]]), -n)
    )
    return {entry for number in order[: math.floor(share * len(entries) + 1e-9)] for entry in entries[number]}


def gone(mask):
    return {tuple(place) for place in (~mask).nonzero().tolist()}


@pytest.mark.parametrize(
    ("score", "block", "amount"),
    [("l1", (1, 1), 0.9), ("l2", (2, 2), 0.5), ("level", (1, None), 0.3), ("l1", (2, 1), 0.77)],
)
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_the_lowest_of_each_matrix_go(name, score, block, amount):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    readers = {"bert-classifier": "bert.encoder.layer.1.attention.output.dense", "gpt2": "transformer.h.1.attn.c_proj"}
    sparse = SparsePruning(amount, None if block == (1, 1) else block, score).apply(model)
    assert equal(model.state_dict(), before)
    weight = f"{readers[name]}.weight"
    matrix, mask = before[weight], sparse.masks[weight]
    if name == "gpt2":  # (inputs, outputs); among equal scores, which there are none of, order would differ
        matrix, mask = matrix.T, mask.T
    sides = tuple(side or size for side, size in zip(block, matrix.shape))
    assert gone(mask) == lowest(matrix, sides, amount, BY_LOOP[score])
    if name == "bert-classifier":
        assert set(sparse.masks) == set(INSIDE)
    for key, value in sparse.model.state_dict().items():
        mask = sparse.masks.get(key, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, before[key], 0))


def test_equal_scores_leave_the_first():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    for scope in ("uniform", "global"):
        masks = SparsePruning(0.5, modules=["0"], scope=scope).apply(model).masks
        assert masks["0.weight"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("maximum", [1.0, 0.7])
@pytest.mark.parametrize("block", [None, (2, 4)])
def test_the_lowest_of_all_matrices_go(maximum, block):
    model = make("bert-classifier")
    with torch.no_grad():  # one matrix would be gone altogether
        model.get_parameter(INSIDE[0]).mul_(0.01)
    amount, plan = 0.5, SparsePruning(0.5, block, scope="global", maximum=maximum, exclude=["*.layer.3", "*.dense"])
    sparse = plan.apply(model)
    names = [name for name in INSIDE if "layer.3" not in name and "dense" not in name]
    assert list(sparse.masks) == names
    rows, columns = block or (1, 1)
    ranked, number = [], {}
    for name in names:
        matrix = model.get_parameter(name).detach()
        entries = list(blocks_of(matrix, rows, columns))
        number[name] = len(entries)
        ranked += [(sum(abs(float(matrix[place])) for place in entry), name, entry) for entry in entries]
    wanted, off = math.floor(amount * len(ranked)), {name: [] for name in names}
    for _, name, entry in sorted(ranked, key=lambda item: item[0]):
        if sum(map(len, off.values())) < wanted and len(off[name]) < math.floor(maximum * number[name] + 1e-9):
            off[name].append(entry)
    for name in names:
        assert gone(sparse.masks[name]) == {place for entry in off[name] for place in entry}
    share = len(off[names[0]]) / number[names[0]]
    assert share == pytest.approx(maximum, abs=1 / number[names[0]])
    shares = sparse.sparsity()
    assert shares["weights"] == pytest.approx(amount, abs=1e-3)
    assert shares[names[0]] == share
    zeros = sum(int((parameter == 0).sum()) for parameter in sparse.model.parameters())
    assert shares["parameters"] == zeros / sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_taylor_is_the_square_of_gradient_times_weight(block):
    model = make("bert-classifier").double()
    data = [with_labels(model, seed) for seed in range(3)]
    model.train().zero_grad()
    sparse = SparsePruning(0.6, block, "taylor").apply(model, iter(data))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    name = INSIDE[7]
    weight = model.get_parameter(name)
    scores = {}
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        product = (weight.grad * weight.detach()).tolist()
        for entry in blocks_of(weight, *block):
            key = tuple(entry)
            scores[key] = scores.get(key, 0.0) + sum(product[row][column] for row, column in entry) ** 2
    order = sorted(scores, key=scores.get)[: math.floor(0.6 * len(scores))]
    assert gone(sparse.masks[name]) == {place for entry in order for place in entry}


def test_random_is_by_seed_and_own_scores_count():
    model = make("bert-classifier")
    one, same, other = (SparsePruning(0.5, score="random", seed=seed).apply(model).masks for seed in (0, 0, 1))
    assert equal(dict(one), dict(same))
    assert not equal(dict(one), dict(other))
    given = {INSIDE[0]: torch.arange(32 * 32).reshape(32, 32)}
    masks = SparsePruning(0.25, score=given, modules=["bert.encoder.layer.0.attention.self.query"]).apply(model).masks
    assert torch.equal(masks[INSIDE[0]], given[INSIDE[0]] >= 256)
    with pytest.raises(ValueError, match=r"score must have a tensor of shape \(32, 32\) for .*key.*got none"):
        SparsePruning(0.25, score=given).apply(model)


def test_modules_of_any_model():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    sparse = SparsePruning(0.75, modules=["0", "3"]).apply(model)
    assert sparse.sparsity()["0.weight"] == 27 / 36
    assert (sparse.model[0].weight == 0).sum() == 27
    with pytest.raises(ValueError, match=r"block must be \(1, 1\) for '0.weight', which is no matrix"):
        SparsePruning(0.5, (1, 3), modules=["0"]).apply(model)
    with pytest.raises(ValueError, match="modules must name what to prune"):
        SparsePruning(0.5).apply(model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"amount": 0}, ValueError, "amount must be greater than 0"),
        ({"amount": 1.0}, ValueError, "amount must be less than 1"),
        ({"block": 4}, TypeError, "block must be a pair"),
        ({"block": (4,)}, ValueError, "block must be a pair"),
        ({"block": (0, 4)}, ValueError, "block's outputs must be at least 1"),
        ({"score": "slim"}, ValueError, "score must be one of the known names"),
        ({"score": 1}, TypeError, "score must be a name"),
        ({"scope": "all"}, ValueError, "scope must be one of the known names"),
        ({"maximum": 0.9}, ValueError, 'maximum must be 1 unless scope="global"'),
        ({"maximum": 0.4, "scope": "global"}, ValueError, "maximum must be at least amount"),
        ({"modules": "bert"}, TypeError, "modules must be a list"),
        ({"exclude": "bert"}, TypeError, "exclude must be a list"),
    ],
)
def test_plans_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        SparsePruning(**{"amount": 0.5, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"block": (4, 4)}, ValueError, r"block must divide 'bert.*intermediate.dense.weight', of 30 outputs"),
        ({"amount": 0.0001}, ValueError, "amount must be large enough to take one of 1024 blocks"),
        ({"modules": ["nothing"]}, KeyError, "no module 'nothing'"),
        ({"exclude": ["nothing"]}, KeyError, "no module 'nothing'"),
        ({"score": "taylor"}, ValueError, "needs data"),
    ],
)
def test_plans_that_do_not_fit_the_model(settings, error, message):
    model = make("bert-classifier")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        SparsePruning(**{"amount": 0.5, **settings}).apply(model)
    with pytest.raises(ValueError, match="dataloader must be None for score='l1'"):
        SparsePruning(0.5).apply(model, [batch_for(model)])
    assert equal(model.state_dict(), before)


def test_masks_are_saved_and_fit_only_their_model(tmp_path):
    model = make("bert-classifier")
    sparse = SparsePruning(0.5).apply(model)
    sparse.masks.save(tmp_path / "masks.safetensors")
    loaded = WeightMasks.load(tmp_path / "masks.safetensors")
    assert equal(dict(loaded), dict(sparse.masks))
    again = SparseWeights(make("bert-classifier"), loaded)
    assert equal(again.model.state_dict(), sparse.model.state_dict())
    with pytest.raises(ValueError, match=r"of the parameters of this GPT2LMHeadModel: .* is none there"):
        SparseWeights(make("gpt2"), loaded)
    with pytest.raises(ValueError, match=r"with a mask of shape \(32, 32\), is of shape \(16, 32\) there"):
        SparseWeights(nn.Sequential(nn.Linear(32, 16)), {"0.weight": torch.ones(32, 32) > 0})
    with pytest.raises(FileNotFoundError):
        WeightMasks.load(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"no masks")
    with pytest.raises(ValueError, match=r"must be a file that WeightMasks\.save wrote"):
        WeightMasks.load(tmp_path / "other")
    with pytest.raises(TypeError, match="must be a tensor of booleans"):
        WeightMasks({"0.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="at least one parameter"):
        WeightMasks({})
    assert f"{UNITS * 16} of {UNITS * 32}" in repr(loaded)


def test_outputs_are_those_of_the_zeroed_weights():
    model = make("bert-classifier")
    sparse = SparsePruning(0.5).apply(model)
    with torch.no_grad():
        for name, mask in sparse.masks.items():
            model.get_parameter(name).mul_(mask)
    assert equal(outputs_of(model), outputs_of(sparse.model))
