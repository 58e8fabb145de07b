import copy
import warnings

import pytest
import torch
from torch import nn

from tests.report.models import CLASSES, LAYERS, POSITIONS, UNITS, VOCABULARY, WIDTH, bert
from tests.students.models import make
from textbrewer.report import COMPONENTS, component_of, parameters_by_component, zeros_by_matrix


def test_components_of_bert_are_those_of_its_sizes():
    expected = {
        "embeddings": (VOCABULARY + POSITIONS + 2) * WIDTH,
        "attention": LAYERS * 4 * (WIDTH * WIDTH + WIDTH),
        "feed-forward": LAYERS * (2 * WIDTH * UNITS + UNITS + WIDTH),
        "norms": (1 + 2 * LAYERS) * 2 * WIDTH,
        "head": WIDTH * WIDTH + WIDTH + CLASSES * WIDTH + CLASSES,  # pooler and classifier
        "other": 0,
    }
    assert parameters_by_component(bert()) == expected


@pytest.mark.parametrize(
    "name", ["bert-lm", "roberta", "distilbert", "electra", "gpt2", "llama", "qwen2", "bart", "t5", "vit", "deit"]
)
def test_every_family_is_known_whole(name):
    model = make(name)
    found = parameters_by_component(model)
    assert found.pop("other") == 0
    assert sum(found.values()) == sum(parameter.numel() for parameter in model.parameters())  # which leaves out tied
    assert found["attention"] > 0
    assert found["feed-forward"] > 0
    assert found["norms"] > 0
    assert found["embeddings"] > 0


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("encoder.layers.0.self_attn.in_proj_weight", "attention"),  # torch's own
        ("encoder.layers.0.linear1.weight", "feed-forward"),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", "feed-forward"),
        ("bert.encoder.layer.0.output.dense.weight", "feed-forward"),
        ("bert.encoder.layer.0.output.LayerNorm.weight", "norms"),
        ("transformer.h.0.ln_1.weight", "norms"),
        ("output.weight", "head"),
        ("lm_head.weight", "head"),
        ("vit.embeddings.cls_token", "embeddings"),
        ("0.weight", "other"),
        ("weight", "other"),
    ],
)
def test_components_by_name(name, component):
    assert component_of(name) == component
    assert component in COMPONENTS


def test_components_by_class():
    assert component_of("a.weight", nn.Embedding(2, 2)) == "embeddings"
    assert component_of("a.weight", nn.LayerNorm(2)) == "norms"


def test_zeros_are_counted():
    model = bert()
    torch.manual_seed(2)
    expected, total = {}, 0
    for number, (name, parameter) in enumerate(model.named_parameters()):
        flat = parameter.data.view(-1)
        flat.fill_(1.0)
        count = (7 * number) % flat.numel()
        flat[torch.randperm(flat.numel())[:count]] = 0.0
        total += count
        if parameter.dim() > 1:
            expected[name] = (count, flat.numel())
    zeros, matrices = zeros_by_matrix(model)
    assert zeros == total
    assert {matrix.name: (matrix.zeros, matrix.total) for matrix in matrices} == expected
    assert all(matrix.share == matrix.zeros / matrix.total for matrix in matrices)


def test_quantised_weights_are_counted_too():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model[0].weight.data[:2] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert sum(parameters_by_component(quantised).values()) == 6 * 4 + 4 + 4 * 3 + 3
    matrices = {matrix.name: matrix for matrix in zeros_by_matrix(quantised)[1]}
    assert matrices["0.weight"].total == 24
    assert matrices["0.weight"].zeros >= 12  # small weights are rounded to zero as well
