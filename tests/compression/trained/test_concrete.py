"""The hard concrete distribution and the expected size, against closed forms, samples and counted parameters."""

import math

import pytest
import torch
from scipy import special

from tests.compression.families import NINE
from tests.students.models import make
from textbrewer.compression import Prune
from textbrewer.compression.sites import find_layout
from textbrewer.compression.trained import concrete
from textbrewer.compression.trained.expected_size import ExpectedSize

ALPHAS = [-4.0, -1.6, 0.0, 0.7, 3.0]


@pytest.mark.parametrize("temperature", [2 / 3, 0.4])
@pytest.mark.parametrize("log_alpha", ALPHAS)
def test_shares_of_factors_at_both_ends(log_alpha, temperature):
    """Drawn at the middles of a fine grid of the noise, so that shares are exact to one in its number."""
    count = 200_000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    factors = concrete.sample(torch.full_like(noise, log_alpha), noise, temperature)
    kept = concrete.probability_kept(torch.tensor(log_alpha, dtype=torch.float64), temperature)
    assert float((factors > 0).double().mean()) == pytest.approx(float(kept), abs=2e-5)
    # 1.2 s - 0.1 reaches 1 at s = 11/12, where the logit is ln 11, as it is -ln 11 where it leaves 0.
    whole = special.expit(log_alpha - temperature * math.log(11))
    assert float((factors == 1).double().mean()) == pytest.approx(whole, abs=2e-5)
    assert float(kept) == pytest.approx(special.expit(log_alpha + temperature * math.log(11)))
    inner = factors[(factors > 0) & (factors < 1)]
    assert (inner.diff() > 0).all()


def test_a_factor_is_what_the_formula_says():
    for log_alpha, noise in ((0.3, 0.5), (-1.0, 0.8), (2.0, 0.01), (0.0, 0.999)):
        s = special.expit((special.logit(noise) + log_alpha) * 1.5)
        found = concrete.sample(*(torch.tensor(one, dtype=torch.float64) for one in (log_alpha, noise)))
        assert float(found) == pytest.approx(min(1.0, max(0.0, 1.2 * s - 0.1)))


def test_noise_at_its_ends_is_finite():
    log_alpha = torch.zeros(2, requires_grad=True)
    factors = concrete.sample(log_alpha, torch.tensor([0.0, 1.0]))
    factors.sum().backward()
    assert factors.tolist() == [0.0, 1.0]
    assert log_alpha.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minimum", [1, 5])
def test_factors_of_inference(seed, minimum):
    generator = torch.Generator().manual_seed(seed)
    log_alpha = 3 * torch.randn(9, generator=generator) - seed
    log_alpha[3] = log_alpha[5]
    values = log_alpha.tolist()
    zeros = round(sum(1 - special.expit(value + math.log(11) * 2 / 3) for value in values))
    zeros = min(zeros, 9 - minimum)
    order = sorted(range(9), key=lambda place: (values[place], -place))
    expected = [0.0 if place in order[:zeros] else special.expit(0.8 * values[place] * 1.5) for place in range(9)]
    found = concrete.inference_factors(log_alpha, minimum)
    torch.testing.assert_close(found.double(), torch.tensor([float(one) for one in expected], dtype=torch.float64))
    assert int((found > 0).sum()) == 9 - zeros


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 0.0), (0.1, math.log(9)), (1e-6, math.log(100))])
def test_where_log_alpha_starts(rate, expected):
    assert concrete.log_alpha_for(rate) == pytest.approx(expected)


def kept_of(masks):
    return {name: mask.float() for name, mask in masks.items()}


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("layers", [0, 2])
def test_size_of_what_stays_for_certain(name, layers):
    """Against the parameters counted in a shrunk model."""
    model = make(name)
    plan = Prune(heads=0.5, ffn=0.4, layers=layers, scope="global", score="random", seed=3)
    masked = plan.apply(model)
    layout = find_layout(model)
    kept = kept_of(masked.masks)
    kept |= {
        site.name: torch.ones(site.units)
        for site in layout.sites
        if site.kind in ("heads", "ffn") and site.name not in kept
    }
    size = ExpectedSize(model, layout, [site for site in layout.sites if site.kind in ("heads", "ffn", "layers")])
    paths = tuple(f"{stack.path}." for stack in layout.stacks)
    before, after = (
        sum(value.numel() for key, value in one.named_parameters() if key.startswith(paths))
        for one in (model, masked.shrink())
    )
    assert float(size(kept)) == pytest.approx(1 - after / before, abs=1e-6)
    assert size.total == before


def test_size_expected_of_random_masks():
    """The mean over many draws of independent units and layers is the product of probabilities."""
    model = make("bert-classifier", num_hidden_layers=3)
    layout = find_layout(model)
    sites = [site for site in layout.sites if site.kind in ("heads", "ffn", "layers")]
    size = ExpectedSize(model, layout, sites)
    generator = torch.Generator().manual_seed(0)
    chances = {site.name: torch.rand(site.units, generator=generator).clamp(0.2, 0.95) for site in sites}
    # By hand: a head is 4 lines of four matrices of width 32 and 12 biases, a unit two lines and a bias; beside them a
    # layer has the biases of two matrices and two norms.
    costs, rest = {"heads": 4 * 4 * 32 + 12, "ffn": 2 * 32 + 1}, 32 * 2 + 4 * 32
    stays = chances["bert.encoder.layer"]
    gone, draws = [], 4000
    for _ in range(draws):
        layers = torch.rand(3, generator=generator) < stays
        left = rest * float(layers.sum())
        for site in sites:
            if site.kind != "layers" and layers[site.layers[0]]:
                left += costs[site.kind] * float(
                    (torch.rand(site.units, generator=generator) < chances[site.name]).sum()
                )
        gone.append(1 - left / (3 * (8 * costs["heads"] + 30 * costs["ffn"] + rest)))
    error = torch.tensor(gone).std() / draws**0.5
    assert float(size(chances)) == pytest.approx(sum(gone) / draws, abs=4 * float(error))


def test_size_has_the_slopes_of_its_formula():
    model = make("bert-classifier", num_hidden_layers=2)
    layout = find_layout(model)
    size = ExpectedSize(model, layout, [site for site in layout.sites if site.kind != "layers"])
    kept = {site.name: torch.full((site.units,), 0.5, requires_grad=True) for site in size.sites}
    size(kept).backward()
    total = sum(value.numel() for key, value in model.named_parameters() if key.startswith("bert.encoder.layer."))
    for site in size.sites:
        # A head: 4 columns or rows of four matrices of width 32, and 3 times 4 biases; a unit: two lines and a bias.
        cost = 4 * 4 * 32 + 3 * 4 if site.kind == "heads" else 2 * 32 + 1
        if site.kind in ("heads", "ffn"):
            torch.testing.assert_close(kept[site.name].grad, torch.full((site.units,), -cost / total))
