"""Weights set to zero while training: so many as the schedule says, for good, and the same after a resume."""

import copy
import itertools
import math

import pytest
import torch

from tests import processes
from tests.compression.pruned_runs import Snapshots, Watch, still, train
from tests.compression.test_sparse import INSIDE, gone
from tests.conftest import Encoder, adaptor, make_config, make_loader, seed_all
from tests.engine.runs import checkpoints, equal
from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller
from textbrewer.compression.weights import GradualSparsity, KeepSparse, SparsePruning


def cubic(step, begin, end, final):
    if step < begin:
        return 0.0
    return final if step >= end else final - final * (1 - (step - begin) / (end - begin)) ** 3


@pytest.mark.parametrize("score", ["l1", "taylor", "random"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("block", [None, (2, 2)])
def test_more_and_more_go_and_stay_zero(tmp_path, score, scope, block):
    gradual = GradualSparsity(SparsePruning(0.8, block, score, scope), begin=1, end=7, every=2)
    student, seen = still("bert-classifier"), []

    def look(step):
        masks = gradual.sparse.masks
        for name, mask in masks.items():
            assert bool((student.get_parameter(name)[~mask] == 0).all())
        seen.append(dict(masks))

    train(tmp_path, student, [gradual, Watch(look)], 9, lr=0.01)
    size = 1 if block is None else 4
    for step, masks in enumerate(seen, start=1):
        last = 7 if step >= 7 else step - (step - 1) % 2
        share = cubic(last, 1, 7, 0.8)
        if scope == "uniform":
            for mask in masks.values():
                assert int((~mask).sum()) == size * math.floor(share * mask.numel() / size + 1e-9)
        else:
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int((~mask).sum()) for mask in masks.values()) == size * math.floor(share * total / size + 1e-9)
    for before, after in itertools.pairwise(seen):
        assert all(not bool((after[name] & ~before[name]).any()) for name in before)
    assert gradual.sparse.sparsity()["weights"] == pytest.approx(0.8, abs=5e-3)


@pytest.mark.parametrize(("begin", "score"), [(0, "l1"), (2, "l1"), (2, "taylor")])
def test_at_once_it_is_the_plan_applied_to_the_student_of_that_step(tmp_path, begin, score):
    student = still("bert-classifier")
    start, snapshots = copy.deepcopy(student), Snapshots()
    gradual = GradualSparsity(
        SparsePruning(0.6, score=score), "one_shot", begin, decay=0.5 if score == "taylor" else None
    )
    train(tmp_path, student, [snapshots, gradual], 4)
    if score == "taylor":
        name = INSIDE[3]
        first, second = (snapshots.gradients[step][name] * snapshots.before[step][name] for step in (1, 2))
        scores = 0.5 * first.square() + second.square()
        expected = set(scores.flatten().argsort()[: int(0.6 * 1024)].tolist())
        assert {row * 32 + column for row, column in gone(gradual.sparse.masks[name])} == expected
        return
    if begin:
        start.load_state_dict(snapshots.models[begin])
    assert equal(dict(gradual.sparse.masks), dict(SparsePruning(0.6).apply(start).masks))


def test_what_is_gone_has_no_gradient(tmp_path):
    gradual, after = GradualSparsity(SparsePruning(0.9), "one_shot"), Snapshots()
    train(tmp_path, still("bert-classifier"), [gradual, after], 2)
    for name, mask in gradual.sparse.masks.items():
        assert bool((after.gradients[2][name][~mask] == 0).all())
        assert bool((after.gradients[2][name] != 0).any())


def test_distilling_with_the_log(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr("textbrewer.engine.tracking.Tracker._write", lambda self, row: rows.append(row))
    student, teacher = Encoder(seed=1), Encoder(width=48, seed=2)
    seed_all(0)
    distiller = GeneralDistiller(make_config(tmp_path), DistillationConfig(), teacher, student, adaptor, adaptor)
    gradual = GradualSparsity(SparsePruning(0.5, modules=["layers"]), "linear", begin=0, end=4, every=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    distiller.train(optimizer, make_loader(24), num_epochs=1, step_callbacks=[gradual])
    assert [row.get("sparsity") for row in rows[1:]] == [0.0, 0.25, 0.25, 0.5, 0.5]
    assert all((student.get_parameter(name) == 0).sum() == 512 for name in gradual.sparse.masks)


def encoder_run(folder, callback, steps, seed=1, **options):
    student = Encoder(seed=seed)
    seed_all(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.02)
    trainer = BasicTrainer(make_config(folder, ckpt_steps=1, save_total_limit=None), student, adaptor)
    loader = make_loader(24, shuffle=True)
    trainer.train(optimizer, loader, num_steps=steps, step_callbacks=[callback], **options)
    return student, optimizer


def resumable(kind):
    if kind == "keep":
        return KeepSparse(modules=["layers"], exclude=["layers.1.feed"])
    plan = SparsePruning(0.7, (2, 4), kind, "global", 0.9, modules=["layers"])
    return GradualSparsity(plan, "cubic", 0.125, 0.75, every=2)


@pytest.mark.parametrize("kind", ["taylor", "l2", "keep"])
def test_resumed_runs_end_the_same(tmp_path, kind, monkeypatch):
    if kind == "keep":
        whole = Encoder.__init__

        def with_zeros(self, *args, **options):
            whole(self, *args, **options)
            with torch.no_grad():
                self.layers[0].query.weight[::2] = 0

        monkeypatch.setattr(Encoder, "__init__", with_zeros)
    callback = resumable(kind)
    student, optimizer = encoder_run(tmp_path / "whole", callback, 8)
    assert int((student.layers[0].query.weight == 0).sum()) >= (512 if kind == "keep" else 1)
    for path in checkpoints(tmp_path / "whole")[:-1]:
        other = resumable(kind)
        again, again_optimizer = encoder_run(tmp_path / path.name, other, 8, seed=5, resume_from=path)
        assert equal(again.state_dict(), student.state_dict())
        assert equal(again_optimizer.state_dict(), optimizer.state_dict())
        assert equal(other.state_dict(), callback.state_dict())


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    encoder_run(tmp_path, GradualSparsity(SparsePruning(0.5, modules=["layers"]), every=1), 2)
    with pytest.raises(ValueError, match=r"got amount=0\.6 and not 0\.5"):
        encoder_run(tmp_path, GradualSparsity(SparsePruning(0.6, modules=["layers"]), every=1), 4, resume_from="latest")
    masks = SparsePruning(0.5, modules=["layers"]).apply(Encoder(seed=1)).masks
    encoder_run(tmp_path / "keep", KeepSparse(masks), 2)
    other = SparsePruning(0.5, modules=["layers"], score="random").apply(Encoder(seed=1)).masks
    with pytest.raises(ValueError, match="must be resumed with the masks of the run before"):
        encoder_run(tmp_path / "keep", KeepSparse(other), 4, resume_from="latest")


def test_zeros_are_kept(tmp_path):
    plan = SparsePruning(0.5, modules=["layers"])
    sparse = plan.apply(Encoder(seed=1))
    masks = sparse.masks
    found = KeepSparse(modules=["layers"])
    student = sparse.model
    trainer = BasicTrainer(make_config(tmp_path), student, adaptor)
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.02)
    trainer.train(optimizer, make_loader(24), num_steps=4, step_callbacks=[found])
    assert equal(dict(found.masks), dict(masks))
    for name, mask in masks.items():
        weight = student.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight, before[name])
    given, _ = encoder_run(tmp_path / "given", KeepSparse(masks), 3)
    assert all(bool((given.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    with pytest.raises(ValueError, match="must have weights that are zero, to be kept so, got none"):
        encoder_run(tmp_path / "dense", KeepSparse(modules=["layers"]), 3)
    with pytest.raises(ValueError, match="modules and exclude must be left out where masks are given"):
        KeepSparse(masks, modules=["layers"])


@pytest.mark.parametrize(
    ("plan", "settings", "error", "message"),
    [
        (0.5, {}, TypeError, "plan must be a SparsePruning"),
        (SparsePruning(0.5), {"initial": 0.6}, ValueError, "initial must be at most amount=0.5"),
        (SparsePruning(0.5), {"decay": 0.6}, ValueError, "decay must be left out"),
        (SparsePruning(0.5), {"every": 0}, ValueError, "every must be at least 1"),
    ],
)
def test_settings_that_cannot_be(plan, settings, error, message):
    with pytest.raises(error, match=message):
        GradualSparsity(plan, **settings)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        ({"score": "taylor"}, {"schedule": "one_shot"}, "begin must be at least 1 step"),
        ({"score": {}}, {}, "score must have a tensor of shape"),
        ({"block": (5, 5)}, {}, "block must divide"),
    ],
)
def test_plans_that_do_not_fit_the_run(tmp_path, plan, settings, message):
    with pytest.raises(ValueError, match=message):
        encoder_run(tmp_path, GradualSparsity(SparsePruning(0.5, modules=["layers"], **plan), **settings), 3)
    with pytest.raises(ValueError, match="must have begun"):
        _ = GradualSparsity(SparsePruning(0.5)).sparse


def on_ranks(rank, folder):
    gradual = GradualSparsity(SparsePruning(0.5, score="taylor", modules=["layers"]), begin=1, end=3, every=1)
    student, _ = encoder_run(folder / "run", gradual, 3)
    torch.save([dict(gradual.sparse.masks), student.state_dict()], folder / f"{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_have_the_same_masks(tmp_path):
    processes.run_ranks(2, tmp_path, on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    assert all(int((~mask).sum()) == 512 for mask in first[0].values())
    assert all(bool((first[1][name][~mask] == 0).all()) for name, mask in first[0].items())
