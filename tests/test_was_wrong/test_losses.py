"""Losses"""

import math

import pytest
import torch

from textbrewer import KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER

from .tiny import batches, distiller, everything, pair, sgd, tags, watching, weights


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_all_masked(trainer):
    """Train on batches without a single kept position."""
    items = [{**batch, "mask": torch.zeros_like(batch["mask"])} for batch in batches()]
    trainer.train(sgd(trainer.model_S), items, num_epochs=1)
    losses = [entry["total"] for entry in trainer.seen]
    assert weights(trainer.model_S).isfinite().all(), f"the student's weights are {weights(trainer.model_S)[0]}"
    assert all(math.isfinite(loss) for loss in losses), f"the loss is {losses[0]}"


@pytest.mark.parametrize("name", ["ce", "mse"])
def test_all_masked_logits(name, tmp_path):
    """An all-masked batch gives NaN: KD losses."""
    check_all_masked(distiller(watching("GeneralDistiller"), tmp_path, *pair(), tags, kd_loss_type=name))


@pytest.mark.parametrize(
    "name",
    ["hidden_mse", "cos", "fsp", "nst", "attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"],
)
def test_all_masked_match(name, tmp_path):
    """An all-masked batch gives NaN and kills the student: match losses."""
    layer = [0, 1] if name in ("fsp", "nst") else 0
    feature = "attention" if name.startswith("attention") else "hidden"
    match = {"layer_T": layer, "layer_S": layer, "feature": feature, "loss": name, "weight": 1}
    kind = watching("GeneralDistiller")
    check_all_masked(distiller(kind, tmp_path, *pair(), everything, intermediate_matches=[match]))


@pytest.mark.parametrize("name", ["attention_ce", "attention_ce_mean"])
def test_masked_columns(name):
    """Masked attention_ce leaks masked columns.

    The scores of masked columns do not change the loss.
    """
    loss, mask = MATCH_LOSS_MAP[name], torch.tensor([[1, 1, 1, 0, 0]] * 2)
    scores_S, scores_T = numbers(2, 3, 5, 5), numbers(2, 3, 5, 5, seed=1)
    found = [loss(scores_S, scores_T, mask=mask).item()]
    for scores in (scores_S, scores_T):
        scores[..., 3:] = 5.0
        found.append(loss(scores_S, scores_T, mask=mask).item())
    assert found == pytest.approx([found[0]] * 3), f"other masked scores, other losses: {found}"


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 0]] * 2)], ids=["no mask", "mask"])
def test_half_precision(mask):
    """fp16 hidden MSE overflows."""
    state_S = torch.full((2, 4, 8), 300.0, dtype=torch.float16)
    loss = MATCH_LOSS_MAP["hidden_mse"](state_S, torch.zeros_like(state_S), mask=mask)
    assert loss.item() == pytest.approx(300.0**2), f"300 squared is {loss.item()}"


def test_zero_vector():
    """pkd of a zero vector is NaN."""
    state_S = torch.zeros(2, 4, 8, requires_grad=True)
    loss = MATCH_LOSS_MAP["pkd"](state_S, numbers(2, 4, 8))
    loss.backward()
    assert loss.isfinite(), f"the loss is {loss.item()}"
    assert state_S.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ce", "mse"])
@pytest.mark.parametrize("side", ["both", "student"])
def test_infinite_logits(name, side):
    """-inf logits give NaN.

    With a class absent on both sides the loss is that of the other classes; where only the student lacks one, it is
    finite with a finite gradient.
    """
    logits_S, logits_T = numbers(2, 5), numbers(2, 5, seed=1)
    logits_S[:, 4] = -torch.inf
    if side == "both":
        logits_T[:, 4] = -torch.inf
    logits_S.requires_grad_()
    loss = KD_LOSS_MAP[name](logits_S, logits_T, 2.0)
    loss.backward()
    assert loss.isfinite(), f"the loss is {loss.item()}"
    assert logits_S.grad.isfinite().all(), "the gradient is not finite"
    if side == "both" and name == "ce":
        expected = KD_LOSS_MAP[name](logits_S[:, :4], logits_T[:, :4], 2.0)
        assert loss.item() == pytest.approx(expected.item())


def test_cos_of_a_view():
    """cos needs contiguous input."""
    state_S, state_T = numbers(4, 2, 8).transpose(0, 1), numbers(4, 2, 8, seed=1).transpose(0, 1)
    loss = MATCH_LOSS_MAP["cos"](state_S, state_T)
    expected = 1 - torch.nn.functional.cosine_similarity(state_S, state_T, dim=-1).mean()
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("spec", [["flsw", 8, 1], ["cwsm", 2]], ids=["flsw", "cwsm"])
def test_lowest_temperature(spec):
    """Temperature schedulers reach zero and below."""
    logits_S = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]])
    logits_T = torch.tensor([[9.0, 0, 0], [-0.1, 0, 0], [0, -0.1, 0]])
    temperatures = TEMPERATURE_SCHEDULER[spec](logits_S, logits_T, 0.5)
    assert temperatures.min() > 0, f"the lowest temperature is {temperatures.min().item():.2g}"
