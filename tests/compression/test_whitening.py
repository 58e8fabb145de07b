"""Second moments against loops over positions; directions and factors against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, make_loader, seed_all
from textbrewer.compression import whitening

WIDTH = 6


def correlated(count, width, seed=0):
    """Inputs whose directions differ a hundredfold in scale."""
    random = np.random.default_rng(seed)
    mixing = np.linalg.qr(random.normal(size=(width, width)))[0] * np.logspace(0, -2, width)
    return random.normal(size=(count, width)) @ mixing.T


def problem(outputs, inputs, seed=0):
    """A matrix and the second moments of its inputs."""
    random = np.random.default_rng(seed)
    states = correlated(50, inputs, seed)
    return random.normal(size=(outputs, inputs)), states.T @ states / len(states)


def error_of(matrix, approximation, moment):
    """The mean squared error of the outputs, E |(W - W') x|^2 = trace (W - W') C (W - W')^T."""
    rest = matrix - approximation
    return np.trace(rest @ moment @ rest.T)


def approximation_of(matrix, moment, rank, damping=0.0):
    """What this library makes of a matrix: the product of both halves, as NumPy."""
    tensor = torch.tensor(matrix)
    directions, _ = whitening.output_directions(tensor, None if moment is None else torch.tensor(moment), damping)
    up, down = whitening.factors(tensor, directions[:, :rank])
    assert up.shape == (len(matrix), rank)
    assert down.shape == (rank, matrix.shape[1])
    return (up @ down).numpy()


# ---- second moments ----------------------------------------------------------------------------------------------


def moments_by_loop(model, batches):
    """The moments of what the first layer's query reads, the embeddings, from one token at a time."""
    table, total, count = model.embedding.weight.detach().double().numpy(), 0.0, 0
    for batch in batches:
        for row, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
            for token, valid in zip(row, mask):
                if valid:
                    total, count = total + np.outer(table[token], table[token]), count + 1
    return total / count


@pytest.mark.parametrize("own", [False, True], ids=["auto", "own adaptor"])
def test_moments_are_those_of_a_loop_over_valid_positions(own):
    model, batches = Encoder(width=WIDTH), list(make_loader(10, 4))
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    model.train()
    random = torch.get_rng_state()
    maps = {"layers.0.query": model.layers[0].query}
    moments = whitening.second_moments(model, maps, batches, adaptor if own else "auto")
    assert moments["layers.0.query"].dtype == torch.float64
    np.testing.assert_allclose(moments["layers.0.query"].numpy(), moments_by_loop(model, batches), rtol=1e-10)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.layers[0].query._forward_pre_hooks


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH), (2, 3, 2, WIDTH), (WIDTH,)], ids=str)
def test_without_a_mask_all_positions_count(shape):
    linear, states = nn.Linear(WIDTH, 2), torch.randn(shape)
    moments = whitening.second_moments(nn.Sequential(linear), {"0": linear}, [states, states * 2])
    rows = torch.cat([states, states * 2]).double().reshape(-1, WIDTH)
    torch.testing.assert_close(moments["0"], sum(row.outer(row) for row in rows) / len(rows))


def test_a_mask_counts_where_batch_and_length_are_one_dimension():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, 2)

        def forward(self, states, attention_mask):
            return self.linear(states.flatten(0, 1))

    model, states, mask = Flat(), torch.randn(2, 3, WIDTH), torch.tensor([[1, 1, 0], [1, 0, 0]])
    moments = whitening.second_moments(model, {"linear": model.linear}, [{"states": states, "attention_mask": mask}])
    rows = states[mask.bool()].double()
    torch.testing.assert_close(moments["linear"], rows.T @ rows / 3)


