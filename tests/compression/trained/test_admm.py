"""ADMM pruning against its three updates written out, with a projection by sorting."""

import copy

import pytest
import torch

from tests.compression.families import with_labels
from tests.compression.pruned_runs import still
from tests.compression.pruned_runs import train as train_family
from tests.compression.trained.linear import Maps, batches, train
from tests.engine.runs import checkpoints, equal
from tests.students.models import make, outputs_of
from textbrewer.callbacks import StepCallback
from textbrewer.compression import Masked, Prune
from textbrewer.compression.trained import ADMMPruning

STEPS, EVERY, RHO, RATE = 11, 3, 0.4, 0.1


def nearest(value, share, together=None):
    """Return the nearest tensors of that sparsity: the smallest numbers at zero."""
    flat = torch.cat([one.flatten() for one in value])
    order = sorted(range(len(flat)), key=lambda place: (-abs(float(flat[place])), place))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: len(flat) - int(share * len(flat) + 1e-9)]] = True
    masks = mask.split([one.numel() for one in value])
    return [one * mask.reshape(one.shape) for one, mask in zip(value, masks)]


def by_hand(model, data, project, begin, end):
    """Train and return the weights after each step."""
    names = ("first", "second")
    weights = {name: getattr(model, name).weight.detach().clone() for name in names}
    sparse = project(weights)
    duals = {name: torch.zeros_like(one) for name, one in weights.items()}
    masks, seen = None, []
    for step, batch in enumerate(data):
        leaves = {name: one.clone().requires_grad_() for name, one in weights.items()}
        loss = model.loss(**batch, **leaves)
        if masks is None and step >= begin:
            loss = loss + sum(RHO / 2 * ((leaves[name] - sparse[name] + duals[name]) ** 2).sum() for name in names)
        gradients = torch.autograd.grad(loss, [*leaves.values(), model.first.bias])
        with torch.no_grad():
            for name, gradient in zip(names, gradients):
                weights[name] = weights[name] - RATE * gradient
            model.first.bias -= RATE * gradients[-1]
        done = step + 1
        if done == end:
            masks = {name: one != 0 for name, one in project(weights).items()}
        elif masks is None and done >= begin and (done - begin) % EVERY == 0:
            sparse = project({name: weights[name] + duals[name] for name in names})
            if done > begin:
                duals = {name: duals[name] + weights[name] - sparse[name] for name in names}
        if masks is not None:
            weights = {name: weights[name] * masks[name] for name in names}
        seen.append(dict(weights))
    return seen


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("begin", [0, 2])
def test_weights_are_pulled_and_pruned(tmp_path, begin, scope):
    data, end = batches(STEPS), 9
    seen = []

    class Watch(StepCallback):
        def begin(self, run):
            self.model = run.student

        def after_step(self, step):
            seen.append({name: one.detach().clone() for name, one in self.model.named_parameters()})

    def project(weights):
        values = list(weights.values())
        if scope == "global":
            return dict(zip(weights, nearest(values, 0.6)))
        return {name: nearest([one], 0.6)[0] for name, one in weights.items()}

    pruning = ADMMPruning(0.6, rho=RHO, modules=["first", "second"], scope=scope, begin=begin, end=end, every=EVERY)
    train(tmp_path, Maps(), [pruning, Watch()], data)
    for found, expected in zip(seen, by_hand(Maps(), data, project, begin, end)):
        for name in ("first", "second"):
            torch.testing.assert_close(found[f"{name}.weight"], expected[name])
    masks = pruning.weight_masks()
    for key, mask in masks.items():
        assert torch.equal(seen[-1][key] != 0, mask)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert gone == (int(0.6 * 48) + int(0.6 * 32) if scope == "uniform" else int(0.6 * 80))


