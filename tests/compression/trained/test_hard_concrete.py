"""Hard concrete pruning: gradients, the constraint, what comes out at the end, and resuming."""

import copy

import pytest
import torch

from tests.compression.families import with_labels
from tests.compression.pruned_runs import loader_for, still, train
from tests.conftest import make_config
from tests.engine.runs import checkpoints, equal
from tests.students.models import make, outputs_of
from textbrewer import BasicTrainer
from textbrewer.callbacks import StepCallback
from textbrewer.compression import Masked, Prune
from textbrewer.compression.gates import has_gates, open_gates
from textbrewer.compression.sites import find_layout
from textbrewer.compression.trained import HardConcretePruning, concrete
from textbrewer.compression.trained.expected_size import ExpectedSize
from textbrewer.compression.trained.learned_factors import FactorSettings, LearnedFactors


class Log(StepCallback):
    """Stands in front of a pruning: sees the model as that one leaves it after each step."""

    def __init__(self, pruning=None, function=None):
        self.pruning, self.function, self.figures = pruning, function, []
        if pruning is not None:
            inner = pruning.after_step
            pruning.after_step = lambda step: self._keep(inner(step))

    def _keep(self, figures):
        self.figures.append({name: float(value) for name, value in (figures or {}).items()})
        return figures

    def begin(self, run):
        self.student = run.student

    def after_step(self, step):
        if self.function is not None:
            self.function(step, self.student)


def bert(**settings):
    return still("bert-classifier", **{"num_hidden_layers": 2, **settings})


