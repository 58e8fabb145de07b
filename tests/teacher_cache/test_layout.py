"""How rows are stored: with or without padding, in what shapes."""

import json

import numpy as np
import pytest
import torch

from textbrewer import MATCH_LOSS_MAP
from textbrewer.adaptors import Views
from textbrewer.configurations import IntermediateMatch
from textbrewer.teacher_cache import layout
from textbrewer.teacher_cache.contents import Contents
from textbrewer.teacher_cache.items import Item
from textbrewer.teacher_cache.keys import Rows
from textbrewer.teacher_cache.layout import Layout

B, L, H, A, C = 3, 5, 4, 2, 6
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
ROWS = Rows([b"a", b"b", b"c"], MASK == 1)
NO_MASK = Rows([b"a", b"b", b"c"], None)


def contents_of(*losses, everything=False):
    matches = []
    for number, loss in enumerate(losses):
        layers = [0, 1] if loss in ("nst", "fsp") else 0
        matches.append(
            (number, IntermediateMatch(layer_T=layers, layer_S=layers, feature="hidden", loss=loss, weight=1))
        )
    return Contents(matches, everything)


def views(**entries):
    captured = entries.pop("captured", None)
    return Views(entries, captured=captured)


LOGITS = torch.zeros(B, C)
TOKENS = torch.zeros(B, L, C)


@pytest.mark.parametrize(
    ("what", "covered"),
    [
        ({"T": views(logits=[LOGITS])}, True),
        ({"T": views(logits=[LOGITS]), "rows": NO_MASK}, False),
        ({"T": views(logits=[LOGITS]), "everything": True}, False),
        ({"T": views(logits=[LOGITS], captured={0: LOGITS})}, False),
        # Logits by position need a mask of their own, of either side, that leaves all padding out.
        ({"T": views(logits=[TOKENS])}, False),
        ({"T": views(logits=[TOKENS]), "S": views(logits_mask=[MASK])}, True),
        ({"T": views(logits=[TOKENS], logits_mask=[MASK])}, True),
        ({"T": views(logits=[TOKENS], logits_mask=[MASK == 1])}, True),
        ({"T": views(logits=[TOKENS]), "S": views(logits_mask=[MASK * 0])}, True),
        ({"T": views(logits=[TOKENS]), "S": views(logits_mask=[torch.ones(B, L)])}, False),
        ({"T": views(logits=[TOKENS], logits_mask=[torch.ones(B, L)]), "S": views(logits_mask=[MASK])}, False),
        ({"T": views(logits=[TOKENS]), "S": views(logits_mask=[MASK, torch.ones(B, L)])}, False),
        ({"T": views(logits=[TOKENS]), "S": views(logits_mask=[MASK[:, :4]])}, False),
        # Of matches the student's inputs_mask decides.
        ({"losses": ["hidden_mse"], "S": views(inputs_mask=MASK)}, True),
        ({"losses": ["hidden_mse", "nst"]}, False),
        ({"losses": ["hidden_mse"], "T": views(inputs_mask=MASK)}, False),
        ({"losses": ["cos"], "S": views(inputs_mask=torch.ones(B, L))}, False),
        ({"losses": ["cos"], "S": views(inputs_mask=MASK), "T": views(logits=[TOKENS])}, False),
        ({"losses": ["cos", "of ours"], "S": views(inputs_mask=MASK)}, False),
        ({"losses": ["cos"], "S": views(inputs_mask=MASK), "rows": NO_MASK}, False),
    ],
)
def test_masks_cover_padding(what, covered, monkeypatch):
    monkeypatch.setitem(MATCH_LOSS_MAP, "of ours", lambda state_S, state_T, mask=None: (state_S - state_T).mean())
    contents = contents_of(*what.get("losses", ()), everything=what.get("everything", False))
    rows = what.get("rows", ROWS)
    assert layout.masks_cover_padding(what.get("S", views()), what.get("T", views()), rows, contents) is covered


