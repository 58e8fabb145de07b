"""NNI's config lists: the examples of its documentation, and each key by hand."""

import pytest
import torch
from torch import nn

from tests.students.models import make
from textbrewer.compression.config_list import from_config_list
from textbrewer.compression.weights import SparsePruning


class Model(nn.Module):
    """The model of NNI's documentation, smaller."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.norm, self.dropout1 = nn.BatchNorm2d(8), nn.Dropout2d(0.25)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 10)


def model():
    torch.manual_seed(0)
    return Model()


def plans(*entries):
    return from_config_list(entries, model()).plans


def lowest_gone(weight, share):
    """Return what stays of a weight when the smallest magnitudes go."""
    order = weight.detach().abs().flatten().argsort()
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[order[: int(share * weight.numel())]] = False
    return mask.reshape(weight.shape)


def test_documented_examples():
    """All but the last dense layer; half of the convolutions' weights together, and four fifths of a dense layer's."""
    both = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}
    (plan,) = plans(both, {"exclude": True, "op_names": ["fc2"]})
    assert plan == SparsePruning(0.5, modules=["conv1", "conv2", "fc1"])
    assert plans({"exclude": True, "op_names": ["fc2"]}, both) == (plan,)
    assert plans({**both, "exclude_op_names": ["fc2"]}) == (plan,)
    found = plans({"op_types": ["Conv2d"], "total_sparsity": 0.5}, {"op_names": ["fc1"], "total_sparsity": 0.8})
    assert found == (
        SparsePruning(0.5, scope="global", modules=["conv1", "conv2"]),
        SparsePruning(0.8, scope="global", modules=["fc1"]),
    )
    standard = {
        "op_names": ["fc1", "fc2"],
        "target_names": ["weight"],
        "target_settings": {
            "weight": {
                "sparse_ratio": 0.8,
                "max_sparse_ratio": None,
                "min_sparse_ratio": None,
                "sparse_threshold": None,
                "global_group_id": None,
                "dependency_group_id": None,
                "granularity": "default",
                "internal_metric_block": None,
                "apply_method": "mul",
            }
        },
    }
    assert plans(standard) == plans({"op_types": ["Linear"], "sparse_ratio": 0.8})


def test_all_entries_are_applied():
    whole = model()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    plan = from_config_list(
        [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["fc1"], "sparsity_per_layer": 0.75}], whole
    )
    sparse = plan.apply(whole)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    for name, share in (("conv1", 0.5), ("conv2", 0.5), ("fc1", 0.75), ("fc2", 0)):
        expected = whole.get_submodule(name).weight * lowest_gone(whole.get_submodule(name).weight, share)
        assert torch.equal(sparse.model.get_submodule(name).weight, expected)
    callbacks = plan.gradual(end=0.5, every=7)
    assert [callback.plan for callback in callbacks] == list(plan.plans)


def test_groups_share_one_budget():
    entries = [
        {"op_names": ["fc1"], "sparse_ratio": 0.5, "global_group_id": "dense", "max_sparse_ratio": 0.6},
        {"op_names": ["conv1"], "sparse_ratio": 0.3},
        {"op_names": ["fc2"], "sparse_ratio": 0.5, "global_group_id": "dense", "max_sparse_ratio": 0.6},
    ]
    found = plans(*entries)
    assert found == (
        SparsePruning(0.5, scope="global", maximum=0.6, modules=["fc1", "fc2"]),
        SparsePruning(0.3, modules=["conv1"]),
    )
    entries[2]["sparse_ratio"] = 0.4
    with pytest.raises(ValueError, match=r"global_group_id='dense' must have the same settings, got amount 0\.5 in"):
        plans(*entries)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"op_types": ["default"]}, ["conv1", "conv2", "fc1", "fc2"]),
        ({"op_names_re": [r"fc\d", "conv1"]}, ["conv1", "fc1", "fc2"]),
        ({"op_partial_names": ["2"]}, ["conv2", "fc2"]),
        ({"op_types": ["Linear"], "op_partial_names": ["2"]}, ["fc2"]),
        ({"op_types": ["Linear", "Conv2d"], "exclude_op_types": ["Conv2d"]}, ["fc1", "fc2"]),
        ({"op_types": ["default"], "exclude_op_names_re": [".*1"]}, ["conv2", "fc2"]),
        ({"op_names": ["fc2", "conv1"]}, ["conv1", "fc2"]),
    ],
)
def test_modules_are_chosen(keys, names):
    (plan,) = plans({**keys, "sparse_ratio": 0.5})
    assert list(plan.modules) == names


@pytest.mark.parametrize(
    ("granularity", "block"),
    [("out_channel", (1, None)), ("in_channel", (None, 1)), ([4, 2], (4, 2)), ([-1, 2], (None, 2)), ("default", None)],
)
def test_granularity_is_a_block(granularity, block):
    (plan,) = plans({"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": granularity})
    assert plan.block == block
    mask = plan.apply(model()).masks["fc1.weight"]
    if block == (1, None):
        assert set(mask.sum(1).tolist()) == {0, 32}
    if block == (4, 2):
        assert set(mask.reshape(4, 4, 16, 2).sum((1, 3)).flatten().tolist()) == {0, 8}


def test_a_limit_that_a_uniform_share_keeps_says_nothing():
    (plan,) = plans({"op_names": ["fc1"], "sparsity": 0.5, "max_sparsity_per_layer": 0.9})
    assert plan == SparsePruning(0.5, modules=["fc1"])


def test_gpt2():
    plan = from_config_list([{"op_types": ["Conv1D"], "op_partial_names": ["c_fc"], "sparse_ratio": 0.5}], make("gpt2"))
    assert plan.apply(make("gpt2")).sparsity()["weights"] == 0.5


FC = {"op_names": ["fc1"], "sparse_ratio": 0.5}


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([], ValueError, "must have at least one entry"),
        ("fc1", TypeError, "config_list must be a list of dicts"),
        (["fc1"], TypeError, r"config_list\[0\] must be a dict"),
        ([{**FC, "sparse_ration": 1}], KeyError, r"config_list\[0\]: unknown key 'sparse_ration'; did you mean 'spars"),
        ([{"op_name": ["fc1"], "sparsity": 0.5}], KeyError, "unknown key 'op_name'; did you mean 'op_names'"),
        ([{**FC, "target_settings": {"weight": {"ratio": 1}}}], KeyError, r"\['weight'\]: unknown key 'ratio'"),
        ([{"op_names": ["fc3"], "sparsity": 0.5}], KeyError, "has no module 'fc3'; did you mean 'fc"),
        ([{"op_types": ["linear"], "sparsity": 0.5}], KeyError, "no module of type 'linear'; did you mean 'Linear'"),
        ([{"op_types": ["BatchNorm2d"], "sparsity": 0.5}], ValueError, r"prune_channels\(score=\"slim\"\)"),
        ([{"op_names": ["norm"], "sparsity": 0.5}], ValueError, "must name linear maps or convolutions, got 'norm'"),
        ([{"op_names_re": ["["], "sparsity": 0.5}], ValueError, r"must be regular expressions, got '\['"),
        ([{"op_names_re": ["x"], "sparsity": 0.5}], KeyError, "no module's name matches 'x'"),
        ([{"op_partial_names": ["x"], "sparsity": 0.5}], KeyError, "has 'x' in its name"),
        ([{"op_names": "fc1", "sparsity": 0.5}], TypeError, r"\['op_names'\] must be a list of texts"),
        ([{"sparsity": 0.5}], ValueError, "must choose modules, by op_types or op_names, got neither"),
        ([{"op_names": ["fc1"], "op_types": ["Conv2d"], "sparsity": 0.5}], ValueError, "must choose linear maps or"),
        ([{"op_names": ["fc1"]}], ValueError, "must say how much goes, by sparse_ratio"),
        ([{**FC, "sparsity": 0.5}], ValueError, "must have one of .*, got sparse_ratio and sparsity"),
        ([{**FC, "target_settings": {"weight": {"sparse_ratio": 1}}}], ValueError, "must have 'sparse_ratio' once"),
        ([{"op_names": ["fc1"], "sparse_ratio": 1.0}], ValueError, r"\['sparse_ratio'\] must be less than 1"),
        ([{**FC, "max_sparse_ratio": 0.4}], ValueError, r"\['max_sparse_ratio'\] must be at least 0\.5"),
        ([{**FC, "target_names": ["weight", "bias"]}], ValueError, "must be of 'weight' alone, got 'bias'"),
        ([{**FC, "target_settings": {"bias": {}}}], ValueError, "must be of 'weight' alone, got 'bias'"),
        ([{**FC, "apply_method": "add"}], ValueError, "must be 'mul', which sets weights to 0, got 'add'"),
        ([{**FC, "granularity": "per_channel"}], ValueError, r"\['granularity'\] must be one of .* got 'per_channel'"),
        ([{**FC, "granularity": [1, -1, -1, -1]}], ValueError, "must be two whole numbers"),
        ([{**FC, "min_sparse_ratio": 0.1}], ValueError, "'min_sparse_ratio' of NNI must be left out"),
        ([{**FC, "sparse_threshold": 0.1}], ValueError, "soft thresholds are MovementPruning's"),
        ([{**FC, "dependency_group_id": 1}], ValueError, "use compression.prune_channels, which finds them itself"),
        ([{"op_names": ["fc1"], "quant_bits": 8}], ValueError, r"to quantise, use compression\.quantize_\(model\)"),
        ([{"op_names": ["fc1"], "lambda": 0.1}], ValueError, "to distil, use a DistillationConfig"),
        ([{**FC, "exclude": True}], ValueError, "must have no 'sparse_ratio' beside exclude=True"),
        ([{**FC, "exclude": 1}], TypeError, r"\['exclude'\] must be True"),
        ([{"op_names": ["fc1"], "exclude": True}], ValueError, "must have an entry with a sparsity"),
        ([FC, {"op_names": ["fc1"], "exclude": True}], ValueError, r"config_list\[0\] must choose modules that no"),
        ([FC, {"op_types": ["Linear"], "sparsity": 0.1}], ValueError, r"'fc1' must be chosen by one entry, got config"),
        ([{**FC, "global_group_id": [1]}], TypeError, "must be a name or number"),
        ([{"op_names": ["fc1"], "sparsity": 0.5, "global_group_id": 1}], ValueError, "must come with 'sparse_ratio'"),
    ],
)
def test_what_cannot_be_read(entries, error, message):
    with pytest.raises(error, match=message):
        from_config_list(entries, model())
