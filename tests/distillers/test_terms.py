"""The parts of the loss: pure functions from views to terms."""

import types
import weakref

import pytest
import torch

from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.losses.samples import PAIRS, feature_of
from textbrewer import (
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    CustomMatch,
    DistillationConfig,
    GeneralDistiller,
    IntermediateMatch,
)
from textbrewer.adaptors import Views
from textbrewer.distillers import terms
from textbrewer.distillers.knowledge import KnowledgeLoss, accepts
from textbrewer.losses import averaged_over
from textbrewer.matching import plan_matches

ROWS, LENGTH, WIDTH, CLASSES = 3, 5, 6, 4
MASK = (torch.arange(LENGTH) < torch.tensor([[5], [2], [3]])).long()
NOW = terms.Now(1.0, 1.0)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(count, width=WIDTH, seed=0):
    return [numbers(ROWS, LENGTH, width, seed=seed + number) for number in range(count)]


def match(loss="hidden_mse", layer_T=0, layer_S=1, feature="hidden", weight=1.0, **more):
    return IntermediateMatch(layer_T, layer_S, weight, loss, feature, **more)


# ---- the KD term -------------------------------------------------------------------------------------------------


def test_kd_term():
    logits_S, logits_T = numbers(ROWS, CLASSES), numbers(ROWS, CLASSES, seed=1)
    knowledge = KnowledgeLoss(KD_LOSS_MAP["ce"], 3.0)
    (term,) = terms.kd_terms(Views({"logits": [logits_S]}), Views({"logits": [logits_T]}), knowledge, terms.Now(0.7, 0))
    assert (term.name, term.weight, term.averaged_over) == ("kd_loss", 0.7, "rows")
    expected = -((logits_T / 3).softmax(-1) * (logits_S / 3).log_softmax(-1)).sum(-1).mean()
    assert term.value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("shapes", "masked", "kind"),
    [
        ([(ROWS, CLASSES)], False, "rows"),
        ([(ROWS, CLASSES)], True, "rows"),
        ([(ROWS, LENGTH, CLASSES)], False, "cells"),
        ([(ROWS, LENGTH, CLASSES)], True, "logits"),
        ([(ROWS, LENGTH, CLASSES)] * 2, True, "logits"),
        ([(ROWS, LENGTH, CLASSES), (ROWS, CLASSES)], True, None),  # a sum of two kinds of mean
        ([(ROWS, CLASSES), (ROWS, LENGTH, CLASSES)], False, None),
    ],
)
def test_what_the_kd_term_averages_over(shapes, masked, kind):
    views = {"logits": [numbers(*shape) for shape in shapes]}
    if masked:
        views["logits_mask"] = [MASK]
    knowledge = KnowledgeLoss(KD_LOSS_MAP["mse"], 1.0)
    (term,) = terms.kd_terms(Views(views), Views(views), knowledge, NOW)
    assert term.averaged_over == kind


def test_temperature_schedule_of_the_logits():
    calls = []

    def schedule(logits_S, logits_T, base):
        calls.append((logits_S, logits_T, base))
        return 10.0

    logits_S, logits_T = numbers(ROWS, CLASSES), numbers(ROWS, CLASSES, seed=1)
    knowledge = KnowledgeLoss(KD_LOSS_MAP["mse"], 4.0, schedule)
    found = knowledge(logits_S, logits_T, None)
    assert found.item() == pytest.approx(((logits_S - logits_T) / 10).square().mean().item())
    assert calls == [(logits_S, logits_T, 4.0)]


def test_accepts_mask():
    assert all(accepts(KD_LOSS_MAP[name], "mask") for name in ("ce", "mse", "kl", "sigmoid"))
    assert not accepts(lambda logits_S, logits_T, temperature: 0, "mask")
    assert not accepts(dict.fromkeys, "mask")  # written in C
    assert KnowledgeLoss(KD_LOSS_MAP["ce"], 1.0).takes_mask
    assert not KnowledgeLoss(KD_LOSS_MAP["ce"], 1.0, lambda logits_S, logits_T, base: base).takes_mask


