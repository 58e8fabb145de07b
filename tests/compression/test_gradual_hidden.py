"""Hidden features that go while training: how many and when, by which gradients, and what is left of the model."""

import itertools
import math

import pytest
import torch

from tests.compression.pruned_runs import Snapshots, Watch, still, train
from tests.engine.runs import checkpoints, equal
from tests.students.models import LAYERS, make, outputs_of
from textbrewer.compression import Prune, load, save
from textbrewer.compression.gradual import GradualPruning


def watched(gradual):
    seen = []
    return seen, Watch(lambda step: seen.append(gradual.masked.masks["hidden"].clone()))


@pytest.mark.parametrize("score", ["l2", "taylor", "slim", "random"])
def test_features_go_as_the_schedule_says_and_stay_gone(tmp_path, score):
    student = still("bert-classifier")
    gradual = GradualPruning(Prune(hidden=0.5, score=score), "linear", begin=2, end=6, every=1)
    seen, watch = watched(gradual)
    train(tmp_path, student, [gradual, watch], 8)
    width = student.config.hidden_size
    for step, mask in enumerate(seen, start=1):
        share = min(max(step - 2, 0) / 4, 1) * 0.5
        assert int((~mask).sum()) == math.floor(share * width + 1e-9)
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(seen))
    assert gradual.sparsity()["hidden"] == 0.5


def test_at_once_it_is_the_plan_applied_to_the_student_of_that_step(tmp_path):
    student = still("bert-classifier")
    plan, snapshots = Prune(hidden=0.5, heads=0.5, score="l2"), Snapshots()
    gradual = GradualPruning(plan, "one_shot", 3)
    train(tmp_path, student, [snapshots, gradual], 3)
    start = still("bert-classifier")
    start.load_state_dict(snapshots.models[3])
    assert equal(dict(gradual.masked.masks), dict(plan.apply(start).masks))


READERS = [
    *(f"bert.encoder.layer.{n}.attention.self.{name}" for n in range(LAYERS) for name in ("query", "key", "value")),
    *(f"bert.encoder.layer.{n}.intermediate.dense" for n in range(LAYERS)),
    "bert.pooler.dense",
    "classifier",
]


def test_taylor_is_of_all_maps_that_read_the_features(tmp_path):
    gradual, snapshots = GradualPruning(Prune(hidden=0.5, score="taylor"), begin=2, end=2), Snapshots()
    states = []
    watch = Watch(lambda step: states.append(gradual.state_dict()))
    student = train(tmp_path, still("bert-classifier"), [snapshots, gradual, watch], 2)
    width = student.config.hidden_size
    expected = [0.0] * width
    for step in (1, 2):
        terms = [0.0] * width
        for reader in READERS:
            gradient, weight = (store[step][f"{reader}.weight"] for store in (snapshots.gradients, snapshots.before))
            for feature in range(width):
                terms[feature] += float((gradient[:, feature] * weight[:, feature]).sum())
        expected = [0.98 * before + term**2 for before, term in zip(expected, terms, strict=True)]
    found = states[1]["sums"]["hidden"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-9)
    off = {feature for feature, stays in enumerate(gradual.masked.masks["hidden"].tolist()) if not stays}
    assert off == set(found.argsort()[: width // 2].tolist())


def test_a_map_tied_to_the_embeddings_does_not_count(tmp_path):
    gradual, snapshots = GradualPruning(Prune(hidden=0.5, score="taylor"), begin=1, end=1), Snapshots()
    states = []
    watch = Watch(lambda step: states.append(gradual.state_dict()))
    student = train(tmp_path, still("gpt2"), [snapshots, gradual, watch], 1)
    terms = torch.zeros(student.config.n_embd)
    for number in range(LAYERS):
        for name in ("attn.c_attn", "mlp.c_fc"):
            weight = f"transformer.h.{number}.{name}.weight"
            terms += (snapshots.gradients[1][weight] * snapshots.before[1][weight]).sum(1)
    torch.testing.assert_close(states[0]["sums"]["hidden"].float(), terms.square(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama", "t5"])
def test_the_student_is_what_shrinks(tmp_path, name):
    plan = Prune(heads=0.5, ffn=0.5, hidden=0.5, score="taylor")
    gradual = GradualPruning(plan, begin=1, end=4, every=1)
    student = train(tmp_path / "run", still(name), [gradual], 6, lr=0.01)
    small = gradual.shrink().eval()
    before, after = outputs_of(student), outputs_of(small)
    for key in after.keys() & before.keys():
        if after[key].shape == before[key].shape:
            scale = max(1.0, float(after[key].abs().max()))
            torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-5 * scale)
    assert before["logits"].shape == after["logits"].shape
    kept, total = (sum(parameter.numel() for parameter in model.parameters()) for model in (small, student))
    assert gradual.sparsity()["parameters"] == pytest.approx(1 - kept / total)
    save(small, tmp_path / "small")
    assert equal(outputs_of(load(tmp_path / "small").eval()), after)


def test_resumed_runs_end_the_same(tmp_path):
    def run(folder, seed, **options):
        student = make("bert-classifier", seed)
        gradual = GradualPruning(Prune(ffn=0.5, hidden=0.5, score="taylor"), begin=1, end=0.75, every=2)
        settings = {"ckpt_steps": 1, "save_total_limit": None}
        train(folder, student, [gradual], 6, lr=0.02, seed=seed, settings=settings, shuffle=True, **options)
        return {"student": student.state_dict(), "state": gradual.state_dict()}

    whole = run(tmp_path / "whole", 0)
    for path in checkpoints(tmp_path / "whole")[:-1]:
        assert equal(run(tmp_path / f"after-{path.name}", 5, resume_from=path), whole), path.name


def test_weights_that_are_not_trained_cannot_be_scored_by_gradients(tmp_path):
    student = still("bert-classifier")
    student.bert.pooler.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'bert\.pooler\.dense\.weight' is not trained"):
        train(tmp_path, student, [GradualPruning(Prune(hidden=0.5, score="taylor"), begin=1)], 3)
