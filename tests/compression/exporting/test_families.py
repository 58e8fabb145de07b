"""The nine families as ONNX: what the model says, at other sizes, pruned, and in a process without the model."""

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.compression.exporting.models import NINE, agree, expected, padded, run, small
from textbrewer.compression import Prune, export, factorize_, load_exported

UNEVEN = Prune(heads=0.4, ffn=0.6, scope="global", score="random", seed=2)
SIZES = ((1, 7), (5, 12), (2, 2), (4, 9))

IN_A_NEW_PROCESS = """
import sys
import torch
from textbrewer import compression

for path in sys.argv[1:]:
    runner = compression.load_exported(path)
    outputs = [dict(runner(**batch)) for batch in torch.load(path + ".batches.pt")]
    torch.save(outputs, path + ".outputs.pt")
assert "transformers" not in sys.modules and "onnx" not in sys.modules
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Return all families pruned, each with the file that it was exported to."""
    folder = tmp_path_factory.mktemp("pruned")
    models = {}
    for name in NINE:
        model = UNEVEN.apply(small(name)).shrink()
        report = export(model, folder / f"{name}.onnx", data=padded(model))
        assert report.difference <= 1e-4
        models[name] = model, report.path
    return models


@pytest.mark.parametrize("name", NINE)
def test_a_file_says_what_the_model_says(name, tmp_path):
    model = small(name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = export(model, tmp_path / "m.onnx", data=padded(model))
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model.eval()
    runner = load_exported(tmp_path / "m.onnx")
    for rows, length in SIZES:
        batch = padded(model, rows, length, seed=rows)
        agree(runner(**batch), expected(model, batch), batch, 1e-4)
    assert report.difference <= 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.json"}
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    assert parameters < report.bytes < parameters + 60_000  # tied weights are there once


@pytest.mark.parametrize("name", NINE)
def test_a_pruned_model_at_other_sizes(name, pruned):
    model, path = pruned[name]
    runner = load_exported(path)
    for rows, length in SIZES[:2]:
        batch = padded(model, rows, length, seed=rows)
        agree(runner(**batch), expected(model, batch), batch, 1e-4)


def test_a_new_process_needs_no_model(pruned):
    batches = {}
    for model, path in pruned.values():
        batches[path] = [padded(model, rows, length, seed=3) for rows, length in SIZES]
        torch.save(batches[path], f"{path}.batches.pt")
    run(IN_A_NEW_PROCESS, *(str(path) for _, path in pruned.values()))
    for model, path in pruned.values():
        for batch, outputs in zip(batches[path], torch.load(f"{path}.outputs.pt"), strict=True):
            agree(outputs, expected(model, batch), batch, 1e-4)


def test_a_model_of_low_rank(tmp_path):
    model = small("t5")
    factorize_(model, [padded(model)], ratio=0.3)
    export(model, tmp_path / "m.onnx", data=[padded(model)])
    batch = padded(model, 2, 5, seed=4)
    agree(load_exported(tmp_path / "m.onnx")(**batch), expected(model, batch), batch, 1e-4)


def test_hidden_states_are_outputs_too(tmp_path):
    model = small("bert-classifier", output_hidden_states=True)
    export(model, tmp_path / "m.onnx", data=padded(model))
    batch = padded(model, 2, 4)
    found = load_exported(tmp_path / "m.onnx")(**batch)
    with torch.no_grad():
        wanted = model(**batch)
    assert list(found) == ["logits", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
    real = batch["attention_mask"].bool()
    for number, states in enumerate(wanted.hidden_states):
        torch.testing.assert_close(found[f"hidden_states.{number}"][real], states[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_torch_programs(name, tmp_path):
    model = small(name)
    export(model, tmp_path / "m.pt2", data=padded(model))
    batch = padded(model, 1, 11, seed=5)
    agree(load_exported(tmp_path / "m.pt2")(**batch), expected(model, batch), batch, 1e-5)
    assert b"outputs.py" not in (tmp_path / "m.pt2").read_bytes()
