"""Matching strategies against explicit loops: pairwise, ordered, nearest, random, attention."""

import copy
import math
import pickle
import random
from collections import Counter
from itertools import combinations, product

import pytest
import torch

from tests.losses.samples import MASK, wave
from textbrewer import MATCH_LOSS_MAP
from textbrewer.matching import STRATEGIES
from textbrewer.matching.dynamic import nearest_pairs, ordered_pairs
from textbrewer.matching.strategy import make_strategy
from textbrewer.matching.subsets import random_subset

MSE = MATCH_LOSS_MAP["hidden_mse"]
WIDTH = 5


def make_states(layers, phase, shape=(3, 4, WIDTH)):
    """States of several layers, each a leaf that may have a gradient."""
    return [wave(*shape, phase=phase + layer).requires_grad_() for layer in range(layers)]


def mse_by_loops(state_S, state_T, mask):
    """Mean squared error over the kept positions, one number after the other."""
    rows, length, width = state_S.shape
    kept = [(row, place) for row, place in product(range(rows), range(length)) if mask is None or mask[row, place]]
    errors = [
        (state_S[row, place, k] - state_T[row, place, k]).item() ** 2 for row, place in kept for k in range(width)
    ]
    return sum(errors) / len(errors)


def table(states_S, states_T, mask):
    return [[mse_by_loops(state_S, state_T, mask) for state_T in states_T] for state_S in states_S]


def with_gradient(states):
    """The places of the states that have a gradient other than zero."""
    return {place for place, state in enumerate(states) if state.grad is not None and bool((state.grad != 0).any())}


