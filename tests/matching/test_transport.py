"""The transport between layers (BERT-EMD): flows, cost attention, and the weights over the training."""

import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from tests.losses.samples import MASK, wave
from textbrewer import MATCH_LOSS_MAP
from textbrewer.matching import STRATEGIES
from textbrewer.matching.strategy import make_strategy

pytest.importorskip("ot")

from textbrewer.matching.transport import cheapest_transport, cost_attention

MSE = MATCH_LOSS_MAP["hidden_mse"]


def least_cost(costs, weights_S, weights_T):
    """The least cost of a transport, from a solver of linear programs."""
    layers_S, layers_T = costs.shape
    sums = [np.outer(np.arange(layers_S) == i, np.ones(layers_T)).ravel() for i in range(layers_S)]
    sums += [np.outer(np.ones(layers_S), np.arange(layers_T) == j).ravel() for j in range(layers_T)]
    found = linprog(costs.ravel(), A_eq=np.array(sums), b_eq=np.concatenate([weights_S, weights_T]))
    assert found.success
    return found.fun


def random_weights(generator, layers):
    weights = generator.random(layers) + 0.05
    return weights / weights.sum()


def make_states(layers, phase):
    return [wave(3, 4, 5, phase=phase + 0.3 * layer).requires_grad_() for layer in range(layers)]


def cost_table(states_S, states_T, mask):
    """The mean squared errors of all pairs, from numpy."""
    kept = np.ones((3, 4), dtype=bool) if mask is None else mask.numpy().astype(bool)
    sides = [[state.detach().numpy()[kept] for state in side] for side in (states_S, states_T)]
    return np.array([[((state_S - state_T) ** 2).mean() for state_T in sides[1]] for state_S in sides[0]])


def attention_by_loops(weights, paid):
    """The update of the authors' code, one number after the other."""
    unit = [cost / weight for cost, weight in zip(paid, weights, strict=True)]
    ratios = [sum(unit) / item for item in unit]
    return [ratio / sum(ratios) for ratio in ratios]


# ---- flow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers_S", "layers_T"), [(4, 12), (6, 12), (3, 3), (1, 5), (5, 2)])
def test_flow_is_the_cheapest(layers_S, layers_T):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        costs = generator.random((layers_S, layers_T))
        weights_S, weights_T = random_weights(generator, layers_S), random_weights(generator, layers_T)
        flow = cheapest_transport(costs, weights_S, weights_T)
        np.testing.assert_allclose(flow.sum(axis=1), weights_S, atol=1e-12)
        np.testing.assert_allclose(flow.sum(axis=0), weights_T, atol=1e-12)
        assert flow.min() >= 0
        assert (flow > 0).sum() <= layers_S + layers_T - 1
        assert (flow * costs).sum() == pytest.approx(least_cost(costs, weights_S, weights_T), abs=1e-9)


def test_flow_between_equal_weights_is_the_best_permutation():
    for seed in range(5):
        costs = np.random.default_rng(seed).random((5, 5))
        best = min(sum(costs[i, j] for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
        flow = cheapest_transport(costs, np.full(5, 0.2), np.full(5, 0.2))
        assert (flow * costs).sum() == pytest.approx(best, abs=1e-12)


# ---- cost attention ------------------------------------------------------------------------------------------------


def test_cost_attention_by_hand():
    # Unit costs 2, 4, 4; ratios 5, 2.5, 2.5.
    np.testing.assert_allclose(
        cost_attention(np.array([0.5, 0.25, 0.25]), np.array([1.0, 1.0, 1.0])), [0.5, 0.25, 0.25]
    )
    np.testing.assert_allclose(cost_attention(np.array([0.5, 0.5]), np.array([1.0, 3.0])), [0.75, 0.25])


def test_cost_attention_by_loops():
    generator = np.random.default_rng(0)
    for layers in (1, 2, 7):
        weights, paid = random_weights(generator, layers), generator.random(layers)
        np.testing.assert_allclose(cost_attention(weights, paid), attention_by_loops(weights, paid), rtol=1e-12)


def test_cost_attention_with_a_temperature_is_a_softmax():
    weights, paid = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.1, 0.3])
    unit = paid / weights
    powers = np.exp(unit.sum() / unit / 5.0)
    np.testing.assert_allclose(cost_attention(weights, paid, 5.0), powers / powers.sum(), rtol=1e-9)
    # Hot: all the same; cold: all on the cheapest.
    np.testing.assert_allclose(cost_attention(weights, paid, 1e9), np.full(3, 1 / 3), rtol=1e-6)
    assert cost_attention(weights, paid, 1e-3).argmax() == unit.argmin()


def test_cost_attention_never_gives_a_weight_of_zero():
    weights = np.array([0.5, 0.3, 0.2])
    for paid in ([0.0, 0.1, 0.2], [0.0, 0.0, 1e-300], [1e9, 1e-9, 1.0]):
        for temperature in (None, 1e-3):
            new = cost_attention(weights, np.array(paid), temperature)
            assert np.isfinite(new).all()
            assert new.min() > 1e-7
            assert new.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_array_equal(cost_attention(weights, np.zeros(3)), weights)