def test_weights_come_near_the_sparse_copy(tmp_path):
    """So that less is lost than without: what is pruned at the end is small."""
    figures = []

    class Log(ADMMPruning):
        def after_step(self, step):
            figures.append({name: float(value) for name, value in super().after_step(step).items()})

    pruning = Log(0.5, rho=2.0, modules=["*"], end=1.0, every=5)
    train(tmp_path, Maps(), [pruning], batches(60))
    assert figures[0]["admm_distance"] > 0.2
    assert figures[-2]["admm_distance"] < 0.3 * figures[0]["admm_distance"]
    assert figures[-1] == {"admm_sparsity": pytest.approx(0.5)}


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama", "t5"])
def test_units_go_and_the_model_shrinks(tmp_path, name):
    model = still(name)
    pruning = ADMMPruning({"heads": 0.5, "ffn": 0.4}, structure="units", rho=0.1, end=6, every=2)
    before = {}

    class Before(StepCallback):
        def begin(self, run):
            self.student = run.student

        def after_step(self, step):
            if step == 6:
                before["model"] = copy.deepcopy(self.student)

    train_family(tmp_path, model, [Before(), pruning], 9)
    masks = pruning.masks()
    masked = Masked(copy.deepcopy(model), masks)
    assert masked.sparsity()["heads"] == pytest.approx(0.5)
    assert masked.sparsity()["ffn"] == pytest.approx(0.4)
    small = masked.shrink()
    batch = with_labels(model)
    for key, value in outputs_of(model, batch).items():
        torch.testing.assert_close(outputs_of(small, batch)[key], value, rtol=1e-4, atol=1e-4)
    # What goes has the smallest norm: as a one-shot pruning by norm of the model at that moment.
    expected = Prune(heads=0.5, ffn=0.4, score="l2").apply(before["model"]).masks
    assert all(torch.equal(expected[key], mask) for key, mask in masks.items())


def test_a_run_that_ends_before_is_pruned_too(tmp_path):
    model = Maps()

    class Breaks(StepCallback):
        def before_step(self, step):
            if step == 2:
                raise RuntimeError

    pruning = ADMMPruning(0.5, modules=["first"])
    with pytest.raises(RuntimeError):
        train(tmp_path, model, [pruning, Breaks()], batches(5))
    assert int((model.first.weight == 0).sum()) == 24


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.5, "structure": "units", "scope": "global"}])
def test_a_resumed_run_ends_alike(tmp_path, settings):
    def run(folder, seed, resume_from=None):
        pruning = ADMMPruning(**settings, rho=0.1, every=2, begin=1, end=8)
        model = make("bert-classifier", seed=seed, num_hidden_layers=2)
        keep = {"save_total_limit": None, "ckpt_steps": 1}
        train_family(folder, model, [pruning], 11, seed=seed, settings=keep, shuffle=True, resume_from=resume_from)
        return {"model": model.state_dict(), "state": pruning.state_dict()}

    whole = run(tmp_path / "whole", 0)
    assert any((value == 0).float().mean() > 0.3 for value in whole["model"].values())
    for path in (checkpoints(tmp_path / "whole")[number] for number in (0, 3, 6, 8)):
        resumed = run(tmp_path / path.name, 7, path)
        wrong = [key for key in whole if not equal(whole[key], resumed[key])]
        assert not wrong, (path.name, wrong)


def test_another_settings_checkpoint_is_refused(tmp_path):
    keep = {"settings": {"ckpt_steps": 1}}
    train(tmp_path, Maps(), [ADMMPruning(0.5, modules=["first"], end=1.0)], batches(3), length={"num_steps": 3}, **keep)
    for pruning, message in (
        (ADMMPruning(0.5, rho=0.3, modules=["first"], end=1.0), "got rho=0.3"),
        (ADMMPruning(0.5, modules=["second"], end=1.0), "another model's weights"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, Maps(), [pruning], batches(3), length={"num_steps": 4}, resume_from="latest", **keep)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be less than 1"),
        ({"sparsity": 0.0}, ValueError, "nothing would be pruned"),
        ({"sparsity": {"ffn": 0.5}}, TypeError, "sparsity must be a number unless"),
        ({"rho": 0}, ValueError, "rho must be greater than 0"),
        ({"structure": "blocks"}, ValueError, "structure must be one of"),
        ({"structure": "units", "modules": ["a"]}, ValueError, "modules must be None"),
        ({"scope": "all"}, ValueError, "scope must be one of"),
        ({"minimum": 0}, ValueError, "minimum must be at least 1"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"begin": 0.9}, ValueError, "end must be at least begin"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        ADMMPruning(**{"sparsity": 0.5, **settings})


def test_runs_that_it_cannot_serve(tmp_path):
    model = Maps()
    before = copy.deepcopy(model.state_dict())
    only = torch.optim.SGD(model.second.parameters(), lr=0.1)
    for message, pruning, options in (
        ("is not in the optimizer", ADMMPruning(0.5, modules=["first"]), {"optimizer": only}),
        ("whose family is unknown", ADMMPruning(0.5), {}),
        ("end must be at most the 3 steps", ADMMPruning(0.5, modules=["first"], end=5), {}),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, model, [pruning], batches(3), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="there must be a training first"):
        ADMMPruning(0.5).masks()
    with pytest.raises(ValueError, match="must not be masked already"):
        train_family(tmp_path, Prune(heads=0.5).apply(still("gpt2")).model, [ADMMPruning(0.5)], 3)