@pytest.mark.parametrize("mask", [None, MASK])
def test_pairwise_is_the_sum(mask):
    states_S, states_T = make_states(3, 0.0), make_states(3, 10.0)
    loss = STRATEGIES["pairwise"](MSE, layers_S=3, layers_T=3)(states_S, states_T, mask)
    expected = sum(mse_by_loops(*pair, mask) for pair in zip(states_S, states_T, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


# ---- choices -------------------------------------------------------------------------------------------------------

COSTS = [
    # the student's layers down, the teacher's across
    [1.0, 5.0, 2.0],
    [4.0, 1.0, 3.0],
    [9.0, 3.0, 1.0],
    [2.0, 4.0, 6.0],
]


def test_ordered_by_hand():
    # Teacher 2 takes student 2; teacher 1 the nearest of 0 and 1, which is 1; teacher 0 the only one left.
    assert ordered_pairs(COSTS) == [(2, 2), (1, 1), (0, 0)]


def test_ordered_skips_a_nearer_layer_that_is_too_high():
    # Teacher 0 is nearest to student 1, but teacher 1 took that one.
    assert ordered_pairs([[7.0, 9.0], [1.0, 1.0], [8.0, 8.0]]) == [(1, 1), (0, 0)]


def test_ordered_takes_the_lowest_layer_again_where_none_is_left():
    # Teacher 2 takes student 0 at once, and nothing is below.
    assert ordered_pairs([[9.0, 9.0, 1.0], [1.0, 1.0, 2.0]]) == [(0, 2), (0, 1), (0, 0)]
    assert ordered_pairs([[3.0, 2.0]]) == [(0, 1), (0, 0)]


def test_nearest_by_hand():
    assert nearest_pairs(COSTS) == [(0, 0), (1, 1), (2, 2)]
    assert nearest_pairs(COSTS, "student") == [(0, 0), (1, 1), (2, 2), (3, 0)]


@pytest.mark.parametrize(("layers_S", "layers_T"), [(6, 4), (4, 4), (2, 5), (1, 3), (5, 1)])
def test_ordered_choices(layers_S, layers_T):
    for seed in range(20):
        costs = torch.rand(layers_S, layers_T, generator=torch.Generator().manual_seed(seed))
        pairs = {layer_T: layer_S for layer_S, layer_T in ordered_pairs(costs.tolist())}
        assert set(pairs) == set(range(layers_T))
        above = layers_S
        for layer_T in range(layers_T - 1, -1, -1):
            allowed = costs[:above, layer_T] if above else costs[:1, layer_T]
            assert costs[pairs[layer_T], layer_T] == allowed.min()
            assert pairs[layer_T] < max(above, 1)
            above = pairs[layer_T]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("name", "options"), [("ordered", {}), ("nearest", {}), ("nearest", {"each": "student"})])
def test_chosen_pairs_are_summed_and_have_the_gradient(name, options, mask):
    states_S, states_T = make_states(5, 0.0), make_states(3, 1.5)
    costs = table(states_S, states_T, mask)
    pairs = ordered_pairs(costs) if name == "ordered" else nearest_pairs(costs, options.get("each", "teacher"))
    loss = STRATEGIES[name](MSE, layers_S=5, layers_T=3, **options)(states_S, states_T, mask)
    assert loss.item() == pytest.approx(sum(costs[layer_S][layer_T] for layer_S, layer_T in pairs), rel=1e-9)
    loss.backward()
    assert with_gradient(states_S) == {layer_S for layer_S, _ in pairs}
    assert with_gradient(states_T) == {layer_T for _, layer_T in pairs}
    weight = torch.ones(3, 4, dtype=torch.float64) if mask is None else mask.double()
    expected = [torch.zeros_like(states_S[0]) for _ in states_S]
    for layer_S, layer_T in pairs:
        difference = (states_S[layer_S] - states_T[layer_T]).detach() * weight.unsqueeze(-1)
        expected[layer_S] = expected[layer_S] + 2 * difference / (WIDTH * weight.sum())
    for state, gradient in zip(states_S, expected, strict=True):
        found = torch.zeros_like(state) if state.grad is None else state.grad
        torch.testing.assert_close(found, gradient)


def test_the_choice_changes_with_the_states():
    states_T = make_states(2, 3.0)
    states_S = [states_T[1].detach() + 0.1, states_T[0].detach() + 0.1]
    nearest = STRATEGIES["nearest"](MSE, layers_S=2, layers_T=2)
    assert nearest(states_S, states_T).item() == pytest.approx(2 * 0.01)
    assert nearest(states_S[::-1], states_T).item() == pytest.approx(2 * 0.01)
    ordered = STRATEGIES["ordered"](MSE, layers_S=2, layers_T=2)
    assert ordered(states_S[::-1], states_T).item() == pytest.approx(2 * 0.01)
    # The other way round order forbids it: the teacher's upper layer takes the student's lower one, and its lower
    # layer is left with that one, too.
    crossed = 0.01 + mse_by_loops(states_S[0], states_T[0], None)
    assert ordered(states_S, states_T).item() == pytest.approx(crossed)


# ---- random subsets ------------------------------------------------------------------------------------------------


def test_random_subsets_are_sorted_and_all_occur():
    drawn = [tuple(random_subset(5, 2, seed=0, epoch=epoch)) for epoch in range(1000)]
    counts = Counter(drawn)
    assert set(counts) == set(combinations(range(5), 2))
    # 100 expected of each of the 10, with a deviation of 9.5.
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_random_subsets_depend_on_seed_and_epoch_alone():
    def draws(seed):
        return [random_subset(12, 4, seed=seed, epoch=epoch) for epoch in range(20)]

    before = draws(1)
    random.seed(5)
    torch.manual_seed(5)
    python, torchs = random.getstate(), torch.get_rng_state()
    assert draws(1) == before
    assert draws(2) != before
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torchs)


def test_random_subset_of_all_is_all():
    assert random_subset(4, 4, seed=3, epoch=7) == [0, 1, 2, 3]


