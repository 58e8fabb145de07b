"""Which units a plan chooses, against every other choice; what it refuses."""

import itertools
import math

import pytest
import torch

from tests.compression.families import GROUPED, NINE, with_labels
from tests.students.models import HEADS, LAYERS, UNITS, batch_for, make
from textbrewer.compression import Masks, Prune
from textbrewer.compression.choosing import choose_global, choose_uniform
from textbrewer.compression.sites import Site, find_layout


def made_up(sizes, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("ffn", f"site{number}", "layers", size) for number, size in enumerate(sizes)]
    scores = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
    if ties:
        scores = {name: (score * 3).round() for name, score in scores.items()}
    return sites, scores


def cheapest(scores, going, allowed):
    """Return the least total score of units that may go, over all choices."""
    units = [(name, unit) for name, score in scores.items() for unit in range(len(score))]
    choices = (choice for choice in itertools.combinations(units, going) if allowed(choice))
    return min(sum(float(scores[name][unit]) for name, unit in choice) for choice in choices)


def gone(masks):
    return [(name, unit) for name, mask in masks.items() for unit in range(len(mask)) if not mask[unit]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("share", "minimum", "maximum"), [(0.5, 1, 1.0), (0.7, 1, 1.0), (0.35, 2, 1.0), (0.4, 1, 0.5)])
def test_global_choice_is_the_cheapest_of_all(share, minimum, maximum, seed, ties):
    sites, scores = made_up([2, 5, 3, 3], seed, ties)
    masks = choose_global(sites, scores, share, minimum, maximum)

    def allowed(choice):
        for site in sites:
            number = sum(name == site.name for name, _ in choice)
            if site.units - number < minimum or number > maximum * site.units:
                return False
        return True

    chosen = gone(masks)
    assert len(chosen) == math.floor(share * 13 + 1e-9)
    assert allowed(chosen)
    assert sum(float(scores[name][unit]) for name, unit in chosen) == pytest.approx(
        cheapest(scores, len(chosen), allowed)
    )


@pytest.mark.parametrize("share", [0.1, 0.34, 0.5, 0.7, 0.99])
def test_uniform_choice_is_the_cheapest_of_each_site(share):
    sites, scores = made_up([2, 5, 3, 10])
    masks = choose_uniform(sites, scores, share, 1)
    for site in sites:
        chosen = gone({site.name: masks[site.name]})
        assert len(chosen) == math.floor(share * site.units + 1e-9)
        least = cheapest({site.name: scores[site.name]}, len(chosen), lambda choice: True)
        assert sum(float(scores[site.name][unit]) for _, unit in chosen) == pytest.approx(least)


def test_shares_are_not_lost_to_rounding():
    sites, scores = made_up([10])
    for tenths in range(1, 10):
        assert len(gone(choose_uniform(sites, scores, tenths / 10, 1))) == tenths


