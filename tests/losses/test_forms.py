"""Reduced forms of teacher features: the loss of the form is the loss of the feature."""

import functools

import pytest
import torch

from tests.losses.samples import MASK, SHAPE, wave
from textbrewer import MATCH_LOSS_MAP
from textbrewer.losses.forms import TeacherForm, form_of, teacher_form

WIDTH, HEADS = 6, 3
PLAIN = {
    "hidden_mse", "cos", "attention_mse", "attention_ce", "attention_kl", "relation_kl", "sp", "cka", "vid",
    "layer_norm_mse", "state_mean", "state_variance",
}  # fmt: skip
POOLED = ("rkd_distance", "rkd_angle", "crd", "embed_distill")
BATCH, LENGTH = SHAPE


def states(phase, dtype, count=2):
    pair = [wave(*SHAPE, WIDTH, phase=phase + number, dtype=dtype) for number in range(2)]
    return pair if count == 2 else pair[0]


def scores(phase, dtype, heads=HEADS):
    return wave(BATCH, heads, LENGTH, LENGTH, phase=phase, dtype=dtype)


FEATURES = {
    "pkd": functools.partial(states, count=1),
    "fsp": states,
    "gram": states,
    "nst": states,
    "mmd": states,
    "attention_mse_sum": scores,
    "attention_ce_mean": scores,
    "at": functools.partial(states, count=1),
    **dict.fromkeys(POOLED, functools.partial(states, count=1)),
}
SHAPES = {
    "pkd": (BATCH, WIDTH),
    "fsp": (BATCH, WIDTH, WIDTH),
    "gram": (BATCH, WIDTH, WIDTH),
    "nst": (BATCH, LENGTH, LENGTH),
    "mmd": (BATCH, LENGTH, LENGTH),
    "attention_mse_sum": (BATCH, LENGTH, LENGTH),
    "attention_ce_mean": (BATCH, LENGTH, LENGTH),
    "at": (BATCH, LENGTH),
    **dict.fromkeys(POOLED, (BATCH, WIDTH)),
}


def test_which_losses_have_a_form():
    built_in = {name for name in MATCH_LOSS_MAP if name in FEATURES or name in PLAIN}
    assert {name for name in built_in if form_of(MATCH_LOSS_MAP[name]) is not None} == set(FEATURES)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FEATURES)
def test_the_loss_and_its_gradient_are_those_of_the_feature(name, dtype, masked):
    """In float32 to the last bit: the form is what the loss computes first."""
    loss, mask = MATCH_LOSS_MAP[name], MASK if masked else None
    teacher = FEATURES[name](3.0, dtype)
    results = []
    for feature in (teacher, form_of(loss).reduce(teacher, mask)):
        student = FEATURES[name](0.0, dtype)
        leaves = student if isinstance(student, list) else [student]
        for leaf in leaves:
            leaf.requires_grad_()
        value = loss(student, feature, mask)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    assert float(results[0][0]) > 1e-5
    for whole, reduced in zip(*results, strict=True):
        assert torch.equal(whole, reduced)