@pytest.mark.parametrize(
    ("tensors", "rows", "depends"),
    [
        ({"logits/0": LOGITS}, ROWS, False),
        ({"logits/0": LOGITS}, NO_MASK, True),
        ({"logits/0": TOKENS, "hidden/3": torch.zeros(B, L, H), "attention/0": torch.zeros(B, A, L, L)}, ROWS, False),
        # Logits over the positions themselves: the start of a span.
        ({"logits/0": torch.zeros(B, L)}, ROWS, True),
        ({"inputs_mask": torch.zeros(B, L)}, ROWS, False),
        # Positions of a decoder.
        ({"hidden/0": torch.zeros(B, L + 1, H)}, ROWS, True),
        ({"attention/0": torch.zeros(B, A, L, L + 1)}, ROWS, True),
        ({"attention/0": torch.zeros(B, A, L + 1, L)}, ROWS, True),
        ({"scores/0": torch.zeros(B, A, L, L), "value/0": torch.zeros(B, A, L, H)}, ROWS, False),
        ({"query/0": torch.zeros(B, L, H)}, ROWS, False),
        ({"scores/0": torch.zeros(B, A, L + 1, L)}, ROWS, True),
        ({"value/0": torch.zeros(B, A, L + 1, H)}, ROWS, True),
        ({"key/0": torch.zeros(B, 2, A, L, H)}, ROWS, True),
        ({"logits_mask/0": torch.zeros(B, L + 1)}, ROWS, True),
        ({"form/position_product/hidden/0,1": torch.zeros(B, L + 1, L + 1)}, ROWS, True),
        ({"form/position_product/hidden/0,1": torch.zeros(B, L, L)}, ROWS, False),
        ({"form/layer_product/hidden/0,1": torch.zeros(B, H, H)}, ROWS, False),
    ],
)
def test_depends_on_padding(tensors, rows, depends):
    assert layout.depends_on_padding(tensors, rows, contents_of("nst", "fsp")) is depends


@pytest.mark.parametrize("shape", [(B, L, A, C), (B, A, L, C)])
def test_logits_with_more_dimensions_keep_their_padding(shape):
    """Which of them are positions is not known."""
    assert layout.depends_on_padding({"logits/0": torch.zeros(shape)}, ROWS, contents_of())


def test_items_have_zero_where_they_are_as_long_as_the_row():
    tensors = {
        "logits/0": torch.zeros(B, L, 30, dtype=torch.bfloat16),
        "logits/1": torch.zeros(B, 5),
        "hidden/2": torch.zeros(B, L, H),
        "attention/1": torch.zeros(B, A, L, L),
        "inputs_mask": torch.zeros(B, L, dtype=torch.int64),
        "captured/0": torch.zeros(B, L, H),
    }
    items = layout.items_of(tensors, False, contents_of(), 4, 2.0)
    assert items == [
        Item("logits/0", "bfloat16", (0, 30), 4, 2.0),
        # Of five logits, four and the level of the others would be more than all.
        Item("logits/1", "float32", (5,), 0, 2.0),
        Item("hidden/2", "float32", (0, H), 0, 2.0),
        Item("attention/1", "float32", (A, 0, 0), 0, 2.0),
        Item("inputs_mask", "int64", (0,), 0, 2.0),
        Item("captured/0", "float32", (L, H), 0, 2.0),
    ]
    padded = layout.items_of(tensors, True, contents_of(), None, 1.0)
    assert [item.shape for item in padded] == [(L, 30), (5,), (L, H), (A, L, L), (L,), (L, H)]
    assert all(item.top_k == 0 for item in padded)


def test_places_of():
    kept = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]) == 1
    places = layout.places_of(Rows([b""] * 5, kept))
    assert places[0] == slice(0, 2)
    assert places[1] == slice(0, 0)
    assert np.array_equal(places[2], [0, 2])
    assert np.array_equal(places[3], [2, 3])
    assert places[4] == slice(0, 4)
    assert layout.places_of(NO_MASK) == [slice(0, 0)] * 3


def test_same_mask():
    masked = views(inputs_mask=MASK)
    assert layout.same_mask(views(), views())
    assert layout.same_mask(masked, views(inputs_mask=MASK.clone()))
    assert not layout.same_mask(masked, views())
    assert not layout.same_mask(views(), masked)
    assert not layout.same_mask(masked, views(inputs_mask=MASK[:, :4]))
    assert not layout.same_mask(masked, views(inputs_mask=torch.ones(B, L)))


def test_a_layout_as_plain_values():
    settled = Layout(
        (Item("logits/0", "float32", (0, 9), 3, 2.0), Item("hidden/1", "bfloat16", (0, H))),
        {"logits": 1, "hidden": 5},
        (0, 2),
        True,
        ("hidden/0",),
        0.25,
    )
    assert Layout.from_dict(json.loads(json.dumps(settled.to_dict()))) == settled


def test_in_words():
    names = ["inputs_mask", "logits/0", "logits/1", "logits_mask/0", "labels/0", "hidden/10", "hidden/2", "hidden/0"]
    names += ["form/layer_product/hidden/2,10", "form/layer_product/hidden/0,4", "attention/1"]
    assert layout.in_words(names) == "logits; hidden 0, 2, 10; layer product of hidden 0-4, 2-10; attention 1"
    assert layout.in_words([]) == ""
