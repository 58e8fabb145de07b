"""Movement pruning against the same training written out with autograd, a straight-through mask and no callback."""

import copy

import pytest
import torch

from tests.compression.families import with_labels
from tests.compression.pruned_runs import still
from tests.compression.pruned_runs import train as train_family
from tests.compression.trained.linear import Maps, batches, train
from tests.engine.runs import checkpoints, equal
from tests.students.models import HEADS, HIDDEN, UNITS, make, outputs_of
from textbrewer.callbacks import StepCallback
from textbrewer.compression import Masked, Prune
from textbrewer.compression.gates import open_gates
from textbrewer.compression.sites import find_layout
from textbrewer.compression.trained import MovementPruning

STEPS, BEGIN, RATE = 14, 3, 0.3


class Watch(StepCallback):
    """Keeps what a pruning has after each step."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def begin(self, run):
        self.student = run.student

    def after_step(self, step):
        state = copy.deepcopy(self.pruning.state_dict())
        weights = {name: one.detach().clone() for name, one in self.student.named_parameters()}
        self.seen.append((state, weights, self.pruning.weight_masks()))


class Adam:
    """Adam, from its formulas."""

    def __init__(self, rate):
        self.rate, self.steps, self.first, self.second = rate, 0, {}, {}

    def step(self, key, value, gradient):
        self.first[key] = 0.9 * self.first.get(key, 0) + 0.1 * gradient
        self.second[key] = 0.999 * self.second.get(key, 0) + 0.001 * gradient**2
        first, second = self.first[key] / (1 - 0.9**self.steps), self.second[key] / (1 - 0.999**self.steps)
        return value - self.rate * first / (second.sqrt() + 1e-8)


def blocks_to_weights(values, rows, columns):
    return torch.kron(values, torch.ones(rows, columns))


def top(scores, share):
    """Return the mask of all but the lowest, by sorting."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda place: (-flat[place], place))
    mask = torch.zeros(len(flat))
    mask[order[: len(flat) - int(share * len(flat) + 1e-9)]] = 1
    return mask.reshape(scores.shape)


def ramp_at(step):
    """Return the share of the goal that is reached; Adam's first steps are all of one size, and nothing goes yet."""
    return 0.0 if step < BEGIN else 1 - (1 - (step - BEGIN) / (STEPS - BEGIN)) ** 3


def by_hand(model, data, rows=1, columns=1, share=None, threshold=None, scale=0.0, rate=0.1, score=None):
    """Train with masks in the forward pass and return weights, scores and masks after each step."""
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("first", "second")}
    scores = {name: torch.zeros(len(one) // rows, one.shape[1] // columns) for name, one in weights.items()}
    masks = {name: torch.ones_like(one) for name, one in scores.items()}
    seen = []
    for step, batch in enumerate(data):
        leaves = {name: one.clone().requires_grad_() for name, one in weights.items()}
        tops = {name: one.clone().requires_grad_() for name, one in scores.items()}
        through = {name: tops[name] + (masks[name] - tops[name]).detach() for name in tops}
        spread = {name: blocks_to_weights(one, rows, columns) for name, one in through.items()}
        loss = model.loss(**batch, **{name: leaves[name] * spread[name] for name in leaves})
        if threshold is not None:
            loss = loss + scale * ramp_at(step) * sum(one.sigmoid().mean() for one in tops.values()) / len(tops)
        gradients = torch.autograd.grad(loss, [*leaves.values(), *tops.values(), model.first.bias])
        with torch.no_grad():
            for name, gradient in zip(leaves, gradients):
                weights[name] -= rate * gradient
            score.steps += 1
            for name, gradient in zip(tops, gradients[len(leaves) :]):
                scores[name] = score.step(name, scores[name], gradient)
            model.first.bias -= rate * gradients[-1]
        ramp = ramp_at(step + 1)
        for name, one in scores.items():
            masks[name] = top(one, share * ramp) if threshold is None else (one.sigmoid() >= threshold * ramp).float()
        seen.append(
            (
                {name: one.clone() for name, one in weights.items()},
                {name: one.clone() for name, one in scores.items()},
                {name: blocks_to_weights(one, rows, columns) for name, one in masks.items()},
            )
        )
    return seen


@pytest.mark.parametrize("block", [None, (2, 2), (4, 1)])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.6, "score_lr": 0.05},
        {"sparsity": 0.6, "score_optimizer": "sgd", "score_lr": RATE},
        {"threshold": 0.499, "regular_scale": 0.2, "score_optimizer": "sgd", "score_lr": RATE},
        {"threshold": 0.48, "regular_scale": 0.5, "score_lr": 0.05},
    ],
    ids=["hard adam", "hard sgd", "soft sgd", "soft adam"],
)
def test_it_is_the_training_with_masks_in_the_forward_pass(tmp_path, settings, block):
    data = batches(STEPS)
    structure = {"structure": "blocks", "block": block} if block else {}
    pruning = MovementPruning(**settings, **structure, modules=["first", "second"], begin=BEGIN, end=1.0)
    watch = Watch(pruning)
    train(tmp_path, Maps(), [pruning, watch], data)

    class Descent(Adam):
        def step(self, key, value, gradient):
            return value - self.rate * gradient

    rule = (Descent if settings.get("score_optimizer") == "sgd" else Adam)(settings["score_lr"])
    rows, columns = block or (1, 1)
    expected = by_hand(
        Maps(),
        data,
        rows,
        columns,
        settings.get("sparsity"),
        settings.get("threshold"),
        settings.get("regular_scale", 0.0),
        score=rule,
    )
    changed = set()
    for (state, weights, masks), (own, scores, own_masks) in zip(watch.seen, expected):
        for number, name in enumerate(("first", "second")):
            key = f"{name}.weight"
            torch.testing.assert_close(state["scores"][number].reshape(scores[name].shape), scores[name])
            assert torch.equal(masks[key].float(), own_masks[name])
            torch.testing.assert_close(state["values"][number][0], own[name])
            torch.testing.assert_close(weights[key], own[name] * own_masks[name])
            changed.add((key, tuple(masks[key].flatten().tolist())))
    assert len(changed) > 6, "masks must have changed for this to show anything"
    final = [masks for _, _, masks in watch.seen][-1]
    if "sparsity" in settings:
        for mask in final.values():
            assert float((~mask).float().mean()) == pytest.approx(0.6, abs=rows * columns / mask.numel())
    else:
        assert not all(mask.all() for mask in final.values())


