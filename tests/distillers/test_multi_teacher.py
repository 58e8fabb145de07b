"""Several teachers: the mean of their logits, each under its own mask, and the features of each."""

import pytest
import torch
from torch import nn

from tests.conftest import adaptor, make_config
from tests.distillers.setups import Setup, batches, make_student, make_teacher
from textbrewer import DistillationConfig, MultiTeacherDistiller
from textbrewer.adaptors import Views
from textbrewer.distillers.multi_teacher import mean_logits

ROWS, LENGTH, CLASSES = 2, 4, 3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*rows):
    """Each row's kept positions, as text: "x" is kept."""
    return torch.tensor([[int(mark == "x") for mark in row] for row in rows])


# ---- the mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_mean_of_heads(count):
    teachers = [[numbers(ROWS, CLASSES, seed=n), numbers(ROWS, 2, seed=10 + n)] for n in range(count)]
    before = [[head.clone() for head in heads] for heads in teachers]
    found = mean_logits([Views({"logits": heads, "labels": [1]}) for heads in teachers])
    assert set(found) == {"logits"}
    for head in range(2):
        for row in range(ROWS):
            for column in range(teachers[0][head].shape[1]):
                expected = sum(heads[head][row, column].item() for heads in teachers) / count
                assert found["logits"][head][row, column].item() == pytest.approx(expected, abs=1e-6)
    assert all(
        torch.equal(a, b) for heads, old in zip(teachers, before, strict=True) for a, b in zip(heads, old, strict=True)
    )


def picked(logits, mask):
    return [logits[row, column] for row in range(len(mask)) for column in range(mask.shape[1]) if mask[row, column]]


@pytest.mark.parametrize(
    "masks",
    [
        [mask_of("xx..", "x..."), mask_of("xx..", "x...")],
        [mask_of("xx..", "x..."), mask_of("..xx", "...x")],
        [mask_of("xx..", "x..."), mask_of("....", ".xxx"), mask_of("x.x.", "...x")],
        [mask_of("xx..", "x..."), mask_of("xxx..."), mask_of(".x", ".x", "x.")],  # other lengths, other rows
        [mask_of("xx..", "x..."), None],
        [None, mask_of("xx..", "x...")],
        [None, mask_of("xx..", "x..."), mask_of("..xx", "...x")],
    ],
    ids=["the same", "others", "three", "lengths", "first only", "second only", "without, two others"],
)
def test_mean_under_each_teacher_s_mask(masks):
    """The first position that each picks is averaged with the first that the others pick, and so on."""
    given = next(mask for mask in masks if mask is not None)
    shapes = [(given if mask is None else mask).shape for mask in masks]
    logits = [numbers(*shape, CLASSES, seed=seed) for seed, shape in enumerate(shapes)]
    views = [
        Views({"logits": [item], **({} if mask is None else {"logits_mask": [mask]})})
        for item, mask in zip(logits, masks, strict=True)
    ]
    found = mean_logits(views)
    rows = [picked(item, given if mask is None else mask) for item, mask in zip(logits, masks, strict=True)]
    expected = torch.stack([sum(each) / len(masks) for each in zip(*rows, strict=True)])
    ours = torch.stack(picked(found["logits"][0], found["logits_mask"][0]))
    assert torch.allclose(ours, expected, atol=1e-6)


def test_teachers_without_logits():
    assert mean_logits([Views({"hidden": []}), Views({})]) == {}


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        ([{"logits": [numbers(2, 3)]}, {}], KeyError, r"return 'logits' or none of them; only those of \[0\] did"),
        ([{"logits": [numbers(2, 3)]}, {"logits": [numbers(2, 3)] * 2}], ValueError, r"as many heads, got \[1, 2\]"),
        (
            [{"logits": [numbers(2, 3)]}, {"logits": [numbers(2, 4)]}],
            ValueError,
            r"same shape, got \[\(2, 3\), \(2, 4\)\]",
        ),
        (
            [
                {"logits": [numbers(2, 4, 3)], "logits_mask": [mask_of("xx..", "x...")]},
                {"logits": [numbers(2, 4, 3)], "logits_mask": [mask_of("xx..", "....")]},
            ],
            ValueError,
            r"logits_mask of adaptor_T\[0\] and adaptor_T\[1\] must pick as many positions, got 3 and 2",
        ),
    ],
    ids=["some without", "heads", "shapes", "masks"],
)
def test_teachers_that_do_not_fit(views, error, message):
    with pytest.raises(error, match=message):
        mean_logits([Views(item) for item in views])


# ---- training ----------------------------------------------------------------------------------------------------


def make(folder, teachers, adaptor_T=adaptor, student=None, adaptor_S=adaptor, **config):
    settings = DistillationConfig(**config)
    student = student or make_student(dropout=0.0)
    return MultiTeacherDistiller(make_config(folder), settings, teachers, student, adaptor_T, adaptor_S)


def first_losses(distiller, data=None):
    seen, compute = [], distiller.compute_loss

    def watched(results_S, results_T):
        total, parts = compute(results_S, results_T)
        seen.append({name: value.item() for name, value in parts.items()})
        return total, parts

    distiller.compute_loss = watched
    distiller.train(torch.optim.SGD(distiller.model_S.parameters(), lr=0.1), data or batches(), num_steps=1)
    return seen[0]


