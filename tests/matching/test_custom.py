"""Custom matches: modules by name or themselves, losses and projections of the user's own, and no hook left behind."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import Encoder, adaptor, make_config, make_loader
from textbrewer import CustomMatch, DistillationConfig, GeneralDistiller
from textbrewer.matching.custom import recording


def squares(output_S, output_T, mask_S, mask_T):
    return (output_S - output_T).square().mean()


def by_name(**changes):
    return {"module_T": "layers.1", "module_S": "layers.0", "weight": 1.0, "loss": squares, **changes}


class Watched(GeneralDistiller):
    """Keeps the total and the parts of every step."""

    def compute_loss(self, results_S, results_T):
        total, parts = super().compute_loss(results_S, results_T)
        self.seen = [*getattr(self, "seen", []), {"total": total.item(), **{k: v.item() for k, v in parts.items()}}]
        return total, parts


def make(folder, matches, width_T=32, **config):
    teacher, student = Encoder(layers=2, width=width_T, seed=1), Encoder(layers=1, dropout=0.0, seed=2)
    settings = DistillationConfig(**{"kd_loss_weight": 0, **config})
    return Watched(make_config(folder), settings, teacher, student, adaptor, adaptor, custom_matches=matches)


def train(distiller, rate=0.1, **arguments):
    optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=rate)
    distiller.train(optimizer, make_loader(), **{"num_steps": 4, **arguments})
    return optimizer


def hooks(*models):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for m in models for module in m.modules())


def outputs_of(model, batch, name):
    """The outputs of a layer in eval mode; those of the model's layers are their states."""
    with torch.no_grad():
        hidden = model.eval()(**batch)["hidden"]
    return hidden[int(name.removeprefix("layers.")) + 1]


# ---- what is matched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["names", "modules", "dicts", "mixed"])
def test_modules_by_name_and_themselves(given, tmp_path):
    distiller = make(tmp_path, None)
    teacher, student = distiller.model_T, distiller.model_S
    fields = by_name()
    if given in ("modules", "mixed"):
        fields["module_T"] = teacher.layers[1]
    if given == "modules":
        fields["module_S"] = student.layers[0]
    matches = [fields if given == "dicts" else CustomMatch(**fields)]
    batch = next(iter(make_loader()))
    expected = (outputs_of(student, batch, "layers.0") - outputs_of(teacher, batch, "layers.1")).square().mean()
    distiller = Watched(
        distiller.t_config, distiller.d_config, teacher, student, adaptor, adaptor, custom_matches=matches
    )
    train(distiller)
    assert distiller.seen[0]["unweighted_custom_match_0"] == pytest.approx(expected.item(), rel=1e-5)


def test_training_brings_the_outputs_together(tmp_path):
    distiller = make(tmp_path, [by_name()])
    train(distiller, num_steps=60)
    losses = [entry["unweighted_custom_match_0"] for entry in distiller.seen]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])  # six steps are one pass over the data


def test_several_at_once(tmp_path):
    matches = [
        by_name(weight=2.0),
        by_name(module_T="embedding", module_S="embedding", weight=0.5),
        by_name(module_T="classifier", module_S="classifier", weight=3),
    ]
    distiller = make(tmp_path, matches, kd_loss_weight=1.5)
    train(distiller)
    for entry in distiller.seen:
        parts = [entry[f"unweighted_custom_match_{number}"] for number in range(3)]
        expected = 2 * parts[0] + 0.5 * parts[1] + 3 * parts[2] + 1.5 * entry["unweighted_kd_loss"]
        assert entry["total"] == pytest.approx(expected, rel=1e-5)
        assert len(set(parts)) == 3


def test_one_module_in_two_matches(tmp_path):
    distiller = make(tmp_path, [by_name(), by_name(loss=lambda S, T, mask_S, mask_T: (S - T).abs().mean())])
    train(distiller)
    assert set(distiller.seen[0]) > {"unweighted_custom_match_0", "unweighted_custom_match_1"}


