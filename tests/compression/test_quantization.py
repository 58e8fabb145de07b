"""int8 weights: rounded as written on paper, trained so with a teacher, stopped, resumed, saved and loaded."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import textbrewer
from tests.compression.families import with_labels
from tests.students.models import batch_for, make, outputs_of, same
from textbrewer import compression
from textbrewer.compression import Prune, factorize_, quantized_weights
from textbrewer.compression.quantization import convert_qat_, prepare_qat_, quantize_

pytest.importorskip("torchao", reason="int8 by torchao: extra qat")
ROOT = Path(__file__).parents[2]


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def rows(seed=1, count=5):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def rounded_weight(weight):
    """Round each output's weights to whole multiples of its scale; in float32, as the largest lies between two."""
    weight = weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return ((weight * (1 / scale)).round().clamp(-128, 127) * scale).double()


def rounded_inputs(inputs):
    """Round each position's values to 256 steps of its own range, which holds zero."""
    inputs = inputs.detach().double()
    low, high = inputs.amin(-1, keepdim=True).clamp(max=0), inputs.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((inputs / scale).round() + zero).clamp(-128, 127) - zero) * scale


def by_hand(model, inputs, activations):
    """Compute a Sequential's outputs, with all its linear maps but the last in int8."""
    *body, head = model
    states = inputs.double()
    for layer in body:
        if isinstance(layer, nn.ReLU):
            states = states.relu()
        else:
            states = rounded_inputs(states) if activations == "int8" else states
            states = states @ rounded_weight(layer.weight).T + layer.bias.double()
    return states @ head.weight.double().T + head.bias.double()


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_all_three_ways_round_as_on_paper(activations):
    model, inputs = dense(), rows()
    expected = by_hand(model, inputs, activations)
    assert (expected - model(inputs)).abs().max() > 1e-4  # the rounding shows
    prepared, direct = copy.deepcopy(model), copy.deepcopy(model)
    assert prepare_qat_(prepared, activations).layers == ("0", "2")
    found = prepared(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    convert_qat_(prepared)
    quantize_(direct, activations)
    for one in (prepared, direct):
        torch.testing.assert_close(one(inputs), found, rtol=0, atol=2e-6)
        assert not any(parameter.requires_grad for parameter in one.parameters())
    assert all(torch.equal(prepared[place].weight.qdata, direct[place].weight.qdata) for place in (0, 2))


def test_where_whole_numbers_cannot_be_multiplied(monkeypatch):
    model, inputs = dense(), rows()
    expected = by_hand(model, inputs, "int8")
    monkeypatch.setattr(quantized_weights, "_multiplies_whole_numbers", lambda device: False)
    quantize_(model)
    assert type(model[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
    torch.testing.assert_close(model(inputs).double(), expected, rtol=0, atol=2e-6)


def test_gradients_pass_the_rounding():
    """Of one map: the gradient of a sum with regard to weights is the rounded inputs, but for weights that are cut."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), rows()
    prepare_qat_(model, include="0")
    model[0](inputs).sum().backward()
    weight = model[0].weight.detach()
    cut = (weight * (1 / (weight.abs().amax(1, keepdim=True) / 127.5))).round() > 127
    assert cut.sum() < 4
    expected = rounded_inputs(inputs).sum(0).expand(4, 16).masked_fill(cut, 0)
    torch.testing.assert_close(model[0].weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_parameters_names_modes_and_random_numbers_stay():
    model = dense()
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    prepare_qat_(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own
    assert model.state_dict().keys() == before.keys()
    assert not any(module.training for module in model.modules())
    convert_qat_(model, to="float")
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_hangs_in_two_places_stays_one():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 2))
    prepare_qat_(model)
    assert model[0] is model[2]
    convert_qat_(model)
    assert model[0] is model[2]
    assert quantized_weights.quantized_names(model) == ["0"]


@pytest.mark.parametrize(
    ("include", "exclude", "layers"),
    [(None, None, ("0", "2")), (["4"], None, ("4",)), (None, "2", ("0",)), ("*", "0", ("2", "4"))],
)
def test_named_layers(include, exclude, layers):
    assert quantize_(dense(), include=include, exclude=exclude).layers == layers


def test_bert_leaves_its_head_and_gets_smaller(tmp_path):
    model = make("bert-classifier")
    sizes = {}
    linear = [module for module in model.bert.modules() if type(module) is nn.Linear]
    weights, outputs = (sum(getattr(module.weight, name)() for module in linear) for name in ("numel", "__len__"))
    for name in ("float", "int8"):
        if name == "int8":
            report = quantize_(model)
            assert len(report.layers) == len(linear)
            assert "left: classifier: an output head" in str(report)
        compression.save(model, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        sizes[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sizes["float"] - sizes["int8"] == 3 * weights - 4 * outputs


IN_A_NEW_PROCESS = """
import sys
import torch
from torch import nn
from textbrewer import compression

folder, kind = sys.argv[1:]
plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))
model = compression.load(folder, model=plain if kind == "dense" else None)
batch = torch.load(folder + "/batch.pt")
outputs = model(batch) if kind == "dense" else model(**batch).logits
torch.save(outputs, folder + "/outputs.pt")
"""


@pytest.mark.parametrize(("kind", "activations"), [("dense", "int8"), ("bert", "int8"), ("bert", "float")])
def test_saved_and_loaded_in_a_new_process(kind, activations, tmp_path):
    model = dense() if kind == "dense" else make("bert-classifier")
    batch = rows() if kind == "dense" else batch_for(model)
    prepare_qat_(model, activations)
    convert_qat_(model)
    compression.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "shapes.json").read_text())["quantized"]
    torch.save(batch, tmp_path / "m" / "batch.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "m"), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model(batch) if kind == "dense" else model(**batch).logits
    assert torch.equal(torch.load(tmp_path / "m" / "outputs.pt"), expected)
    again = compression.load(tmp_path / "m", model=dense() if kind == "dense" else None)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    compression.save(again, tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("m", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_pruned_factorised_and_quantised(tmp_path):
    model = make("bert-classifier")
    small = Prune(heads=0.5, ffn=0.5, layers=1, score="random").apply(model).shrink()
    factorize_(small, [batch_for(model)], ratio=0.3)
    plain = outputs_of(small)["logits"]
    report = quantize_(small)
    assert any(name.endswith(".up") for name in report.layers)
    compression.save(small, tmp_path)
    loaded = compression.load(tmp_path)
    same(outputs_of(loaded), outputs_of(small))
    assert 0 < (outputs_of(loaded)["logits"] - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("name", ["t5", "llama", "vit"])
def test_other_families(name, tmp_path):
    model = make(name)
    if name == "t5":  # whose feed-forward parts look at the dtype of a layer's weight
        factorize_(model, ratio=0.3, method="svd")
    before = outputs_of(model)
    quantize_(model)
    compression.save(model, tmp_path)
    same(outputs_of(compression.load(tmp_path)), outputs_of(model))
    for key in ("logits", "last_hidden_state"):
        if key in before:
            assert not torch.equal(outputs_of(model)[key], before[key])


def distiller(student, folder, teacher, **settings):
    config = textbrewer.TrainingConfig(output_dir=str(folder), log_dir=None, progress_bar=False, **settings)
    learn = textbrewer.DistillationConfig(kd_loss_type="mse", hard_label_weight=0)
    return textbrewer.GeneralDistiller(config, learn, teacher, student, "auto", "auto")


def train(student, folder, teacher, steps, resume=None, callback=None, **settings):
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    batches = [with_labels(teacher, seed) for seed in range(4)]
    distiller(student, folder, teacher, ckpt_steps=3, **settings).train(
        optimizer, batches, num_steps=steps, resume_from=resume, callback=callback
    )


def test_distilled_while_it_rounds_and_stopped_and_resumed(tmp_path):
    """The student's loss is measured in int8: trained for it, it comes nearer to the teacher than rounded after."""
    teacher = make("bert-classifier")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    whole, stopped = (make("bert-classifier", seed=1) for _ in range(2))
    prepare_qat_(whole)
    train(whole, tmp_path / "whole", teacher, 6)
    prepare_qat_(stopped)

    def stop(model, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "stopped", teacher, 6, callback=stop)
    resumed = make("bert-classifier", seed=2)
    layers = sum(type(module) is torch.nn.Linear for module in resumed.modules())
    prepared = len(prepare_qat_(resumed).layers)
    with pytest.raises(
        ValueError,
        match=rf"other layers: {prepared} FakeQuantizedLinear, {layers - prepared} Linear; here there are "
        rf"0 FakeQuantizedLinear, {layers} Linear\. Make the student .* prepare_qat_",
    ):
        train(make("bert-classifier", seed=2), tmp_path / "stopped", teacher, 6, resume="latest")
    train(resumed, tmp_path / "stopped", teacher, 6, resume="latest")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    # gs6.pkl is a plain model's
    plain = make("bert-classifier", seed=3)
    plain.load_state_dict(torch.load(tmp_path / "whole" / "gs6.pkl", weights_only=True))
    quantize_(plain)
    found = outputs_of(whole)["logits"]
    convert_qat_(whole)
    torch.testing.assert_close(outputs_of(whole)["logits"], found, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs_of(plain)["logits"], found, rtol=0, atol=1e-5)


def test_mixed_precision(tmp_path):
    student, teacher = make("bert-classifier", seed=1), make("bert-classifier")
    prepare_qat_(student)
    train(student, tmp_path, teacher, 3, precision="bf16")
    convert_qat_(student)
    assert outputs_of(student)["logits"].isfinite().all()


def test_training_for_int8_is_better_than_rounding_after_it(tmp_path):
    """On a problem where rounding hurts: one input is a thousand times the others, and all share a position's range."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=generator)
    inputs[:, 0] *= 1000
    small = torch.randn(8, 3, generator=generator)
    small[0] = 0
    targets = (inputs @ small).detach()
    losses = {}
    for kind in ("after", "while"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 3))
        if kind == "while":
            prepare_qat_(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(400):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        (convert_qat_ if kind == "while" else quantize_)(model)
        losses[kind] = float(nn.functional.mse_loss(model(inputs), targets))
    assert losses["while"] < losses["after"]


@pytest.mark.parametrize("function", [prepare_qat_, quantize_])
@pytest.mark.parametrize(
    ("make_model", "arguments", "message"),
    [
        (lambda: nn.Conv2d(1, 2, 3), {}, r"must have an nn\.Linear that .* can quantise, got none"),
        (lambda: nn.Sequential(nn.Linear(4, 2)), {}, "got none .*0: an output head; name it in include"),
        (lambda: dense().double(), {}, "0: its weight is float64, not of 32 or 16 bits"),
        (lambda: nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2)), {}, "0: it has a single input"),
        (lambda: make("gpt2"), {}, "a Conv1D, whose weight is the other way round"),
        (lambda: Prune(heads=0.5).apply(make("bert-classifier")).model, {}, r"shrunk .* take masked\.shrink\(\)"),
        (dense, {"activations": "int4"}, "activations must be one of the known names, got 'int4'"),
        (dense, {"include": "7"}, "include must name linear maps of the model, got '7'"),
    ],
)
def test_what_cannot_be_quantised(function, make_model, arguments, message):
    model = make_model()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        function(model, **arguments)
    assert str(model) == before


def test_the_wrong_order(tmp_path):
    with pytest.raises(TypeError, match="model must be a torch module"):
        prepare_qat_("model")
    model = dense()
    with pytest.raises(ValueError, match="must be fake-quantised by prepare_qat_ and trained, got none of its layers"):
        convert_qat_(model)
    with pytest.raises(ValueError, match="to must be one of the known names, got 'int4'"):
        convert_qat_(model, to="int4")
    prepare_qat_(model)
    for again in (prepare_qat_, quantize_):
        with pytest.raises(ValueError, match=r"must not be quantised already for .*, got int8 or fake-quantised '0'"):
            again(model)
    with pytest.raises(ValueError, match=r"must be converted to be saved, .*convert_qat_\(model\)"):
        compression.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    convert_qat_(model)
    with pytest.raises(ValueError, match="it is quantised already"):
        convert_qat_(model)
    with pytest.raises(ValueError, match="must not be quantised already"):
        prepare_qat_(model)
    with pytest.raises(ValueError, match=r"its weight is a \w*Int8Tensor, quantised already"):
        factorize_(model, ratio=0.5, method="svd", include="0")
    bert = make("bert-classifier")
    quantize_(bert)
    with pytest.raises(ValueError, match="prune first, and factorise, quantise"):
        Prune(ffn=0.5).apply(bert)
    with pytest.raises(ValueError, match=r"must have parameters with requires_grad=True, all of them are frozen"):
        train(bert, tmp_path / "run", make("bert-classifier"), 1)


def test_lora_must_be_merged_first():
    pytest.importorskip("peft")
    model = compression.lora_(make("bert-classifier"))
    with pytest.raises(ValueError, match="no adapters of peft inside for prepare_qat_; merge them first"):
        prepare_qat_(model)


def test_other_quantised_tensors_are_not_saved(tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as other

    model = dense()
    other(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(
        ValueError, match=r"as quantize_ and convert_qat_ make them, .* got a Int8Tensor in '0\.weight'"
    ):
        compression.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "float64", "activations": "int8"}, "the dtype of '0.weight' must be one of the known names"),
        ({"dtype": "float32", "activations": "int4"}, "the activations of '0.weight' must be one of"),
        ({"dtype": "float32"}, "activations"),
        ([], "list"),
    ],
)
def test_manifests_that_are_damaged(entry, message, tmp_path):
    model = dense()
    quantize_(model)
    compression.save(model, tmp_path)
    path = tmp_path / "shapes.json"
    manifest = json.loads(path.read_text())
    manifest["quantized"]["0.weight"] = entry
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        compression.load(tmp_path, model=dense())


def test_without_torchao(monkeypatch, tmp_path):
    model = dense()
    quantize_(model)
    compression.save(model, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    for function in (prepare_qat_, quantize_):
        with pytest.raises(ImportError, match=r"needs torchao: pip install 'textbrewer\[qat\]'"):
            function(dense())
    with pytest.raises(ImportError, match=r"a model with int8 weights needs torchao: pip install 'textbrewer\[qat\]'"):
        compression.load(tmp_path, model=dense())