# ---- matches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", MATCH_LOSS_MAP)
def test_match_terms(name, masked):
    """Each match loss on the features that the match names, under the student's mask."""
    pair, feature = name in PAIRS, feature_of(name)
    width = LENGTH if feature in ("attention", "scores") else WIDTH
    student, teacher = layers(3, width, seed=1), layers(3, width, seed=5)
    if name == "vid":  # means and variances
        student = [torch.cat([item, item.abs() + 1], dim=-1) for item in student]
    if feature != "hidden":
        student, teacher = ([item.unsqueeze(1) for item in side] for side in (student, teacher))
    layer_T, layer_S = ([2, 0], [1, 2]) if pair else (2, 1)
    views_S = {feature: student, **({"inputs_mask": MASK} if masked else {})}
    plan = plan_matches([match(name, layer_T, layer_S, feature, weight=3.0)])
    (term,) = terms.match_terms(Views(views_S), [Views({feature: teacher, "inputs_mask": MASK * 0})], plan)
    picked_S = [student[1], student[2]] if pair else student[1]
    picked_T = [teacher[2], teacher[0]] if pair else teacher[2]
    expected = MATCH_LOSS_MAP[name](picked_S, picked_T, mask=MASK if masked else None)
    assert term.value.item() == pytest.approx(expected.item())
    assert expected.item() != 0
    assert term.weight == 3.0
    assert term.name == f"{feature}_{name}_{'1-2_2-0' if pair else '1_2'}"


def test_projected_features_count_before_the_adaptor_s():
    plan = plan_matches([match(), match()])
    student, teacher, projected = layers(2), layers(2, seed=7), numbers(ROWS, LENGTH, WIDTH, seed=9)
    first, second = terms.match_terms(Views({"hidden": student}, {1: projected}), [Views({"hidden": teacher})], plan)
    assert first.value.item() == pytest.approx((student[1] - teacher[0]).square().mean().item())
    assert second.value.item() == pytest.approx((projected - teacher[0]).square().mean().item())


def test_matches_name_their_teacher():
    teachers = [Views({"hidden": layers(1, seed=seed)}) for seed in (3, 4, 5)]
    student = layers(2)
    plan = plan_matches([match(teacher=number) for number in (2, 0)])
    found = terms.match_terms(Views({"hidden": student}), teachers, plan)
    expected = [(student[1] - teachers[number]["hidden"][0]).square().mean().item() for number in (2, 0)]
    assert [term.value.item() for term in found] == pytest.approx(expected)


def test_what_match_terms_average_over():
    student, scores = layers(2), [numbers(ROWS, 1, LENGTH, LENGTH)] * 2
    plan = plan_matches([match(), match("attention_mse", feature="attention"), match("pkd")])
    views = {"hidden": student, "attention": scores}
    for mask, kinds in ((MASK, ["positions", "pairs", "rows"]), (None, ["cells", "cell_pairs", "rows"])):
        given = views if mask is None else {**views, "inputs_mask": mask}
        found = terms.match_terms(Views(given), [Views(views)], plan)
        assert [term.averaged_over for term in found] == kinds


def test_custom_terms():
    outputs_S, outputs_T = layers(2), layers(2, seed=5)
    calls = []

    def loss(output_S, output_T, mask_S, mask_T):
        calls.append((mask_S, mask_T))
        return (output_S - output_T).abs().mean()

    matches = [CustomMatch("a", "b", 2.0, loss), CustomMatch("a", "b", 3.0, "hidden_mse")]
    views = [
        Views({"inputs_mask": mask}, captured=dict(enumerate(outputs)))
        for mask, outputs in ((MASK, outputs_S), (MASK.flip(0), outputs_T))
    ]
    found = terms.custom_terms(*views, matches)
    assert [(term.name, term.weight) for term in found] == [("custom_match_0", 2.0), ("custom_match_1", 3.0)]
    kept = MASK.bool()
    expected = [
        (outputs_S[0] - outputs_T[0]).abs().mean().item(),
        (outputs_S[1] - outputs_T[1])[kept].square().mean().item(),
    ]
    assert [term.value.item() for term in found] == pytest.approx(expected)
    assert torch.equal(calls[0][0], MASK)
    assert torch.equal(calls[0][1], MASK.flip(0))