def test_what_is_masked_comes_back_as_it_left(tmp_path):
    """Neither decay nor momentum reaches it; a score is put up by hand to bring it back."""
    data = batches(STEPS)
    pruning = MovementPruning(0.5, modules=["first"], end=2, score_lr=1e-6)
    left = {}

    class Lift(StepCallback):
        def begin(self, run):
            self.weight = run.student.first.weight

        def after_backward(self, step):
            assert (self.weight.grad[self.weight == 0] == 0).all()

        def after_step(self, step):
            (mask,) = pruning.weight_masks().values()
            assert torch.equal(self.weight == 0, ~mask)
            if step == 2:
                left.update(value=pruning.state_dict()["values"][0][0].clone(), ever=mask)
            elif step < STEPS - 1:
                left["ever"] = left.get("ever", mask) | mask
            if step == STEPS - 2:
                pruning.state_dict()["scores"][0].mul_(-1)
            if step == STEPS - 1:
                back = mask & ~left["ever"]
                assert back.sum() > 10
                assert torch.equal(self.weight[back], left["value"][back])
                assert (left["value"][back] != 0).all()

    model = Maps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    train(tmp_path, model, [pruning, Lift()], data, optimizer)


def test_a_units_score_falls_by_the_loss_slope_of_its_factor(tmp_path):
    """With one step of plain descent at rate 1; the factors are other code, hooks on the activations."""
    for name in ("bert-classifier", "gpt2", "llama", "t5"):
        model = still(name, num_layers=2) if name == "t5" else still(name)
        layout = find_layout(model)
        kinds = {"heads": 0.5, "ffn": 0.5}
        pruning = MovementPruning(kinds, structure="units", score_optimizer="sgd", score_lr=1.0)
        factors = {site.name: torch.ones(site.units, requires_grad=True) for site in layout.sites if site.kind in kinds}
        fresh = copy.deepcopy(model).train()
        open_gates(fresh, layout.sites, factors)
        loss = fresh(**with_labels(model, 0)).loss
        slopes = dict(zip(factors, torch.autograd.grad(loss, list(factors.values()))))
        train_family(tmp_path / name, model, [pruning], 1)
        state = pruning.state_dict()
        assert set(state["names"]) == set(slopes)
        for site, scores in zip(state["names"], state["scores"]):
            torch.testing.assert_close(-scores, slopes[site], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama"])
def test_units_go_and_the_model_shrinks(tmp_path, name, scope):
    model = still(name)
    pruning = MovementPruning({"heads": 0.5, "ffn": 0.7}, structure="units", scope=scope, end=8)
    figures = []

    class Last(StepCallback):
        def after_step(self, step):
            figures.append(pruning._figures(step))

    train_family(tmp_path, model, [pruning, Last()], 10)
    masks = pruning.masks()
    masked = Masked(copy.deepcopy(model), masks)
    assert masked.sparsity()["heads"] == pytest.approx(0.5)
    assert masked.sparsity()["ffn"] == pytest.approx(0.7)
    batch = with_labels(model)
    small = masked.shrink()
    for key, value in outputs_of(model, batch).items():
        torch.testing.assert_close(outputs_of(small, batch)[key], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs_of(masked.model, batch)[key], value, rtol=1e-5, atol=1e-5)
    zeros = {name: int((mask == 0).sum()) for name, mask in pruning.weight_masks().items()}
    share = sum(zeros.values()) / sum(mask.numel() for mask in pruning.weight_masks().values())
    assert float(figures[-1]["movement_sparsity"]) == pytest.approx(share)
    for key, mask in pruning.weight_masks().items():
        assert torch.equal(model.get_parameter(key)[~mask], torch.zeros(zeros[key]))


def test_blocks_of_heads_shrink_where_all_of_one_have_gone(tmp_path):
    model = still("bert-classifier", num_hidden_layers=1)
    width, reader = HIDDEN // HEADS, "bert.encoder.layer.0.attention.output.dense"
    block = (None, width)  # what reads one head, of all outputs
    pruning = MovementPruning(0.5, structure="blocks", block=block, modules=[reader], end=6)
    train_family(tmp_path, model, [pruning], 8)
    masks = pruning.masks()
    assert set(masks) == {reader}
    weight = model.get_submodule(reader).weight.detach()
    gone = torch.stack(
        [bool((weight[:, head * width : (head + 1) * width] == 0).all()) * torch.ones(()) for head in range(HEADS)]
    )
    assert torch.equal(masks[reader], gone == 0)
    assert int(gone.sum()) == HEADS // 2
    small = Masked(copy.deepcopy(model), masks).shrink()
    for key, value in outputs_of(model).items():
        torch.testing.assert_close(outputs_of(small)[key], value, rtol=1e-5, atol=1e-5)


def test_single_weights_leave_nothing_to_shrink(tmp_path):
    pruning = MovementPruning(0.3, end=2)
    train_family(tmp_path, still("bert-classifier", num_hidden_layers=1), [pruning], 3)
    with pytest.raises(ValueError, match="nothing can be shrunk"):
        pruning.masks()


def test_soft_scores_keep_the_minimum(tmp_path):
    """A penalty that drives all scores down leaves as many of each place as must stay."""
    pruning = MovementPruning(
        threshold=0.4, regular_scale=1e4, structure="units", minimum=3, score_lr=1.0, exclude=["*.layer.1.*"]
    )
    model = still("bert-classifier", num_hidden_layers=2)
    train_family(tmp_path, model, [pruning], 6)
    masks = pruning.masks()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "bert.encoder.layer.0.attention.output.dense": 3,
        "bert.encoder.layer.0.output.dense": 3,
    }
    assert {len(mask) for mask in masks.values()} == {HEADS, UNITS}


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "structure": "units"},
        {"sparsity": 0.5, "scope": "global", "every": 3},
        {"threshold": 0.4999, "structure": "blocks", "block": (2, 2), "score_optimizer": "sgd"},
    ],
    ids=["units", "weights", "soft blocks"],
)
def test_a_resumed_run_ends_alike(tmp_path, settings):
    def run(folder, seed, resume_from=None):
        pruning = MovementPruning(**settings, end=8)
        model = make("bert-classifier", seed=seed, num_hidden_layers=2)
        keep = {"save_total_limit": None, "ckpt_steps": 1}
        train_family(folder, model, [pruning], 10, seed=seed, settings=keep, shuffle=True, resume_from=resume_from)
        state = pruning.state_dict()
        return {"model": model.state_dict(), **{key: state[key] for key in ("scores", "stays", "optimizer")}}

    whole = run(tmp_path / "whole", 0)
    assert not all(stays.all() for stays in whole["stays"])
    for path in checkpoints(tmp_path / "whole")[2:9:3]:
        resumed = run(tmp_path / path.name, 7, path)
        wrong = [key for key in whole if not equal(whole[key], resumed[key])]
        assert not wrong, (path.name, wrong)


