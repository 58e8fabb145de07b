"""``compile``: the same training, nothing left behind, and a clear word where torch cannot."""

import copy
import shutil

import pytest
import torch
from torch import nn

from tests.conftest import adaptor, make_config
from tests.distillers.setups import Setup, batches, make_student, make_teacher, weights
from textbrewer import BasicTrainer, CustomMatch, GeneralDistiller
from textbrewer.distillers import compiling
from textbrewer.engine import NonFiniteError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
COMPILED = "_compiled_call_impl"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def watch(model, seen):
    """Note, by batch, whether the model's own forward pass runs uncompiled."""
    model.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))


def run(folder, wanted, **options):
    setup = Setup(
        folder, student=make_student(dropout=0.0), training={"compile": wanted}, config=options.pop("config", {})
    )
    names = list(setup.student.state_dict())
    setup.train(**options)
    assert list(setup.student.state_dict()) == names
    for model in (setup.student, *setup.teachers):
        assert COMPILED not in vars(model)
    return setup


@pytest.mark.parametrize("wanted", [pytest.param(True, marks=pytest.mark.slow), "teacher", "student"])
def test_training_is_the_same(tmp_path, monkeypatch, wanted):
    compiled, real = [], torch.compile

    def counted(*args, **options):
        compiled.append(args)
        return real(*args, **options)

    plain = run(tmp_path / "plain", False)
    monkeypatch.setattr(torch, "compile", counted)
    found = run(tmp_path / "compiled", wanted)
    assert len(compiled) == (2 if wanted is True else 1)
    torch.testing.assert_close(weights(found.student), weights(plain.student), rtol=1e-3, atol=1e-4)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x)) * 2


def test_compiled_while_open_only():
    model, x = Small(), torch.randn(5, 3)
    expected = model(x)
    names, traced = list(model.state_dict()), []
    watch(model, traced)
    with compiling.compiled([model, model], "student"):
        assert list(model.state_dict()) == names
        found = model(x)
        assert "CompiledFunction" in type(found.grad_fn).__name__
        with compiling.paused(model):
            assert "Compiled" not in type(model(x).grad_fn).__name__
        assert "CompiledFunction" in type(model(x).grad_fn).__name__
        assert COMPILED not in vars(copy.deepcopy(model))
    torch.testing.assert_close(found, expected)
    assert "Compiled" not in type(model(x).grad_fn).__name__
    assert COMPILED not in vars(model)


def test_undone_after_an_error():
    model = Small()
    with pytest.raises(KeyError, match="other"), compiling.compiled([model], "student"):
        raise KeyError("other")
    assert COMPILED not in vars(model)


def test_a_model_that_the_user_compiled_stays_compiled():
    model = Small()
    model.compile()
    own = vars(model)[COMPILED]
    with compiling.compiled([model], "student"):
        assert vars(model)[COMPILED] is own
    assert vars(model)[COMPILED] is own


