"""The tables under TextBrewer's names: entries of the user's own, by ``register_new`` and by assignment."""

import pytest
import torch
from torch import nn

import textbrewer
from tests.conftest import Encoder, adaptor, make_config, make_loader
from textbrewer import DistillationConfig, GeneralDistiller, presets, register_new

TABLES = {
    "kd_loss": presets.KD_LOSS_MAP,
    "match_loss": presets.MATCH_LOSS_MAP,
    "projection": presets.PROJ_MAP,
    "weight_scheduler": presets.WEIGHT_SCHEDULER,
    "temperature_scheduler": presets.TEMPERATURE_SCHEDULER,
}


@pytest.fixture(autouse=True)
def _tables_as_before():
    before = {name: dict(table) for name, table in TABLES.items()}
    yield
    for name, table in TABLES.items():
        table.clear()
        table.update(before[name])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("capitals", [str, str.upper, str.title], ids=["as it is", "upper", "title"])
def test_register_new(name, capitals):
    def function(*arguments):
        return None

    register_new(capitals(name), "mine", function)
    assert TABLES[name]["mine"] is function
    assert "mine" in TABLES[name]


def test_text_brewer_s_own_spelling():
    register_new("match_Loss", "mine", max)  # with the capital letter of 0.2.1
    assert presets.MATCH_LOSS_MAP["mine"] is max


def test_the_tables_are_those_of_the_package():
    assert presets.MAPS == TABLES
    for table in ("KD_LOSS_MAP", "MATCH_LOSS_MAP", "PROJ_MAP", "WEIGHT_SCHEDULER", "TEMPERATURE_SCHEDULER"):
        assert getattr(textbrewer, table) is getattr(presets, table)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("match", "mine", max), ValueError, "map_name .*got 'match'; did you mean 'match_loss'"),
        ((3, "mine", max), ValueError, "map_name"),
        (("kd_loss", "mine", 3), TypeError, "KD loss 'mine' must be callable, got 3"),
        (("kd_loss", "", max), TypeError, "name of a KD loss must be a non-empty string, got ''"),
        (("kd_loss", 5, max), TypeError, "non-empty string, got 5"),
    ],
)
def test_bad_entries(arguments, error, message):
    with pytest.raises(error, match=message):
        register_new(*arguments)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_dicts(table):
    assert isinstance(table, dict)
    table["mine"] = max
    assert table["mine"] is max
    assert list(table)[-1] == "mine"
    table["mine"] = min  # assignment replaces
    assert table["mine"] is min
    with pytest.raises(TypeError, match="must be callable"):
        table["other"] = "text"
    with pytest.raises(KeyError, match="did you mean 'mine'"):
        table["mines"]
    assert table.get("mines") is None
    with pytest.raises(ValueError, match="'mine' is registered already; assign to the table to replace it"):
        table.add("mine")
    with pytest.raises(ValueError, match="at least one name"):
        table.add()


def test_specifications():
    table = presets.TEMPERATURE_SCHEDULER
    table["half"] = lambda divisor: lambda logits_S, logits_T, base: base / divisor
    for spec in (["half", 2], ("half", 2), ["half", {"divisor": 2}]):
        assert table.make(spec)(0, 0, 8) == 4
        assert table[spec](0, 0, 8) == 4  # as in TextBrewer
        assert spec in table
    assert table.make("half") is table["half"]
    assert ["none", 2] not in table
    for spec in ([], 5, None):
        with pytest.raises(TypeError, match="must be a name or a list"):
            table.make(spec)
    with pytest.raises(TypeError, match=r"\['half'\]: .*divisor"):
        table.make(["half"])


def test_entries_of_the_user_train(tmp_path):
    """One step with a loss, match loss, projection and schedules of the user's own, against the same sum by hand."""
    register_new("kd_loss", "difference", lambda logits_S, logits_T, temperature: (logits_S - logits_T).abs().mean())
    presets.MATCH_LOSS_MAP["first"] = lambda state_S, state_T, mask=None: (state_S - state_T)[:, 0].square().mean()
    presets.PROJ_MAP["double"] = lambda dim_in, dim_out: nn.Linear(dim_in, dim_out, bias=False)
    presets.WEIGHT_SCHEDULER["third"] = lambda progress: 1 / 3
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "first", "weight": 5, "proj": ["double", 32, 32]}
    seen = []

    class Watched(GeneralDistiller):
        def compute_loss(self, results_S, results_T):
            total, parts = super().compute_loss(results_S, results_T)
            difference = (results_S["logits"][0] - results_T["logits"][0]).abs().mean()
            projected = results_S["hidden"][1] @ self.projections[0].weight.T
            first = (projected - results_T["hidden"][1])[:, 0].square().mean()
            seen.append((total.item(), 6 * difference.item() / 3 + 5 * first.item(), sorted(parts)))
            return total, parts

    config = DistillationConfig(
        kd_loss_type="difference", kd_loss_weight=6, kd_loss_weight_scheduler="third", intermediate_matches=[match]
    )
    student = Encoder(layers=1, seed=2)
    distiller = Watched(make_config(tmp_path), config, Encoder(seed=1), student, adaptor, adaptor)
    distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), make_loader(), num_steps=2)
    assert len(seen) == 2
    for found, expected, names in seen:
        assert found == pytest.approx(expected, rel=1e-5)
        assert names == ["unweighted_hard_label_loss", "unweighted_hidden_first_1_1", "unweighted_kd_loss"]
