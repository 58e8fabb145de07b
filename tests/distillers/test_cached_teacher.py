"""A teacher behind a cache: some rows of a batch, and how far it runs for what is not stored."""

import collections

import pytest
import torch

from textbrewer.distillers.cached_teacher import needs_for, rows_only

IDS = torch.arange(12).reshape(4, 3)
Pair = collections.namedtuple("Pair", "ids scale")


class Encoding(collections.UserDict):
    """A batch as tokenizers of transformers return it."""


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_a_dict_of_some_rows_is_of_the_same_class(kind):
    batch = kind({"ids": IDS, "texts": ["a", "b", "c", "d"], "pair": ["x", "y"], "scale": torch.tensor(2.0), "n": 3})
    some = rows_only(batch, [2, 0])
    assert type(some) is kind
    assert some["ids"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert (some["texts"], some["pair"], some["scale"].item(), some["n"]) == (["c", "a"], ["x", "y"], 2.0, 3)


@pytest.mark.parametrize("batch", [(IDS, torch.tensor(2.0)), [IDS, torch.tensor(2.0)], Pair(IDS, torch.tensor(2.0))])
def test_a_sequence_of_some_rows_is_of_the_same_class(batch):
    some = rows_only(batch, [1])
    assert type(some) is type(batch)
    assert some[0].tolist() == [[3, 4, 5]]
    assert some[1].item() == 2.0


def test_a_tensor_of_some_rows():
    assert rows_only(IDS, [3]).tolist() == [[9, 10, 11]]


def test_needs_are_the_layers_of_what_is_not_stored():
    needs = needs_for(["hidden/3", "form/position_product/hidden/1,6", "attention/2", "inputs_mask"])
    assert not needs.logits
    assert needs.layers == {"hidden": {1, 3, 6}, "attention": {2}}