def test_random_meets_the_chosen_layers_in_order():
    states_S, states_T = make_states(2, 0.0), make_states(6, 4.0)
    costs = table(states_S, states_T, MASK)
    strategy = STRATEGIES["random"](MSE, layers_S=2, layers_T=6, seed=3)
    seen = set()
    for epoch in range(8):
        strategy.epoch = epoch
        low, high = strategy.chosen()
        assert low < high
        seen.add((low, high))
        first = strategy(states_S, states_T, MASK).item()
        assert first == pytest.approx(costs[0][low] + costs[1][high], rel=1e-9)
        # Another step of the epoch, another process, a resumed run: the same layers.
        again = STRATEGIES["random"](MSE, layers_S=2, layers_T=6, seed=3)
        again.epoch = epoch
        assert strategy(states_S, states_T, MASK).item() == again(states_S, states_T, MASK).item() == first
    assert len(seen) > 4


# ---- attention over the teacher's layers ---------------------------------------------------------------------------


def attention_by_loops(states_S, states_T, mask):
    """ALP-KD, one number after the other."""
    rows, length, width = states_S[0].shape
    places = [0 if mask is None else mask[row].tolist().index(1) for row in range(rows)]
    total = 0.0
    for state_S in states_S:
        combined = torch.zeros(rows, length, width, dtype=torch.float64)
        for row, place in enumerate(places):
            dots = [
                sum(state_S[row, place, k].item() * state_T[row, place, k].item() for k in range(width))
                for state_T in states_T
            ]
            exponents = [math.exp(dot - max(dots)) for dot in dots]
            for state_T, exponent in zip(states_T, exponents, strict=True):
                combined[row] += exponent / sum(exponents) * state_T[row].detach()
        total += mse_by_loops(state_S, combined, mask)
    return total


@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)])
def test_attention_is_the_weighted_sum(mask):
    states_S, states_T = make_states(2, 0.0), make_states(4, 5.0)
    loss = STRATEGIES["attention"](MSE, layers_S=2, layers_T=4)(states_S, states_T, mask)
    assert loss.item() == pytest.approx(attention_by_loops(states_S, states_T, mask), rel=1e-9)


def test_attention_to_one_layer_or_to_equal_ones_is_that_layer():
    states_S, (state_T,) = make_states(2, 0.0), make_states(1, 5.0)
    expected = sum(mse_by_loops(state_S, state_T, MASK) for state_S in states_S)
    for layers_T in (1, 3):
        strategy = STRATEGIES["attention"](MSE, layers_S=2, layers_T=layers_T)
        assert strategy(states_S, [state_T] * layers_T, MASK).item() == pytest.approx(expected, rel=1e-9)


def test_attention_of_vectors_is_that_of_states_of_length_1():
    vectors_S, vectors_T = make_states(2, 0.0, (3, WIDTH)), make_states(3, 5.0, (3, WIDTH))
    strategy = STRATEGIES["attention"](MSE, layers_S=2, layers_T=3)
    states = [[vector.unsqueeze(1) for vector in vectors] for vectors in (vectors_S, vectors_T)]
    assert strategy(vectors_S, vectors_T).item() == pytest.approx(attention_by_loops(*states, None), rel=1e-9)