def test_matches_of_each_teacher(tmp_path):
    """Each match reads the teacher it names, through a projection of that teacher's width."""
    teachers = [make_teacher(1), make_teacher(3), make_student(dropout=0.0)]
    match = {"layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    matches = [
        {**match, "layer_T": 2, "teacher": 1, "proj": ["linear", 32, 48]},
        {**match, "layer_T": 0, "teacher": 2},
        {**match, "layer_T": 1, "proj": ["linear", 32, 48]},
    ]
    distiller = make(tmp_path, teachers, intermediate_matches=matches)
    (batch,) = batches(4)
    with torch.no_grad():
        state = distiller.model_S.train()(**batch)["hidden"][1]
        states = [teacher.eval()(**batch)["hidden"] for teacher in teachers]
        pairs = [
            (distiller.projections[0](state), states[1][2]),
            (state, states[2][0]),
            (distiller.projections[2](state), states[0][1]),
        ]
    kept = batch["attention_mask"].bool()
    expected = [(first - second)[kept].square().mean().item() for first, second in pairs]
    found = first_losses(distiller, [batch])
    names = ["hidden_hidden_mse_1_2", "hidden_hidden_mse_1_0", "hidden_hidden_mse_1_1"]
    assert [found[f"unweighted_{name}"] for name in names] == pytest.approx(expected, rel=1e-5)


def test_masks_of_each_teacher(tmp_path):
    """Teachers of other tokenisations: each adaptor picks its own positions, as many as the student's."""
    masks = [mask_of(*["xx......"] * 4), mask_of(*["......xx"] * 4), mask_of(*["x......x"] * 4)]

    def masked(mask):
        return lambda batch, outputs: {"logits": outputs["logits"], "logits_mask": mask}

    teachers = [make_teacher(1, by_token=True), make_teacher(3, by_token=True)]
    student = make_student(dropout=0.0, by_token=True)
    distiller = make(tmp_path, teachers, [masked(masks[0]), masked(masks[1])], student, masked(masks[2]), temperature=1)
    (batch,) = batches(4, by_token=True)
    with torch.no_grad():
        rows = [
            torch.stack(picked(model.eval()(**batch)["logits"], mask))
            for model, mask in zip([*teachers, student], masks, strict=True)
        ]
    expected = -(((rows[0] + rows[1]) / 2).softmax(-1) * rows[2].log_softmax(-1)).sum(-1).mean()
    assert first_losses(distiller, [batch])["unweighted_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_probability_shift_of_the_mean(tmp_path):
    teachers, student = [make_teacher(1), make_teacher(3)], make_student(dropout=0.0)
    (batch,) = batches(4)
    with torch.no_grad():
        mean = sum(teacher.eval()(**batch)["logits"] for teacher in teachers) / 2
        logits = student(**batch)["logits"]
    target = mean.tolist()
    for row, label in zip(target, batch["labels"].tolist(), strict=True):
        top = row.index(max(row))
        row[top], row[label] = row[label], row[top]
    expected = -(torch.tensor(target).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    distiller = make(tmp_path, teachers, student=student, probability_shift=True, temperature=1)
    assert first_losses(distiller, [batch])["unweighted_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_compute_loss_gets_a_list(tmp_path):
    kinds = []

    class Mine(MultiTeacherDistiller):
        def compute_loss(self, results_S, results_T):
            kinds.append((type(results_S), [type(results) for results in results_T]))
            return super().compute_loss(results_S, results_T)

    Setup(tmp_path, Mine).train(num_steps=1)
    assert kinds == [(Views, [Views, Views])]


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_containers_of_teachers(container, tmp_path):
    distiller = make(tmp_path, container([make_teacher(1), make_teacher(3)]))
    assert first_losses(distiller)["unweighted_kd_loss"] > 0


def test_one_teacher_in_a_list_is_that_teacher(tmp_path):
    losses = [
        first_losses(make(tmp_path / "several", [make_teacher()])),
        first_losses(make(tmp_path / "twice", [make_teacher(), make_teacher()])),
    ]
    single = Setup(tmp_path / "one", "BasicDistiller", student=make_student(dropout=0.0))
    seen = single.losses()
    single.train(num_steps=1)
    for found in losses:
        assert found["unweighted_kd_loss"] == pytest.approx(seen[0]["unweighted_kd_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("models", "adaptors", "config", "error", "message"),
    [
        (make_teacher, lambda: adaptor, {}, TypeError, "model_T must be a list of teachers, got Encoder"),
        (list, lambda: adaptor, {}, TypeError, "model_T must be a list of teachers"),
        (lambda: {"a": make_teacher()}, lambda: adaptor, {}, TypeError, "model_T must be a list of teachers, got dict"),
        (
            lambda: [make_teacher()] * 2,
            lambda: [adaptor] * 3,
            {},
            ValueError,
            r"adaptor_T must be one adaptor, or one a teacher \(2\), got 3",
        ),
        (lambda: [make_teacher(), None], lambda: adaptor, {}, TypeError, "model_T must be a torch module, got None"),
        (
            lambda: [make_teacher()] * 2,
            lambda: adaptor,
            {"teacher": 2},
            ValueError,
            "teacher of match 'hidden_hidden_mse_0_0' must be less than the number of teachers, 2, got 2",
        ),
    ],
    ids=["no list", "empty", "dict", "adaptors", "None", "teacher's number"],
)
def test_wrong_teachers(models, adaptors, config, error, message, tmp_path):
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1, **config}
    matches = [match] if config else []
    with pytest.raises(error, match=message):
        make(tmp_path, models(), adaptors(), intermediate_matches=matches)
