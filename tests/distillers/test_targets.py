"""How several teachers become one KD loss: the weights and losses of each target, by plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tests.conftest import CLASSES
from textbrewer.adaptors import Views
from textbrewer.distillers.knowledge import KnowledgeLoss
from textbrewer.distillers.targets import TARGETS, Moment, make_target
from textbrewer.distillers.targets.agreement import least_norm_weights
from textbrewer.distillers.targets.base import checked_weights
from textbrewer.distillers.targets.means import MeanProbs
from textbrewer.distillers.targets.positions import carry
from textbrewer.distillers.terms import Now
from textbrewer.losses import kd_ce_loss
from textbrewer.registry import KD_LOSS_MAP

ROWS = 5


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teachers_of(count, shape=(ROWS, CLASSES)):
    return [2 * numbers(*shape, seed=number) for number in range(count)]


def labels_of(shape=(ROWS,)):
    labels = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(9))
    labels.view(-1)[1] = -100
    return labels


def moment_of(results_S=None, tau=1.0, **options):
    return Moment(KnowledgeLoss(options.pop("loss", kd_ce_loss), tau, **options), Now(1.0, 0.0), results_S)


def blended(spec, views, moment):
    """What takes in the views of all teachers."""
    blend = make_target(spec, len(views)).start(moment)
    for number, item in enumerate(views):
        blend.add(number, Views(item))
    return blend


# ---- weights, row by row -----------------------------------------------------------------------------------------


def softmax(values, tau=1.0):
    powers = [math.exp((value - max(values)) / tau) for value in values]
    return [power / sum(powers) for power in powers]


def cross_entropy(logits, label):
    return 0.0 if label < 0 else -math.log(softmax(logits)[label])


def entropy(logits):
    return -sum(p * math.log(p) for p in softmax(logits))


def margin(logits):
    return sorted(logits)[-1] - sorted(logits)[-2]


def shares(values):
    return [value / sum(values) for value in values]


def by_the_others(values):
    return [(1 - value / sum(values)) / (len(values) - 1) for value in values]


def ca_mkd(rows, label):
    return [(1 - weight) / (len(rows) - 1) for weight in softmax([cross_entropy(row, label) for row in rows])]


# The weights of the teachers' probabilities for one row, of the logits of each teacher and the label.
WEIGHTS = {
    "mean_probs": lambda rows, label: [1 / len(rows)] * len(rows),
    "ca_mkd": ca_mkd,
    "entropy": lambda rows, label: by_the_others([entropy(row) for row in rows]),
    "confidence": lambda rows, label: shares([max(softmax(row)) for row in rows]),
    "margin": lambda rows, label: softmax([margin(row) for row in rows], 0.5),
    "weights": lambda rows, label: [[0.2, 0.8], [0.1, 0.4, 0.5]][len(rows) - 2],
}


def spec_of(name, count):
    if name == "margin":
        return ["confidence", {"by": "margin", "softness": 0.5}]
    return ["mean_probs", {"weights": [[1, 4], [2, 8, 10]][count - 2]}] if name == "weights" else name


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_mixtures(name, count, tau):
    """The softmax at the temperature of what the student is given is the mixture of the teachers' softmaxes."""
    logits, labels = teachers_of(count), labels_of()
    results_S = Views({"logits": [numbers(ROWS, CLASSES)], "labels": [labels]})
    blend = blended(spec_of(name, count), [{"logits": [item]} for item in logits], moment_of(results_S, tau))
    (found,) = blend.views()["logits"]
    for row in range(ROWS):
        own = [item[row].tolist() for item in logits]
        weights = WEIGHTS[name](own, int(labels[row]))
        assert sum(weights) == pytest.approx(1)
        probs = [softmax(item, tau) for item in own]
        expected = [sum(w * p[c] for w, p in zip(weights, probs, strict=True)) for c in range(CLASSES)]
        assert softmax(found[row].tolist(), tau) == pytest.approx(expected, rel=1e-6)
        # They are log-probabilities times the temperature, so that losses on logits have one scale.
        assert [value / tau for value in found[row].tolist()] == pytest.approx([math.log(p) for p in expected])


