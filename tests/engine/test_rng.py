"""The random-number state: taken, put back, kept, and fit to be saved."""

import random

import numpy as np
import pytest
import torch

from textbrewer.engine import rng


def draw(*generators):
    """Draw from every generator, also numbers that come in pairs, of which one is kept for the next time."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.standard_normal(),
        torch.rand(()).item(),
        torch.randn(3).tolist(),
        *(torch.rand((), generator=generator).item() for generator in generators),
    ]


def test_put_gives_the_same_numbers_again():
    own = torch.Generator().manual_seed(3)
    draw(own)
    state = rng.take([own])
    first = draw(own), draw(own)
    rng.put(state, [own])
    assert (draw(own), draw(own)) == first


def test_a_state_survives_a_file(tmp_path):
    own = torch.Generator().manual_seed(3)
    draw(own)
    state = rng.take([own])
    torch.save(state, tmp_path / "state.pt")
    first = draw(own)
    rng.put(torch.load(tmp_path / "state.pt", weights_only=True), [own])
    assert draw(own) == first


def test_kept_puts_back_even_after_an_error():
    own = torch.Generator().manual_seed(3)
    state = rng.take([own])
    expected = draw(own)
    rng.put(state, [own])

    def fail():
        draw(own)
        raise KeyError

    with pytest.raises(KeyError), rng.kept([own]):
        fail()
    assert draw(own) == expected


def test_kept_leaves_other_generators_alone():
    own = torch.Generator().manual_seed(3)
    before = own.get_state()
    with rng.kept():
        draw(own)
    assert not torch.equal(own.get_state(), before)


@pytest.mark.parametrize("value", [0, 1, 2**32 + 1, 2**63 - 1])
def test_seed_gives_each_generator_its_plain_seed(value):
    rng.seed(value)
    seeded = draw()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    assert draw() == seeded


def test_another_number_of_generators_is_refused():
    with pytest.raises(ValueError):
        rng.put(rng.take([torch.Generator()]))