# ---- strategy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("layers_S", "layers_T"), [(2, 4), (3, 3), (4, 2)])
def test_steps_of_training(layers_S, layers_T, mask):
    strategy = STRATEGIES["emd"](MSE, layers_S=layers_S, layers_T=layers_T)
    weights_S, weights_T = np.full(layers_S, 1 / layers_S), np.full(layers_T, 1 / layers_T)
    for step in range(4):
        states_S, states_T = make_states(layers_S, step), make_states(layers_T, step + 0.5)
        costs = cost_table(states_S, states_T, mask)
        loss = strategy(states_S, states_T, mask)
        assert loss.item() == pytest.approx(least_cost(costs, weights_S, weights_T), rel=1e-5)
        paid = cheapest_transport(costs, weights_S, weights_T) * costs
        weights_S = np.array(attention_by_loops(weights_S, paid.sum(axis=1)))
        weights_T = np.array(attention_by_loops(weights_T, paid.sum(axis=0)))
        np.testing.assert_allclose(strategy.weights_S.numpy(), weights_S, rtol=1e-4)
        np.testing.assert_allclose(strategy.weights_T.numpy(), weights_T, rtol=1e-4)
        # From here on as the strategy has them, in single precision, so that errors do not add up.
        weights_S, weights_T = (
            item.double().numpy() / item.double().numpy().sum() for item in (strategy.weights_S, strategy.weights_T)
        )
    assert weights_S.max() > 1.01 * weights_S.min()


def test_gradient_is_that_of_the_flow():
    states_S, states_T = make_states(2, 0.0), make_states(3, 1.0)
    costs = cost_table(states_S, states_T, MASK)
    flow = cheapest_transport(costs, np.full(2, 1 / 2), np.full(3, 1 / 3))
    assert (flow == 0).any()
    STRATEGIES["emd"](MSE, layers_S=2, layers_T=3)(states_S, states_T, MASK).backward()
    for i, state_S in enumerate(states_S):
        expected = sum(
            flow[i, j] * 2 * (state_S - state_T).detach() * MASK.unsqueeze(-1) / (5 * MASK.sum())
            for j, state_T in enumerate(states_T)
        )
        torch.testing.assert_close(state_S.grad, expected)


def test_a_layer_that_is_cheap_gets_more_weight():
    states_T = make_states(2, 0.0)
    states_S = [states_T[0].detach() + 0.1, states_T[1].detach() + 0.5]
    strategy = STRATEGIES["emd"](MSE, layers_S=2, layers_T=2)
    strategy(states_S, states_T)
    # Unit costs 0.01 and 0.25, so the weights are as 25 to 1.
    np.testing.assert_allclose(strategy.weights_S.numpy(), [25 / 26, 1 / 26], rtol=1e-5)


def test_weights_follow_training_only():
    states = make_states(2, 0.0), make_states(3, 1.0)
    strategy = STRATEGIES["emd"](MSE, layers_S=2, layers_T=3)
    buffer, before = strategy.weights_T, strategy.weights_T.clone()
    strategy.eval()(*states)
    assert torch.equal(buffer, before)
    strategy.train()
    with torch.no_grad():
        strategy(*states)
    assert torch.equal(buffer, before)
    strategy(*states)
    assert strategy.weights_T is buffer
    assert not torch.allclose(buffer, before)
    fixed = STRATEGIES["emd"](MSE, layers_S=2, layers_T=3, update=False)
    fixed(*states)
    assert torch.equal(fixed.weights_T, before)


def test_weights_go_through_a_checkpoint():
    strategy = STRATEGIES["emd"](MSE, layers_S=2, layers_T=3)
    for step in range(3):
        strategy(make_states(2, step), make_states(3, step + 0.5))
    state = {name: value.clone() for name, value in strategy.state_dict().items()}
    assert set(state) == {"weights_S", "weights_T"}
    resumed = STRATEGIES["emd"](MSE, layers_S=2, layers_T=3)
    resumed.load_state_dict(state)
    following = make_states(2, 9.0), make_states(3, 9.5)
    fresh = STRATEGIES["emd"](MSE, layers_S=2, layers_T=3)(*following).item()
    assert strategy(*following).item() == resumed(*following).item() != fresh
    assert torch.equal(strategy.weights_S, resumed.weights_S)


def test_weights_stay_weights_over_many_steps():
    strategy = STRATEGIES["emd"](MSE, layers_S=3, layers_T=5)
    generator = torch.Generator().manual_seed(0)
    states_T = [torch.randn(2, 3, 4, generator=generator) for _ in range(5)]
    for step in range(200):
        # One layer learns perfectly, and the others come and go.
        noise = [torch.randn(2, 3, 4, generator=generator) * scale for scale in (0.0, 0.1, 10.0 * (step % 2))]
        loss = strategy([state + other for state, other in zip(states_T, noise, strict=False)], states_T)
        assert bool(loss.isfinite())
        for weights in (strategy.weights_S, strategy.weights_T):
            assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
            assert weights.min().item() > 0


def test_costs_that_are_not_finite():
    strategy = STRATEGIES["emd"](MSE, layers_S=2, layers_T=2)
    states_S, states_T = make_states(2, 0.0), make_states(2, 1.0)
    loss = strategy([states_S[0], states_S[1] * float("nan")], states_T)
    assert bool(loss.isnan())
    assert loss.requires_grad
    assert strategy.weights_S.tolist() == [0.5, 0.5]
    assert bool(strategy(states_S, states_T).isfinite())


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install 'textbrewer\[emd\]'"):
        make_strategy("emd", MSE, 2, 3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weight_temperature": 0}, ValueError, "weight_temperature of strategy 'emd' must be greater than 0"),
        ({"weight_temperature": "1"}, TypeError, "weight_temperature of strategy 'emd' must be a number"),
        ({"update": 1}, TypeError, "update of strategy 'emd'"),
        ({"temprature": 1}, ValueError, "weight_temperature"),
    ],
)
def test_options_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        make_strategy(["emd", options], MSE, 2, 3)


def test_the_temperature_reaches_the_weights():
    strategy = make_strategy(["emd", {"weight_temperature": 1e9}], MSE, 2, 3)
    strategy(make_states(2, 0.0), make_states(3, 1.0))
    np.testing.assert_allclose(strategy.weights_T.numpy(), np.full(3, 1 / 3), rtol=1e-6)
