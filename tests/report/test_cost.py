import copy
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.report.models import CLASSES, LAYERS, LENGTH, ROWS, UNITS, WIDTH, bert, bert_batches
from textbrewer.report.cost import bytes_of_files, bytes_on_disk, flops_of, is_quantised, peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (7, 8, 2)])
def test_flops_of_a_linear_layer(rows, inputs, outputs):
    assert flops_of(nn.Linear(inputs, outputs), torch.randn(rows, inputs)) == 2 * rows * inputs * outputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_of_bert(attention):
    model, batch = bert(attn_implementation=attention).eval(), bert_batches()[0]
    tokens = ROWS * LENGTH
    in_layer = 2 * tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * UNITS) + 2 * 2 * ROWS * LENGTH * LENGTH * WIDTH
    head = 2 * ROWS * (WIDTH * WIDTH + WIDTH * CLASSES)
    assert flops_of(lambda batch: model(**batch), batch) == LAYERS * in_layer + head


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_file(tmp_path, tied):
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
    if tied:
        model[1].weight = model[0].weight
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    assert bytes_on_disk(model) == ((tmp_path / "model.safetensors").stat().st_size, "safetensors")
    assert (bytes_on_disk(model)[0] < 4 * 60 * 60 * 2) == tied


def test_bytes_of_quantised_weights_are_those_of_torchs_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(200, 200)), {nn.Linear})
    torch.save(model.state_dict(), tmp_path / "model")
    assert is_quantised(model)
    size, kind = bytes_on_disk(model)
    assert kind == "torch.save"
    assert size == (tmp_path / "model").stat().st_size
    assert size < bytes_on_disk(nn.Linear(200, 200))[0]


def test_bytes_of_files_and_folders(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name, size in (("one", 3), ("folder/two", 50), ("folder/inner/three", 700)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert bytes_of_files([tmp_path / "one", tmp_path / "folder"]) == 753


def test_peak_memory_is_that_of_the_activations():
    rows, inputs, units, outputs = 64, 10, 1000, 7
    model = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, outputs))
    peak = peak_memory(model, torch.randn(rows, inputs), CPU)
    hidden = 4 * rows * units  # before and after ReLU; what is smaller may come on top
    assert 2 * hidden <= peak <= 2 * hidden + 4 * rows * outputs + 4096


def test_peak_memory_leaves_out_weights_and_inputs():
    model = nn.Linear(500, 500)
    assert peak_memory(model, torch.randn(2, 500), CPU) < 4 * 500 * 500 / 10


def test_memory_of_unknown_devices_is_left_out():
    assert peak_memory(copy.copy, torch.ones(1), torch.device("meta")) is None
