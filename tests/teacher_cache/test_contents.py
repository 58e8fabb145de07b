"""What of a teacher's views is kept, and that the losses of it are those of the views themselves."""

import pytest
import torch

from tests.losses.samples import MASK, PAIRS, wave
from tests.losses.samples import feature_of as read_by
from textbrewer import MATCH_LOSS_MAP
from textbrewer.adaptors import Views
from textbrewer.configurations import IntermediateMatch
from textbrewer.losses.forms import form_of
from textbrewer.teacher_cache.contents import Contents, form_name, layers_of

LAYERS, BATCH, LENGTH, WIDTH, HEADS = 4, 3, 4, 6, 3


def some_views(phase=0.0, mask=MASK, width=WIDTH):
    hidden = [wave(BATCH, LENGTH, width, phase=phase + layer, dtype=torch.float32) for layer in range(LAYERS + 1)]
    shape = (BATCH, HEADS, LENGTH, LENGTH)
    attention = [wave(*shape, phase=phase + 9 + layer, dtype=torch.float32) for layer in range(LAYERS)]
    heads = [
        wave(BATCH, HEADS, LENGTH, WIDTH, phase=phase + 30 + layer, dtype=torch.float32) for layer in range(LAYERS)
    ]
    entries = {
        "logits": [wave(BATCH, 5, phase=phase + 20, dtype=torch.float32), wave(BATCH, 2, phase=phase + 21)],
        "logits_mask": [MASK.clone()],
        "labels": [torch.arange(BATCH)],
        "losses": [torch.tensor(1.0)],
        "hidden": hidden,
        "attention": attention,
        "scores": [scores + 1 for scores in attention],
        "value": heads,
    }
    if mask is not None:
        entries["inputs_mask"] = mask
    return Views(entries)


def match_of(loss, layers=None):
    feature = read_by(loss)
    if layers is None:
        layers = [1, 3] if loss in PAIRS else 2
    return IntermediateMatch(layer_T=layers, layer_S=layers, feature=feature, loss=loss, weight=1)


def contents_of(*matches, everything=False, whole=()):
    return Contents(list(enumerate(matches)), everything, whole)


def feature_of(views, match):
    layers = match.layer_T
    sequence = views[match.feature]
    return [sequence[layer] for layer in layers] if isinstance(layers, list) else sequence[layers]


def loss_of(number, match, views_T, views_S):
    """The loss as a distiller computes it: of the reduced form where the views have one."""
    feature_T = views_T.reduced[number] if number in views_T.reduced else feature_of(views_T, match)
    feature_S = feature_of(views_S, match)
    if match.loss == "vid":  # means and variances
        feature_S = torch.cat([feature_S, feature_S.abs() + 1], dim=-1)
    return MATCH_LOSS_MAP[match.loss](feature_S, feature_T, views_S.get("inputs_mask"))


BASE = {"logits/0", "logits/1", "logits_mask/0", "inputs_mask"}
KEPT = {
    "hidden_mse": {"hidden/2"},
    "cos": {"hidden/2"},
    "pkd": {"form/first_position/hidden/2"},
    "fsp": {"form/layer_product/hidden/1,3"},
    "gram": {"form/layer_product/hidden/1,3"},
    "nst": {"form/position_product/hidden/1,3"},
    "mmd": {"form/position_product/hidden/1,3"},
    "attention_mse": {"attention/2"},
    "attention_mse_sum": {"form/sum_of_heads/attention/2"},
    "attention_ce": {"attention/2"},
    "attention_ce_mean": {"form/mean_of_heads/attention/2"},
    "attention_kl": {"attention/2"},
    "scores_mse": {"scores/2"},
    "relation_kl": {"value/2"},
    "at": {"form/energies/hidden/2"},
    **{name: {"hidden/2"} for name in ("sp", "cka", "vid", "layer_norm_mse", "state_mean", "state_variance")},
    **{name: {"form/mean_of_positions/hidden/2"} for name in ("rkd_distance", "rkd_angle", "crd", "embed_distill")},
}


@pytest.mark.parametrize("loss", KEPT)
def test_what_is_kept_for_each_loss(loss):
    assert set(contents_of(match_of(loss)).tensors(some_views())) == BASE | KEPT[loss]


def test_no_built_in_loss_is_missing_here():
    assert {name for name in MATCH_LOSS_MAP if MATCH_LOSS_MAP[name].__module__.startswith("textbrewer.")} == set(KEPT)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mask", [MASK, None])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("loss", KEPT)
def test_the_loss_of_what_is_kept_is_that_of_the_live_views(loss, negative, mask, whole):
    match = match_of(loss)
    if negative:
        count = LAYERS + (match.feature == "hidden")
        numbers = [layer - count for layer in layers_of(match)]
        match = match_of(loss, numbers if loss in PAIRS else numbers[0])
    live, views_S = some_views(mask=mask), some_views(phase=3.0, mask=mask)
    contents = contents_of(match, whole=[0] if whole else [])
    tensors = contents.tensors(live)
    if not whole:
        assert {name for name in tensors if name not in BASE} == KEPT[loss]
    kept = contents.views(tensors, contents.counts(live))
    has_form = form_of(MATCH_LOSS_MAP[loss]) is not None
    assert (0 in kept.reduced) is (has_form and not whole)
    expected = loss_of(0, match, live, views_S)
    assert float(expected) > 1e-4
    assert torch.equal(loss_of(0, match, kept, views_S), expected)