def test_attention_has_the_gradient_of_its_value():
    states_S, states_T = make_states(2, 0.0, (2, 3, 4)), make_states(3, 5.0, (2, 3, 4))
    strategy = STRATEGIES["attention"](MSE, layers_S=2, layers_T=3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.autograd.gradcheck(
        lambda *states: strategy(states[:2], states[2:], mask), (*states_S, *states_T), atol=1e-6
    )


def test_attention_where_a_row_is_masked_whole():
    mask = MASK.clone()
    mask[1] = 0
    states_S, states_T = make_states(2, 0.0), make_states(3, 5.0)
    # cos takes anything at masked positions, of the student as well.
    strategy = STRATEGIES["attention"](MATCH_LOSS_MAP["cos"], layers_S=2, layers_T=3)
    expected = strategy([state[[0, 2]] for state in states_S], [state[[0, 2]] for state in states_T], mask[[0, 2]])
    spoilt = [
        [state.detach().masked_fill(mask[..., None] == 0, math.nan).requires_grad_() for state in side]
        for side in (states_S, states_T)
    ]
    loss = strategy(*spoilt, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    expected.backward()
    for state, sound in zip(spoilt[0], states_S, strict=True):
        torch.testing.assert_close(state.grad, sound.grad)


@pytest.mark.parametrize(
    ("shape_S", "shape_T", "words"),
    [((3, 4, 5), (3, 4, 6), "'proj': 'linear'"), ((3, 2, 4, 4), (3, 2, 4, 4), "another strategy")],
)
def test_attention_needs_hidden_states(shape_S, shape_T, words):
    strategy = STRATEGIES["attention"](MSE, layers_S=1, layers_T=1)
    with pytest.raises(ValueError, match=words):
        strategy(make_states(1, 0.0, shape_S), make_states(1, 1.0, shape_T))


# ---- every strategy ------------------------------------------------------------------------------------------------

EVERY = ["pairwise", "ordered", "nearest", "random", "attention", "emd"]


def make(name, layers=3):
    if name == "emd":
        pytest.importorskip("ot")
    return make_strategy(name, MSE, layers, layers)


def test_every_strategy_is_tested():
    assert sorted(STRATEGIES) == sorted(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_masked_positions_do_not_matter(name):
    states_S, states_T = make_states(3, 0.0), make_states(3, 8.0)
    expected = make(name)(states_S, states_T, MASK).item()
    for rubbish in (1e3, math.nan):
        # Only the teacher's side may be NaN: hidden_mse asks for finite states of the student where it has a gradient.
        spoilt = [state.detach().masked_fill(MASK.unsqueeze(-1) == 0, rubbish) for state in states_T]
        assert make(name)(states_S, spoilt, MASK).item() == expected
    assert make(name)(states_S, states_T).item() != expected


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_gives_a_loss_in_float32(name):
    states = [[state.detach().to(torch.bfloat16) for state in make_states(3, phase)] for phase in (0.0, 8.0)]
    loss = make(name)(*states, MASK)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    exact = make(name)(*[[state.double() for state in side] for side in states], MASK)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "attention"])
def test_attention_maps_can_be_matched(name):
    if name == "emd":
        pytest.importorskip("ot")
    loss = MATCH_LOSS_MAP["attention_mse"]
    state = wave(3, 2, 4, 4)
    strategy = make_strategy(name, loss, 2, 2)
    assert strategy([state, state], [state, state], MASK).item() == 0
    assert strategy([state, state], [state + 1, state + 1], MASK).item() > 0.9


@pytest.mark.parametrize("name", EVERY)
def test_strategies_can_be_copied(name):
    states_S, states_T = make_states(3, 0.0), make_states(3, 8.0)
    strategy = make(name)
    strategy.epoch = 4
    twins = copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))
    values = [item(states_S, states_T, MASK).item() for item in (strategy, *twins)]
    assert values == [values[0]] * 3


@pytest.mark.parametrize(
    ("spec", "layers", "error", "words"),
    [
        ("pairwise", (2, 3), ValueError, "as many layers.*2 and 3.*layer_map"),
        ("random", (4, 3), ValueError, "at least as many layers.*3 and 4"),
        (["random", {"seed": 1.5}], (2, 3), ValueError, "seed of strategy 'random' must be a whole number, got 1.5"),
        (["nearest", {"each": "layer"}], (2, 3), ValueError, "each of strategy 'nearest'"),
        (["nearest", {"side": "student"}], (2, 3), ValueError, "each"),
        ("orderd", (2, 3), KeyError, "ordered"),
    ],
)
def test_what_cannot_be_built(spec, layers, error, words):
    with pytest.raises(error, match=words):
        make_strategy(spec, MSE, *layers)
