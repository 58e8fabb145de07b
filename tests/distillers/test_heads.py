"""The logits of both sides, head by head: what masks pick, what corresponds to what, and the probability shift."""

import inspect
import math

import pytest
import torch

from textbrewer import KD_LOSS_MAP
from textbrewer.adaptors import Views
from textbrewer.distillers import heads, terms
from textbrewer.distillers.knowledge import KnowledgeLoss
from textbrewer.schedulers import cwsm_temperature_scheduler_builder, flsw_temperature_scheduler_builder

ROWS, LENGTH, CLASSES = 3, 5, 4


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*rows):
    """Each row's kept positions, as text: "x" is kept."""
    return torch.tensor([[int(mark == "x") for mark in row] for row in rows])


LOGITS_S, LOGITS_T = numbers(ROWS, LENGTH, CLASSES), numbers(ROWS, LENGTH, CLASSES, seed=1)
MASK = mask_of("xxx..", ".x.x.", "....x")


def picked(logits, mask):
    """The logits at the kept positions, in reading order, by explicit loops."""
    return torch.stack(
        [logits[row, column] for row in range(mask.shape[0]) for column in range(mask.shape[1]) if mask[row, column]]
    )


def kd(name="ce", scheduler=None, shift=False, loss=None):
    return KnowledgeLoss(loss or KD_LOSS_MAP[name], 2.0, scheduler, shift)


def value(views_S, views_T, knowledge):
    (term,) = terms.kd_terms(Views(views_S), Views(views_T), knowledge, terms.Now(1.0, 0.0))
    return term


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "mse", "kl", "sigmoid"])
@pytest.mark.parametrize("sides", ["both", "both, as copies", "student", "teacher", "boolean"])
def test_masked_loss_is_that_of_the_picked_rows(name, sides):
    views_S, views_T = {"logits": [LOGITS_S]}, {"logits": [LOGITS_T]}
    if sides != "teacher":
        views_S["logits_mask"] = [MASK.bool() if sides == "boolean" else MASK]
    if sides != "student":
        views_T["logits_mask"] = [MASK.clone() if sides == "both, as copies" else MASK]
    expected = KD_LOSS_MAP[name](picked(LOGITS_S, MASK), picked(LOGITS_T, MASK), 2.0)
    term = value(views_S, views_T, kd(name))
    assert term.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert term.averaged_over == "logits"


@pytest.mark.parametrize(
    "masks",
    [
        (mask_of("xxx..", ".x.x.", "....x"), mask_of("..xxx", "x...x", "x....")),
        (mask_of("xx", "x."), mask_of(".xxx....", "........")),  # another length, another split by row
        (mask_of("xxx...x", "..x...."), mask_of("x", "x", "x", "x", "x")),  # other rows
    ],
)
@pytest.mark.parametrize("name", ["ce", "mse", "kl", "sigmoid"])
def test_differing_masks_are_matched_in_order(name, masks):
    logits_S, logits_T = (numbers(*mask.shape, CLASSES, seed=seed) for seed, mask in enumerate(masks))
    views = [
        {"logits": [logits], "logits_mask": [mask]} for logits, mask in zip((logits_S, logits_T), masks, strict=True)
    ]
    expected = KD_LOSS_MAP[name](picked(logits_S, masks[0]), picked(logits_T, masks[1]), 2.0)
    assert value(*views, kd(name)).value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "scheduler", [flsw_temperature_scheduler_builder(1, 2), cwsm_temperature_scheduler_builder(1)], ids=["flsw", "cwsm"]
)
def test_temperature_schedules_see_the_picked_rows(scheduler):
    views = [{"logits": [logits], "logits_mask": [MASK]} for logits in (LOGITS_S, LOGITS_T)]
    rows_S, rows_T = picked(LOGITS_S, MASK), picked(LOGITS_T, MASK)
    expected = KD_LOSS_MAP["ce"](rows_S, rows_T, scheduler(rows_S, rows_T, 2.0))
    assert value(*views, kd(scheduler=scheduler)).value.item() == pytest.approx(expected.item(), rel=1e-5)


def without_mask(logits_S, logits_T, temperature):
    """A KD loss of the user's own, without a parameter for masks."""
    seen.append((tuple(logits_S.shape), tuple(logits_T.shape)))
    return (logits_S - logits_T).abs().sum(dim=-1).mean()


seen = []


