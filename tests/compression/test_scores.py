"""Importance scores against explicit loops, gradients of the plain model, and differences of its loss."""

import copy
import math

import pytest
import torch

from tests.compression.families import double, with_labels
from tests.students.models import HEADS, HIDDEN, LAYERS, UNITS, batch_for
from textbrewer.compression import Prune
from textbrewer.compression.data_scores import DATA_SCORES
from textbrewer.compression.sites import find_layout
from textbrewer.compression.weight_scores import WEIGHT_SCORES, unit_weights

WIDTH = HIDDEN // HEADS


def weights_of_unit(state, name, kind, unit):
    """Return all weights of one unit of the second layer, as a list of numbers, by what the family's modules are."""
    numbers = []
    if name == "bert-classifier":
        layer = "bert.encoder.layer.1."
        if kind == "heads":
            rows = range(unit * WIDTH, (unit + 1) * WIDTH)
            for part in ("query", "key", "value"):
                numbers += [state[f"{layer}attention.self.{part}.weight"][row] for row in rows]
            numbers += [state[f"{layer}attention.output.dense.weight"][:, row] for row in rows]
        else:
            numbers = [state[f"{layer}intermediate.dense.weight"][unit], state[f"{layer}output.dense.weight"][:, unit]]
    elif name == "gpt2":
        layer = "transformer.h.1."
        if kind == "heads":
            for row in range(unit * WIDTH, (unit + 1) * WIDTH):
                for part in range(3):
                    numbers.append(state[f"{layer}attn.c_attn.weight"][:, part * HIDDEN + row])
                numbers.append(state[f"{layer}attn.c_proj.weight"][row])
        else:
            numbers = [state[f"{layer}mlp.c_fc.weight"][:, unit], state[f"{layer}mlp.c_proj.weight"][unit]]
    else:  # two query heads to a head of keys and values
        layer = "model.layers.1."
        if kind == "heads":
            queries = range(unit * 2 * WIDTH, (unit + 1) * 2 * WIDTH)
            keys = range(unit * WIDTH, (unit + 1) * WIDTH)
            numbers += [state[f"{layer}self_attn.q_proj.weight"][row] for row in queries]
            numbers += [state[f"{layer}self_attn.{part}_proj.weight"][row] for part in "kv" for row in keys]
            numbers += [state[f"{layer}self_attn.o_proj.weight"][:, row] for row in queries]
        else:
            numbers = [state[f"{layer}mlp.{part}_proj.weight"][unit] for part in ("gate", "up")]
            numbers.append(state[f"{layer}mlp.down_proj.weight"][:, unit])
    return [value for vector in numbers for value in vector.tolist()]


def distance(one, other):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other)))


BY_LOOP = {
    "l1": lambda own, every: sum(abs(value) for value in own),
    "l2": lambda own, every: math.sqrt(sum(value**2 for value in own)),
    "level": lambda own, every: sum(abs(value) for value in own) / len(own),
    "fpgm": lambda own, every: sum(distance(own, other) for other in every),
}


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama"])
def test_scores_by_weights_are_those_of_loops(name, kind):
    model = double(name)
    layout = find_layout(model)
    site = layout.of(kind)[1]
    units = {"ffn": UNITS, "heads": HEADS // 2 if name == "llama" else HEADS}[kind]
    assert site.units == units
    every = [weights_of_unit(model.state_dict(), name, kind, unit) for unit in range(units)]
    weights = unit_weights(model, layout, site)
    assert set(WEIGHT_SCORES) == set(BY_LOOP)
    for score, loop in BY_LOOP.items():
        expected = [loop(own, every) for own in every]
        torch.testing.assert_close(WEIGHT_SCORES[score](weights), torch.tensor(expected, dtype=torch.float64))


def test_scores_of_many_units_are_worked_out_in_parts():
    torch.manual_seed(0)
    weights = [torch.randn(700, 3, dtype=torch.float64), torch.randn(700, 2, dtype=torch.float64)]
    joined = torch.cat(weights, dim=1)
    for unit in (0, 511, 512, 699):
        expected = sum(distance(joined[unit].tolist(), other) for other in joined.tolist())
        assert float(WEIGHT_SCORES["fpgm"](weights)[unit]) == pytest.approx(expected)


def test_scores_of_layers_are_of_all_their_matrices():
    model = double("t5")
    layout = find_layout(model)
    (site,) = (site for site in layout.of("layers") if site.stack == "encoder.block")
    expected = []
    for block in model.encoder.block:
        total = 0.0
        for key, parameter in block.named_parameters():
            if parameter.dim() == 2 and "relative" not in key:
                total += float(parameter.detach().abs().sum())
        expected.append(total)
    scores = WEIGHT_SCORES["l1"](unit_weights(model, layout, site))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


READERS = {
    "bert-classifier": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "vit": ("vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2"),
}


def batches(model, count=3):
    def cast(batch):
        return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}

    return [cast(with_labels(model, seed)) for seed in range(count)]


def taylor_by_weights(model, reader, units, data):
    """Return the sum over batches of the squared sums of gradient times weight, of the weights that read a unit."""
    module = model.get_submodule(reader)
    scores = [0.0] * units
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        product = module.weight.grad * module.weight.detach()
        columns = product if type(module).__name__ == "Conv1D" else product.T
        width = len(columns) // units
        for unit in range(units):
            scores[unit] += float(columns[unit * width : (unit + 1) * width].sum()) ** 2
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("name", READERS)
def test_taylor_is_gradient_times_weight(name):
    model = double(name)
    data = batches(model)
    layout = find_layout(model)
    sites = [*layout.of("heads"), *layout.of("ffn")]
    model.train()
    model.zero_grad()
    scores = DATA_SCORES["taylor"](model, sites, iter(data))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    assert len(scores) == 2 * LAYERS
    for site in sites:
        expected = taylor_by_weights(model, site.name, site.units, data)
        torch.testing.assert_close(scores[site.name], expected, rtol=1e-5, atol=1e-9)
        number = int(site.name.split(".")[2 if name != "bert-classifier" else 3])
        assert site.name == READERS[name][site.kind == "ffn"].format(number)


