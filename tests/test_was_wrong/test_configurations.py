"""Weights and configurations"""

import copy
import json

import pytest

import textbrewer
from textbrewer import DistillationConfig

from .tiny import distiller, everything, loader, pair, refused, sgd, watching

MATCH = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


def weights_in_effect(folder, **config):
    """The weight of the KD loss in each of four steps, as total loss over unweighted loss."""
    trainer = distiller(watching("GeneralDistiller"), folder, *pair(), **config)
    trainer.train(sgd(trainer.model_S), loader(8, 2), num_epochs=1)
    return [entry["total"] / entry["unweighted_kd_loss"] for entry in trainer.seen]


def test_weight_scheduler_and_weight(tmp_path):
    """A weight scheduler overwrites the configured weight."""
    found = weights_in_effect(tmp_path, kd_loss_weight=0.5, kd_loss_weight_scheduler="linear_decay")
    assert found[2] == pytest.approx(0.5 * (1 - 2 / 4)), f"0.5 decayed by half is {found[2]:.2g}"


def test_weight_scheduler_leaves_the_config(tmp_path):
    """A weight scheduler mutates the user's config (it ends at 0)."""
    config = DistillationConfig(kd_loss_weight_scheduler="linear_decay", hard_label_weight_scheduler="linear_growth")
    train_config = textbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu")
    teacher, student = pair()
    trainer = textbrewer.GeneralDistiller(train_config, config, teacher, student, everything, everything)
    trainer.train(sgd(student), loader(), num_epochs=1)
    found = config.kd_loss_weight, config.hard_label_weight
    assert found == (1, 0), f"kd_loss_weight, hard_label_weight = {found} afterwards"


def test_weight_scheduler_starts_in_time(tmp_path):
    """A weight scheduler starts one step late."""
    found = weights_in_effect(tmp_path, kd_loss_weight_scheduler="linear_growth")
    assert found == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4]), f"growth from 0 starts with {found[:2]}"


def test_proj_is_not_mutated():
    """`proj` lists are mutated in place."""
    match = {**MATCH, "proj": ["linear", 4, 4]}
    before = copy.deepcopy(match)
    DistillationConfig(intermediate_matches=[match])
    assert match == before, f"proj is {match['proj']} afterwards"


@pytest.mark.parametrize(
    "match",
    [{**MATCH, "proj": ("linear", 4, 4)}, {**MATCH, "loss": "fsp", "layer_T": (0, 1), "layer_S": (0, 1)}],
    ids=["proj", "layers"],
)
def test_tuples(match, tmp_path):
    """Tuples are refused."""
    teacher, student = pair()
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, everything, intermediate_matches=[match])
    trainer.train(sgd(student), loader(), num_epochs=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature_scheduler": None},
        {"kd_loss_weight_scheduler": None},
        {"hard_label_weight_scheduler": None},
        {"intermediate_matches": [None]},
        {"temperature_scheduler": "none", "kd_loss_weight_scheduler": "none"},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_json_null(settings, tmp_path):
    """JSON null is not accepted.

    Nor is the default "none" when it is read from a file.
    """
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    config = DistillationConfig.from_json_file(str(path))
    train_config = textbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu")
    teacher, student = pair()
    trainer = textbrewer.GeneralDistiller(train_config, config, teacher, student, everything, everything)
    trainer.train(sgd(student), loader(), num_epochs=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kd_loss_type": "cee"}, ["kd_loss_type", "'cee'", "did you mean 'ce'"]),
        ({"intermediate_matches": [{**MATCH, "loss": "hidden_mes"}]}, ["loss", "did you mean 'hidden_mse'"]),
        ({"intermediate_matches": [{**MATCH, "layer_S": "first"}]}, ["layer_S", "'first'"]),
        ({"intermediate_matches": [{**MATCH, "loss": "fsp"}]}, ["layer_T", "list of two layers"]),
        ({"temperature_scheduler": "flsw"}, ["temperature_scheduler", "'flsw'", "beta"]),
    ],
    ids=["kd loss", "match loss", "layer", "layers of fsp", "flsw alone"],
)
def test_bad_names(settings, words):
    """A bad loss name, layer number or scheduler string is found only deep in training.

    Each is refused when the configuration is made, with the name of the field and what is known.
    """
    refused(lambda: DistillationConfig(**settings), *words)


def test_layer_out_of_range(tmp_path):
    """A layer number out of range is found only deep in training, with a bare IndexError."""
    teacher, student = pair()
    match = {**MATCH, "layer_S": 7}
    trainer = distiller("GeneralDistiller", tmp_path, teacher, student, everything, intermediate_matches=[match])
    refused(lambda: trainer.train(sgd(student), loader(), num_epochs=1), "layer_S=7", "hidden", "0 to 1")


def test_register_match_loss():
    """`register_new('match_loss', ...)` is refused because of a capital letter."""
    textbrewer.register_new("match_loss", "my_loss", lambda state_S, state_T, mask=None: (state_S - state_T).mean())
    assert "my_loss" in textbrewer.MATCH_LOSS_MAP
    textbrewer.MATCH_LOSS_MAP.pop("my_loss")