@pytest.mark.parametrize("by_labels", [False, True], ids=["decoder mask", "labels"])
def test_each_side_of_encoder_and_decoder_has_its_own_padding(by_labels):
    """Tokens under padding do not matter, though both sides are of one length."""
    pytest.importorskip("transformers")
    from tests.students.models import make

    model = make("t5")
    maps = {
        name: model.get_submodule(name)
        for name in (
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.k",
            "decoder.block.0.layer.1.EncDecAttention.q",
        )
    }
    kept = {
        "encoder": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "decoder": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]),
    }
    seed_all(0)
    tokens = {side: torch.randint(3, 37, (2, 4)) for side in kept}

    def batch(other):
        ids = {side: torch.where(kept[side].bool(), tokens[side], other) for side in kept}
        more = {"decoder_attention_mask": kept["decoder"]}
        if by_labels:
            more = {"labels": torch.where(kept["decoder"].bool(), 5, -100)}
        return {
            "input_ids": ids["encoder"], "attention_mask": kept["encoder"], "decoder_input_ids": ids["decoder"], **more,
        }  # fmt: skip

    one, other = (whitening.second_moments(model, maps, [batch(token)]) for token in (7, 11))
    for name in maps:
        torch.testing.assert_close(one[name], other[name], msg=name)


def test_a_map_that_is_not_reached_has_no_moments():
    model = nn.ModuleDict({"used": nn.Linear(WIDTH, 2), "unused": nn.Linear(WIDTH, 2)})
    model.forward = lambda states: model["used"](states)
    assert whitening.second_moments(model, dict(model.items()), [torch.randn(3, WIDTH)]).keys() == {"used"}


def test_a_map_called_twice_sums_both_calls():
    linear = nn.Linear(WIDTH, WIDTH)
    states = torch.randn(3, WIDTH)
    moments = whitening.second_moments(nn.Sequential(linear, linear), {"0": linear}, [states])
    rows = torch.cat([states, linear(states).detach()]).double()
    torch.testing.assert_close(moments["0"], rows.T @ rows / 6)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "dataloader must yield at least one batch, got none"),
        (3, TypeError, "dataloader must be an iterable of batches"),
        ([torch.full((2, WIDTH), float("nan"))], ValueError, "inputs of '0' must be finite"),
    ],
    ids=["empty", "no iterable", "NaN"],
)
def test_data_that_cannot_be_used(data, error, message):
    linear = nn.Linear(WIDTH, 2)
    with pytest.raises(error, match=message):
        whitening.second_moments(nn.Sequential(linear), {"0": linear}, data)