# ---- losses, total -----------------------------------------------------------------------------------------------


def test_hard_label_terms():
    losses = [torch.tensor(2.0), torch.tensor([1.0, 5.0, 6.0]), torch.tensor([[4.0]])]
    (term,) = terms.hard_label_terms(Views({"losses": losses}), terms.Now(0, 0.5))
    assert (term.name, term.weight, term.averaged_over) == ("hard_label_loss", 0.5, "labels")
    assert term.value.item() == 2 + 4 + 4  # a loss by row or by GPU counts with its mean
    assert terms.hard_label_terms(Views({}), NOW) == []


def term_of(name, value, weight, kind="rows"):
    return terms.Term(name, torch.tensor(value), weight, kind)


def test_total():
    parts = [term_of("kd_loss", 2.0, 3.0), term_of("first", 5.0, 0.5), term_of("second", 7.0, 0)]
    loss, logs = terms.total(parts, NOW)
    assert loss.item() == 2 * 3 + 5 * 0.5
    assert logs == {"unweighted_kd_loss": 2.0, "unweighted_first": 5.0, "unweighted_second": 7.0}
    with pytest.raises(ValueError, match=r"nothing to optimise: .*'logits' nor 'losses', and there are no matches"):
        terms.total([], NOW)


def test_total_with_shares():
    """With exact accumulation each term counts by what it averages over; the logs stay as they are."""
    share = {"rows": torch.tensor(0.5), "positions": torch.tensor(2.0)}
    parts = [term_of("a", 3.0, 1.0), term_of("b", 5.0, 2.0, "positions")]
    loss, logs = terms.total(parts, terms.Now(1, 1, share))
    assert loss.item() == 3 * 0.5 + 5 * 2 * 2
    assert logs == {"unweighted_a": 3.0, "unweighted_b": 5.0}
    for kind in (None, "pairs"):
        with pytest.raises(ValueError, match=r"cannot weigh 'c': .*averaged_over, or use 'micro_batch'"):
            terms.total([*parts, term_of("c", 1.0, 1.0, kind)], terms.Now(1, 1, share))


def test_a_loss_of_the_user_s_tells_what_it_averages_over():
    @averaged_over("positions")
    def mine(state_S, state_T, mask=None):
        return (state_S - state_T).abs().mean()

    MATCH_LOSS_MAP["mine"] = mine
    try:
        plan = plan_matches([match("mine")])
        views = Views({"hidden": layers(2), "inputs_mask": MASK})
        (term,) = terms.match_terms(views, [views], plan)
        assert term.averaged_over == "positions"
    finally:
        del MATCH_LOSS_MAP["mine"]


# ---- weight 0 ----------------------------------------------------------------------------------------------------


def test_terms_without_weight_cost_no_gradient():
    idle, counted = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    parts = [terms.Term("idle", idle * 5, 0.0, None), terms.Term("counted", counted * 7, 2.0, "rows")]
    for share, factor in ((None, 1.0), ({"rows": torch.tensor(0.5)}, 0.5)):
        # What "idle" averages over is not known; but without a weight it needs no share.
        loss, logs = terms.total(parts, terms.Now(1, 1, share))
        assert loss.item() == 3 * 7 * 2 * factor
        found = torch.autograd.grad(loss, [idle, counted], allow_unused=True, retain_graph=True)
        assert found == (None, torch.tensor(14.0 * factor))
        assert {name: value.item() for name, value in logs.items()} == {"unweighted_idle": 10, "unweighted_counted": 21}
        assert not logs["unweighted_idle"].requires_grad


def test_without_any_weight_the_loss_has_a_graph():
    value = torch.tensor(2.0, requires_grad=True)
    loss, logs = terms.total([terms.Term("a", value * 3, 0.0, "rows")], NOW)
    assert torch.autograd.grad(loss, value)[0] == 0
    assert logs["unweighted_a"].item() == 6