def test_another_settings_checkpoint_is_refused(tmp_path):
    keep = {"settings": {"ckpt_steps": 1}}
    train(tmp_path, Maps(), [MovementPruning(0.5, modules=["first"])], batches(3), length={"num_steps": 3}, **keep)
    for pruning, message in (
        (MovementPruning(0.4, modules=["first"]), "got goals"),
        (MovementPruning(0.5, modules=["second"]), "another model's weights"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, Maps(), [pruning], batches(3), length={"num_steps": 4}, resume_from="latest", **keep)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "one of sparsity .hard. and threshold .soft. must be given"),
        ({"sparsity": 0.5, "threshold": 0.1}, ValueError, "and not both"),
        ({"sparsity": 1.0}, ValueError, "sparsity must be less than 1, got 1.0"),
        ({"sparsity": 0.0}, ValueError, "nothing would be pruned"),
        ({"sparsity": {"heads": 0.5}}, TypeError, "sparsity must be a number unless"),
        ({"sparsity": {"heads": 1.5}, "structure": "units"}, ValueError, r"sparsity\['heads'\] must be less than 1"),
        ({"sparsity": {"hidden": 0.5}, "structure": "units"}, KeyError, "unknown key 'hidden'"),
        ({"threshold": -0.1}, ValueError, "threshold must be at least 0"),
        ({"sparsity": 0.5, "structure": "rows"}, ValueError, "structure must be one of"),
        ({"sparsity": 0.5, "structure": "blocks"}, ValueError, "block must be given"),
        ({"sparsity": 0.5, "block": (2, 2)}, ValueError, "block must be given with"),
        ({"sparsity": 0.5, "structure": "blocks", "block": (0, 2)}, ValueError, "a side of block must be at least 1"),
        ({"sparsity": 0.5, "structure": "blocks", "block": (None, None)}, ValueError, "block must be .outputs, inputs"),
        ({"sparsity": 0.5, "structure": "units", "modules": ["a"]}, ValueError, "modules must be None"),
        ({"sparsity": 0.5, "modules": "a"}, TypeError, "modules must be a list"),
        ({"sparsity": 0.5, "scope": "local"}, ValueError, "scope must be one of"),
        ({"threshold": 0.5, "scope": "global"}, ValueError, "scope must be left out with threshold"),
        ({"sparsity": 0.5, "schedule": "cubix"}, ValueError, "schedule must be one of"),
        ({"sparsity": 0.5, "begin": 0.8, "end": 0.5}, ValueError, "end must be at least begin"),
        ({"sparsity": 0.5, "score_optimizer": "rmsprop"}, ValueError, "score_optimizer must be one of"),
        ({"sparsity": 0.5, "score_lr": 0}, ValueError, "score_lr must be greater than 0"),
        ({"sparsity": 0.5, "minimum": 0}, ValueError, "minimum must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        MovementPruning(**settings)


def test_runs_that_it_cannot_serve(tmp_path):
    model, data = Maps(), batches(3)
    before = copy.deepcopy(model.state_dict())

    def fails(message, pruning, given=model, error=ValueError, **options):
        with pytest.raises(error, match=message):
            train(tmp_path, given, [pruning], **{"data": data, **options})

    first = MovementPruning(0.5, modules=["first"])
    fails("whose family is unknown", MovementPruning(0.5))
    fails("the model must be of a known family", MovementPruning(0.5, structure="units"))
    fails("has no module 'third'", MovementPruning(0.5, modules=["third"]), error=KeyError)
    fails("block must divide", MovementPruning(0.5, structure="blocks", block=(3, 3), modules=["first"]))
    only = torch.optim.SGD(model.second.parameters(), lr=0.1)
    fails("'first.weight' is not in the optimizer", first, optimizer=only)
    fails("end must be at most the 3 steps", MovementPruning(0.5, modules=["first"], end=7))
    fails("end must be after begin", MovementPruning(0.5, modules=["first"], begin=0.0, end=0.1))
    fails("must be a number of steps", first, data=(batch for batch in data), length={"num_epochs": 1})
    model.first.weight.requires_grad_(False)
    fails("'first.weight' is frozen", first)
    model.first.weight.requires_grad_(True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="there must be a training first"):
        MovementPruning(0.5).masks()


def test_a_masked_model_is_refused(tmp_path):
    masked = Prune(heads=0.5).apply(still("bert-classifier"))
    with pytest.raises(ValueError, match="must not be masked already"):
        train_family(tmp_path, masked.model, [MovementPruning(0.5, structure="units")], 2)


def test_more_than_can_go_is_refused(tmp_path):
    pruning = MovementPruning({"heads": 0.9}, structure="units", minimum=3)
    with pytest.raises(ValueError, match="minimum must be at most what stays, got 3"):
        train_family(tmp_path, still("bert-classifier"), [pruning], 4)
