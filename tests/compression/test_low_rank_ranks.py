"""Ranks against their definitions, and the common budget against all possible ranks."""

import itertools

import pytest
import torch

from textbrewer.compression.low_rank_ranks import (
    Spectrum,
    largest_rank,
    ranks_by_energy,
    ranks_by_ratio,
    ranks_under_budget,
)


def spectrum(outputs, inputs, seed=0, decay=2.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(min(outputs, inputs), generator=generator, dtype=torch.float64)
    return Spectrum(outputs, inputs, torch.exp(-decay * values.cumsum(0)))


@pytest.mark.parametrize("outputs", range(1, 13))
@pytest.mark.parametrize("inputs", [1, 2, 3, 6, 12])
def test_largest_rank_is_the_last_at_which_the_pair_is_smaller(outputs, inputs):
    smaller = [rank for rank in range(1, 20) if rank * (outputs + inputs) < outputs * inputs]
    assert largest_rank(outputs, inputs) == max(smaller, default=0)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(32, 32), (48, 12), (7, 13), (10, 10)], ids=str)
def test_ratio_gives_the_largest_rank_that_removes_as_much(ratio, shape):
    outputs, inputs = shape
    fits = [
        rank
        for rank in range(1, 40)
        if rank * (outputs + inputs) <= (1 - ratio) * outputs * inputs + 1e-9
        and rank * (outputs + inputs) < outputs * inputs
    ]
    assert ranks_by_ratio({"a": spectrum(*shape)}, ratio) == {"a": max(fits, default=0)}


def test_ratio_is_not_lost_to_rounding():
    # (1 - 0.9) * 100 * 100 / 200 is 5, and a little less in floating point.
    assert (1 - 0.9) * 100 * 100 / 200 < 5
    assert ranks_by_ratio({"a": spectrum(100, 100)}, 0.9) == {"a": 5}


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.95, 3), (0.96, 4), (1.0, 4)]
)
def test_energy_gives_the_smallest_rank_that_keeps_as_much(energy, rank):
    energies = torch.tensor([50.0, 30.0, 15.0, 5.0, 0.0], dtype=torch.float64)
    assert ranks_by_energy({"a": Spectrum(9, 5, energies)}, energy) == {"a": rank}


def test_without_energy_one_direction_keeps_all():
    assert ranks_by_energy({"a": Spectrum(4, 4, torch.zeros(4))}, 1.0) == {"a": 1}


# ---- the common budget -------------------------------------------------------------------------------------------


def kept(spectra, ranks):
    """The sum of the shares of energy that ranks keep."""
    return sum(sum(item.shares()[: ranks[name]]) for name, item in spectra.items())


def cost(spectra, ranks):
    return sum(item.weights if ranks[name] is None else ranks[name] * item.per_direction
               for name, item in spectra.items())  # fmt: skip


def every_choice(spectra, budget):
    """All ranks of pairs that are smaller than the maps and fit in the budget together."""
    ranges = [range(1, largest_rank(item.outputs, item.inputs) + 1) for item in spectra.values()]
    choices = (dict(zip(spectra, ranks)) for ranks in itertools.product(*ranges))
    return [ranks for ranks in choices if cost(spectra, ranks) <= budget]


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_budget_over_equal_shapes_is_spent_in_the_best_way(ratio, seed):
    spectra = {name: spectrum(12, 20, seed + 10 * number, 1 + number) for number, name in enumerate("abc")}
    budget = (1 - ratio) * 3 * 240
    best = max(kept(spectra, ranks) for ranks in every_choice(spectra, budget))
    found = ranks_under_budget(spectra, ratio=ratio)
    assert None not in found.values()
    assert cost(spectra, found) <= budget
    assert kept(spectra, found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("shapes", [[(12, 20), (30, 8), (16, 16)], [(60, 6), (12, 12), (11, 14)]], ids=str)
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("seed", range(6))
def test_budget_over_other_shapes_misses_the_best_by_less_than_a_direction(shapes, ratio, seed):
    spectra = {name: spectrum(*shape, seed + 10 * number) for number, (name, shape) in enumerate(zip("abc", shapes))}
    budget = (1 - ratio) * sum(item.weights for item in spectra.values())
    choices = every_choice(spectra, budget)
    best = max(kept(spectra, ranks) for ranks in choices)
    found = ranks_under_budget(spectra, ratio=ratio)
    assert None not in found.values()
    assert cost(spectra, found) <= budget
    # No further direction fits.
    for name, item in spectra.items():
        assert cost(spectra, found) + item.per_direction > budget or found[name] == largest_rank(*item[:2])
    following = [item.shares()[found[name]] for name, item in spectra.items()]
    assert best - max(following) < kept(spectra, found) <= best + 1e-12
    assert found in choices


def test_energy_under_a_budget_is_kept_on_average_by_the_fewest_weights():
    spectra = {name: spectrum(12, 20, 10 * number, 1 + number) for number, name in enumerate("abc")}
    found = ranks_under_budget(spectra, energy=0.8)
    assert kept(spectra, found) >= 3 * 0.8
    enough = [ranks for ranks in every_choice(spectra, 720) if kept(spectra, ranks) >= 3 * 0.8]
    assert cost(spectra, found) == min(cost(spectra, ranks) for ranks in enough)


def test_each_map_counts_alike_however_large_its_outputs_are():
    one, other = spectrum(12, 12, 1), spectrum(12, 12, 2)
    found = ranks_under_budget({"a": one, "b": other}, ratio=0.5)
    scaled = ranks_under_budget({"a": one, "b": other._replace(energies=other.energies * 1e6)}, ratio=0.5)
    assert found == scaled


def test_a_map_that_needs_nearly_all_its_directions_is_left_whole():
    flat, steep = Spectrum(12, 12, torch.ones(12)), Spectrum(12, 12, torch.tensor([1.0] + [1e-6] * 11))
    # 1 direction of one and all of the other take 24 + 144 of 288 weights.
    assert ranks_under_budget({"flat": flat, "steep": steep}, ratio=0.41) == {"flat": None, "steep": 1}
    # With a weight less the other is not whole, and no direction of the steep one fits in the rest.
    assert ranks_under_budget({"flat": flat, "steep": steep}, ratio=0.42) == {"flat": 5, "steep": 1}


def test_a_direction_for_each_map_must_fit():
    spectra = {"a": spectrum(12, 12), "b": spectrum(12, 12)}
    assert ranks_under_budget(spectra, ratio=0.8333) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match=r"leave a direction to each of the 2 maps.*largest possible is 0\.8333"):
        ranks_under_budget(spectra, ratio=0.834)