# ---- directions and factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 7), (9, 5), (5, 9)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_plain_factors_are_the_truncated_svd_of_numpy(outputs, inputs, rank):
    matrix, _ = problem(outputs, inputs)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = approximation_of(matrix, None, rank)
    np.testing.assert_allclose(found, left[:, :rank] * values[:rank] @ right[:rank], atol=1e-12)
    # Eckart and Young: what is lost is the energy of the values left out.
    np.testing.assert_allclose(np.sum((matrix - found) ** 2), np.sum(values[rank:] ** 2), atol=1e-12)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 7), (9, 5), (5, 9)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_whitened_factors_are_the_papers_formula(outputs, inputs, rank):
    """SVD_k(W L) L^-1 with C = L L^T, solved by NumPy."""
    matrix, moment = problem(outputs, inputs)
    root = np.linalg.cholesky(moment)
    left, values, right = np.linalg.svd(matrix @ root, full_matrices=False)
    truncated = left[:, :rank] * values[:rank] @ right[:rank]
    expected = np.linalg.solve(root.T, truncated.T).T
    np.testing.assert_allclose(approximation_of(matrix, moment, rank), expected, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_whitened_error_is_the_smallest_there_is(rank):
    """The smallest eigenvalues of W C W^T; no descent from random starts gets below, nor any small change."""
    matrix, moment = problem(6, 4, seed=3)
    found = approximation_of(matrix, moment, rank)
    error = error_of(matrix, found, moment)
    np.testing.assert_allclose(error, np.linalg.eigvalsh(matrix @ moment @ matrix.T)[: 6 - rank].sum(), atol=1e-12)
    best = min(alternating_least_squares(matrix, moment, rank, seed) for seed in range(5))
    np.testing.assert_allclose(best, error, rtol=1e-3)
    assert best >= error * (1 - 1e-9)
    random = np.random.default_rng(0)
    left, values, right = np.linalg.svd(found)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    for size in np.logspace(-6, 0, 60):
        other = (up + size * random.normal(size=up.shape)) @ (down + size * random.normal(size=down.shape))
        assert error_of(matrix, other, moment) >= error - 1e-12


def alternating_least_squares(matrix, moment, rank, seed, steps=3000):
    """The error that is reached by solving for one half and then for the other, from a random start."""
    up = np.random.default_rng(seed).normal(size=(len(matrix), rank))
    for _ in range(steps):
        down = np.linalg.solve(up.T @ up, up.T @ matrix)
        up = matrix @ moment @ down.T @ np.linalg.inv(down @ moment @ down.T)
    return error_of(matrix, up @ down, moment)


@pytest.mark.parametrize(("rank", "share"), [(2, 0.7), (8, 0.3), (16, 0.1)])
def test_whitened_beats_plain_where_inputs_are_correlated(rank, share):
    random, states = np.random.default_rng(1), correlated(400, 32, seed=1)
    matrix = random.normal(size=(32, 32))
    moment = states.T @ states / len(states)
    errors = []
    for found in (approximation_of(matrix, moment, rank), approximation_of(matrix, None, rank)):
        errors.append(np.mean(np.sum((states @ (matrix - found).T) ** 2, axis=1)))
    assert errors[0] < share * errors[1]


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 8), (8, 5)])
@pytest.mark.parametrize("whitened", [False, True])
def test_all_directions_give_the_matrix_back(outputs, inputs, whitened):
    matrix, moment = problem(outputs, inputs)
    np.testing.assert_allclose(approximation_of(matrix, moment if whitened else None, 5), matrix, atol=1e-12)


def test_energies_are_the_squared_singular_values():
    matrix, moment = problem(5, 8)
    directions, energies = whitening.output_directions(torch.tensor(matrix), torch.tensor(moment))
    values = np.linalg.svd(matrix @ np.linalg.cholesky(moment), compute_uv=False)
    np.testing.assert_allclose(energies.numpy(), values**2, rtol=1e-10)
    np.testing.assert_allclose((directions.T @ directions).numpy(), np.eye(5), atol=1e-12)


def test_halves_share_the_scale_evenly():
    up, down = whitening.factors(torch.randn(5, 7) * 100, torch.linalg.qr(torch.randn(5, 3).double())[0])
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_damping_ranks_by_weights_what_the_data_does_not_reach():
    """Of inputs that are never there, the direction with the larger weights is kept."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=torch.float64))
    moment = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="moments of the inputs of 'here' must not be singular with damping=0"):
        whitening.output_directions(matrix, moment, 0.0, "here")
    # Both reached directions have the energy 4, and only then come those of 5 and 3.
    directions, _ = whitening.output_directions(matrix, moment, 1e-6)
    assert {int(place) for place in directions[:, :2].abs().argmax(dim=0)} == {0, 1}
    assert directions[:, 2:].abs().argmax(dim=0).tolist() == [2, 3]


def test_inputs_that_are_all_zero_count_as_alike():
    matrix = torch.randn(4, 6, dtype=torch.float64)
    plain = whitening.output_directions(matrix)
    zero = whitening.output_directions(matrix, torch.zeros(6, 6, dtype=torch.float64), 1e-6)
    torch.testing.assert_close(zero[1], plain[1])


def test_weights_must_be_finite():
    with pytest.raises(ValueError, match="weight of 'here' must be finite"):
        whitening.output_directions(torch.tensor([[1.0, float("inf")]]), name="here")