@pytest.mark.parametrize("name", ["mean_logits", "mean_probs", "ca_mkd", "entropy", "confidence"])
def test_one_teacher_is_that_teacher(name):
    (logits,) = teachers_of(1)
    results_S = Views({"logits": [logits], "labels": [labels_of()]})
    blend = blended(name, [{"logits": [logits]}], moment_of(results_S, 2.0))
    assert torch.allclose(torch.softmax(blend.views()["logits"][0] / 2, -1), torch.softmax(logits / 2, -1))


def test_weighted_mean_of_logits():
    logits = teachers_of(3)
    blend = blended(["mean_logits", {"weights": [1, 3, 0]}], [{"logits": [item]} for item in logits], moment_of())
    assert torch.allclose(blend.views()["logits"][0], 0.25 * logits[0] + 0.75 * logits[1])


@pytest.mark.parametrize("name", ["mean_probs", "ca_mkd", "entropy", "confidence"])
def test_impossible_classes_and_certain_teachers(name):
    """Logits of -inf, certain teachers, and teachers that hold the true class impossible give finite weights."""
    never = -math.inf
    logits = [torch.tensor([[0.0, never, 1.0], [0.0, never, never]]), torch.tensor([[0.0, never, 2.0]] * 2)]
    results_S = Views({"logits": [logits[1]], "labels": [torch.tensor([1, 2])]})
    (found,) = blended(name, [{"logits": [item]} for item in logits], moment_of(results_S)).views()["logits"]
    probs = torch.softmax(found, -1)
    assert probs.isfinite().all()
    assert (probs[:, 1] == 0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(2))


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_ca_mkd_without_cancellation(scale):
    """Tiny shares of the mixture are exact, as it is a sum of positive terms."""
    logits = [scale * item for item in teachers_of(2)]
    results_S = Views({"logits": [logits[0].float()], "labels": [labels_of()]})
    views = [{"logits": [item.float()]} for item in logits]
    (found,) = blended("ca_mkd", views, moment_of(results_S)).views()["logits"]
    for row, label in enumerate(labels_of().tolist()):
        own = [item[row].tolist() for item in logits]
        weights = ca_mkd(own, label)
        expected = [sum(w * softmax(item)[c] for w, item in zip(weights, own, strict=True)) for c in range(CLASSES)]
        assert found[row].tolist() == pytest.approx([math.log(p) for p in expected], rel=1e-4, abs=1e-4)


# ---- losses ------------------------------------------------------------------------------------------------------


def losses_with(spec, logits, student, tau=2.0, loss=kd_ce_loss, learned=None):
    results_S = Views({"logits": [student], "labels": [labels_of()]})
    results_S.learned = learned
    blend = blended(spec, [{"logits": [item]} for item in logits], moment_of(results_S, tau, loss=loss))
    return blend.terms(results_S)[0].value, blend


def test_mean_loss():
    logits, student = teachers_of(3), numbers(ROWS, CLASSES, seed=8)
    each = [kd_ce_loss(student, item, 2.0) for item in logits]
    assert losses_with("mean_loss", logits, student)[0] == pytest.approx(sum(each) / 3)
    found, _ = losses_with(["mean_loss", {"weights": [1, 0, 3]}], logits, student)
    assert found == pytest.approx(0.25 * each[0] + 0.75 * each[2])


def gradient_of(spec, loss, seed=8):
    student = numbers(ROWS, CLASSES, seed=seed).requires_grad_()
    value, _ = losses_with(spec, teachers_of(3), student, loss=loss)
    return torch.autograd.grad(value, student)[0]


def reverse(logits_S, logits_T, temperature=1.0):
    """KL(q || p), by its definition."""
    log_q, log_p = (torch.log_softmax(item / temperature, -1) for item in (logits_S, logits_T))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@pytest.mark.parametrize(("loss", "same", "other"), [
    (kd_ce_loss, "mean_probs", "mean_logits"), (reverse, "mean_logits", "mean_probs"),
])  # fmt: skip
def test_what_the_mean_of_losses_equals(loss, same, other):
    """Forward divergences: the mean of probabilities; reverse ones: the mean of logits (the geometric mean)."""
    expected = gradient_of("mean_loss", loss)
    assert torch.allclose(gradient_of(same, loss), expected, atol=1e-9)
    assert not torch.allclose(gradient_of(other, loss), expected, atol=1e-4)