def evaluated(model):
    training = model.training
    outputs = outputs_of(model, with_labels(model))
    model.train(training)
    return outputs


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama", "t5"])
def test_what_it_is_in_eval_mode_is_what_comes_out_shrunk(tmp_path, name, layers):
    settings = {"num_layers": 2} if name == "t5" else {}
    model = still(name, **settings)
    seen = {}

    def look(step, student):
        seen[step] = evaluated(student)
        assert has_gates(student)

    pruning = HardConcretePruning(0.5, layers=layers, lr=0.4, drop_rate=0.3, ramp=0.3, end=1.0, exact=False)
    train(tmp_path, model, [Log(function=look), pruning], 20, lr=1e-3)
    assert not has_gates(model)
    masks = pruning.masks()
    assert any(not mask.all() for mask in masks.values())
    masked = Masked(copy.deepcopy(model), masks)
    small = masked.shrink()
    scale = max(1.0, *(float(value.abs().max()) for value in seen[20].values()))
    for key, value in seen[20].items():
        torch.testing.assert_close(evaluated(small)[key], value, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(evaluated(masked.model)[key], value, rtol=0, atol=2e-5 * scale)
        if not layers:
            torch.testing.assert_close(evaluated(model)[key], value, rtol=0, atol=2e-5 * scale)
    kept, total = (sum(parameter.numel() for parameter in one.parameters()) for one in (small, model))
    assert kept < 0.9 * total


@pytest.mark.parametrize(("target", "layers"), [(0.3, False), (0.6, False), (0.6, True)])
def test_a_short_training_reaches_its_target(tmp_path, target, layers):
    model = bert(num_hidden_layers=4)
    pruning = HardConcretePruning(target, layers=layers, lr=0.1, drop_rate=0.1, ramp=0.3, end=0.9)
    log = Log(pruning)
    train(tmp_path, model, [pruning], 150, lr=1e-3)
    masked = Masked(model, pruning.masks())
    found = masked.sparsity()["stack_parameters"]
    layer = sum(parameter.numel() for parameter in model.bert.encoder.layer.parameters())
    assert found == pytest.approx(target, abs=(2 * 32 + 1) / layer), "to one unit"
    last = log.figures[-1]
    assert last["hard_concrete_sparsity"] == pytest.approx(found, abs=1e-5)
    by_itself = log.figures[133]["hard_concrete_sparsity"]
    assert by_itself == pytest.approx(target, abs=0.15)
    assert by_itself != pytest.approx(found, abs=1e-4)
    assert last["hard_concrete_target"] == pytest.approx(target)
    assert log.figures[22]["hard_concrete_target"] == pytest.approx(target * 23 / 45)


@pytest.mark.parametrize("target", [0.15, 0.35, 0.55, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_an_exact_target_moves_what_is_nearest_the_border(seed, target):
    model = bert()
    layout = find_layout(model)
    sites = [site for site in layout.sites if site.kind in ("heads", "ffn")]
    size = ExpectedSize(model, layout, sites)
    learned = LearnedFactors(sites, size, FactorSettings(0.1, 0.1, 0.5, 2 / 3, 2, seed), torch.device("cpu"))
    for log_alpha in learned.log_alphas.values():
        log_alpha.data = 2 * torch.randn(len(log_alpha), generator=torch.Generator().manual_seed(seed + len(log_alpha)))
    learned.settle()
    before = {name: factors.clone() for name, factors in learned.resting.items()}
    more = float(learned.gone()) < target
    learned.meet(target)
    total = sum(parameter.numel() for parameter in model.bert.encoder.layer.parameters())
    assert float(learned.gone()) == pytest.approx(target, abs=65 / total)
    for kind in ("heads", "ffn"):
        moved, others = [], []
        for site in (site for site in sites if site.kind == kind):
            was, now = before[site.name] > 0, learned.resting[site.name] > 0
            assert int(now.sum()) >= 2
            alphas = learned.log_alphas[site.name].detach()
            assert (was >= now).all() if more else (was <= now).all()
            moved += alphas[was != now].tolist()
            if int(now.sum()) > 2:
                others += alphas[was & now if more else ~was & ~now].tolist()
            kept = alphas[now]
            torch.testing.assert_close(learned.resting[site.name][now], torch.sigmoid(0.8 * kept * 1.5))
        if moved and others and kind == "ffn":
            assert max(moved) <= min(others) if more else min(moved) >= max(others)


def test_the_multipliers_go_up_the_constraint(tmp_path):
    """Below the target the first one falls, above it rises; the second one only ever rises. Adam's first step is lr."""
    for rate, sign in ((0.01, -1), (0.9, 1)):
        pruning = HardConcretePruning(0.3, drop_rate=rate, ramp=1, end=4, lambda_lr=0.05, lr=1e-4)
        log = Log(pruning)
        train(tmp_path / str(rate), bert(), [pruning], 4, lr=1e-5)
        first, second = log.figures[0], log.figures[2]
        assert first["hard_concrete_target"] == pytest.approx(0.3)
        gap = first["hard_concrete_expected_sparsity"] - (0.0 if sign < 0 else 0.3)
        # The very first step has a target of 0, the ramp's start.
        assert first["hard_concrete_lambda_1"] == pytest.approx(0.05 * (1 if gap > 0 else -1), rel=1e-2)
        assert first["hard_concrete_lambda_2"] == pytest.approx(0.05, rel=1e-2)
        change = second["hard_concrete_lambda_1"] - log.figures[1]["hard_concrete_lambda_1"]
        assert change * sign > 0
        assert second["hard_concrete_lambda_2"] > first["hard_concrete_lambda_2"]


def test_the_constraint_pulls_to_the_target_from_both_sides(tmp_path):
    """Without a loss: its gradients are taken away."""

    class Silent(HardConcretePruning):
        def after_backward(self, step):
            for factors in self._learned.drawn.values():
                factors.grad = None
            super().after_backward(step)

    for rate in (0.02, 0.95):
        pruning = Silent(0.4, drop_rate=rate, ramp=1, end=1.0, lr=0.1)
        log = Log(pruning)
        train(tmp_path / str(rate), bert(), [pruning], 200, lr=1e-5)
        expected = [figures["hard_concrete_expected_sparsity"] for figures in log.figures]
        assert abs(expected[0] - 0.4) > 0.25
        # It swings about the target, ever less.
        swings = [abs(one - 0.4) for one in expected]
        assert max(swings[-40:]) < 0.5 * swings[0]
        assert sum(expected[-80:]) / 80 == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(("accumulation", "parts"), [(1, [1, 1, 1, 1]), (4, [4]), (3, [3, 1])])
def test_gradients_are_means_over_the_micro_batches(tmp_path, accumulation, parts):
    """Of a step that the end of the data cuts short too; by autograd on a copy with the same factors."""
    model = bert()
    pruning = HardConcretePruning(0.3, lr=1e-6, drop_rate=0.4, ramp=1, end=1.0)
    found = []

    class Spy(StepCallback):
        def begin(self, run):
            self.run = run

        def after_backward(self, step):
            learned = pruning._learned
            values = {name: value.detach().clone() for name, value in learned.drawn.items()}
            slopes = [slope.clone() / self.run.loss_scale() for slope in learned.gradients()]
            found.append((copy.deepcopy(self.run.student.state_dict()), values, slopes))

    # By epochs, as only their ends cut steps short.
    trainer = BasicTrainer(make_config(tmp_path, gradient_accumulation_steps=accumulation), model, "auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer.train(optimizer, loader_for(model), num_epochs=1, step_callbacks=[Spy(), pruning])
    assert len(found) == len(parts)
    batches, place = list(loader_for(model)), 0
    for part, (weights, values, slopes) in zip(parts, found):
        fresh = bert().train()
        fresh.load_state_dict(weights)
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        open_gates(fresh, find_layout(fresh).sites, leaves)
        loss = sum(fresh(**batch).loss for batch in batches[place : place + part]) / part
        place += part
        for slope, expected in zip(slopes, torch.autograd.grad(loss, list(leaves.values()))):
            torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
        assert any(slope.abs().max() > 1e-4 for slope in slopes)


def test_a_distribution_goes_down_the_loss_through_its_draw(tmp_path):
    """One step of log alpha, against finite differences of loss and constraint at the same noise."""
    model = bert(num_hidden_layers=1).double()
    pruning = HardConcretePruning(0.1, lr=1e-3, drop_rate=0.4, ffn=False, ramp=1, end=1)
    seen = {}

    class Spy(StepCallback):
        def begin(self, run):
            pruning._learned.lambdas.data += torch.tensor([0.7, -0.4])
            self.student = run.student

        def after_backward(self, step):
            learned = pruning._learned
            (name,) = learned.log_alphas
            seen.update(
                name=name,
                noise=learned._noise[name].clone(),
                alpha=learned.log_alphas[name].detach().clone(),
                gradient=learned.log_alphas[name].grad.clone(),
                size=learned.size,
            )

    start = {}

    class Before(StepCallback):
        def after_backward(self, step):
            start["alpha"] = next(iter(pruning._learned.log_alphas.values())).detach().clone()
            start["weights"] = copy.deepcopy(self.student.state_dict())

        def begin(self, run):
            self.student = run.student

    # Spy.begin must come after the pruning's, its after_backward too.
    train(tmp_path, model, [Before(), pruning, Spy()], 1, lr=1e-3)
    fresh = bert(num_hidden_layers=1).double().train()
    fresh.load_state_dict(start["weights"])
    batch = with_labels(fresh, 0)
    sites = find_layout(fresh).sites

    def objective(alpha):
        factors = concrete.sample(alpha, seen["noise"].double())
        model = copy.deepcopy(fresh)
        open_gates(model, sites, {seen["name"]: factors})
        with torch.no_grad():
            loss = float(model(**batch).loss)
        gap = float(seen["size"]({seen["name"]: concrete.probability_kept(alpha).float()}))
        return loss + 0.7 * gap - 0.4 * gap**2  # the target is 0 at the start of the ramp

    for place in range(len(start["alpha"])):
        step = torch.zeros(len(start["alpha"]), dtype=torch.float64)
        step[place] = 1e-2
        up, down = (objective(start["alpha"].double() + sign * step) for sign in (1, -1))
        assert float(seen["gradient"][place]) == pytest.approx((up - down) / 2e-2, abs=2e-4)
    moved = seen["alpha"] - start["alpha"]
    assert torch.equal(moved.sign(), -seen["gradient"].sign())


def test_factors_are_drawn_by_seed_and_anew_each_step(tmp_path):
    def draws(seed):
        pruning, seen = HardConcretePruning(0.3, drop_rate=0.5, seed=seed), []

        class Spy(StepCallback):
            def after_backward(self, step):
                seen.append(torch.cat([one.detach().clone() for one in pruning._learned.drawn.values()]))

        train(tmp_path / str(len(list(tmp_path.iterdir()))), bert(), [Spy(), pruning], 3, seed=seed)
        return seen

    one, same, other = draws(0), draws(0), draws(1)
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])
    assert all(bool(((draw > 0) & (draw < 1)).any()) and bool((draw == 0).any()) for draw in one)


def test_before_its_begin_the_model_is_whole_and_after_its_end_it_stays_pruned(tmp_path):
    model, open_at, weights = bert(), {}, {}
    pruning = HardConcretePruning(0.5, begin=3, ramp=6, end=10, lr=0.5, drop_rate=0.3)

    def look(step, student):
        open_at[step] = has_gates(student)
        weights[step] = {key: value.clone() for key, value in student.state_dict().items()}

    # Behind the pruning, so that it sees what that one has done.
    train(tmp_path, model, [pruning, Log(function=look)], 16)
    assert open_at == {step: 4 <= step < 10 for step in range(1, 17)}
    for name, mask in pruning.masks().items():
        gone = ~mask.repeat_interleave(model.get_submodule(name).weight.shape[1] // len(mask))
        assert gone.any()
        for step in range(10, 17):
            assert (weights[step][f"{name}.weight"][:, gone] == 0).all()
        assert not torch.equal(weights[10][f"{name}.weight"], weights[16][f"{name}.weight"])


@pytest.mark.parametrize("layers", [False, True])
def test_a_resumed_run_ends_alike(tmp_path, layers):
    def run(folder, seed, resume_from=None, steps=14):
        pruning = HardConcretePruning(0.4, layers=layers, begin=2, ramp=6, end=10, lr=0.3, drop_rate=0.4)
        model = make("bert-classifier", seed=seed, num_hidden_layers=3)
        keep = {"save_total_limit": None, "ckpt_steps": 1}
        scores = []

        def evaluate(model, step):
            scores.append((step, evaluated(model.eval())["logits"]))

        train(
            folder,
            model,
            [pruning],
            steps,
            lr=1e-3,
            seed=seed,
            settings=keep,
            shuffle=True,
            resume_from=resume_from,
            callback=evaluate,
        )
        return {"model": model.state_dict(), "state": pruning.state_dict(), "scores": dict(scores)}

    whole = run(tmp_path / "whole", 0)
    assert whole["state"]["fixed"]
    for path in (checkpoints(tmp_path / "whole")[number] for number in (0, 4, 9, 11)):
        resumed = run(tmp_path / path.name, 7, path)
        scores = {step: whole["scores"][step] for step in resumed["scores"]}
        wrong = [key for key in ("model", "state") if not equal(whole[key], resumed[key])]
        assert not wrong, (path.name, wrong)
        assert equal(scores, resumed["scores"])


@pytest.mark.parametrize("layers", [False, True])
def test_a_callback_that_is_due_sees_the_factors(tmp_path, layers):
    """It broke off within the evaluation at a checkpoint; the resumed run evaluates first."""
    seen = []

    def run(fails_at, resume_from=None):
        pruning = HardConcretePruning(0.4, layers=layers, ramp=3, end=5, lr=0.5, drop_rate=0.5)

        def evaluate(model, step):
            seen.append(evaluated(model.eval())["logits"])
            if step == fails_at:
                raise KeyError

        keep = {"save_total_limit": None, "ckpt_steps": 2}
        train(tmp_path, bert(), [pruning], 6, settings=keep, resume_from=resume_from, callback=evaluate)

    for fails_at in (4, 6):
        with pytest.raises(KeyError):
            run(fails_at, resume_from="latest")
    run(None, resume_from="latest")
    first, at_four, again, at_six, last = seen
    assert torch.equal(at_four, again)
    assert torch.equal(at_six, last)
    assert not torch.equal(first, at_four)


def test_a_broken_run_leaves_the_factors_in_the_weights(tmp_path):
    model, seen = bert(), {}

    class Breaks(StepCallback):
        def begin(self, run):
            self.student = run.student

        def before_step(self, step):
            if step == 3:
                seen.update(evaluated(self.student))
                raise RuntimeError

    pruning = HardConcretePruning(0.5, lr=0.5, drop_rate=0.5)
    with pytest.raises(RuntimeError):
        train(tmp_path, model, [pruning, Breaks()], 6)
    assert not has_gates(model)
    torch.testing.assert_close(evaluated(model.eval())["logits"], seen["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": 0.0}, ValueError, "target must be greater than 0"),
        ({"target": 1.0}, ValueError, "target must be less than 1"),
        ({"heads": False, "ffn": False}, ValueError, "one of heads, ffn and layers must be True"),
        ({"heads": 0.5}, TypeError, "heads must be True or False"),
        ({"exact": 1}, TypeError, "exact must be True or False"),
        ({"lr": 0}, ValueError, "lr must be greater than 0"),
        ({"lambda_lr": -1}, ValueError, "lambda_lr must be greater than 0"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate must be less than 1"),
        ({"temperature": 0}, ValueError, "temperature must be greater than 0"),
        ({"minimum": 0}, ValueError, "minimum must be at least 1"),
        ({"ramp": 0.9, "end": 0.5}, ValueError, "end must be at least begin=0.9"),
        ({"layers": True, "exclude": ["a"]}, ValueError, "exclude must be empty with layers=True"),
        ({"exclude": "a"}, TypeError, "exclude must be a list"),
        ({"seed": "x"}, TypeError, "seed must be a whole number"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        HardConcretePruning(**{"target": 0.5, **settings})


def test_runs_that_it_cannot_serve(tmp_path):
    model = bert()
    before = copy.deepcopy(model.state_dict())

    def fails(message, pruning, given=model, error=ValueError, **options):
        with pytest.raises(error, match=message):
            train(tmp_path, given, [pruning], 4, **options)
        assert not has_gates(given) or given is not model

    fails("target must be at most 0.78., what heads and ffn can give", HardConcretePruning(0.95, minimum=2))
    fails("target must be at most 0.*, what heads can give", HardConcretePruning(0.7, ffn=False))
    fails("has no module 'x'", HardConcretePruning(0.5, exclude=["x"]), error=KeyError)
    fails("exclude must leave something", HardConcretePruning(0.5, exclude=["bert"]))
    fails("end must be at most the 4 steps", HardConcretePruning(0.5, end=9))
    fails("end must be after begin", HardConcretePruning(0.5, begin=0.0, ramp=0.1))
    fails("must not be masked already", HardConcretePruning(0.5), Prune(heads=0.5).apply(model).model)
    only = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    fails("is not in the optimizer", HardConcretePruning(0.5), optimizer=only)
    scaled = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    fails("layers must be False where config.scale_attn", HardConcretePruning(0.5, layers=True), scaled)
    with pytest.raises(ValueError, match="there must be a training first"):
        HardConcretePruning(0.5).masks()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
