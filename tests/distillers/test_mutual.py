"""Students that learn from each other: one step by hand, checkpoints, resuming, bad input."""

import copy

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.recipes.jobs import batches, bert, largest_difference, weights
from textbrewer import DistillationConfig, MutualDistiller, TrainingConfig


def config(folder):
    return TrainingConfig(output_dir=str(folder), progress_bar=False, device="cpu")


def learn(**settings):
    return DistillationConfig(**{"temperature": 1, "kd_loss_type": "kl", "hard_label_weight": 1, **settings})


def train(folder, models, data=None, settings=None, **arguments):
    distiller = MutualDistiller(config(folder), settings or learn(), models)
    optimizer = torch.optim.SGD(distiller.cohort.parameters(), lr=0.1)
    with distiller:
        distiller.train(optimizer, data or batches(), num_epochs=2, **arguments)


@pytest.mark.parametrize(("temperature", "kd_weight", "hard_weight"), [(1, 1, 1), (2, 0.5, 0.7), (3, 1, 0)])
def test_one_step_is_that_of_the_papers_loss(temperature, kd_weight, hard_weight, tmp_path):
    models = [bert(2, seed=1), bert(1, seed=2), bert(1, width=16, seed=3)]
    expected, (batch,) = copy.deepcopy(models), batches(1)
    for model in expected:
        model.train()
    logits = [model(**batch).logits for model in expected]
    loss = 0
    for number, own in enumerate(logits):
        divergences = []
        for other in range(len(logits)):
            if other == number:
                continue
            p = F.softmax(logits[other].detach() / temperature, dim=-1)
            log_q = F.log_softmax(own / temperature, dim=-1)
            divergences.append(temperature**2 * (p * (p.log() - log_q)).sum(-1).mean())
        loss = loss + hard_weight * F.cross_entropy(own, batch["labels"]) + kd_weight * sum(divergences) / 2
    loss.backward()
    settings = learn(temperature=temperature, kd_loss_weight=kd_weight, hard_label_weight=hard_weight)
    distiller = MutualDistiller(config(tmp_path), settings, models)
    with distiller:
        optimizer = torch.optim.SGD(distiller.cohort.parameters(), lr=0.1)
        distiller.train(optimizer, [batch], num_steps=1)
    for model, reference in zip(models, expected, strict=True):
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            change = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(mine, theirs - 0.1 * change, rtol=1e-5, atol=1e-6)


def test_the_first_student_is_the_one_that_is_saved_and_evaluated(tmp_path):
    models, seen = [bert(2, seed=1), bert(1, seed=2)], []
    train(tmp_path, models, callback=lambda model, step: seen.append((model, step)))
    assert [step for _, step in seen] == [6, 12]
    assert all(model is models[0] for model, _ in seen)
    saved = torch.load(tmp_path / "gs12.pkl", weights_only=True)
    assert saved.keys() == models[0].state_dict().keys()
    assert largest_difference(saved, weights(models[0])) == 0


def test_all_students_go_on_after_an_interruption(tmp_path):
    whole = [bert(2, seed=1, dropout=0.1), bert(1, seed=2, dropout=0.1)]
    torch.manual_seed(0)
    train(tmp_path / "whole", whole)

    def stop(model, step):
        raise KeyboardInterrupt

    cut = [bert(2, seed=1, dropout=0.1), bert(1, seed=2, dropout=0.1)]
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", cut, callback=stop)
    again = [bert(2, seed=1, dropout=0.1), bert(1, seed=2, dropout=0.1)]
    train(tmp_path / "cut", again, resume_from="latest")
    for mine, theirs in zip(again, whole, strict=True):
        assert largest_difference(weights(mine), weights(theirs)) == 0


def test_peers_help_each_other_to_agree(tmp_path):
    @torch.no_grad()
    def disagreement(models):
        first, second = (F.log_softmax(model.eval()(**batch).logits, -1) for model in models)
        return float((first.exp() * (first - second)).sum(-1).mean())

    (batch,) = batches(1)
    models = [bert(2, seed=1), bert(2, seed=2)]
    before = disagreement(models)
    distiller = MutualDistiller(config(tmp_path), learn(hard_label_weight=0), models)
    with distiller:
        distiller.train(torch.optim.SGD(distiller.cohort.parameters(), lr=0.3), [batch], num_steps=30)
    assert disagreement(models) < before / 10


@pytest.mark.parametrize(
    ("models", "settings", "error", "message"),
    [
        ([bert(1)], {}, ValueError, "at least two different students, got 1"),
        (bert(1), {}, TypeError, "models must be a list"),
        ([bert(1), "bert"], {}, TypeError, "each of models"),
        ([bert(1), bert(1)], {"is_caching_logits": True}, ValueError, "is_caching_logits is not for mutual learning"),
        ([bert(1), bert(1)], {"teacher_cache": "x"}, ValueError, "teacher_cache is not for mutual learning"),
        (
            [bert(1), bert(1)],
            {"intermediate_matches": [{"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "cos", "weight": 1}]},
            ValueError,
            "intermediate_matches is not for mutual learning",
        ),
    ],
)
def test_bad_input(models, settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        MutualDistiller(config(tmp_path), learn(**settings), models)


def test_one_adaptor_each(tmp_path):
    with pytest.raises(ValueError, match=r"one a student \(2\), got 3"):
        MutualDistiller(config(tmp_path), learn(), [bert(1), bert(1)], ["auto"] * 3)
    given = [lambda batch, outputs: {"losses": outputs.loss}, "auto"]
    distiller = MutualDistiller(config(tmp_path), learn(), [bert(1), bert(1)], given)
    optimizer = torch.optim.SGD(distiller.cohort.parameters(), lr=0.1)
    with pytest.raises(KeyError, match="needs 'logits' of each student"), distiller:
        distiller.train(optimizer, batches(), num_epochs=1)


def test_labels_that_are_not_there_are_told_once_of_each_student(tmp_path):
    data = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches(3)]
    with pytest.warns(UserWarning, match="hard_label_weight=1 has no effect") as found:
        train(tmp_path, [bert(1, seed=1), bert(1, seed=2)], data)
    assert len([item for item in found if "hard_label_weight" in str(item.message)]) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kd_loss_weight_scheduler": "linear_growth"}, "the weight scheduler 'linear_growth'"),
        ({"temperature_scheduler": ["linear", 1.0]}, "the temperature scheduler 'linear'"),
    ],
)
def test_progress_without_a_length(settings, words, tmp_path):
    models, endless = [bert(1, seed=1), bert(1, seed=2)], (batch for batch in batches())
    before = weights(models[0])
    with pytest.raises(ValueError, match=f"{words} must know the run's length.*give num_steps"):
        train(tmp_path, models, endless, learn(**settings))
    assert largest_difference(before, weights(models[0])) == 0