@pytest.mark.parametrize(
    ("keys", "now", "weights", "expected"),
    [
        (("logits",), (1, 0), (), True),
        (("logits", "losses"), (0, 0), (), False),
        (("losses",), (1, 0), (), False),
        (("losses",), (0, 0.5), (), True),
        (("logits",), (0, 0.5), (), False),
        ((), (0, 0), (0, 2), True),
        ((), (1, 1), (0, 0), False),
    ],
)
def test_some_weight(keys, now, weights, expected):
    views = Views({key: [torch.ones(2, 2)] for key in keys})
    plan = plan_matches([match(weight=weight) for weight in weights])
    custom = [CustomMatch("a", "b", weight, "hidden_mse") for weight in weights]
    for matches in ((plan, []), ([], custom)):
        assert terms.some_weight(views, *matches, terms.Now(*now)) is expected


class Counted:
    """A loss that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, student, teacher, *others, **options):
        self.calls += 1
        return (student - teacher).square().mean()


@pytest.fixture
def losses():
    """A KD loss, two match losses and a custom one that count."""
    found = [Counted() for _ in range(4)]
    KD_LOSS_MAP["counted"], MATCH_LOSS_MAP["first"], MATCH_LOSS_MAP["second"] = found[:3]
    yield found
    del KD_LOSS_MAP["counted"], MATCH_LOSS_MAP["first"], MATCH_LOSS_MAP["second"]


def weighted(folder, losses, kd, first, second, custom, hard, **config):
    """Train three steps; return how often each loss was called, and the logged names of each step."""
    teacher, student = Encoder(layers=2, width=32, seed=1), Encoder(layers=2, width=32, seed=2)
    matches = [
        {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": name, "weight": weight}
        for name, weight in (("first", first), ("second", second))
    ]
    settings = DistillationConfig(
        kd_loss_type="counted", kd_loss_weight=kd, hard_label_weight=hard, intermediate_matches=matches, **config
    )
    distiller = GeneralDistiller(
        make_config(folder), settings, teacher, student, adaptor, adaptor,
        custom_matches=[CustomMatch("layers.0", "layers.0", custom, losses[3])],
    )  # fmt: skip
    names, compute = [], distiller.compute_loss

    def watched(results_S, results_T):
        total, logs = compute(results_S, results_T)
        names.append({name.removeprefix("unweighted_") for name in logs})
        return total, logs

    distiller.compute_loss = watched
    distiller.train(torch.optim.SGD(student.parameters(), 0.01), list(make_loader(12)), num_steps=3)
    return [loss.calls for loss in losses], names


NAMES = ["kd_loss", "hidden_first_1_1", "hidden_second_1_1", "custom_match_0"]


@pytest.mark.parametrize(
    "weights", [(1, 1, 1, 1, 1), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 2, 1), (0, 0, 0, 0, 1), (0, 0, 1, 1, 0)]
)
def test_no_work_for_terms_of_weight_0(tmp_path, losses, weights):
    calls, names = weighted(tmp_path, losses, *weights)
    assert calls == [3 if weight else 0 for weight in weights[:4]]
    expected = {name for name, weight in zip(NAMES, weights[:4], strict=True) if weight}
    assert names == [expected | {"hard_label_loss"}] * 3


def test_where_nothing_has_a_weight_all_is_computed(tmp_path, losses):
    """A schedule at its end or beginning may leave nothing; the step is then one of loss 0."""
    calls, names = weighted(tmp_path, losses, 1, 0, 0, 0, 0, kd_loss_weight_scheduler="linear_growth")
    assert calls == [3, 1, 1, 1]
    assert names == [{*NAMES, "hard_label_loss"}, *[{"kd_loss", "hard_label_loss"}] * 2]


def test_a_schedule_switches_terms_on_and_off(tmp_path, losses):
    calls, names = weighted(tmp_path, losses, 1, 0, 1, 0, 0, kd_loss_weight_scheduler="linear_growth")
    assert calls == [2, 0, 3, 0]
    assert [NAMES[0] in found for found in names] == [False, True, True]


def test_processes_that_must_give_every_parameter_a_gradient_skip_nothing(tmp_path, losses, monkeypatch):
    """``find_unused_parameters=False`` with several processes: torch waits for the gradient of each parameter."""
    monkeypatch.setattr(GeneralDistiller, "_may_skip", lambda self: False)
    assert weighted(tmp_path, losses, 0, 1, 0, 0, 0)[0] == [3] * 4


@pytest.mark.parametrize(("world", "find", "expected"), [(1, False, True), (2, True, True), (2, False, False)])
def test_may_skip(tmp_path, world, find, expected):
    teacher, student = Encoder(seed=1), Encoder(seed=2)
    config = make_config(tmp_path, find_unused_parameters=find)
    distiller = GeneralDistiller(config, DistillationConfig(), teacher, student, adaptor, adaptor)
    distiller._runtime = types.SimpleNamespace(world=world)
    assert distiller._may_skip() is expected


# ---- memory ------------------------------------------------------------------------------------------------------


class Mark:
    """Lives as long as the graph that it is in."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, mark):
        ctx.mark = mark
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("options", [{}, {"stack_matches": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("watched", [False, True])
def test_nothing_of_a_step_outlives_it(tmp_path, options, watched):
    """When the teacher has run for the next batch, no tensor of the step before is left, nor of its graph."""
    alive, counts = [], []

    def remember(results):
        for value in results.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    alive.append(weakref.ref(tensor))

    def teacher_adaptor(batch, outputs):
        counts.append(sum(reference() is not None for reference in alive))
        alive.clear()
        views = adaptor(batch, outputs)
        remember({key: views[key] for key in ("logits", "hidden", "attention")})
        return views

    def student_adaptor(batch, outputs):
        views = adaptor(batch, outputs)
        mark = Mark()
        alive.append(weakref.ref(mark))
        views["hidden"] = [*views["hidden"][:-1], Marked.apply(views["hidden"][-1], mark)]
        remember({key: views[key] for key in ("logits", "hidden", "attention", "losses")})
        return views

    class Watched(GeneralDistiller):
        def compute_loss(self, results_S, results_T):
            total, logs = super().compute_loss(results_S, results_T)
            remember({"total": total, **logs})
            return total, logs

    teacher, student = Encoder(layers=2, width=32, seed=1), Encoder(layers=2, width=32, seed=2)
    matches = [
        {"layer_T": number, "layer_S": number, "feature": "hidden", "loss": "cos", "weight": 1} for number in (1, 2)
    ]
    settings = DistillationConfig(hard_label_weight=1, intermediate_matches=matches)
    kind = Watched if watched else GeneralDistiller
    config = make_config(tmp_path, **options)
    distiller = kind(config, settings, teacher, student, teacher_adaptor, student_adaptor)
    distiller.train(torch.optim.SGD(student.parameters(), 0.01), list(make_loader(12)), num_steps=3)
    assert len(counts) >= 3
    assert counts == [0] * len(counts)


def test_layers_that_no_loss_reads_are_let_go_before_the_student_runs(tmp_path):
    teacher, student = Encoder(layers=4, width=32, seed=1), Encoder(layers=2, width=32, seed=2)
    layers, alive = [], []

    def teacher_adaptor(batch, outputs):
        layers[:] = [weakref.ref(state) for state in outputs["hidden"]]
        return adaptor(batch, outputs)

    student.register_forward_pre_hook(lambda *_: alive.append([layer() is not None for layer in layers]))
    matches = [{"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]
    settings = DistillationConfig(intermediate_matches=matches)
    distiller = GeneralDistiller(make_config(tmp_path), settings, teacher, student, teacher_adaptor, adaptor)
    distiller.train(torch.optim.SGD(student.parameters(), 0.01), list(make_loader(12)), num_steps=3)
    assert alive == [[True] * 5, *[[False, False, True, False, False]] * 2]
