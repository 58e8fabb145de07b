"""Match losses computed together give what each gives on its own."""

import pytest
import torch

from tests.distillers.setups import Setup, weights
from tests.losses.samples import PAIRS, feature_of
from textbrewer import MATCH_LOSS_MAP
from textbrewer.distillers.stacking import Stacking, make_stacking

ROWS, LENGTH, WIDTH = 3, 5, 4
MASK = (torch.arange(LENGTH) < torch.tensor([[5], [2], [3]])).long()


def features(count, shape=(ROWS, LENGTH, WIDTH), seed=0, student=True):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).requires_grad_(student) for _ in range(count)]


def both(stacking, losses, student, teacher, mask):
    """Values and gradients of the weighted sum, together and one by one."""
    results = []
    for values in (
        stacking.values(losses, student, teacher, mask),
        [loss(s, t, mask=mask) for loss, s, t in zip(losses, student, teacher, strict=True)],
    ):
        leaves = [leaf for item in student for leaf in (item if isinstance(item, list) else [item])]
        total = sum((number + 1) * value for number, value in enumerate(values))
        results.append((torch.stack(values), torch.autograd.grad(total, leaves)))
    return results


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", MATCH_LOSS_MAP)
def test_values_and_gradients(name, masked):
    loss, mask = MATCH_LOSS_MAP[name], MASK if masked else None
    shapes = {"hidden": (ROWS, LENGTH, WIDTH), "value": (ROWS, 2, LENGTH, WIDTH)}
    shape = shapes.get(feature_of(name), (ROWS, 2, LENGTH, LENGTH))
    student, teacher = features(3, shape), features(3, shape, seed=1, student=False)
    if name == "vid":  # means and variances
        student = [torch.cat([item, item.abs() + 1], dim=-1).detach().requires_grad_() for item in student]
    if name in PAIRS:
        student, teacher = ([[item, item * 0.5] for item in side] for side in (student, teacher))
        student = [[item[0].detach().requires_grad_(), item[1].detach().requires_grad_()] for item in student]
    stacking = Stacking()
    for _ in range(2):  # the first time is the comparison
        together, alone = both(stacking, [loss] * 3, student, teacher, mask)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


def counted(loss):
    calls = []

    def counting(state_S, state_T, mask=None):
        calls.append(tuple(state_S.shape))
        return loss(state_S, state_T, mask=mask)

    return counting, calls


def test_one_call_for_those_that_fit_together():
    loss, calls = counted(MATCH_LOSS_MAP["hidden_mse"])
    other = MATCH_LOSS_MAP["cos"]
    wide = (ROWS, LENGTH, 7)
    student = [*features(2), *features(1, wide), *features(2, seed=3)]
    teacher = [*features(2, seed=5), *features(1, wide, seed=6), *features(2, seed=7)]
    losses = [loss, loss, loss, other, loss]
    stacking = Stacking()
    for expected in (1 + 3 + 1, 2):  # the wide one alone; three one by one and together; then only together
        calls.clear()
        values = stacking.values(losses, student, teacher, MASK)
        assert len(calls) == expected
        for value, function, s, t in zip(values, losses, student, teacher, strict=True):
            torch.testing.assert_close(value, function(s, t, mask=MASK))


def reads_the_data(state_S, state_T, mask=None):
    return (state_S - state_T).square().mean() if state_S.sum().item() > -1e9 else state_S.sum()


def no_scalar(state_S, state_T, mask=None):
    return (state_S - state_T).square().mean(dim=(1, 2))


def depends_on_the_call(state_S, state_T, mask=None, seen=[0]):
    seen[0] += 1
    return (state_S - state_T).square().mean() * seen[0]


@pytest.mark.parametrize("loss", [reads_the_data, depends_on_the_call])
def test_a_loss_that_cannot_be_vectorised_is_computed_one_by_one(loss):
    wrapped, calls = counted(loss)
    student, teacher = features(3), features(3, seed=1, student=False)
    stacking = Stacking()
    stacking.values([wrapped] * 3, student, teacher, None)
    calls.clear()
    values = stacking.values([wrapped] * 3, student, teacher, None)
    assert calls == [(ROWS, LENGTH, WIDTH)] * 3  # it is not tried again
    if loss is reads_the_data:
        expected = [(s - t).square().mean() for s, t in zip(student, teacher, strict=True)]
        torch.testing.assert_close(values, expected)


def test_a_fault_of_the_features_is_raised():
    student, teacher = features(2), features(2, (ROWS, LENGTH, WIDTH + 1), seed=1)
    with pytest.raises(ValueError, match="hidden states of student and teacher must have the same shape"):
        Stacking().values([MATCH_LOSS_MAP["hidden_mse"]] * 2, student, teacher, None)


def test_values_that_are_no_scalars_stay_as_they_are():
    values = Stacking().values([no_scalar] * 2, features(2), features(2, seed=1), None)
    assert [tuple(value.shape) for value in values] == [(ROWS,)] * 2


@pytest.mark.parametrize(
    ("wanted", "device", "stacks"),
    [(None, "cpu", False), (None, "cuda", True), (True, "cpu", True), (False, "cuda", False)],
)
def test_when_losses_are_stacked(wanted, device, stacks):
    assert (make_stacking(wanted, torch.device(device)) is not None) is stacks


def test_training_is_the_same(tmp_path):
    layers = [
        {"layer_T": number, "layer_S": number, "feature": "hidden", "loss": "cos", "weight": 1 + number}
        for number in (0, 1)
    ]
    matches = [{**match, "proj": ["linear", 32, 48]} for match in layers]
    results = []
    for stacks in (True, False):
        setup = Setup(
            tmp_path / str(stacks), training={"stack_matches": stacks}, config={"intermediate_matches": matches}
        )
        losses = setup.losses()
        setup.train()
        results.append((losses, weights(setup.student)))
    (together, first), (alone, second) = results
    assert [list(entry) for entry in together] == [list(entry) for entry in alone]
    assert [list(entry.values()) for entry in together] == [
        pytest.approx(list(entry.values()), rel=1e-4) for entry in alone
    ]
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
