"""Utilities"""

import numpy as np
import pytest
import torch
from torch import nn

import textbrewer.data_utils
import textbrewer.utils

from .tiny import Net, within


def count(model):
    """The total that display_parameters gives."""
    return textbrewer.utils.display_parameters(model)[1].value[0]


def test_views():
    """display_parameters miscounts views."""
    weight = torch.zeros(10, 4)
    state = {"whole": weight, "lower half": weight[5:], "other": torch.zeros(3)}
    assert count(state) == 43, f"{count(state)} elements of 43"


def test_meta_tensors():
    """display_parameters miscounts meta tensors."""
    expected = sum(value.numel() for value in Net().parameters())
    with torch.device("meta"):
        model = Net()
    assert count(model) == expected, f"{count(model)} elements of {expected}"


def test_buffers():
    """display_parameters miscounts buffers.

    What the table says of a buffer must not read as if it were a parameter.
    """
    text, tree = textbrewer.utils.display_parameters(nn.BatchNorm1d(4))
    assert "(buffer)" in text, "a buffer is listed as a parameter"
    assert tree["weight"].name == "weight"


@pytest.mark.parametrize("model", [nn.ReLU(), {}], ids=["module", "state dict"])
def test_empty_model(model):
    """display_parameters fails on empty models."""
    assert count(model) == 0


@pytest.mark.parametrize("tokens", [[], ["a"], ["a", "b"]], ids=["0", "1", "2"])
def test_short_input(tokens):
    """`n_gram_sampling` fails on short input."""
    np.random.seed(0)
    for _ in range(20):
        span = textbrewer.data_utils.n_gram_sampling(tokens)
        assert list(span) in [tokens[start:end] for start in range(3) for end in range(3)]


def test_long_disorder_ends():
    """`long_disorder` can hang."""
    with within(3):
        assert textbrewer.data_utils.long_disorder([1, 2, 3], p=1, length=0.1) == [1, 2, 3]


def test_masking_leaves_arrays():
    """`masking` edits arrays in place."""
    tokens = np.arange(10)
    textbrewer.data_utils.masking(tokens, p=1.0, mask=-1)
    assert tokens.tolist() == list(range(10)), f"afterwards the input is {tokens.tolist()}"