def test_uncertainty():
    logits, student = teachers_of(3), numbers(ROWS, CLASSES, seed=8)
    log_variances = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    each = [kd_ce_loss(student, item, 2.0).item() for item in logits]
    found, blend = losses_with("uncertainty", logits, student, learned=log_variances)
    values = log_variances.tolist()[0]
    expected = sum(math.exp(-a) * loss + a / 2 for a, loss in zip(values, each, strict=True)) / 3
    assert found.item() == pytest.approx(expected)
    assert {name: value.item() for name, value in blend.figures.items()} == {
        f"log_variance_{number}": value for number, value in enumerate(values)
    }
    # At the optimum the learned variances are twice the losses.
    optimum = torch.tensor([[math.log(2 * loss) for loss in each]], dtype=torch.float64, requires_grad=True)
    value, _ = losses_with("uncertainty", logits, student, learned=optimum)
    assert torch.autograd.grad(value, optimum)[0].abs().max() < 1e-12


def gram_of(count, seed, width=6):
    vectors = numbers(count, width, seed=seed) + 0.7
    return (vectors @ vectors.T).numpy()


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_weights_of_least_norm(count, cap, seed):
    gram = gram_of(count, seed)
    found = least_norm_weights(gram, cap)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    assert (found <= cap + 1e-12).all()
    best = minimize(
        lambda w: w @ gram @ w, np.full(count, 1 / count), jac=lambda w: 2 * gram @ w, bounds=[(0, cap)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert found @ gram @ found == pytest.approx(best.fun, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("gram", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones((3, 3))])
def test_weights_where_all_are_alike(gram):
    assert least_norm_weights(gram, 1.0) == pytest.approx([1 / 3] * 3)


def test_opposite_teachers_cancel():
    """Two vectors of opposite directions, one twice as long: the point of least norm is the origin."""
    assert least_norm_weights(np.array([[1.0, -2.0], [-2.0, 4.0]]), 1.0) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("cap", [1.0, 0.4])
def test_agree(cap):
    """By the closed form of the gradient, (q - p_k) / (tau rows), and a search over a grid of weights."""
    logits, student = teachers_of(3), numbers(ROWS, CLASSES, seed=8).requires_grad_()
    value, blend = losses_with(["agree", {"cap": cap}], logits, student, tau=2.0)
    q = torch.softmax(student.detach() / 2, -1)
    gradients = [((q - torch.softmax(item / 2, -1)) / 2 / ROWS).flatten() for item in logits]
    grid = [(a / 200, b / 200) for a in range(201) for b in range(201 - a)]
    allowed = [(a, b, 1 - a - b) for a, b in grid if max(a, b, 1 - a - b) <= cap + 1e-9]
    norm = {w: sum(x * g for x, g in zip(w, gradients, strict=True)).norm().item() for w in allowed}
    best = min(norm, key=norm.get)
    found = [blend.figures[f"weight_{number}"].item() for number in range(3)]
    assert found == pytest.approx(best, abs=0.01)
    each = [kd_ce_loss(student, item, 2.0).item() for item in logits]
    assert value.item() == pytest.approx(sum(w * loss for w, loss in zip(found, each, strict=True)))


def test_gate():
    """The mixture has the gate's weights; its loss is the cross-entropy of the mixture at temperature 1."""
    logits, labels, student = teachers_of(2), labels_of(), numbers(ROWS, CLASSES, seed=8).requires_grad_()
    scores = numbers(ROWS, 2, seed=4).requires_grad_()
    results_S = Views({"logits": [student], "labels": [labels]})
    results_S.learned = torch.log_softmax(scores, -1)
    blend = blended("gate", [{"logits": [item]} for item in logits], moment_of(results_S, 3.0))
    (target,) = blend.views()["logits"]
    kd, gate = blend.terms(results_S)
    losses = []
    for row, label in enumerate(labels.tolist()):
        weights = softmax(scores[row].tolist())
        mixed = {tau: [sum(w * softmax(item[row].tolist(), tau)[c] for w, item in zip(weights, logits, strict=True))
                       for c in range(CLASSES)] for tau in (1, 3)}  # fmt: skip
        assert softmax(target[row].tolist(), 3.0) == pytest.approx(mixed[3])
        losses += [] if label < 0 else [-math.log(mixed[1][label])]
    assert gate.name == "gate_loss"
    assert gate.value.item() == pytest.approx(sum(losses) / len(losses))
    # Neither learns from the other's loss: the gate from the labels alone, the student from the teachers alone.
    assert torch.autograd.grad(kd.value, scores, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(gate.value, student, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(gate.value, scores)[0].abs().max() > 0
    shown = [blend.figures[f"gate_weight_{number}"].item() for number in range(2)]
    assert shown == pytest.approx(torch.softmax(scores, -1).mean(0).tolist(), rel=1e-5)


# ---- positions, heads, labels ------------------------------------------------------------------------------------

LENGTH = 4


def mask_of(*rows):
    return torch.tensor([[int(mark == "x") for mark in row] for row in rows])


def picked(values, mask):
    return [values[row, column] for row in range(len(mask)) for column in range(mask.shape[1]) if mask[row, column]]


MASKS = {
    "the same": [mask_of("xx..", "x..x"), mask_of("xx..", "x..x"), mask_of("xx..", "x..x")],
    "the student's": [mask_of(".xx.", "xx.."), mask_of("xx..", "x..x"), mask_of("xx..", "x..x")],
    "all other": [mask_of("xxx.x"), mask_of("xx..", "x..x"), mask_of("xx...", "x.x..")],
    "none of the student": [None, mask_of("xx..", "x..x"), mask_of("xx..", "x..x")],
    "none of the first": [mask_of("xx..", "x..x"), None, mask_of("xx..", "x..x")],
    "none of the teachers": [mask_of("xx..", "x..x"), None, None],
}


@pytest.mark.parametrize("name", ["mean_probs", "ca_mkd", "entropy", "confidence", "mean_loss"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masks_of_each_side(name, masks):
    """The loss is the mean over the first position that each side picks, the second that each picks, and so on."""
    whole = [next(mask for mask in masks if mask is not None) if item is None else item for item in masks]
    logits = [2 * numbers(*mask.shape, CLASSES, seed=seed) for seed, mask in enumerate(whole)]
    labels = torch.randint(0, CLASSES, whole[0].shape, generator=torch.Generator().manual_seed(3))
    views = [
        {"logits": [item], **({} if mask is None else {"logits_mask": [mask]})}
        for item, mask in zip(logits, masks, strict=True)
    ]
    results_S = Views({**views[0], "labels": [labels]})
    (found,) = blended(name, views[1:], moment_of(results_S, 2.0)).terms(results_S)
    rows = [[item.tolist() for item in picked(each, mask)] for each, mask in zip(logits, whole, strict=True)]
    true = [int(label) for label in picked(labels, whole[0])]
    total = 0.0
    for own, first, second, label in zip(*rows, true, strict=True):
        weights = [0.5, 0.5] if name == "mean_loss" else WEIGHTS[name]([first, second], label)
        logs = [math.log(p) for p in softmax(own, 2.0)]
        for weight, row in zip(weights, (first, second), strict=True):
            total -= weight * sum(p * log for p, log in zip(softmax(row, 2.0), logs, strict=True))
    assert found.value.item() == pytest.approx(total / len(true))


def test_several_heads():
    """Each head has weights of its own, and the losses are added."""
    logits = [[numbers(ROWS, 3, seed=n), numbers(ROWS, 7, seed=10 + n)] for n in range(2)]
    labels = [labels_of(), torch.randint(0, 7, (ROWS,), generator=torch.Generator().manual_seed(1))]
    student = [numbers(ROWS, 3, seed=20), numbers(ROWS, 7, seed=21)]
    results_S = Views({"logits": student, "labels": labels})
    (found,) = blended("ca_mkd", [{"logits": item} for item in logits], moment_of(results_S)).terms(results_S)
    total = 0.0
    for head in range(2):
        for row in range(ROWS):
            own = [item[head][row].tolist() for item in logits]
            weights = ca_mkd(own, int(labels[head][row]))
            logs = [math.log(p) for p in softmax(student[head][row].tolist())]
            for weight, teacher in zip(weights, own, strict=True):
                total -= weight * sum(p * log for p, log in zip(softmax(teacher), logs, strict=True))
    assert found.value.item() == pytest.approx(total / ROWS)


SHIFTED = ["mean_probs", "confidence", "entropy", "ca_mkd", "mean_loss", ["mean_logits", {"shift_each": True}]]


@pytest.mark.parametrize("spec", SHIFTED, ids=str)
def test_each_teacher_is_shifted(spec):
    """The true class gets the largest logit of each teacher, before they are mixed."""
    logits, labels, student = teachers_of(3), labels_of(), numbers(ROWS, CLASSES, seed=8)
    corrected = [item.clone() for item in logits]
    for item in corrected:
        for row, label in zip(item, labels.tolist(), strict=True):
            top = int(row.argmax())
            if label >= 0:
                row[top], row[label] = row[label].clone(), row[top].clone()
    results_S = Views({"logits": [student], "labels": [labels]})
    views = [[{"logits": [item]} for item in each] for each in (logits, corrected)]
    (found,) = blended(spec, views[0], moment_of(results_S, probability_shift=True)).terms(results_S)
    (expected,) = blended(spec, views[1], moment_of(results_S)).terms(results_S)
    assert found.value.item() == pytest.approx(expected.value.item())
    (plain,) = blended(spec, views[0], moment_of(results_S)).terms(results_S)
    assert abs(found.value - plain.value) > 1e-3


def test_the_gate_learns_from_teachers_that_are_not_shifted():
    """Corrected by the labels, all teachers would be right, and there were nothing to learn."""
    logits, results_S = teachers_of(2), Views({"logits": [numbers(ROWS, CLASSES)], "labels": [labels_of()]})
    results_S.learned = torch.log_softmax(numbers(ROWS, 2), -1)
    views = [{"logits": [item]} for item in logits]
    plain, shifted = (
        blended("gate", views, moment_of(results_S, probability_shift=shift)).terms(results_S) for shift in (0, 1)
    )
    assert plain[1].value.item() == shifted[1].value.item()
    assert plain[0].value.item() != pytest.approx(shifted[0].value.item())


@pytest.mark.parametrize("kd_loss", sorted(KD_LOSS_MAP))
@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"sample", "route"}))
def test_every_target_with_every_loss(name, kd_loss):
    """Two teachers that are one: whatever the weights, the loss is that of this teacher, at any temperature."""
    shape = (2, LENGTH)
    logits, mask, labels = 2 * numbers(*shape, CLASSES, seed=1), mask_of("xxx.", "xx.."), labels_of(shape)
    student = numbers(*shape, CLASSES, seed=8).requires_grad_()
    results_S = Views({"logits": [student], "labels": [labels], "logits_mask": [mask]})
    results_S.learned = torch.zeros(1, 2) if name == "uncertainty" else torch.log_softmax(numbers(2, 2), -1)
    moment = moment_of(results_S, 2.0, loss=KD_LOSS_MAP[kd_loss])
    view = {"logits": [logits], "logits_mask": [mask]}
    found = blended(name, [view, view], moment).terms(results_S)[0].value
    expected = moment.knowledge(student, logits, mask.bool(), labels)
    if name not in ("mean_logits", "mean_loss", "agree", "uncertainty"):
        # Logits of a mixture are log-probabilities: the same up to a constant in each row.
        expected = moment.knowledge(student, 2.0 * torch.log_softmax(logits / 2.0, -1), mask.bool(), labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert torch.autograd.grad(found, student)[0].isfinite().all()


def test_labels_are_carried_to_the_teacher_s_positions():
    labels = torch.tensor([[5, 6, 7], [8, 9, 4]])
    masks = mask_of("x.x", "xx."), mask_of(".x", "xx", "x.")
    found = carry(labels, torch.zeros(3, 2, 10), *masks)
    assert found.tolist() == [[-100, 5], [7, 8], [9, -100]]


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("mean_prob", KeyError, "unknown target 'mean_prob'; did you mean 'mean_probs'"),
        (3, TypeError, "a target must be a name"),
        (["gate", {"width": 3}], ValueError, "target 'gate' has no constant 'width'; known: size, lr"),
        (["mean_probs", {"weights": [1, 2, 3]}], ValueError, r"must have one number a teacher \(2\), got 3"),
        (["mean_loss", {"weights": [1, -1]}], ValueError, "weights of target 'mean_loss' must be at least 0, got -1"),
        (["sample", {"weights": [0, 0]}], ValueError, "must have a positive sum"),
        (["sample", {"seed": -1}], ValueError, "seed of target 'sample' must be at least 0"),
        (["agree", {"cap": 0.4}], ValueError, r"from 1/2 \(one over the teachers\) to 1, got 0.4"),
        (["agree", {"cap": 2}], ValueError, "to 1, got 2"),
        (["confidence", {"by": "logit"}], ValueError, "by of target 'confidence' must be one of"),
        (["confidence", {"softness": 0}], ValueError, "softness of target 'confidence' must be greater than 0"),
        (["gate", {"lr": 0}], ValueError, "lr of target 'gate' must be greater than 0"),
        (["route", {"column": 3}], TypeError, "column of target 'route' must be a name"),
        (["mean_logits", {"shift_each": 1}], TypeError, "shift_each of target 'mean_logits' must be True or False"),
    ],
    ids=str,
)
def test_wrong_targets(spec, error, message):
    with pytest.raises(error, match=message):
        make_target(spec, 2)


@pytest.mark.parametrize("name", ["ca_mkd", "gate"])
def test_labels_are_needed(name):
    results_S = Views({"logits": [numbers(ROWS, CLASSES)]})
    results_S.learned = torch.zeros(ROWS, 1)
    with pytest.raises(KeyError, match=f"target='{name}' needs 'labels' from adaptor_S"):
        blended(name, [{"logits": [numbers(ROWS, CLASSES)]}], moment_of(results_S))


@pytest.mark.parametrize(
    ("labels", "logits", "error", "message"),
    [
        (torch.zeros(ROWS), numbers(ROWS, CLASSES), TypeError, "labels must be classes"),
        (torch.zeros(ROWS, 2).long(), numbers(ROWS, CLASSES), ValueError, r"labels must have the shape .* \(5,\), got"),
        (torch.zeros(ROWS).long(), numbers(ROWS, 9), ValueError, "must have as many classes, got 3 and 9"),
    ],
    ids=["real", "shape", "classes"],
)
def test_labels_that_do_not_fit(labels, logits, error, message):
    results_S = Views({"logits": [numbers(ROWS, CLASSES)], "labels": [labels]})
    with pytest.raises(error, match=message):
        blended("ca_mkd", [{"logits": [logits]}], moment_of(results_S))


def test_weights_have_the_sum_one():
    assert checked_weights((1, 3), 2, "x") == [0.25, 0.75]
    assert checked_weights(None, 4, "x") == [0.25] * 4


def test_a_target_of_one_s_own():
    """Registered by its name, with constants of its own."""

    class Squared(MeanProbs):
        def log_weight(self, number, logits, labels, moment):
            return super().log_weight(number, logits, labels, moment) * 2

    TARGETS.add("squared")(Squared)
    try:
        logits = teachers_of(2)
        blend = blended(["squared", {"weights": [1, 3]}], [{"logits": [item]} for item in logits], moment_of())
    finally:
        del TARGETS["squared"]
    expected = (0.1 * torch.softmax(logits[0], -1) + 0.9 * torch.softmax(logits[1], -1)).log()
    assert torch.allclose(blend.views()["logits"][0], expected, atol=1e-6)
