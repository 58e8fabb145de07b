"""Channels taken out of convolutional networks: the same as if they had been zero, smaller, and loaded again."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.compression.test_saving import Encoder
from tests.students.models import make
from textbrewer import compression
from textbrewer.compression.cnn import prune_channels

pytest.importorskip("torch_pruning", reason="channels by torch-pruning: extra cnn")
ROOT = Path(__file__).parents[2]
SCORES = ("l1", "l2", "fpgm", "slim", "lamp", "random")


class Plain(nn.Module):
    """Two convolutions and two dense layers, one after the other."""

    def __init__(self, width=8, units=12):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.dense, self.head = nn.Linear(2 * width * 9, units), nn.Linear(units, 5)

    def forward(self, images, labels=None):
        states = torch.relu(self.norm(self.first(images)))
        states = torch.relu(self.second(states)).flatten(1)
        logits = self.head(torch.relu(self.dense(states)))
        return logits if labels is None else (logits, nn.functional.cross_entropy(logits, labels))


class Branches(nn.Module):
    """Sums, concatenations, depthwise convolutions, groups, and a factor by channel of its own."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 1)
        self.block = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, width, 1))
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.side = nn.Conv2d(width, 6, 1)
        self.grouped = nn.Conv2d(width + 6, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 3, 1)
        self.factor = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, images):
        states = self.stem(images)
        states = states + self.factor * self.block(states)
        states = torch.cat([self.deep(states), self.side(states)], 1)
        return {"map": self.last(torch.relu(self.norm(self.grouped(states))))}


def plain(seed=0, **widths):
    torch.manual_seed(seed)
    model = Plain(**widths).double().eval()
    for buffer in (model.norm.running_mean, model.norm.running_var):
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    for parameter in (model.norm.weight, model.norm.bias):
        parameter.data.copy_(torch.rand_like(parameter) + 0.5)
    return model


def images(seed=1, channels=1):
    return torch.rand(3, channels, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_kept(small, whole):
    """Return which rows of a weight a smaller one has: compared by their biases, all of which differ."""
    return [whole.bias.tolist().index(value) for value in small.bias.tolist()]


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_as_if_the_channels_had_been_zero(score, scope):
    model = plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = prune_channels(model, images(), 0.5, score, scope)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(small) is Plain
    zeroed = copy.deepcopy(model)
    for name, extra in (("first", zeroed.norm), ("second", None), ("dense", None)):
        layer = getattr(zeroed, name)
        kept = rows_kept(getattr(small, name), layer)
        gone = [row for row in range(len(layer.bias)) if row not in kept]
        for part in [layer.weight, layer.bias] + ([] if extra is None else [extra.weight, extra.bias]):
            part.data[gone] = 0
        if scope == "uniform" and not (score == "slim" and name != "first"):
            assert len(kept) == len(layer.bias) // 2
    torch.testing.assert_close(small(images()), zeroed(images()), rtol=0, atol=1e-12)
    total, kept = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, small))
    assert kept < total
    removed = sum(
        len(getattr(model, name).bias) - len(getattr(small, name).bias) for name in ("first", "second", "dense")
    )
    if scope == "global" and score != "slim":
        assert removed == (8 + 16 + 12) // 2


