"""Pruning while training: what goes when, by which scores, and that the model stays what it seems to be."""

import copy
import itertools
import math

import pytest
import torch

from tests import processes
from tests.compression.families import with_labels
from tests.compression.pruned_runs import Snapshots, Watch, loader_for, still, train
from tests.conftest import make_config, seed_all
from tests.engine.runs import checkpoints, equal
from tests.students.models import HEADS, LAYERS, UNITS, WIDTH_OF_HEAD, make, outputs_of
from textbrewer import DistillationConfig, GeneralDistiller
from textbrewer.compression import Prune, load, save
from textbrewer.compression.gates import has_gates
from textbrewer.compression.gradual import GradualPruning
from textbrewer.compression.sites import find_layout

STEPS = 12


def cubic(step, begin, end, final):
    if step < begin:
        return 0.0
    return final if step >= end else final - final * (1 - (step - begin) / (end - begin)) ** 3


def masks_by_step(gradual, store):
    return Watch(lambda step: store.append({name: mask.clone() for name, mask in gradual.masked.masks.items()}))


def gone(mask):
    return {unit for unit, stays in enumerate(mask.tolist()) if not stays}


@pytest.mark.parametrize("score", ["l1", "taylor", "random"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("every", [1, 3])
def test_units_go_as_the_schedule_says_and_stay_gone(tmp_path, score, scope, every):
    plan = Prune(heads=0.5, ffn=0.4, score=score, scope=scope)
    gradual = GradualPruning(plan, begin=2, end=10, every=every)
    seen = []
    train(tmp_path, still("bert-classifier"), [gradual, masks_by_step(gradual, seen)], STEPS)
    due = [step for step in range(2, 10) if (step - 2) % every == 0] + [10]
    for step, masks in enumerate(seen, start=1):
        last = max([turn for turn in due if turn <= step], default=0)
        for end, final, units in ((".attention.output.dense", 0.5, HEADS), (".output.dense", 0.4, UNITS)):
            sites = [name for name in masks if name.endswith(end) and ("attention" in name) == ("attention" in end)]
            assert len(sites) == LAYERS
            share = cubic(last, 2, 10, final) if last else 0.0
            if scope == "uniform":
                assert all(len(gone(masks[name])) == math.floor(share * units + 1e-9) for name in sites)
            else:
                assert sum(len(gone(masks[name])) for name in sites) == math.floor(share * units * LAYERS + 1e-9)
    for before, after in itertools.pairwise(seen):
        assert all(gone(before[name]) <= gone(after[name]) for name in before)
    assert len({str(masks) for masks in seen}) > 2
    chosen = plan if score != "taylor" else Prune(heads=0.5, ffn=0.4, scope=scope)
    once = chosen.apply(make("bert-classifier"))
    for name in ("heads", "ffn"):
        assert gradual.sparsity()[name] == once.sparsity()[name]
    assert set(gradual.masked.masks) == set(once.masks)


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("score", ["l2", "mean_activation"])
def test_at_once_it_is_the_plan_applied_to_the_student_of_that_step(tmp_path, score, begin):
    student = still("bert-classifier")
    start, batches = copy.deepcopy(student), [with_labels(student, 7), with_labels(student, 8)]
    data = batches if score == "mean_activation" else None
    plan = Prune(heads=0.5, ffn=0.5, score=score, scope="global", maximum=0.9, exclude=["*.layer.2"])
    gradual, snapshots = GradualPruning(plan, "one_shot", begin, dataloader=data), Snapshots()
    seen = []
    train(tmp_path, student, [snapshots, gradual, masks_by_step(gradual, seen)], 5)
    if begin:
        assert all(mask.all() for masks in seen[: begin - 1] for mask in masks.values())
        start.load_state_dict(snapshots.models[begin])
    expected = plan.apply(start, data).masks
    for masks in seen[max(0, begin - 1) :]:
        assert equal(masks, dict(expected))


READERS = {
    "bert-classifier": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
}


def term_by_loop(name, gradient, weight, positions):
    """Return the sum of gradient times weight over what reads some features."""
    total = 0.0
    for position in positions:
        row = (gradient[position], weight[position]) if name == "gpt2" else (gradient[:, position], weight[:, position])
        total += sum(g * w for g, w in zip(row[0].tolist(), row[1].tolist()))
    return total


@pytest.mark.parametrize(("name", "decay"), [("bert-classifier", None), ("gpt2", 0.5), ("llama", 1.0)])
def test_taylor_is_read_from_the_gradients_of_the_run(tmp_path, name, decay):
    plan = Prune(heads=0.5, ffn=0.5, score="taylor")
    gradual, snapshots = GradualPruning(plan, "linear", begin=2, end=5, every=1, decay=decay), Snapshots()
    states = []
    watch = Watch(lambda step: states.append(copy.deepcopy(gradual.state_dict())))
    settings = {"gradient_accumulation_steps": 2}
    train(tmp_path, still(name), [snapshots, gradual, watch], 6, settings=settings)
    groups = HEADS // 2 if name == "llama" else HEADS
    kept = 0.98 if decay is None else decay
    for kind, units in ((0, groups), (1, UNITS)):
        site = READERS[name][kind].format(1)
        width = 2 * WIDTH_OF_HEAD if name == "llama" else WIDTH_OF_HEAD
        places = [range(unit * width, (unit + 1) * width) if kind == 0 else [unit] for unit in range(units)]
        sums, off = [0.0] * units, set()
        for step in range(1, 6):
            gradient, weight = (store[step][f"{site}.weight"] for store in (snapshots.gradients, snapshots.before))
            for unit in range(units):
                sums[unit] = kept * sums[unit] + term_by_loop(name, gradient, weight, places[unit]) ** 2
            torch.testing.assert_close(
                states[step - 1]["sums"][site], torch.tensor(sums, dtype=torch.float64), rtol=1e-3, atol=1e-10
            )
            wanted = math.floor((step - 2) / 3 * 0.5 * units + 1e-9) if step >= 2 else 0
            left = sorted((unit for unit in range(units) if unit not in off), key=lambda unit: sums[unit])
            off |= set(left[: wanted - len(off)])
            assert gone(states[step - 1]["masks"][site]) == off
        assert len(off) == units // 2


def test_taylor_of_heads_that_layers_share_is_of_their_sum(tmp_path):
    gradual, snapshots = GradualPruning(Prune(heads=0.5, score="taylor"), begin=1, end=1), Snapshots()
    states = []
    watch = Watch(lambda step: states.append(gradual.state_dict()))
    train(tmp_path, still("t5"), [snapshots, gradual, watch], 1)
    (site,) = (name for name in gradual.masked.masks if name.startswith("encoder"))
    expected = torch.zeros(HEADS)
    for number in range(LAYERS):
        weight = f"encoder.block.{number}.layer.0.SelfAttention.o.weight"
        product = snapshots.gradients[1][weight] * snapshots.before[1][weight]
        expected += product.sum(0).reshape(HEADS, WIDTH_OF_HEAD).sum(1)
    torch.testing.assert_close(states[0]["sums"][site].float(), expected.square(), rtol=1e-3, atol=1e-8)
    assert gone(gradual.masked.masks[site]) == set(expected.square().argsort()[: HEADS // 2].tolist())


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama", "t5"])
def test_the_student_is_what_shrinks_and_what_went_does_not_matter(tmp_path, name):
    gradual = GradualPruning(Prune(heads=0.5, ffn=0.5, score="taylor", scope="global"), end=0.5, every=2)
    student = train(tmp_path / "run", still(name), [gradual], 8, lr=0.01)
    assert has_gates(student)
    small = gradual.shrink().eval()
    assert not has_gates(small)
    before, after = outputs_of(student), outputs_of(small)
    for key in after:
        scale = max(1.0, float(after[key].abs().max()))
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-5 * scale)
    kept, total = (sum(parameter.numel() for parameter in model.parameters()) for model in (small, student))
    assert gradual.sparsity()["parameters"] == pytest.approx(1 - kept / total)
    save(small, tmp_path / "small")
    again = load(tmp_path / "small").eval()
    assert equal(outputs_of(again), after)
    parameters = dict(student.named_parameters())
    changed = 0
    for site in find_layout(student).sites:
        mask = gradual.masked.masks.get(site.name)
        for tensor, axis in site.inner.axes if mask is not None else ():
            width = parameters[tensor].shape[axis] // len(mask)
            if name != "gpt2" and width:
                off = (~mask).repeat_interleave(width).nonzero().flatten()
                parameters[tensor].data.index_fill_(axis, off, 7.0)
                changed += len(off)
    assert name == "gpt2" or changed
    for key, value in outputs_of(student).items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-5)


def test_gradients_of_what_went_are_zero(tmp_path):
    gradual, snapshots = GradualPruning(Prune(ffn=0.5, score="l1"), "one_shot", 2), Snapshots()
    train(tmp_path, still("bert-classifier"), [snapshots, gradual], 4, lr=1e-4)
    for name, mask in gradual.masked.masks.items():
        writer = name.replace(".output.dense", ".intermediate.dense.weight")
        first, last = snapshots.gradients[1][writer], snapshots.gradients[4][writer]
        assert bool((first[~mask] != 0).any(1).all())
        assert bool((last[~mask] == 0).all())
        assert bool((last[mask] != 0).any(1).all())


def test_callbacks_see_the_pruned_model_and_the_log_its_shares(tmp_path, monkeypatch):
    rows, seen = [], {}
    monkeypatch.setattr("textbrewer.engine.tracking.Tracker._write", lambda self, row: rows.append(row))
    gradual = GradualPruning(Prune(heads=0.5, ffn=0.5), "linear", begin=0, end=4, every=2)

    def evaluate(model, step):
        seen[step] = outputs_of(model)["logits"], outputs_of(gradual.shrink())["logits"], gradual.sparsity()

    train(tmp_path, still("bert-classifier"), [gradual], 6, lr=0.001, settings={"ckpt_steps": 2}, callback=evaluate)
    assert [seen[step][2]["heads"] for step in (2, 4, 6)] == [0.25, 0.5, 0.5]
    for theirs, small, _ in seen.values():
        torch.testing.assert_close(theirs, small, rtol=0, atol=1e-4)
    assert [row.get("sparsity_heads") for row in rows[1:]] == [0.0, 0.25, 0.25, 0.5, 0.5]
    assert [row.get("sparsity_ffn") for row in rows[2:]] == pytest.approx([7 / 30, 7 / 30, 0.5, 0.5])


def test_it_takes_part_in_a_distillation(tmp_path):
    student, teacher = make("bert-classifier"), make("bert-classifier", seed=3)
    seed_all(0)
    match = {"layer_T": 2, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    distiller = GeneralDistiller(
        make_config(tmp_path), DistillationConfig(intermediate_matches=[match]), teacher, student, "auto", "auto"
    )
    gradual = GradualPruning(Prune(heads=0.5, ffn=0.5, score="taylor"), every=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    distiller.train(optimizer, loader_for(student), num_epochs=3, step_callbacks=[gradual])
    assert gradual.sparsity()["heads"] == gradual.sparsity()["ffn"] == 0.5
    torch.testing.assert_close(outputs_of(gradual.shrink())["logits"], outputs_of(student)["logits"], rtol=0, atol=1e-4)


RESUMED = {
    "taylor": ({"score": "taylor", "scope": "global"}, {"begin": 0.1, "decay": 0.7}, {}),
    "l1, bf16": ({"score": "l1"}, {"schedule": "linear"}, {"precision": "bf16"}),
    "taylor, accumulation": ({"score": "taylor"}, {"begin": 1}, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_runs_end_the_same(tmp_path, name):
    plan, times, settings = RESUMED[name]

    def run(folder, seed, **options):
        student = make("bert-classifier", seed)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.02)
        gradual = GradualPruning(Prune(heads=0.5, ffn=0.5, **plan), end=0.75, every=2, **times)
        every_step = {"ckpt_steps": 1, "save_total_limit": None, **settings}
        train(
            folder, student, [gradual], 8, seed=seed, settings=every_step, optimizer=optimizer, shuffle=True, **options
        )
        return {
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "masks": dict(gradual.masked.masks),
            "state": gradual.state_dict(),
        }

    whole = run(tmp_path / "whole", 0)
    for path in checkpoints(tmp_path / "whole")[:-1]:
        again = run(tmp_path / f"after-{path.name}", 5, resume_from=path)
        assert equal(again, whole), path.name


def test_a_checkpoint_of_other_settings_or_units_is_refused(tmp_path):
    def run(model, plan, steps, **options):
        gradual = GradualPruning(plan, end=1.0, every=1)
        train(tmp_path, model, [gradual], steps, settings={"ckpt_steps": 1}, **options)

    run(make("bert-classifier"), Prune(heads=0.5), 1)
    with pytest.raises(ValueError, match=r"must have the settings .* got heads=0.25 and not 0.5"):
        run(make("bert-classifier"), Prune(heads=0.25), 3, resume_from="latest")
    with pytest.raises(ValueError, match=r"got ffn=0\.5 and not None"):
        run(make("bert-classifier"), Prune(heads=0.5, ffn=0.5), 3, resume_from="latest")


def test_a_longer_run_gives_nothing_back(tmp_path):
    """By shares, the resumed run's schedule wants less gone at first than has gone."""

    def run(steps, **options):
        gradual, seen = GradualPruning(Prune(heads=0.5, ffn=0.5), "linear", end=1.0, every=1), []
        callbacks = [gradual, masks_by_step(gradual, seen)]
        train(tmp_path, still("bert-classifier"), callbacks, steps, settings={"ckpt_steps": 1}, **options)
        return seen

    (*_, before) = run(2)
    after = run(6, resume_from="latest")
    assert all(gone(before[name]) <= gone(masks[name]) for masks in after for name in before)
    assert all(len(gone(mask)) == len(mask) // 2 for mask in after[-1].values())


def test_a_run_that_is_shorter_than_its_end_catches_up(tmp_path):
    def run(steps, **options):
        gradual = GradualPruning(Prune(heads=0.5), "linear", end=0.8, every=2)
        train(tmp_path, still("bert-classifier"), [gradual], steps, settings={"ckpt_steps": 5}, **options)
        return gradual.sparsity()["heads"]

    assert run(10) == 0.5
    (tmp_path / "checkpoint-10").rename(tmp_path.parent / "later")
    assert run(6, resume_from=tmp_path / "checkpoint-5") == 0.5


def test_masks_come_off_and_the_callback_can_start_again(tmp_path):
    gradual = GradualPruning(Prune(heads=0.5), end=1, every=1)
    student = train(tmp_path, still("bert-classifier"), [gradual], 2)
    with pytest.raises(ValueError, match="must be new for each run"):
        train(tmp_path / "again", student, [gradual], 2)
    with pytest.raises(ValueError, match="model must not be masked already"):
        train(tmp_path / "again", student, [GradualPruning(Prune(heads=0.5))], 2)
    plain = make("bert-classifier")
    plain.load_state_dict(student.state_dict())
    assert not torch.equal(outputs_of(plain)["logits"], outputs_of(student)["logits"])
    gradual.remove()
    assert torch.equal(outputs_of(plain)["logits"], outputs_of(student)["logits"])
    with pytest.raises(ValueError, match="must have begun"):
        gradual.shrink()
    train(tmp_path / "again", student, [gradual], 2)
    assert gradual.sparsity()["heads"] == 0.5


@pytest.mark.parametrize(
    ("plan", "settings", "error", "message"),
    [
        ("heads", {}, TypeError, "plan must be a Prune"),
        (Prune(heads=0.5, layers=1), {}, ValueError, "layers must be 0 in a plan for GradualPruning"),
        (Prune(heads=0.5, ffn=0.25), {"initial": 0.3}, ValueError, "initial must be at most each share"),
        (Prune(heads=0.5), {"schedule": "cube"}, ValueError, "schedule must be one of the known names"),
        (Prune(heads=0.5), {"decay": 0.9}, ValueError, 'decay must be left out unless score="taylor"'),
        (Prune(heads=0.5, score="taylor"), {"decay": 0.0}, ValueError, "decay must be greater than 0"),
        (Prune(heads=0.5, score="apoz"), {}, ValueError, "score='apoz' needs data"),
        (Prune(heads=0.5), {"dataloader": []}, ValueError, "dataloader must be None for score='l1'"),
        (Prune(heads=0.5, score="taylor"), {"dataloader": []}, ValueError, "dataloader must be None"),
    ],
)
def test_settings_that_cannot_be(plan, settings, error, message):
    with pytest.raises(error, match=message):
        GradualPruning(plan, **settings)


@pytest.mark.parametrize(
    ("plan", "settings", "error", "message"),
    [
        (Prune(heads=0.5, minimum=6), {}, ValueError, "minimum must be at most what stays"),
        (Prune(heads=0.01), {}, ValueError, "large enough to take one of 8"),
        (Prune(heads=0.5, exclude=["nothing"]), {}, KeyError, "no module 'nothing'"),
        (Prune(heads=0.5, score={}), {}, ValueError, "score must have 8 numbers"),
        (Prune(heads=0.5), {"end": 20}, ValueError, "end must be at most the 4 steps"),
        (Prune(heads=0.5, score="taylor"), {"schedule": "one_shot"}, ValueError, "begin must be at least 1 step"),
        (Prune(heads=0.5, score="taylor"), {"initial": 0.1}, ValueError, "begin must be at least 1 step"),
    ],
)
def test_plans_that_do_not_fit_the_run(tmp_path, plan, settings, error, message):
    student = make("bert-classifier")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=message):
        train(tmp_path, student, [GradualPruning(plan, **settings)], 4)
    assert equal(student.state_dict(), before)
    assert not has_gates(student)


@pytest.mark.parametrize("how", ["frozen", "not held"])
def test_taylor_needs_weights_that_are_trained(tmp_path, how):
    student = make("bert-classifier")
    name = "bert.encoder.layer.1.output.dense.weight"
    held = [parameter for key, parameter in student.named_parameters() if key != name]
    student.get_parameter(name).requires_grad_(how == "not held")
    for score, exclude in (("taylor", ["bert.encoder.layer.1"]), ("l1", [])):
        model = copy.deepcopy(student)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradual = GradualPruning(Prune(ffn=0.5, score=score, exclude=exclude))
        train(tmp_path / score, model, [gradual], 2, optimizer=optimizer)
    optimizer = torch.optim.SGD(held, lr=0.1)
    with pytest.raises(ValueError, match=f"'{name}' is not trained"):
        train(tmp_path / "refused", student, [GradualPruning(Prune(ffn=0.5, score="taylor"))], 2, optimizer=optimizer)


def test_an_error_leaves_the_masks_for_a_resume(tmp_path):
    class StopError(Exception):
        pass

    def stop(step):
        if step == 3:
            raise StopError

    student = still("bert-classifier")
    gradual = GradualPruning(Prune(heads=0.5), "linear", end=4, every=1)
    settings = {"ckpt_steps": 1}
    with pytest.raises(StopError):
        train(tmp_path / "run", student, [gradual, Watch(stop)], 5, settings=settings)
    gradual.remove()
    train(tmp_path / "run", student, [gradual, Watch(lambda step: None)], 5, settings=settings, resume_from="latest")
    whole = GradualPruning(Prune(heads=0.5), "linear", end=4, every=1)
    expected = train(tmp_path / "whole", still("bert-classifier"), [whole], 5, settings=settings)
    assert equal(student.state_dict(), expected.state_dict())
    assert equal(dict(gradual.masked.masks), dict(whole.masked.masks))


def on_ranks(rank, folder):
    """Each rank has other rows, and other batches for the scores that read their own."""
    found = {}
    for score in ("taylor", "mean_activation"):
        student = still("bert-classifier")
        data = [with_labels(student, 10 + rank)] if score == "mean_activation" else None
        gradual = GradualPruning(Prune(heads=0.5, ffn=0.5, score=score), begin=1, every=1, dataloader=data)
        train(folder / score, student, [gradual], 4)
        found[score] = dict(gradual.masked.masks)
        if score == "taylor":
            found["sums"] = gradual.state_dict()["sums"]
        found[f"{score} weights"] = student.state_dict()
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_have_the_same_masks(tmp_path):
    processes.run_ranks(2, tmp_path, on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    assert all(len(gone(mask)) == len(mask) // 2 for mask in first["taylor"].values())
    alone = GradualPruning(Prune(heads=0.5, ffn=0.5, score="taylor"), begin=1, every=1)
    train(tmp_path / "alone", still("bert-classifier"), [alone], 4)
    assert not equal(alone.state_dict()["sums"], first["sums"])