def test_a_loss_without_a_mask_gets_the_picked_rows():
    seen.clear()
    assert "mask" not in inspect.signature(without_mask).parameters
    views = [{"logits": [logits], "logits_mask": [MASK]} for logits in (LOGITS_S, LOGITS_T)]
    expected = (picked(LOGITS_S, MASK) - picked(LOGITS_T, MASK)).abs().sum(dim=-1).mean()
    assert value(*views, kd(loss=without_mask)).value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert seen == [((6, CLASSES), (6, CLASSES))]


def test_a_schedule_without_a_mask_gets_the_picked_rows():
    views = [{"logits": [logits], "logits_mask": [MASK]} for logits in (LOGITS_S, LOGITS_T)]
    shapes = []

    def schedule(logits_S, logits_T, base):
        shapes.append(tuple(logits_S.shape))
        return base * (1 + torch.arange(len(logits_S)))

    rows = picked(LOGITS_S, MASK), picked(LOGITS_T, MASK)
    expected = KD_LOSS_MAP["ce"](*rows, 2.0 * torch.arange(1, 7))
    assert value(*views, kd(scheduler=schedule)).value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert shapes == [(6, CLASSES)]


def test_masks_do_not_touch_rows_of_logits():
    """Logits of rows have no positions: a logits mask has no effect on them, as in TextBrewer."""
    logits_S, logits_T = LOGITS_S[:, 0], LOGITS_T[:, 0]
    views = [{"logits": [logits], "logits_mask": [MASK]} for logits in (logits_S, logits_T)]
    term = value(*views, kd())
    assert term.value.item() == pytest.approx(KD_LOSS_MAP["ce"](logits_S, logits_T, 2.0).item())
    assert term.averaged_over == "rows"


def test_gradient_of_what_is_masked_is_zero():
    logits = LOGITS_S.clone().requires_grad_()
    other = mask_of("..xxx", "x...x", "x....")
    for mask_T in (MASK, other):
        logits.grad = None
        value(
            {"logits": [logits], "logits_mask": [MASK]}, {"logits": [LOGITS_T], "logits_mask": [mask_T]}, kd()
        ).value.backward()
        assert (logits.grad.abs().sum(-1) > 0).long().tolist() == MASK.tolist()


def test_several_heads_are_added():
    heads_S, heads_T = [LOGITS_S, -LOGITS_S, LOGITS_S[:, 0]], [LOGITS_T, -LOGITS_T, LOGITS_T[:, 0]]
    other = mask_of("x....", "xxxxx", ".....")
    for masks in ([MASK], [MASK, MASK, MASK], [MASK, other, MASK]):
        views = [{"logits": logits, "logits_mask": masks} for logits in (heads_S, heads_T)]
        both = masks if len(masks) == 3 else masks * 3
        expected = sum(
            KD_LOSS_MAP["ce"](picked(heads_S[n], both[n]), picked(heads_T[n], both[n]), 2.0) for n in range(2)
        ) + KD_LOSS_MAP["ce"](heads_S[2], heads_T[2], 2.0)
        assert value(*views, kd()).value.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- what is refused ---------------------------------------------------------------------------------------------


def refused(views_S, views_T, message, error=ValueError, shift=False):
    with pytest.raises(error, match=message):
        value(views_S, views_T, kd(shift=shift))


def test_masks_that_pick_other_numbers():
    views_S, views_T = {"logits": [LOGITS_S], "logits_mask": [MASK]}, {"logits": [LOGITS_T]}
    fewer = mask_of("xxx..", ".x.x.", ".....")
    message = "logits_mask of adaptor_S and adaptor_T must pick as many positions, got 6 and 5"
    refused(views_S, {**views_T, "logits_mask": [fewer]}, message)


def test_a_mask_of_one_side_on_logits_of_two_lengths():
    longer = numbers(ROWS, LENGTH + 2, CLASSES)
    message = r"logits_mask of adaptor_T .*\(3, 7\), got \(3, 5\), the other side's, as adaptor_T returned none"
    refused({"logits": [LOGITS_S], "logits_mask": [MASK]}, {"logits": [longer]}, message)


def test_numbers_of_heads_and_masks():
    two = {"logits": [LOGITS_S, LOGITS_S]}
    refused(two, {"logits": [LOGITS_T]}, "must have as many heads, got 2 and 1")
    refused({**two, "logits_mask": [MASK] * 3}, two, r"'logits_mask' must be one mask, or one a head \(2\), got 3")
    refused(two, {}, "adaptor_T returned no 'logits'", KeyError)
    refused({"losses": []}, two, r"adaptor_S returned no 'logits' \(only \['losses'\]\)", KeyError)
    assert terms.kd_terms(Views({}), Views({}), kd(), terms.Now(1, 0)) == []