def test_taylor_of_heads_that_layers_share_is_of_their_sum():
    model = double("t5")
    data = batches(model, 2)
    layout = find_layout(model)
    (site,) = (site for site in layout.of("heads") if site.name.startswith("encoder"))
    scores = DATA_SCORES["taylor"](model, [site], data)[site.name]
    expected = torch.zeros(HEADS, dtype=torch.float64)
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        modules = [block.layer[0].SelfAttention.o for block in model.encoder.block]
        products = sum((module.weight.grad * module.weight.detach()).sum(0) for module in modules)
        expected += products.reshape(HEADS, WIDTH).sum(1).square()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-9)


def test_taylor_of_a_layer_is_the_change_of_the_loss_as_it_fades():
    model = double("bert-classifier")
    (batch,) = batches(model, 1)
    (site,) = find_layout(model).of("layers")
    score = DATA_SCORES["taylor"](model, [site], [batch])[site.name]

    def loss(number, factor):
        handle = model.bert.encoder.layer[number].register_forward_hook(
            lambda module, inputs, output: inputs[0] + factor * (output - inputs[0])
        )
        with torch.no_grad():
            value = float(model(**batch).loss)
        handle.remove()
        return value

    for number in range(LAYERS):
        slope = (loss(number, 1 + 1e-5) - loss(number, 1 - 1e-5)) / 2e-5
        assert float(score[number]) == pytest.approx(slope**2, rel=1e-4)


def test_taylor_reads_an_own_adaptor_and_needs_losses():
    model = double("bert-classifier")
    data = batches(model, 2)
    plain = [{"input_ids": batch["input_ids"]} for batch in data]
    with pytest.raises(ValueError, match=r'"losses" for score="taylor", got none.*"labels"'):
        Prune(heads=0.5, score="taylor").apply(model, plain)
    sites = find_layout(model).of("ffn")
    scores = DATA_SCORES["taylor"](model, sites, data, lambda batch, outputs: {"losses": [outputs.loss, outputs.loss]})
    once = DATA_SCORES["taylor"](model, sites, data)
    for name in scores:
        torch.testing.assert_close(scores[name], 4 * once[name])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_activity_is_the_mean_over_real_positions(name, masked):
    model = double(name, **({"hidden_act": "relu"} if name == "bert-classifier" else {"activation_function": "relu"}))
    data = [batch_for(model, seed) for seed in range(2)]
    if masked:
        for batch in data:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, 5:] = 0
    layout = find_layout(model)
    sites = [*layout.of("heads"), *layout.of("ffn"), *layout.of("layers")]
    heard = {site.name: [] for site in sites[:-1]}
    changes = [[] for _ in range(LAYERS)]
    handles = []
    for key, store in heard.items():
        handles.append(
            model.get_submodule(key).register_forward_pre_hook(lambda _, inputs, s=store: s.append(inputs[0]))
        )
    for number, store in enumerate(changes):

        def record(_, inputs, output, store=store):
            store.append((output[0] if isinstance(output, tuple) else output) - inputs[0])

        handles.append(model.get_submodule(f"{sites[-1].stack}.{number}").register_forward_hook(record))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    means = DATA_SCORES["mean_activation"](model, sites, data)
    shares = DATA_SCORES["apoz"](model, sites[:-1], data)

    def positions(stored):
        for batch, states in zip(data, stored):
            mask = batch.get("attention_mask")
            for row in range(states.shape[0]):
                for place in range(states.shape[1]):
                    if mask is None or mask[row, place]:
                        yield states[row, place].tolist()

    for site in (sites[1], sites[LAYERS + 1]):
        width = (HIDDEN if site.kind == "heads" else UNITS) // site.units
        rows = list(positions(heard[site.name]))
        some_zeros = False
        for unit in range(site.units):
            values = [row[place] for row in rows for place in range(unit * width, (unit + 1) * width)]
            assert float(means[site.name][unit]) == pytest.approx(sum(map(abs, values)) / len(values))
            zeros = sum(value == 0 for value in values) / len(values)
            assert float(shares[site.name][unit]) == pytest.approx(1 - zeros)
            some_zeros |= 0 < zeros < 1
        assert some_zeros == (site.kind == "ffn")
    for number in range(LAYERS):
        values = [abs(value) for row in positions(changes[number]) for value in row]
        assert float(means[sites[-1].name][number]) == pytest.approx(sum(values) / len(values))


def test_the_scored_model_is_pruned_by_its_scores():
    model = double("bert-classifier")
    data = batches(model)
    masked = Prune(heads=0.5, ffn=0.5, score="taylor").apply(model, data)
    for number in range(LAYERS):
        for kind, units in ((0, HEADS), (1, UNITS)):
            reader = READERS["bert-classifier"][kind].format(number)
            scores = taylor_by_weights(copy.deepcopy(model), reader, units, data)
            best = set(scores.topk(units // 2).indices.tolist())
            assert set(masked.masks[reader].nonzero().flatten().tolist()) == best