def test_equal_scores_leave_the_first():
    sites, scores = made_up([4, 4])
    scores = {name: torch.zeros(4) for name in scores}
    assert gone(choose_uniform(sites, scores, 0.5, 1)) == [("site0", 2), ("site0", 3), ("site1", 2), ("site1", 3)]
    assert gone(choose_global(sites, scores, 0.5, 1, 1.0)) == [("site0", 3), ("site1", 1), ("site1", 2), ("site1", 3)]


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_a_plan_takes_what_it_says(name, scope):
    model = make(name)
    layout = find_layout(model)
    masks = Prune(heads=0.5, ffn=0.3, scope=scope).apply(model).masks
    for kind, share in (("heads", 0.5), ("ffn", 0.3)):
        sites = layout.of(kind)
        weights = [(masks[site.name], site) for site in sites]
        off = sum(int((~mask).sum()) * site.per_unit * len(site.layers) for mask, site in weights)
        total = sum((HEADS if kind == "heads" else UNITS) * len(site.layers) for site in sites)
        cost = max(site.per_unit * len(site.layers) for site in sites)
        assert share * total - cost < off <= share * total
        if kind == "heads" and name in GROUPED:
            assert {site.units for site in sites} == {HEADS // 2}
    assert set(masks) == {site.name for kind in ("heads", "ffn") for site in layout.of(kind)}


def test_layers_go_first_and_shares_are_of_the_rest():
    model = make("bart")
    masked = Prune(heads=0.5, layers=1, score="l2").apply(model)
    removed = {f"{path}.{int((~mask).nonzero())}." for path, mask in masked.masks.items() if path.endswith("layers")}
    assert len(removed) == 2
    others = [key for key in masked.masks if not key.endswith("layers")]
    assert len(others) == (LAYERS - 1) * 3
    assert not any(key.startswith(tuple(removed)) for key in others)
    assert masked.sparsity()["heads"] == pytest.approx(1 - 0.5 * (LAYERS - 1) / LAYERS)


def test_excluded_modules_stay():
    model = make("bert-classifier")
    exclude = ["bert.encoder.layer.0", "*.layer.[12].output.dense"]
    plan = Prune(heads=0.5, ffn=0.5, layers=1, score="random", seed=5, exclude=exclude)
    masks = plan.apply(model).masks
    stays = masks["bert.encoder.layer"].nonzero().flatten().tolist()
    assert 0 in stays
    heads = {f"bert.encoder.layer.{number}.attention.output.dense" for number in stays if number != 0}
    units = {"bert.encoder.layer.3.output.dense"} if 3 in stays else set()
    assert set(masks) == {"bert.encoder.layer"} | heads | units


def test_random_is_by_seed():
    model = make("vit")
    one, same, other = (Prune(ffn=0.5, score="random", seed=seed).apply(model).masks for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_own_scores():
    model = make("bert-classifier")
    scores = {site.name: torch.arange(site.units).float() for site in find_layout(model).of("ffn")}
    masks = Prune(ffn=0.5, score=scores).apply(model).masks
    assert all(torch.equal(mask, torch.arange(UNITS) >= UNITS // 2) for mask in masks.values())
    name = next(iter(scores))
    with pytest.raises(ValueError, match=r"must have 30 numbers for .*got \(3,\)"):
        Prune(ffn=0.5, score={**scores, name: torch.ones(3)}).apply(model)
    with pytest.raises(ValueError, match=r"must have 30 numbers for .*got none"):
        Prune(ffn=0.5, score={}).apply(model)
    with pytest.raises(ValueError, match="scores must be finite"):
        Prune(ffn=0.5, score={**scores, name: torch.full((UNITS,), math.nan)}).apply(model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "nothing would be pruned"),
        ({"heads": 1.0}, ValueError, "heads must be less than 1, got 1.0"),
        ({"ffn": -0.1}, ValueError, "ffn must be at least 0"),
        ({"heads": float("nan")}, ValueError, "heads must be finite"),
        ({"heads": "half"}, TypeError, "heads must be a number"),
        ({"layers": 0.5}, ValueError, "layers must be a whole number"),
        ({"layers": -1}, ValueError, "layers must be at least 0"),
        ({"heads": 0.5, "score": "L1"}, ValueError, "did you mean 'l1'"),
        ({"heads": 0.5, "score": 3}, TypeError, "score must be a name, or a dict"),
        ({"heads": 0.5, "scope": "local"}, ValueError, "scope must be one of the known names"),
        ({"heads": 0.5, "minimum": 0}, ValueError, "minimum must be at least 1"),
        ({"heads": 0.5, "maximum": 1.5, "scope": "global"}, ValueError, "maximum must be at most 1"),
        ({"heads": 0.5, "maximum": 0.6}, ValueError, 'maximum must be 1 unless scope="global"'),
        ({"heads": 0.5, "exclude": "bert"}, TypeError, "exclude must be a list"),
    ],
)
def test_plans_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        Prune(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heads": 0.5, "minimum": 5}, ValueError, "minimum must be at most what stays, got 5.*leaves 4 of the 8"),
        ({"heads": 0.7, "scope": "global", "minimum": 4}, ValueError, "got 0.7: only 16 of 22 can go"),
        ({"heads": 0.7, "scope": "global", "maximum": 0.25}, ValueError, "only 8 of 22 can go"),
        ({"heads": 0.1}, ValueError, "large enough to take one of 8, got 0.1"),
        ({"layers": LAYERS}, ValueError, "at least one of the 4 layers"),
        ({"layers": 4, "exclude": ["bert.encoder.layer.1"]}, ValueError, "those in exclude"),
        ({"heads": 0.5, "exclude": ["encoder.nothing"]}, KeyError, "no module 'encoder.nothing'"),
        ({"heads": 0.5, "exclude": ["bert"]}, ValueError, "exclude must leave something to prune of heads"),
        ({"heads": 0.5, "score": "taylor"}, ValueError, "needs data: pass apply"),
    ],
)
def test_plans_that_do_not_fit_the_model(settings, error, message):
    model = make("bert-classifier")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        Prune(**settings).apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_data_that_do_not_fit_the_score():
    model = make("bert-classifier")
    with pytest.raises(ValueError, match="dataloader must be None for score='l1'"):
        Prune(heads=0.5).apply(model, [with_labels(model)])
    with pytest.raises(ValueError, match="at least one batch"):
        Prune(heads=0.5, score="mean_activation").apply(model, [])
    with pytest.raises(ValueError, match='must not be "apoz" for whole layers'):
        Prune(layers=1, score="apoz").apply(model, [batch_for(model)])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Prune(heads=0.5).apply({"model": model})
    masks = Prune(ffn=0.5, score="mean_activation").apply(model, [batch_for(model)]).masks
    assert isinstance(masks, Masks)
