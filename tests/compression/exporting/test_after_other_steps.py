"""Export of what the other steps leave: factorised maps, LoRA's additions, models trained for int8, quantised ones."""

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.compression.exporting.models import agree, expected, padded, small
from textbrewer.compression import Prune, export, factorize_, load_exported
from textbrewer.compression.lora import lora_, merge_lora
from textbrewer.compression.quantization import convert_qat_, prepare_qat_, quantize_


def exported(model, folder, **settings):
    batch = padded(model)
    wanted = expected(model.eval(), batch)
    export(model, folder / "m.onnx", data=batch, **settings)
    return load_exported(folder / "m.onnx")(**batch), wanted, batch


def test_pruned_and_factorised(tmp_path):
    model = Prune(heads=0.5, ffn=0.5).apply(small("bert-classifier")).shrink()
    factorize_(model, ratio=0.5, method="svd", include="*.encoder")
    agree(*exported(model, tmp_path), atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_lora(merged, tmp_path):
    pytest.importorskip("peft")
    model = small("bert-classifier")
    plain = expected(model.eval(), padded(model))["logits"]
    adapted = lora_(model, rank=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    if merged:
        adapted = merge_lora(adapted)
    found, wanted, batch = exported(adapted, tmp_path)
    assert (wanted["logits"] - plain).abs().max() > 1e-3
    agree(found, wanted, batch, atol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_trained_for_int8(quantize, tmp_path):
    pytest.importorskip("torchao")
    model = small("bert-classifier")
    prepare_qat_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**padded(model), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    convert_qat_(model, to="float")
    bounds = {} if quantize is None else {"quantize": "int8", "tolerance": 0.2, "agreement": 0.0}
    agree(*exported(model, tmp_path, **bounds), atol=1e-4 if quantize is None else 0.2)


@pytest.mark.parametrize("prepared", [False, True])
def test_int8_of_torchao_says_what_to_do_instead(prepared, tmp_path):
    pytest.importorskip("torchao")
    model = small("bert-classifier")
    (prepare_qat_ if prepared else quantize_)(model)
    with pytest.raises(ValueError, match=r"must not be quantised already .*float32"):
        export(model, tmp_path / "m.onnx", data=padded(model))
    assert not list(tmp_path.iterdir())