def test_what_a_loss_is_called_with(tmp_path):
    batch, seen = next(iter(make_loader())), []

    def loss(output_S, output_T, mask_S, mask_T):
        seen.append((output_S, output_T, mask_S, mask_T))
        return output_S.square().mean()

    train(make(tmp_path, [by_name(loss=loss)]), num_steps=1)
    ((output_S, output_T, mask_S, mask_T),) = seen
    assert output_S.requires_grad
    assert not output_T.requires_grad
    assert torch.equal(mask_S, batch["attention_mask"])
    assert torch.equal(mask_T, batch["attention_mask"])
    seen.clear()

    def without_mask(batch, outputs):
        return {"logits": outputs["logits"]}

    distiller = make(tmp_path / "other", [by_name(loss=loss)])
    distiller = GeneralDistiller(
        distiller.t_config,
        distiller.d_config,
        distiller.model_T,
        distiller.model_S,
        without_mask,
        without_mask,
        [by_name(loss=loss)],
    )
    train(distiller, num_steps=1)
    assert seen[0][2:] == (None, None)


def test_named_losses_get_the_student_s_mask(tmp_path):
    distiller = make(tmp_path, [by_name(loss="hidden_mse")])
    batch = next(iter(make_loader()))
    kept = batch["attention_mask"].bool()
    state_S, state_T = (
        outputs_of(distiller.model_S, batch, "layers.0"),
        outputs_of(distiller.model_T, batch, "layers.1"),
    )
    expected = (state_S - state_T)[kept].square().mean()
    train(distiller)
    assert distiller.seen[0]["unweighted_custom_match_0"] == pytest.approx(expected.item(), rel=1e-5)


def test_beside_matches_of_features(tmp_path):
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    distiller = make(tmp_path, [by_name()], intermediate_matches=[match])
    train(distiller)
    assert set(distiller.seen[0]) > {"unweighted_custom_match_0", "unweighted_hidden_hidden_mse_1_1"}


def test_with_remembered_teachers(tmp_path):
    """The teacher's outputs are kept with the batches: it runs once over the data, the numbers stay."""
    found = []
    for caching in (False, True):
        distiller = make(tmp_path / str(caching), [by_name()], is_caching_logits=caching)
        torch.manual_seed(0)
        runs = []
        handle = distiller.model_T.register_forward_pre_hook(lambda *ignored: runs.append(1))
        distiller.train(
            torch.optim.SGD(distiller.model_S.parameters(), lr=0.1), make_loader(count=4, batch_size=4), num_epochs=3
        )
        handle.remove()
        found.append([entry["unweighted_custom_match_0"] for entry in distiller.seen])
        assert len(runs) == (1 if caching else 3)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ---- projections -------------------------------------------------------------------------------------------------


def test_projection_is_trained_and_saved(tmp_path):
    projection = nn.Linear(32, 48)
    before = projection.weight.detach().clone()
    distiller = make(tmp_path, [by_name(proj_func=projection, proj_group={"lr": 0.03})], width_T=48)
    optimizer = train(distiller)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.03]
    held = {id(value) for value in optimizer.param_groups[1]["params"]}
    assert held == {id(value) for value in projection.parameters()}
    assert not torch.equal(projection.weight, before)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    stored = [value for name, value in saved.items() if value.shape == (48, 32)]
    assert len(stored) == 1
    assert torch.equal(stored[0], projection.weight)
    exported = torch.load(tmp_path / "gs4.pkl", weights_only=True)
    assert set(exported) == set(distiller.model_S.state_dict())


def test_projection_is_resumed(tmp_path):
    def run(folder, num_steps, **arguments):
        torch.manual_seed(5)
        projection = nn.Linear(32, 48)
        distiller = make(folder, [by_name(proj_func=projection)], width_T=48)
        train(distiller, num_steps=num_steps, **arguments)
        return projection.weight.detach()

    expected = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert torch.equal(run(tmp_path / "parts", 6, resume_from="latest"), expected)


def test_projection_that_is_a_function(tmp_path):
    distiller = make(tmp_path, [by_name(proj_func=lambda state: state[..., :16])])
    distiller.custom_matches[0].loss = lambda S, T, mask_S, mask_T: (S - T[..., :16]).square().mean()
    optimizer = train(distiller)
    assert len(optimizer.param_groups) == 1
    assert len(distiller.seen) == 4