def test_shapes():
    refused({"logits": [LOGITS_S]}, {"logits": [LOGITS_T[:, :4]]}, r"same shape, got \(3, 5, 4\) and \(3, 4, 4\)")
    refused({"logits": [LOGITS_S]}, {"logits": [LOGITS_T[..., :3]]}, r"same shape, got \(3, 5, 4\) and \(3, 5, 3\)")
    masked = {"logits_mask": [MASK]}
    refused({"logits": [LOGITS_S], **masked}, {"logits": [LOGITS_T[..., :3]], **masked}, "must have the same shape")


# ---- probability shift -------------------------------------------------------------------------------------------


def shifted(row, label):
    """The label's and the largest number swapped, by plain Python; a negative label swaps nothing."""
    row = list(row)
    if label >= 0:
        top = row.index(max(row))
        row[top], row[label] = row[label], row[top]
    return row


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 2)])
def test_probability_shift(shape):
    logits = numbers(*shape, CLASSES)
    labels = torch.randint(-1, CLASSES, shape, generator=torch.Generator().manual_seed(2))
    labels[..., 0] = -100
    before = logits.clone()
    found = heads.probability_shift(logits, labels)
    assert torch.equal(logits, before)
    rows = zip(logits.flatten(0, -2).tolist(), labels.flatten().tolist(), strict=True)
    assert found.flatten(0, -2).tolist() == [shifted(row, label) for row, label in rows]


def test_the_shifted_teacher_is_never_wrong():
    logits, labels = numbers(50, CLASSES), torch.randint(0, CLASSES, (50,))
    assert torch.equal(heads.probability_shift(logits, labels).argmax(-1), labels)
    assert torch.equal(heads.probability_shift(logits, logits.argmax(-1)), logits)


@pytest.mark.parametrize("mask_T", [MASK, mask_of("..xxx", "x...x", "x....")], ids=["one mask", "differing masks"])
@pytest.mark.parametrize("loss", [None, without_mask], ids=["ce", "without mask"])
def test_probability_shift_under_masks(mask_T, loss):
    """The labels are the student's, and go with its positions."""
    # Each label is another class than the largest logit of the teacher's row that it meets.
    labels = torch.full((ROWS, LENGTH), -100)
    labels[MASK.bool()] = (picked(LOGITS_T, mask_T).argmax(dim=-1) + 1) % CLASSES
    views_S = {"logits": [LOGITS_S], "logits_mask": [MASK], "labels": [labels]}
    views_T = {"logits": [LOGITS_T], "logits_mask": [mask_T]}
    rows = zip(picked(LOGITS_T, mask_T).tolist(), picked(labels.unsqueeze(-1), MASK).flatten().tolist(), strict=True)
    target = torch.tensor([shifted(row, label) for row, label in rows])
    assert (target != picked(LOGITS_T, mask_T)).any(dim=-1).all()
    function = loss or KD_LOSS_MAP["ce"]
    expected = function(picked(LOGITS_S, MASK), target, 2.0)
    assert value(views_S, views_T, kd(loss=function, shift=True)).value.item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_probability_shift_of_several_heads():
    labels = [torch.tensor([0, 1, 2]), torch.tensor([3, -100, 0])]
    heads_S, heads_T = [LOGITS_S[:, 0], LOGITS_S[:, 1]], [LOGITS_T[:, 0], LOGITS_T[:, 1]]
    expected = 0.0
    for head_S, head_T, label in zip(heads_S, heads_T, labels, strict=True):
        target = [shifted(row, y) for row, y in zip(head_T.tolist(), label.tolist(), strict=True)]
        for row_S, row_T in zip(head_S.tolist(), target, strict=True):
            exp_S, exp_T = ([math.exp(x / 2) for x in row] for row in (row_S, row_T))
            expected -= sum(t / sum(exp_T) * math.log(s / sum(exp_S)) for s, t in zip(exp_S, exp_T, strict=True)) / ROWS
    term = value({"logits": heads_S, "labels": labels}, {"logits": heads_T}, kd(shift=True))
    assert term.value.item() == pytest.approx(expected, rel=1e-5)


def test_probability_shift_needs_labels():
    views = {"logits": [LOGITS_S]}
    refused(views, views, "probability_shift=True needs 'labels' from adaptor_S", KeyError, shift=True)
    two = {"logits": [LOGITS_S] * 2, "labels": [torch.zeros(3, 5)]}
    refused(two, two, r"'labels' must be one tensor a head \(2\), got 1", shift=True)