def test_torch_s_own_modules_are_compiled_too():
    """``nn.Module.compile()`` leaves them as they are, without a word."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    with compiling.compiled([model], "student"):
        assert "CompiledFunction" in type(model(torch.randn(2, 3)).grad_fn).__name__


class Untraceable(Small):
    @torch._dynamo.disable
    def forward(self, x):
        return super().forward(x)


def test_nothing_to_compile():
    model = Untraceable()
    with compiling.compiled([model], "teacher"), pytest.raises(RuntimeError) as error:
        model(torch.randn(2, 3))
    assert str(error.value).startswith("compile: the teacher (Untraceable) could not be compiled: torch found nothing")
    assert "Use compile=False or compile='student'" in str(error.value)


@pytest.fixture
def _no_compiler():
    import torch._inductor.config as inductor
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize(("wanted", "who"), [("student", "student"), ("teacher", "teacher"), (True, "teacher")])
def test_without_a_compiler(tmp_path, wanted, who):
    setup = Setup(tmp_path, training={"compile": wanted})
    before = weights(setup.student)
    with pytest.raises(RuntimeError) as error:
        setup.train()
    found = str(error.value)
    assert found.startswith(f"compile: the {who} (Encoder) could not be compiled: ")
    assert "No working C++ compiler" in found
    assert "\n" not in found
    assert "use compile=false" in found.lower()
    assert "install what is missing (on a CPU, a C++ compiler such as g++)" in found
    assert torch.equal(weights(setup.student), before)
    for model in (setup.student, *setup.teachers):
        assert COMPILED not in vars(model)


def test_checkpoints_and_resume(tmp_path):
    """A compiled run's checkpoint is one of the plain student, and an uncompiled run can go on with it."""
    whole = run(tmp_path / "whole", "student", num_steps=6)
    half = run(tmp_path / "half", "student", num_steps=3)
    saved = torch.load(tmp_path / "half" / "gs3.pkl", weights_only=True)
    assert list(saved) == list(half.student.state_dict())
    rest = run(tmp_path / "half", False, num_steps=6, resume_from="latest")
    torch.testing.assert_close(weights(rest.student), weights(whole.student), rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_not_finite_is_traced_to_its_term(tmp_path):
    """Which asks for gradients through the compiled student more than once."""

    def spoiled(batch, outputs):
        views = adaptor(batch, outputs)
        # Its square root has an infinite gradient at 0.
        views["losses"] = (outputs["logits"].sum() * 0).abs().sqrt()
        return views

    setup = Setup(
        tmp_path, kind="BasicDistiller", adaptor_S=spoiled, training={"compile": "student"}, student=make_student(0.0)
    )
    with pytest.raises(NonFiniteError, match=r"the gradient of unweighted_hard_label_loss is not finite"):
        setup.train(max_grad_norm=1.0)


def test_custom_matches_are_refused(tmp_path):
    setup = Setup(tmp_path, training={"compile": "student"})
    old = setup.distiller
    setup.distiller = GeneralDistiller(
        old.t_config, old.d_config, setup.teachers[0], setup.student, adaptor, adaptor,
        custom_matches=[CustomMatch("classifier", "classifier", 1.0, "hidden_mse")],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"compile and custom_matches exclude each other: .*; use compile=False"):
        setup.train()


def test_basic_trainer(tmp_path):
    trained = []
    for wanted in (False, "student"):
        model = make_student(dropout=0.0)
        trainer = BasicTrainer(make_config(tmp_path / str(wanted), compile=wanted), model, adaptor)
        seen = []
        model.classifier.register_forward_hook(lambda *_, seen=seen: seen.append(torch.compiler.is_compiling()))
        trainer.train(torch.optim.SGD(model.parameters(), 0.1), batches(), num_steps=4)
        trained.append(weights(model))
        assert COMPILED not in vars(model)
        assert seen == ([False] * 4 if wanted is False else seen)
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
    trainer = BasicTrainer(make_config(tmp_path, compile="teacher"), make_teacher(), adaptor)
    with pytest.raises(ValueError, match=r"compile='teacher': a BasicTrainer has no teacher; use compile=True"):
        trainer.train(torch.optim.SGD(trainer.model.parameters(), 0.1), batches(), num_steps=1)


def test_a_compiled_teacher_stops_early(tmp_path):
    match = {
        "layer_T": 1,
        "layer_S": 1,
        "feature": "hidden",
        "loss": "hidden_mse",
        "weight": 1,
        "proj": ["linear", 32, 48],
    }
    config = {"kd_loss_weight": 0, "hard_label_weight": 0, "intermediate_matches": [match]}
    plain = run(tmp_path / "plain", False, config=config)
    found = run(tmp_path / "compiled", "teacher", config=config)
    torch.testing.assert_close(weights(found.student), weights(plain.student), rtol=1e-3, atol=1e-4)