def test_training_twice_adds_a_projection_once(tmp_path):
    distiller = make(tmp_path, [by_name(proj_func=nn.Linear(32, 48))], width_T=48)
    optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=0.1)
    for folder in ("first", "second"):
        distiller.t_config.output_dir = str(tmp_path / folder)
        distiller.train(optimizer, make_loader(), num_steps=2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(list(distiller.model_S.parameters())),
        2,
    ]


# ---- hooks -------------------------------------------------------------------------------------------------------


def test_no_hook_is_left(tmp_path):
    distiller = make(tmp_path, [by_name(), by_name(module_T="classifier", module_S="classifier")])
    assert hooks(distiller.model_T, distiller.model_S) == 0
    between = []
    train(distiller, callback=lambda model, step: between.append(hooks(distiller.model_T, model)))
    assert between == [0]
    assert hooks(distiller.model_T, distiller.model_S) == 0


def test_no_hook_is_left_after_an_error(tmp_path):
    def fails(*outputs, **named):
        raise ArithmeticError("in the loss")

    distiller = make(tmp_path, [by_name(loss=fails)])
    with pytest.raises(ArithmeticError, match="in the loss"):
        train(distiller)
    assert hooks(distiller.model_T, distiller.model_S) == 0
    distiller = make(tmp_path, [by_name()])
    distiller.model_S.forward = fails
    with pytest.raises(ArithmeticError):
        train(distiller)
    assert hooks(distiller.model_T, distiller.model_S) == 0


class Shaped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, value):
        return self.wrap(value)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "more"), lambda x: [None, x], lambda x: {"a": 1, "b": x}])
def test_recording_takes_the_first_tensor(wrap):
    module, value = Shaped(wrap), torch.ones(2)
    with recording([module]) as outputs:
        module(value)
        assert outputs[0] is value
        module(value * 2)
        assert outputs[0].tolist() == [2, 2]  # the last call counts
    assert not module._forward_hooks
    module(value * 3)
    assert outputs[0].tolist() == [2, 2]


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"module_T": "layer.1"}, KeyError, "no module 'layer.1'; did you mean 'layers.1'"),
        ({"module_S": "layers.1"}, KeyError, "no module 'layers.1'; did you mean 'layers.0'"),
        ({"module_S": nn.Linear(2, 2)}, ValueError, "a module must be inside the model, got a Linear"),
        ({"module_S": 3}, TypeError, "module_S must be a module or its dotted name, got 3"),
        ({"weight": -1}, ValueError, "weight of a custom match must be at least 0, got -1"),
        ({"weight": "1"}, TypeError, "weight of a custom match must be a number, got '1'"),
        ({"loss": "hidden"}, ValueError, "loss of a custom match .*did you mean 'hidden_mse'"),
        ({"loss": 3}, TypeError, "loss of a custom match must be a function or a known name, got 3"),
        (
            {"proj_func": "linear"},
            TypeError,
            "proj_func of a custom match must be a module or a function, got 'linear'",
        ),
        ({"module": "layers.0"}, KeyError, "custom match: unknown key 'module'; did you mean 'module_"),
    ],
)
def test_bad_matches(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path, [by_name(**changes)])


@pytest.mark.parametrize("side", ["module_T", "module_S"])
def test_module_that_does_not_run(side, tmp_path):
    distiller = make(tmp_path, None)
    models = {"module_T": distiller.model_T, "module_S": distiller.model_S}
    models[side].add_module("idle", nn.Linear(2, 2))
    distiller = GeneralDistiller(
        distiller.t_config,
        distiller.d_config,
        distiller.model_T,
        distiller.model_S,
        adaptor,
        adaptor,
        [by_name(**{side: "idle"})],
    )
    with pytest.raises(ValueError, match=f"{side} of custom match 0 did not run"):
        train(distiller)


def test_fields():
    match = CustomMatch("a", "b", 2.0, squares)
    assert match.to_dict() == {
        "module_T": "a",
        "module_S": "b",
        "weight": 2.0,
        "loss": squares,
        "proj_func": None,
        "proj_group": {},
    }
    assert CustomMatch.from_dict(match.to_dict()) == match
    group = {"lr": 1.0}
    match = CustomMatch("a", "b", 2.0, squares, proj_group=group)
    match.proj_group["lr"] = 2.0
    assert group == {"lr": 1.0}