def test_branches_stay_together():
    torch.manual_seed(0)
    model = Branches().double().eval()
    small = prune_channels(model, images(channels=2), 0.5, "l2")
    widths = {name: module.out_channels for name, module in small.named_modules() if isinstance(module, nn.Conv2d)}
    assert widths == {"stem": 4, "block.0": 6, "block.2": 4, "deep": 4, "side": 3, "grouped": 4, "last": 3}
    assert small.deep.groups == 4
    assert small.factor.shape == (4, 1, 1)
    assert small.norm.num_channels == 4
    assert small(images(channels=2))["map"].shape == (3, 3, 6, 6)
    kept = rows_kept(small.stem, model.stem)
    assert rows_kept(small.block[2], model.block[2]) == kept
    assert torch.equal(small.factor, model.factor[kept])
    assert rows_kept(small.deep, model.deep) == kept
    inner = rows_kept(small.block[0], model.block[0])
    assert torch.equal(small.block[2].weight, model.block[2].weight[kept][:, inner])
    side = rows_kept(small.side, model.side)
    read = kept + [8 + row for row in side]
    grouped = rows_kept(small.grouped, model.grouped)
    assert sorted(row // 4 for row in grouped) == [0, 0, 1, 1]  # as many of each group of the normalisation
    assert torch.equal(small.grouped.weight, model.grouped.weight[grouped][:, read])


@pytest.mark.parametrize("score", ["l1", "l2", "fpgm"])
def test_the_least_important_go(score):
    """Of the second layer, some filters and what reads them are small, or alike, and differ in nothing else."""
    model = plain()
    weak = [1, 4, 5, 6, 9, 10, 12, 15]
    model.second.weight.data[:] = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    if score == "fpgm":
        model.second.weight.data[weak] = model.second.weight.data[weak].mean(0)
    else:
        model.second.weight.data[weak] *= 0.01
        model.dense.weight.data.view(12, 16, 9)[:, weak] *= 0.01
    small = prune_channels(model, images(), 0.5, score)
    assert rows_kept(small.second, model.second) == [row for row in range(16) if row not in weak]


def test_slim_goes_by_the_factors_of_the_normalisation():
    model = plain()
    model.norm.weight.data = torch.tensor([0.1, -2.0, 0.2, 3.0, -0.3, 1.0, 0.05, -1.5], dtype=torch.float64)
    small = prune_channels(model, images(), 0.5, "slim")
    assert rows_kept(small.first, model.first) == [1, 3, 5, 7]
    assert (small.second.out_channels, small.dense.out_features) == (16, 12)  # nothing normalises these


def test_taylor_is_the_sum_of_gradients_times_weights():
    model = plain()
    data = [{"images": images(seed), "labels": torch.tensor([seed, 1, 4])} for seed in range(3)]
    seen = []

    def adaptor(batch, outputs):
        seen.append(batch)
        return {"logits": outputs[0], "losses": outputs[1]}

    small = prune_channels(model, images(), 0.5, "taylor", dataloader=data, adaptor=adaptor)
    assert len(seen) == 3
    assert all(parameter.grad is None for one in (model, small) for parameter in one.parameters())
    copied = copy.deepcopy(model)
    sum(copied(**batch)[1] for batch in data).backward()
    terms = {name: (value.grad * value).abs().detach() for name, value in copied.named_parameters()}
    score = terms["dense.weight"].sum(1) + terms["head.weight"].sum(0)
    assert rows_kept(small.dense, model.dense) == sorted(score.topk(6).indices.tolist())
    score = terms["second.weight"].sum((1, 2, 3)) + terms["dense.weight"].view(12, 16, 9).sum((0, 2))
    assert rows_kept(small.second, model.second) == sorted(score.topk(8).indices.tolist())


def test_limits_names_and_seeds():
    model = plain()
    small = prune_channels(model, images(), 0.6, scope="global", minimum=3, maximum=0.7, exclude=["sec*"])
    assert small.second.out_channels == 16
    assert small.first.out_channels >= 3
    assert small.dense.out_features >= 4
    assert small.first.out_channels + small.dense.out_features == 20 - 12
    first, again, other = (prune_channels(model, images(), 0.5, "random", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    assert rows_kept(first.second, model.second) != rows_kept(other.second, model.second)


def test_modes_frozen_parameters_and_random_numbers_stay():
    model = plain()
    model.train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        small = prune_channels(model, [images()], 0.5, "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["first.weight"]


IN_A_NEW_PROCESS = """
import sys
import torch
from textbrewer import compression
from tests.compression.test_cnn import Branches, Plain

folder, kind, count = sys.argv[1:]
if int(count):
    pattern = {"Plain": Plain, "Branches": Branches}[kind]().double()
model = compression.load(folder, model=pattern if int(count) else None)
with torch.no_grad():
    outputs = model(torch.load(folder + "/images.pt"))
    torch.save(outputs["map"] if kind == "Branches" else outputs[0] if kind == "resnet" else outputs, folder + "/o.pt")
"""


def resnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("kind", ["Plain", "Branches", "resnet"])
def test_saved_and_loaded_in_a_new_process(kind, tmp_path):
    torch.manual_seed(0)
    model = {"Plain": plain, "Branches": lambda: Branches().double().eval(), "resnet": resnet}[kind]()
    batch = torch.rand(2, 3, 32, 32) if kind == "resnet" else images(channels=2 if kind == "Branches" else 1)
    small = prune_channels(model, batch, 0.4, "random", scope="global", maximum=0.7)
    folder = tmp_path / "m"
    compression.save(small, folder)
    torch.save(batch, folder / "images.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(folder), kind, "0" if kind == "resnet" else "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        outputs = small(batch)
    expected = outputs["map"] if kind == "Branches" else outputs[0] if kind == "resnet" else outputs
    assert torch.equal(torch.load(folder / "o.pt"), expected)
    dense = tmp_path / "dense"
    compression.save(model, dense)
    assert (folder / "model.safetensors").stat().st_size < 0.8 * (dense / "model.safetensors").stat().st_size
    loaded = compression.load(folder, model=None if kind == "resnet" else copy.deepcopy(model))
    assert str(loaded) == str(small)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_loaded_network_is_trained_pruned_and_factorised_further(tmp_path):
    model = prune_channels(plain(), images(), 0.5)
    compression.save(model, tmp_path / "m")
    loaded = compression.load(tmp_path / "m", model=Plain())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loaded(images(), labels)[1])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    smaller = prune_channels(loaded.eval(), images(), 0.5)
    assert smaller.first.out_channels == 2
    compression.factorize_(smaller, ratio=0.3, method="svd", include="dense")
    compression.save(smaller, tmp_path / "n")
    again = compression.load(tmp_path / "n", model=Plain())
    assert torch.equal(again(images()), smaller(images()))


def test_any_model_is_kept_by_the_numbers_of_its_modules(tmp_path):
    torch.manual_seed(0)
    model, tokens = Encoder(width=8, heads=2, units=5), torch.randint(0, 11, (2, 5))
    compression.save(model, tmp_path)
    loaded = compression.load(tmp_path, model=Encoder())  # built wider, with more heads
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.blocks[0].attn.num_heads == 2
    for layers, message in ((2, "only the manifest has a module 'blocks.2"), (4, "only the model has a tensor")):
        with pytest.raises(ValueError, match=message):
            compression.load(tmp_path, model=Encoder(layers=layers))
    with pytest.raises(ValueError, match=r"pass compression\.load\(path, model=Encoder\(\.\.\.\)\)"):
        compression.load(tmp_path)
    path = tmp_path / "shapes.json"
    manifest = json.loads(path.read_text())
    for key, value in (("out_features", "8"), ("forward", 3), ("num_heads", [2])):
        numbers = {**manifest["numbers"], "blocks.0.attn": {key: value}}
        path.write_text(json.dumps({**manifest, "numbers": numbers}))
        with pytest.raises(ValueError, match=f"'blocks.0.attn' must have a number '{key}'"):
            compression.load(tmp_path, model=Encoder())


class Fixed(Plain):
    """One that counts on its width."""

    def forward(self, images):
        return super().forward(images + 0 * self.first(images).reshape(len(images), 8, 6, 6).sum(1, keepdim=True))


class Both(Plain):
    """One that returns its first features too."""

    def forward(self, images):
        states = self.first(images)
        return states, super().forward(images)


def test_code_that_counts_on_a_width():
    model = Fixed().double().eval()
    with pytest.raises(ValueError, match=r"exclude must name the layers whose widths .* counts on: .* RuntimeError"):
        prune_channels(model, images())
    assert prune_channels(model, images(), exclude=["first"])(images()).shape == (3, 5)


def test_what_is_returned_stays():
    small = prune_channels(Both().double().eval(), images())
    assert (small.first.out_channels, small.second.out_channels, small.head.out_features) == (8, 8, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio must be greater than 0"),
        ({"ratio": 1.0}, ValueError, "ratio must be less than 1"),
        ({"ratio": 0.01}, ValueError, "ratio must be large enough to take one of 16 channels, got 0.01"),
        ({"score": "l3"}, ValueError, "score must be one of the known names, got 'l3'"),
        ({"score": "taylor"}, ValueError, 'score="taylor" needs data: pass dataloader='),
        ({"dataloader": [1]}, ValueError, "dataloader must be None for score='l2'"),
        ({"scope": "local"}, ValueError, "scope must be one of the known names"),
        ({"maximum": 0.5}, ValueError, 'maximum must be 1 unless scope="global"'),
        ({"scope": "global", "minimum": 8}, ValueError, "only .* can go; lower it, or loosen them"),
        ({"minimum": 0}, ValueError, "minimum must be at least 1"),
        ({"exclude": ["third"]}, KeyError, r"the model \(Plain\) has no module 'third'"),
        ({"exclude": "first"}, TypeError, "exclude must be a list of names"),
        ({"exclude": ["first", "second", "dense"]}, ValueError, "must have channels that can be taken out .*got none"),
        ({"score": "slim", "exclude": ["first"]}, ValueError, "that a BatchNorm normalises.*got none"),
        ({"example_inputs": torch.rand(1, 3, 6, 6)}, ValueError, "model must take example_inputs, and raises Runtime"),
    ],
)
def test_arguments_that_cannot_work(arguments, error, message):
    model = plain()
    with pytest.raises(error, match=message):
        prune_channels(model, **{"example_inputs": images(), **arguments})


def test_models_for_which_it_is_not():
    for name in ("bert-classifier", "vit"):
        with pytest.raises(ValueError, match=r"got the transformer '\w+'.*use compression\.Prune\(heads="):
            prune_channels(make(name), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the transformer 'Encoder' \(attention 'blocks.0.attn'\)"):
        prune_channels(Encoder(), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="the transformer 'TransformerEncoderLayer'"):
        prune_channels(nn.TransformerEncoderLayer(8, 2), torch.zeros(1, 4, 8))
    masked = compression.Prune(heads=0.5).apply(make("vit")).model
    with pytest.raises(ValueError, match="must not be masked"):
        prune_channels(masked, torch.zeros(1))
    with pytest.raises(TypeError, match="model must be a torch module"):
        prune_channels("resnet", images())
    broken = plain()
    broken.first.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="scores must be finite"):
        prune_channels(broken, images())


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"needs torch-pruning: pip install 'textbrewer\[cnn\]'"):
        prune_channels(plain(), images())
