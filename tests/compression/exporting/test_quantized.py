"""int8 and bfloat16: recomputed by hand where that can be done, smaller, and close to the model."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.compression.exporting.models import Bag, agree, bag_batch, expected, padded, small
from textbrewer.compression import export, load_exported
from textbrewer.compression.exporting import onnx_files

# docs/export.md says so too: without these instructions ONNX Runtime adds pairs of products in 16 bits, which overflow.
exact_products = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="int8 products of ONNX Runtime saturate on CPUs without VNNI"
)


def rounded(values, scale, zero, low, high):
    return np.clip(np.rint(values / scale) + zero, low, high)


def dynamic_by_hand(layer, inputs):
    """Return a linear map in int8: weights by output, one range for all inputs, as ONNX's DynamicQuantizeLinear."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    scales = np.abs(weight).max(1, keepdims=True) / 127
    low, high = min(0.0, inputs.min()), max(0.0, inputs.max())
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    whole = rounded(inputs, scale, zero, 0, 255) - zero
    return whole @ rounded(weight, scales, 0, -127, 127).T * scale * scales.T + bias


@exact_products
def test_dynamic_int8_is_what_it_says(tmp_path):
    torch.manual_seed(0)
    layer, rows = nn.Linear(24, 5), torch.randn(40, 24)
    report = export(layer, tmp_path / "m.onnx", data=rows, quantize="int8")
    found = load_exported(tmp_path / "m.onnx")(rows)["output"].numpy()
    by_hand = dynamic_by_hand(layer, rows.numpy())
    exact = layer(rows).detach().numpy()
    assert np.abs(found - by_hand).max() < 0.1 * np.abs(found - exact).max()
    assert report.difference >= np.abs(found - exact).max() * 0.999
    assert 1e-4 < report.difference < 0.1
    assert (report.quantize, report.mode) == ("int8", "dynamic")


@exact_products
def test_static_int8_keeps_the_range_of_its_data(tmp_path):
    torch.manual_seed(0)
    layer, rows = nn.Linear(24, 5), torch.randn(40, 24).clamp(-1, 1)
    export(layer, tmp_path / "m.onnx", data=rows, quantize="int8", mode="static")
    export(layer, tmp_path / "d.onnx", data=rows, quantize="int8")
    static, dynamic = load_exported(tmp_path / "m.onnx"), load_exported(tmp_path / "d.onnx")
    torch.testing.assert_close(static(rows)["output"], layer(rows).detach(), rtol=0, atol=0.05)
    cut = layer(torch.clamp(8 * rows, -1, 1)).detach()  # what is out of the range of the inputs is cut off
    torch.testing.assert_close(static(8 * rows)["output"], cut, rtol=0, atol=0.05)
    torch.testing.assert_close(dynamic(8 * rows)["output"], layer(8 * rows).detach(), rtol=0, atol=0.3)


def test_bf16_rounds_the_matrices_alone(tmp_path):
    model = small("bert-classifier")
    report = export(model, tmp_path / "m.onnx", data=padded(model), quantize="bf16")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16().float()
    batch = padded(model, 2, 5)
    agree(load_exported(tmp_path / "m.onnx")(**batch), expected(model, batch), batch, 1e-5)
    assert report.quantize == "bf16"
    assert report.mode is None


@pytest.mark.parametrize(("quantize", "share"), [pytest.param("int8", 0.3, marks=exact_products), ("bf16", 0.52)])
def test_a_wide_model_is_as_small_as_it_should_be(quantize, share, tmp_path):
    model = Bag(width=256, words=2000, classes=300)
    plain = export(model, tmp_path / "plain.onnx", data=bag_batch(40))
    report = export(model, tmp_path / "m.onnx", data=bag_batch(40), quantize=quantize)
    assert (tmp_path / "m.onnx").stat().st_size == report.bytes < share * plain.bytes
    assert plain.bytes >= plain.parameter_bytes == 4 * (2000 * 256 + 300 * 257)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("gpt2", "dynamic"), ("t5", "dynamic"), ("vit", "dynamic"), ("vit", "static"), ("llama", "static")],
)
def test_families_in_int8(name, mode, tmp_path):
    model = small(name)
    data = [padded(model, 4, 9, seed) for seed in range(3)]
    report = export(model, tmp_path / "m.onnx", data=data, quantize="int8", mode=mode, agreement=0.5, tolerance=0.2)
    batch = padded(model, 2, 6, seed=9)
    wanted = expected(model, batch)
    agree(load_exported(tmp_path / "m.onnx")(**batch), wanted, batch, 0.3 * float(wanted["logits"].abs().max()))
    assert report.difference > 1e-4
    assert 0.5 <= report.agreement <= 1
    assert report.check.rows == 13


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_tensors_of_large_models_are_in_a_file_beside(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "_ONE_FILE", 1000)
    model, batch = Bag(width=64), bag_batch()
    report = export(model, tmp_path / "m.onnx", data=batch, quantize=quantize, agreement=0)
    assert set(report.files) == {"m.onnx", "m.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "m.onnx.json"}
    atol = 1e-5 if quantize is None else 0.05
    torch.testing.assert_close(
        load_exported(tmp_path / "m.onnx")(**batch).logits, model(**batch)["logits"].detach(), rtol=0, atol=atol
    )


def test_bf16_torch_programs_compute_in_bf16(tmp_path):
    model, batch = Bag(width=64), bag_batch()
    report = export(model, tmp_path / "m.pt2", data=batch, quantize="bf16", agreement=0)
    found = load_exported(tmp_path / "m.pt2")(**batch)["logits"]
    assert found.dtype == torch.float32
    half = Bag(width=64).bfloat16()(batch["tokens"], batch["weights"].bfloat16())["logits"]
    torch.testing.assert_close(found, half.detach().float(), rtol=0, atol=1e-6)
    assert report.difference > 1e-4


@pytest.mark.parametrize(
    ("quantize", "mode", "atol"),
    [(None, "dynamic", 1e-4), ("bf16", "dynamic", 0.1), ("int8", "dynamic", 0.2), ("int8", "static", 0.3)],
)
def test_openvino(quantize, mode, atol, tmp_path):
    pytest.importorskip("openvino")
    if quantize == "int8":
        pytest.importorskip("nncf")
    model = small("roberta", hidden_size=64, intermediate_size=256, vocab_size=500)
    report = export(
        model,
        tmp_path / "m.xml",
        data=padded(model),
        quantize=quantize,
        mode=mode,
        agreement=0.5,
        tolerance=max(atol, 1e-4),
    )
    assert set(report.files) == {"m.xml", "m.bin"}
    for rows, length in ((1, 7), (5, 12)):
        batch = padded(model, rows, length)
        wanted = expected(model, batch)
        scale = max(1.0, float(wanted["logits"].abs().max())) if quantize else 1.0
        agree(load_exported(tmp_path / "m.xml", threads=1)(**batch), wanted, batch, 2 * atol * scale)
    share = {None: 1.0, "bf16": 0.55, "int8": 0.32}[quantize]
    assert report.files["m.bin"] <= share * report.parameter_bytes + 5000
