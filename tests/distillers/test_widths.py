"""``proj='linear'`` alone: the widths are read from the models, and nothing else changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import Encoder, make_loader, seed_all
from tests.distillers.setups import DISTILLERS, Setup, weights

MATCH = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
PAIR = {**MATCH, "layer_T": [0, 2], "layer_S": [0, 1], "loss": "fsp"}


def with_config(model, width):
    """The model with a configuration that tells its width, as transformers models have."""
    model.config = SimpleNamespace(hidden_size=width)
    return model


class Noisy(Encoder):
    """Draws random numbers even in eval mode."""

    def forward(self, *inputs, **named):
        torch.rand(3)
        np.random.rand(3)
        return super().forward(*inputs, **named)


def make(folder, proj, kind="GeneralDistiller", known=False, matches=(MATCH,), **options):
    teachers, student = [Noisy(layers=2, width=48, seed=seed) for seed in (1, 3)], Noisy(layers=1, seed=2)
    if known:
        teachers, student = [with_config(teacher, 48) for teacher in teachers], with_config(student, 32)
    several = kind.startswith("Multi")
    config = {"intermediate_matches": [{**match, "proj": proj} for match in matches]}
    return Setup(folder, kind, teachers[: 2 if several else 1], student, config=config, **options)


@pytest.mark.parametrize("kind", DISTILLERS[1:])
@pytest.mark.parametrize("known", [True, False], ids=["from the configurations", "from a batch"])
def test_the_student_is_that_of_named_widths(kind, known, tmp_path):
    """Weights, projections and random numbers: all as with the widths written out, with a shuffled loader too."""
    results = []
    for proj in (["linear", 32, 48], "linear"):
        setup = make(tmp_path / str(len(results)), proj, kind, known)
        seed_all(0)
        if proj != "linear":
            # Made when the distiller was; they are made again from the seed that the others meet.
            setup.distiller.projections.clear()
            setup.distiller.build_projections({0: (None, None)})
        elif known:
            setup.distiller.projections.clear()
            setup.distiller.build_projections({0: (32, 48)})
        setup.train(make_loader(shuffle=True))
        projection = setup.distiller.projections[0]
        state = torch.get_rng_state(), np.random.get_state()[1]
        results.append((weights(setup.student), weights(projection), *map(torch.as_tensor, state)))
    for named, read in zip(*results, strict=True):
        assert torch.equal(named, read)


def test_known_widths_are_read_when_the_distiller_is_made(tmp_path):
    distiller = make(tmp_path, "relu", known=True).distiller
    assert distiller.projections[0][0].weight.shape == (48, 32)
    assert make(tmp_path, "relu").distiller.projections == {}


def test_reading_widths_leaves_no_trace(tmp_path):
    """Models, modes and gradients stay, and the data is then read from its start, in the order it would have had."""

    def loader():
        return make_loader(shuffle=True, generator=torch.Generator().manual_seed(5))

    setup = make(tmp_path, "linear")
    before = [weights(model) for model in (setup.student, *setup.teachers)]
    seen, modes = [], []
    setup.student.register_forward_pre_hook(
        lambda model, inputs: modes.append((model.training, torch.is_grad_enabled()))
    )
    setup.train(
        loader(),
        optimizer=torch.optim.SGD(setup.student.parameters(), lr=0.0),
        batch_postprocessor=lambda batch: seen.append(batch["input_ids"]) or batch,
    )
    assert all(
        torch.equal(weights(model), old) for model, old in zip((setup.student, *setup.teachers), before, strict=True)
    )
    assert modes == [(False, False)] + [(True, True)] * 6
    expected = [batch["input_ids"] for batch in loader()]
    assert len(seen) == 7  # the first one twice
    assert all(torch.equal(ids, other) for ids, other in zip(seen, [expected[0], *expected], strict=True))


@pytest.mark.parametrize("matches", [(MATCH, PAIR), (PAIR,)], ids=["two matches", "a pair of layers"])
def test_widths_of_several_matches(matches, tmp_path):
    setup = make(tmp_path, "linear", matches=matches)
    seen = setup.losses()
    setup.train()
    assert [module.weight.shape for module in setup.distiller.projections.values()] == [(48, 32)] * len(matches)
    assert len(seen[0]) == 3 + len(matches)


def test_options_of_the_optimiser_without_widths(tmp_path):
    setup = make(tmp_path, ["linear", {"lr": 0.5}])
    optimizer = setup.train()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.5]


def test_widths_of_stored_teacher_outputs(tmp_path):
    """The teacher's width is read from what the batches bring; it does not run."""
    setup = make(tmp_path, "linear")
    data = []
    for batch in make_loader():
        with torch.no_grad():
            data.append({"student": batch, "teacher": batch, "teacher_cache": setup.teachers[0].eval()(**batch)})
    setup.teachers[0].forward = None
    setup.train(data)
    assert setup.distiller.projections[0].weight.shape == (48, 32)


def test_widths_of_an_iterator_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="iterator that can be read only once"):
        make(tmp_path, "linear").train(batch for batch in make_loader())