@pytest.mark.parametrize("name", FEATURES)
def test_the_form_has_rows_first_and_names_its_positions(name):
    form, teacher = form_of(MATCH_LOSS_MAP[name]), FEATURES[name](3.0, torch.float32)
    whole = form.reduce(teacher, MASK)
    assert whole.shape == SHAPES[name]
    assert form.positions == tuple(place for place, size in enumerate(whole.shape) if place > 0 and size == LENGTH)
    # Row by row it is the same.
    for row in range(BATCH):
        one = [state[row : row + 1] for state in teacher] if isinstance(teacher, list) else teacher[row : row + 1]
        torch.testing.assert_close(form.reduce(one, MASK[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("name", FEATURES)
def test_the_kept_part_depends_on_the_mask_only_where_it_says_so(name):
    form, teacher = form_of(MATCH_LOSS_MAP[name]), FEATURES[name](3.0, torch.float64)
    masked, whole = form.reduce(teacher, MASK), form.reduce(teacher, None)
    for row in range(BATCH):
        kept = MASK[row].nonzero()[:, 0]
        a, b = masked[row], whole[row]
        for dimension in form.positions:
            a, b = a.index_select(dimension - 1, kept), b.index_select(dimension - 1, kept)
        assert torch.allclose(a, b) is (not form.uses_mask or len(kept) == LENGTH)


def test_forms_against_plain_sums():
    """By the definitions, element by element."""
    first, second = states(3.0, torch.float64)
    gram = form_of(MATCH_LOSS_MAP["fsp"]).reduce([first, second], MASK)
    nst = form_of(MATCH_LOSS_MAP["nst"]).reduce([first, second], None)
    for b in range(BATCH):
        kept = [i for i in range(LENGTH) if MASK[b, i]]
        for i in range(WIDTH):
            for j in range(WIDTH):
                expected = sum(float(first[b, n, i] * second[b, n, j]) for n in kept) / len(kept)
                assert float(gram[b, i, j]) == pytest.approx(expected)
        for i in range(LENGTH):
            for j in range(LENGTH):
                expected = sum(float(first[b, i, h] * second[b, j, h]) for h in range(WIDTH)) / WIDTH
                assert float(nst[b, i, j]) == pytest.approx(expected)
    heads = scores(3.0, torch.float64)
    torch.testing.assert_close(form_of(MATCH_LOSS_MAP["attention_mse_sum"]).reduce(heads, None), sum(heads.unbind(1)))
    mean = form_of(MATCH_LOSS_MAP["attention_ce_mean"]).reduce(heads, None)
    torch.testing.assert_close(mean, sum(heads.unbind(1)) / HEADS)
    torch.testing.assert_close(form_of(MATCH_LOSS_MAP["pkd"]).reduce(first, MASK), first[:, 0])
    energies = form_of(MATCH_LOSS_MAP["at"]).reduce(first, MASK)
    torch.testing.assert_close(energies, sum(channel * channel for channel in first.unbind(-1)))
    for name in POOLED:
        mean = form_of(MATCH_LOSS_MAP[name]).reduce(first, MASK)
        for b in range(BATCH):
            kept = int(MASK[b].sum())
            torch.testing.assert_close(mean[b], sum(first[b, :kept].unbind(0)) / kept)


@pytest.mark.parametrize("name", ["fsp", "nst", "attention_mse_sum", "attention_ce_mean", "at", *POOLED])
def test_half_precision_features_are_reduced_in_full_precision(name):
    teacher = FEATURES[name](3.0, torch.bfloat16)
    assert form_of(MATCH_LOSS_MAP[name]).reduce(teacher, MASK).dtype == torch.float32


@pytest.mark.parametrize("name", ["fsp", "nst"])
def test_a_form_of_another_shape_is_refused(name):
    form = form_of(MATCH_LOSS_MAP[name]).reduce(states(3.0, torch.float32), MASK)
    with pytest.raises(
        ValueError, match=r"products of student and teacher must have the same shape, got .*same tokens"
    ):
        MATCH_LOSS_MAP[name](states(0.0, torch.float32), form[:, :-1], MASK)


@pytest.mark.parametrize("name", ["fsp", "nst", "attention_mse_sum", "attention_ce_mean"])
def test_a_feature_of_the_wrong_kind_is_refused(name):
    wrong = states(0.0, torch.float32, 1) if name in ("fsp", "nst") else states(0.0, torch.float32)
    with pytest.raises(TypeError):
        form_of(MATCH_LOSS_MAP[name]).reduce(wrong, None)


def test_marks_are_found_also_through_partials():
    form = TeacherForm("mean", lambda feature, mask: feature.mean(dim=1))

    @teacher_form(form)
    def loss(state_S, state_T, mask=None, scale=1.0):
        return scale * (state_S - state_T).sum()

    assert form_of(loss) is form
    assert form_of(functools.partial(functools.partial(loss, scale=2.0), mask=None)) is form
    assert form_of(lambda state_S, state_T, mask=None: 0) is None
    assert loss(torch.ones(2), torch.zeros(2)) == 2
