"""The teacher's own precision: what it says, and that nothing of it is left behind."""

import warnings

import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, make_config
from tests.distillers.setups import Setup, batches, make_teacher, weights
from textbrewer import BasicTrainer, CustomMatch, GeneralDistiller
from textbrewer.distillers.quantized import Int8Layers
from textbrewer.engine import Runtime
from textbrewer.engine.precision import precision_of


def seen_by_the_loss(setup):
    """The teacher's views of every step."""
    views, compute = [], setup.distiller.compute_loss

    def watched(results_S, results_T):
        views.append(results_T)
        return compute(results_S, results_T)

    setup.distiller.compute_loss = watched
    return views


def by_hand(dtype, batch):
    teacher = make_teacher(1).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        return teacher(**batch)


@pytest.mark.parametrize(
    ("run", "teacher", "dtype"),
    [
        ("no", None, torch.float32),
        ("no", "no", torch.float32),
        ("no", "bf16", torch.bfloat16),
        ("bf16", None, torch.bfloat16),
        ("bf16", "no", torch.float32),
    ],
)
def test_precision_of_the_teacher_alone(tmp_path, run, teacher, dtype):
    setup = Setup(tmp_path, training={"precision": run, "teacher_precision": teacher})
    inside = []
    setup.teachers[0].classifier.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    setup.student.classifier.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    views = seen_by_the_loss(setup)
    setup.train(num_steps=1)
    assert inside == [dtype, torch.bfloat16 if run == "bf16" else torch.float32]
    expected = by_hand(dtype, batches()[0])
    assert views[0]["logits"][0].dtype == torch.float32
    assert torch.equal(views[0]["logits"][0], expected["logits"].float())
    for feature in ("hidden", "attention"):
        for found, wanted in zip(views[0][feature], expected[feature], strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, wanted.float())


# ---- int8 --------------------------------------------------------------------------------------------------------


def quantised_by_hand(layer, x):
    """A linear layer with weights of 8 bits (a scale for each output) and activations of 7 (one scale)."""
    weight = layer.weight
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    weight = (weight / scale).round().clamp(-128, 127) * scale
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 127
    zero = round(-low / step)
    x = ((x / step).round() + zero).clamp(0, 127).sub(zero) * step
    return x @ weight.T + layer.bias


def test_int8_layers_against_the_formula():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(50, 24)
    layers = Int8Layers(model)
    with torch.no_grad():
        exact, expected = model(x), quantised_by_hand(model[0], x)
        with layers.in_place():
            found = model(x)
    rounding = (exact - expected).abs().max()
    assert rounding > 0
    # The kernels round halves another way here and there: far less than what quantisation itself costs.
    assert (found - expected).abs().max() < 0.5 * rounding
    assert (found - exact).norm() / exact.norm() < 0.05


def test_int8_leaves_the_teacher_alone(tmp_path):
    teacher = make_teacher(1)
    modules = dict(teacher.named_modules())
    tensors = {name: (value.data_ptr(), value.clone()) for name, value in teacher.state_dict().items()}
    kinds = []
    for name in ("layers.0.query", "classifier"):
        parent = teacher.get_submodule(name.rpartition(".")[0])
        parent.register_forward_pre_hook(
            lambda module, inputs, name=name.rpartition(".")[2]: kinds.append(type(getattr(module, name)))
        )
    setup = Setup(tmp_path, teachers=[teacher], training={"teacher_precision": "int8"})
    views = seen_by_the_loss(setup)
    setup.train(num_steps=2)
    assert set(kinds) == {torch.ao.nn.quantized.dynamic.Linear}
    assert dict(teacher.named_modules()) == modules
    assert {name: value.data_ptr() for name, value in teacher.state_dict().items()} == {
        name: pointer for name, (pointer, _) in tensors.items()
    }
    assert all(torch.equal(value, tensors[name][1]) for name, value in teacher.state_dict().items())
    assert not any(hasattr(module, "qconfig") for module in teacher.modules())
    expected = by_hand(torch.float32, batches()[0])
    for feature in ("hidden", "attention"):
        for found, wanted in zip(views[0][feature], expected[feature], strict=True):
            assert (found - wanted).norm() / wanted.norm() < 0.1
    assert not torch.equal(views[0]["hidden"][1], expected["hidden"][1])
    assert torch.equal(views[0]["hidden"][0], expected["hidden"][0])  # the embedding stays float32


