"""Exports of models of one's own: inputs, outputs, files, the tokenizer, the report; and what is refused."""

import json
import os
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.compression.exporting.models import Bag, bag_batch, padded, run, small
from textbrewer import compression
from textbrewer.compression import Prune, export, exporting, load_exported
from textbrewer.compression.exporting import checking, staging
from textbrewer.report import report


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the folder of an exported model."""
    folder = tmp_path_factory.mktemp("bag")
    export(Bag(), folder / "bag.onnx", data={**bag_batch(), "labels": torch.tensor([0, 1, 2, 0])})
    return folder


class Pair(nn.Module):
    """Two texts of different lengths, as a tuple out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, question, answer):
        return self.table(question).mean(1), {"inner": self.table(answer).sum(1)}


class Fixed(nn.Module):
    """As many tokens as it has weights."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 4), nn.Linear(6 * 4, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).flatten(1))


class Frames(nn.Module):
    """Floats of any length; positional inputs."""

    def forward(self, *frames):
        return torch.cat([part.mean(1) for part in frames], -1)


class CountsRows(nn.Module):
    """Fixes the number of rows."""

    def forward(self, values):
        return values.reshape(int(values.shape[0]), -1).sum(1) * values.new_ones(len(values)).numpy().shape[0]


def test_axes_of_several_inputs(tmp_path):
    torch.manual_seed(0)
    model = Pair().eval()
    batch = (torch.randint(0, 50, (3, 5)), torch.randint(0, 50, (3, 5)))
    found = export(model, tmp_path / "m.onnx", data=batch)
    assert found.inputs == {"question": ("batch", "length"), "answer": ("batch", "answer_length")}
    others = (torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 3)))
    outputs = load_exported(tmp_path / "m.onnx")(*others)
    assert list(outputs) == ["output.0", "output.1.inner"]
    wanted = model(*others)
    torch.testing.assert_close(outputs["output.0"], wanted[0].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["output.1.inner"], wanted[1]["inner"].detach(), rtol=0, atol=1e-5)


def test_a_length_that_the_model_fixes_stays(tmp_path):
    tokens = torch.randint(0, 50, (3, 6))
    found = export(Fixed(), tmp_path / "m.onnx", data={"tokens": tokens})
    assert found.inputs == {"tokens": ("batch", 6)}
    runner = load_exported(tmp_path / "m.onnx")
    assert runner(tokens=tokens[:1])["output"].shape == (1, 2)
    with pytest.raises(ValueError, match=r"'tokens' must have the shape \(batch, 6\), got \(3, 5\)"):
        runner(tokens=tokens[:, :5])


def test_axes_that_differ_between_batches_and_those_asked_for(tmp_path):
    batches = [(torch.randn(2, length, 3), torch.randn(2, 4, 3)) for length in (5, 7)]
    found = export(Frames(), tmp_path / "m.onnx", data=batches, dynamic_axes={"input_1": {1: "frames"}})
    assert found.inputs == {"input_0": ("batch", "input_0_1", 3), "input_1": ("batch", "frames", 3)}
    frames = torch.randn(1, 9, 3), torch.randn(1, 2, 3)
    torch.testing.assert_close(load_exported(tmp_path / "m.onnx")(*frames)["output"], Frames()(*frames))
    with pytest.raises(ValueError, match="dynamic_axes says so, and does not take tokens 3 x 5"):
        export(
            Fixed(), tmp_path / "n.onnx", data={"tokens": torch.ones(2, 6, dtype=torch.long)},
            dynamic_axes={"tokens": {1: "words"}},
        )  # fmt: skip
    assert not (tmp_path / "n.onnx").exists()


def test_batches_are_read_up_to_a_number(tmp_path):
    read = []

    def batches():
        for seed in range(10):
            read.append(seed)
            yield bag_batch(rows=2, seed=seed)

    found = export(Bag(), tmp_path / "m.pt2", data=batches(), batches=3)
    assert read == [0, 1, 2]
    assert found.check.rows == 2 * 3 + 1


def test_labels_are_no_inputs(exported):
    manifest = json.loads((exported / "bag.onnx.json").read_text())
    assert [item["name"] for item in manifest["inputs"]] == ["tokens", "weights"]
    assert manifest["ignored"] == ["labels"]
    runner, batch = load_exported(exported / "bag.onnx"), bag_batch(2, 9, seed=3)
    one, other = runner(**batch), runner(**batch, labels=torch.zeros(2))
    assert torch.equal(one.logits, other.logits)


def test_what_is_noted(exported):
    manifest = json.loads((exported / "bag.onnx.json").read_text())
    assert manifest["check"]["rows"] == 5
    assert manifest["check"]["shapes"] == [[4, 6], [1, 6]]
    assert manifest["check"]["outputs"]["logits"]["difference"] <= 1e-4
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["kind"], manifest["model"], manifest["quantize"]) == ("onnx", "Bag", None)
    content = (exported / "bag.onnx").read_bytes()
    assert str(exported).encode() not in content
    assert b".py" not in content


def test_the_report_takes_it_beside_models(exported):
    runner = load_exported(exported / "bag.onnx", threads=1)
    batches = [bag_batch(4, 6, seed) for seed in range(2)]

    def score(model):
        return float(sum(model(**batch)["logits"].argmax(-1).eq(1).float().mean() for batch in batches))

    found = report({"torch": Bag(), "onnx": runner}, batches, score=score, repeats=3, warmup=1)
    size = (exported / "bag.onnx").stat().st_size
    assert (found["onnx"].file_bytes, found["onnx"].file_format) == (size, "bag.onnx")
    assert found["onnx"].scores == found["torch"].scores
    assert found["onnx"].parameters is None
    assert len(found["onnx"].timings) == 2


def test_the_tokenizer_and_the_classes_travel_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    model = small("bert-classifier", id2label={0: "down", 1: "up"}, label2id={"down": 0, "up": 1})
    texts = tokenizer(["good bad", "bad"], padding=True, return_tensors="pt")
    batch = {name: texts[name] for name in ("input_ids", "attention_mask")}
    export(model, tmp_path / "m.onnx", data=batch, tokenizer=tokenizer)
    runner = load_exported(tmp_path / "m.onnx")
    assert runner.labels == {0: "down", 1: "up"}
    again = runner.tokenizer()(["good bad", "bad"], padding=True, return_tensors="pt")
    assert torch.equal(again["input_ids"], batch["input_ids"])
    export(model, tmp_path / "m.onnx", data=batch, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.json"}
    with pytest.raises(FileNotFoundError, match="export with tokenizer="):
        load_exported(tmp_path / "m.onnx").tokenizer()


def test_beyond_the_tolerance_nothing_is_written(tmp_path):
    model, batch = Bag(width=64), bag_batch(20)
    message = r"'logits' is off by [\d.e-]+ of its root mean square, more than 1e-06;.* \(over 21 rows"
    with pytest.raises(ValueError, match=message) as caught:
        export(model, tmp_path / "a" / "b" / "m.onnx", data=batch, quantize="int8", tolerance=1e-6, agreement=0)
    assert "of 21 decisions the same" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_few_equal_decisions_are_an_error(tmp_path, monkeypatch):
    real = exporting.exporter.open_file

    def turned(*arguments, **named):
        run = real(*arguments, **named)
        return lambda batch: {name: values.flip(-1) for name, values in run(batch).items()}

    monkeypatch.setattr(exporting.exporter, "open_file", turned)
    with pytest.raises(ValueError, match=r"'logits' decides \d+ of 21 rows or positions alike, less than 90%"):
        export(Bag(), tmp_path / "m.pt2", data=bag_batch(20), quantize="bf16", tolerance=100.0)
    with pytest.raises(ValueError, match="'logits' is off by"):
        export(Bag(), tmp_path / "m.pt2", data=bag_batch(20))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        export(Bag(), path, data=bag_batch())
    with pytest.raises(ValueError, match="nothing was written"):
        export(Bag(), path, data=bag_batch(), quantize="bf16", tolerance=1e-9, overwrite=True)
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(".json"):
            raise OSError("no space left on the device")
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        export(Bag(), path, data=bag_batch(), overwrite=True)
    assert [item.name for item in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_text() == "mine"
    monkeypatch.undo()
    export(Bag(), path, data=bag_batch(), overwrite=True)
    batch = bag_batch(2)
    torch.testing.assert_close(load_exported(path)(**batch).logits, Bag()(**batch)["logits"].detach())


def test_a_quantised_file_is_held_to_the_root_mean_square():
    """One row of a hundred that is far off is no failure of it, as it is of a float32 file; all of them a bit are."""
    expected = torch.tensor([[3.0, -4.0]]).repeat(100, 1)
    one, all_of_them = expected.clone(), expected * 1.2
    one[7] = torch.tensor([-1.0, 1.0])
    for found, share in ((one, (41 / 2500) ** 0.5), (all_of_them, 0.2)):
        check = checking.compare(
            lambda batch: {"logits": expected}, lambda batch: {"logits": found}, [{"ids": expected}]
        )
        assert check.outputs["logits"].relative_difference == pytest.approx(share, rel=1e-6)
        assert check.failures(0.15, 0.9, quantized=True) == (
            [] if found is one else ["'logits' is off by 0.2 of its root mean square, more than 0.15"]
        )
    assert checking.Figures(squared_difference=1.0).relative_difference == float("inf")
    assert checking.Figures().relative_difference == 0.0


def test_padding_does_not_count():
    expected = {"start_logits": torch.tensor([[1.0, 2.0, 9.0]]), "logits": torch.zeros(1, 3, 2)}
    found = {"start_logits": torch.tensor([[1.0, 2.5, -9.0]]), "logits": torch.zeros(1, 3, 2)}
    found["logits"][0, 2] = torch.tensor([5.0, 7.0])
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    check = checking.compare(lambda batch: expected, lambda batch: found, [batch])
    assert check.outputs["start_logits"] == checking.Figures(0.5, 2.0, 1, 1, 0.25, 5.0)
    assert check.outputs["logits"] == checking.Figures(0.0, 0.0, 2, 2)
    whole = checking.compare(lambda batch: expected, lambda batch: found, [{"ids": torch.ones(1, 3)}])
    assert whole.outputs["start_logits"] == checking.Figures(18.0, 9.0, 1, 0, 324.25, 86.0)
    assert whole.outputs["logits"] == checking.Figures(7.0, 0.0, 3, 2, 74.0, 0.0)
    assert whole.failures(1.0, 0.0) == ["'start_logits' is off by 18, more than 9", "'logits' is off by 7, more than 1"]
    nothing = {"logits": torch.full((1, 3, 2), torch.nan)}
    assert checking.compare(lambda batch: {"logits": torch.zeros(1, 3, 2)}, lambda batch: nothing, [batch]).failures(
        9, 0
    )
    with pytest.raises(ValueError, match="must be finite on the data"):
        checking.compare(lambda batch: nothing, lambda batch: nothing, [batch])
    with pytest.raises(ValueError, match=r"must have the model's shape \(1, 3, 2\), got \(1, 3\)"):
        checking.compare(lambda batch: nothing, lambda batch: {"logits": torch.zeros(1, 3)}, [batch])


def bag_in(change):
    model = Bag()
    change(model)
    return model


def tied_to_torchao():
    pytest.importorskip("torchao")
    from textbrewer.compression.quantization import quantize_

    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantize_(model)
    return model


@pytest.mark.parametrize(
    ("path", "settings", "kind", "message"),
    [
        ("m.bin", {}, ValueError, r"path must end in one of .onnx \(onnx\), .xml \(openvino\), .pt2 \(torch\)"),
        ("m.onnx", {"format": "torch"}, ValueError, r"must end in .pt2 for format='torch'"),
        ("m.onnx", {"format": "tflite"}, ValueError, "format must be one of the known names"),
        ("m.onnx", {"quantize": "int4"}, ValueError, 'quantize must be None, "int8" or "bf16", got'),
        ("m.pt2", {"quantize": "int8"}, ValueError, r"must end in one of .onnx, .xml for quantize='int8'"),
        ("m.onnx", {"mode": "static"}, ValueError, 'mode="static" is of quantize="int8"'),
        ("m.onnx", {"quantize": "int8", "mode": "fast"}, ValueError, "mode must be one of"),
        ("m.onnx", {"tolerance": 0}, ValueError, "tolerance must be greater than 0"),
        ("m.onnx", {"agreement": 1.5}, ValueError, "agreement must be at most 1"),
        ("m.onnx", {"batches": 0}, ValueError, "batches must be at least 1"),
        ("m.onnx", {"opset": 9}, ValueError, "opset must be at least 18"),
        ("m.pt2", {"opset": 20}, ValueError, "opset must be None for a .pt2 file"),
        ("m.onnx", {"tokenizer": "bert"}, TypeError, "tokenizer must have save_pretrained"),
        ("m.onnx", {"dynamic_axes": {"token": {1: "x"}}}, KeyError, "unknown key 'token'"),
        ("m.onnx", {"dynamic_axes": {"tokens": {2: "x"}}}, ValueError, "axes of 'tokens' from 0 to 1"),
        ("m.onnx", {"model": "bert"}, TypeError, "model must be a torch.nn.Module"),
        ("m.onnx", {"model": lambda: Bag().half()}, ValueError, "must be in float32 to be exported, got float16"),
        ("m.onnx", {"model": lambda: Bag().to("meta")}, ValueError, "'table.weight' is on the meta device"),
        ("m.onnx", {"model": tied_to_torchao}, ValueError, "must not be quantised already"),
        ("m.onnx", {"data": []}, ValueError, "at least one batch, got none"),
        ("m.onnx", {"data": 3}, TypeError, "data must be a batch or an iterable of batches"),
        ("m.onnx", {"data": {"tokens": [1, 2]}}, TypeError, "batches of tensors, got list for 'tokens'"),
        ("m.onnx", {"data": {"labels": torch.ones(2)}}, ValueError, "with inputs beside"),
        ("m.onnx", {"data": {"tokens": torch.ones(2, 3).long()}}, ValueError, "fails on one of .*'weights'"),
        ("m.onnx", {"data": [bag_batch(), {"tokens": torch.ones(2, 3).long()}]}, ValueError, "the same inputs"),
    ],
)  # fmt: skip
def test_bad_input(path, settings, kind, message, tmp_path):
    model = settings.pop("model", Bag)
    arguments = {"data": bag_batch(), **settings}
    with pytest.raises(kind, match=message):
        export(model() if callable(model) else model, tmp_path / path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be(tmp_path):
    masked = Prune(heads=0.5).apply(small("bert-classifier"))
    with pytest.raises(ValueError, match=r"must be shrunk to be exported, got a masked one; export masked.shrink\(\)"):
        export(masked.model, tmp_path / "m.onnx", data=padded(masked.model))
    with pytest.raises(TypeError, match="of a Masked, what shrink"):
        export(masked, tmp_path / "m.onnx", data=padded(masked.model))
    with pytest.raises(ValueError, match=r"must be one that torch\.export can record, and CountsRows is not"):
        export(CountsRows(), tmp_path / "m.onnx", data=torch.ones(3, 2))
    with pytest.raises(ValueError, match="weights that int8 can hold"):
        export(Frames(), tmp_path / "m.onnx", data=torch.ones(3, 2, 2), quantize="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "path", "quantize", "command"),
    [
        ("onnxscript", "m.onnx", None, r"needs onnxscript: pip install 'textbrewer\[onnx\]'"),
        ("onnxruntime", "m.onnx", "int8", r"needs onnxruntime: pip install 'textbrewer\[onnx\]'"),
        ("openvino", "m.xml", None, r"needs openvino: pip install 'textbrewer\[openvino\]'"),
        ("nncf", "m.xml", "int8", r"needs nncf: pip install 'textbrewer\[openvino\]'"),
    ],
)
def test_a_missing_extra_names_the_command(missing, path, quantize, command, tmp_path, monkeypatch):
    if missing == "nncf":
        pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=command):
        export(Bag(), tmp_path / path, data=bag_batch(), quantize=quantize)
    assert list(tmp_path.iterdir()) == []


def test_a_runner_refuses_what_does_not_fit(exported, tmp_path):
    runner, batch = load_exported(exported / "bag.onnx"), bag_batch(2, 5)
    assert torch.equal(runner(batch["tokens"].int(), batch["weights"]).logits, runner(**batch).logits)
    with pytest.raises(KeyError, match="must have 'weights'"):
        runner(tokens=batch["tokens"])
    with pytest.raises(KeyError, match="unknown key 'token'"):
        runner(**batch, token=1)
    with pytest.raises(ValueError, match="'tokens' must be of int64, got float32"):
        runner(batch["weights"], batch["weights"])
    with pytest.raises(ValueError, match=r"must have the shape \(batch, length\), got \(2\)"):
        runner(batch["tokens"][:, 0], batch["weights"])
    with pytest.raises(ValueError, match="batch must be the same in all inputs, got 2 in 'tokens' and 1 in 'weights'"):
        runner(batch["tokens"], batch["weights"][:1])
    with pytest.raises(TypeError, match="'tokens' must be a tensor, got list"):
        runner([1], batch["weights"])
    with pytest.raises(TypeError, match="takes 2 inputs, got 3"):
        runner(1, 2, 3)
    with pytest.raises(AttributeError, match="no output 'logit'"):
        _ = runner(**batch).logit
    with pytest.raises(ValueError, match="threads must be at least 1"):
        load_exported(exported / "bag.onnx", threads=0)
    with pytest.raises(FileNotFoundError, match=r"needs .*none\.onnx"):
        load_exported(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("bag.onnx", lambda content: content[:-10], "damaged, or was not exported together"),
        ("bag.onnx.json", lambda content: content[:40], "must be as compression.export writes it"),
        ("bag.onnx.json", lambda content: content.replace(b'"version": 1', b'"version": 2'), "reads version 1"),
        ("bag.onnx.json", lambda content: b"{}", "must be as compression.export writes it"),
    ],
)
def test_damaged_files_are_refused(file, change, message, exported, tmp_path):
    for path in exported.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(change(content) if path.name == file else content)
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "bag.onnx")


def test_nothing_is_imported_before_it_is_needed():
    script = "import sys, textbrewer; from textbrewer import compression; print(sorted(sys.modules))"
    loaded = {name.strip("'[]").partition(".")[0] for name in run(script).strip().split(", ")}
    assert "textbrewer" in loaded
    assert not loaded & {"onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "transformers"}
    assert compression.export is export