def test_what_is_not_kept_is_none_in_the_views():
    live = some_views()
    contents = contents_of(
        match_of("hidden_mse", 0), match_of("cos", -1), match_of("attention_mse", 1), match_of("fsp")
    )
    kept = contents.views(contents.tensors(live), contents.counts(live))
    assert [item is not None for item in kept["hidden"]] == [True, False, False, False, True]
    assert [item is not None for item in kept["attention"]] == [False, True, False, False]
    assert kept["hidden"][4] is live["hidden"][4]
    assert kept["inputs_mask"] is live["inputs_mask"]
    assert all(own is other for own, other in zip(kept["logits"], live["logits"], strict=True))
    assert kept["logits_mask"] == live["logits_mask"]
    assert "labels" not in kept
    assert "losses" not in kept
    assert set(kept.reduced) == {3}


def test_matches_share_one_form():
    """Of one layer, by whatever number; not of the layers the other way round."""
    contents = contents_of(
        match_of("fsp", [1, 3]), match_of("gram", [-4, -2]), match_of("fsp", [3, 1]), match_of("nst", [1, 3])
    )
    live = some_views()
    tensors = contents.tensors(live)
    forms = {name for name in tensors if name.startswith("form/")}
    assert forms == {
        "form/layer_product/hidden/1,3",
        "form/layer_product/hidden/3,1",
        "form/position_product/hidden/1,3",
    }
    kept = contents.views(tensors, contents.counts(live))
    assert set(kept.reduced) == {0, 1, 2, 3}
    assert kept.reduced[0] is kept.reduced[1]
    assert not torch.equal(kept.reduced[0], kept.reduced[2])
    assert form_name(contents.form(0, contents.matches[0][1]), contents.matches[0][1], 5) in forms


def test_layers_that_another_match_reads_whole_are_kept_beside_a_form():
    contents = contents_of(match_of("pkd", 2), match_of("hidden_mse", 2))
    assert set(contents.tensors(some_views())) == BASE | {"form/first_position/hidden/2", "hidden/2"}


@pytest.mark.parametrize(
    ("loss", "layers", "width", "is_whole"),
    [
        # The form's numbers in a row, against half of the layers': (4, width) each, and 3 heads of (4, 4).
        ("pkd", 2, 6, False),  # width against 2 width
        ("fsp", [1, 3], 4, False),  # 16 against 16
        ("fsp", [1, 3], 5, True),  # 25 against 20
        ("fsp", [2, 2], 2, False),  # 4 against 4: the layer counts once
        ("fsp", [2, 2], 3, True),  # 9 against 6
        ("nst", [1, 3], 4, False),  # 16 against 16
        ("nst", [1, 3], 3, True),  # 16 against 12
        ("attention_mse_sum", 2, 6, False),  # 16 against 24
        ("hidden_mse", 2, 6, False),
    ],
)
def test_settle_takes_whole_layers_where_the_form_is_not_half_as_large(loss, layers, width, is_whole):
    views = some_views(width=width)
    settled = contents_of(match_of(loss, layers)).settle(views)
    assert settled.whole == ({0} if is_whole else set())
    names = {name for name in settled.tensors(views) if name.startswith("hidden/")}
    if is_whole:
        assert names == {f"hidden/{layer}" for layer in ([layers] if isinstance(layers, int) else layers)}


def test_settle_takes_whole_layers_where_the_students_mask_is_another():
    """For the forms that are made with the mask, and only those."""
    contents = contents_of(match_of("fsp"), match_of("nst"), match_of("pkd"))
    views = some_views(width=4)
    assert contents.settle(views, masks_agree=False).whole == {0}
    assert contents.settle(views, masks_agree=True).whole == set()
    assert contents_of(match_of("pkd"), whole=[0]).settle(views).whole == {0}


def test_everything():
    contents = contents_of(match_of("fsp"), match_of("pkd"), everything=True)
    live = some_views()
    tensors = contents.tensors(live)
    hidden = {f"hidden/{layer}" for layer in range(LAYERS + 1)}
    others = {f"{feature}/{layer}" for feature in ("attention", "scores", "value") for layer in range(LAYERS)}
    assert set(tensors) == BASE | {"labels/0"} | hidden | others
    kept = contents.views(tensors, contents.counts(live))
    assert not kept.reduced
    assert set(kept) == set(live) - {"losses"}
    for key in ("logits", "hidden", "attention", "labels", "logits_mask"):
        assert all(own is other for own, other in zip(kept[key], live[key], strict=True))


def test_captured_outputs_are_kept():
    live = some_views()
    live.captured = {0: torch.ones(BATCH, 2), 3: torch.zeros(BATCH, 7)}
    contents = contents_of()
    tensors = contents.tensors(live)
    assert set(tensors) == BASE | {"captured/0", "captured/3"}
    kept = contents.views(tensors, contents.counts(live))
    assert kept.captured.keys() == {0, 3}
    assert kept.captured[3] is live.captured[3]


@pytest.mark.parametrize(
    ("loss", "layers"),
    [
        ("hidden_mse", 9),
        ("hidden_mse", -9),
        ("pkd", 9),
        ("pkd", -6),
        ("fsp", [0, 5]),
        ("nst", [-9, 0]),
        ("attention_mse_sum", 4),
    ],
)
def test_layers_that_are_not_there_are_left_to_the_loss_to_report(loss, layers):
    contents, live = contents_of(match_of(loss, layers)), some_views()
    assert contents.settle(live).whole == set()
    tensors = contents.tensors(live)
    assert {name for name in tensors if name.startswith("form")} == set()
    kept = contents.views(tensors, contents.counts(live))
    assert not kept.reduced


@pytest.mark.parametrize("loss", ["hidden_mse", "pkd"])
def test_layers_that_the_adaptor_left_out_and_features_it_does_not_return(loss):
    contents, live = contents_of(match_of(loss)), some_views()
    live["hidden"][2] = None
    assert set(contents.settle(live).tensors(live)) == BASE
    del live["hidden"]
    assert set(contents.settle(live).tensors(live)) == BASE