def test_int8_trains_as_float32_does_nearly(tmp_path):
    students = []
    for precision in (None, "int8"):
        setup = Setup(tmp_path / str(precision), training={"teacher_precision": precision})
        before = weights(setup.student)
        setup.train()
        students.append(weights(setup.student))
    moved = (students[0] - before).norm()
    assert 0 < (students[1] - students[0]).norm() < 0.2 * moved


def test_int8_shares_what_the_student_trains():
    model, student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    student.weight = model[1].weight
    layers = Int8Layers(model, {id(parameter) for parameter in student.parameters()})
    with layers.in_place():
        assert type(model[0]) is not nn.Linear
        assert type(model[1]) is nn.Linear


def test_int8_layer_in_two_places_is_quantised_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared, "other": nn.Linear(4, 4)})
    with Int8Layers(model).in_place():
        assert model["one"] is model["two"]
        assert model["one"] is not shared
    assert model["one"] is model["two"] is shared


@pytest.mark.parametrize("module", ["layers.0", "layers.0.query", "classifier"])
def test_custom_matches_hear_int8_layers(tmp_path, module):
    """Modules whose outputs custom matches read, Linear layers too, are recorded as they run: in int8."""
    teacher, seen = make_teacher(1), []
    setup = Setup(tmp_path, training={"teacher_precision": "int8"})

    def loss(output_S, output_T, mask_S, mask_T):
        seen.append(output_T)
        return output_S.square().mean()

    custom = [CustomMatch(module, "layers.0", 1.0, loss)]
    old = setup.distiller
    distiller = GeneralDistiller(
        old.t_config, old.d_config, teacher, setup.student, adaptor, adaptor, custom_matches=custom
    )
    setup.distiller = distiller
    setup.train(num_steps=1)
    exact = []
    teacher.eval().get_submodule(module).register_forward_hook(
        lambda _, inputs, output: exact.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        teacher(**batches()[0])
    assert not torch.equal(seen[0], exact[0])
    assert (seen[0] - exact[0]).norm() / exact[0].norm() < 0.1


def test_int8_says_nothing_of_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Int8Layers(nn.Sequential(nn.Linear(4, 4)))


class ReadsWeights(Encoder):
    def forward(self, *args, **kwargs):
        self.classifier.weight.abs()
        return super().forward(*args, **kwargs)


def test_int8_errors(tmp_path):
    with pytest.raises(ValueError, match=r"Embedding has no float32 nn\.Linear layers; use teacher_precision='bf16'"):
        Int8Layers(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="no float32"):
        Int8Layers(nn.Linear(3, 4).double())
    teacher = ReadsWeights(layers=2, width=48, seed=1)
    setup = Setup(tmp_path, teachers=[teacher], training={"teacher_precision": "int8"})
    with pytest.raises(RuntimeError, match=r"ReadsWeights failed with int8 layers .* use teacher_precision='bf16'"):
        setup.train()
    assert type(teacher.classifier) is nn.Linear


def test_no_int8_kernels(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "engine", "none")
    with pytest.raises(ValueError, match="no int8 kernels on this machine"):
        Int8Layers(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cpu", "fp16", "teacher_precision='fp16' needs a GPU, and the device is 'cpu'; use teacher_precision='bf16'"),
        (
            "cuda",
            "int8",
            "teacher_precision='int8' is for CPUs, and the device is 'cuda'; use teacher_precision='bf16'",
        ),
    ],
)
def test_precisions_that_a_device_has_not(tmp_path, device, precision, message):
    config = make_config(tmp_path, teacher_precision=precision)
    config.device = device
    with pytest.raises(ValueError, match=message):
        precision_of(config)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            Runtime(config)


def test_a_trainer_has_no_teacher(tmp_path):
    student = make_teacher()
    trainer = BasicTrainer(make_config(tmp_path, teacher_precision="bf16"), student, adaptor)
    with pytest.raises(ValueError, match="a BasicTrainer has no teacher; use precision"):
        trainer.train(torch.optim.SGD(student.parameters(), 0.1), batches(), num_steps=1)
