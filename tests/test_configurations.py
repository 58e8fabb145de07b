"""Configurations: dict and JSON in and out, what is refused and with which words, and what is left alone."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from textbrewer import DistillationConfig, IntermediateMatch, TrainingConfig, register_new
from textbrewer.configurations import Projection, parse_projection
from textbrewer.registry import KD_LOSS_MAP, TEMPERATURE_SCHEDULER

MATCH = {"layer_T": 4, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1}

TRAININGS = [
    {},
    {"gradient_accumulation_steps": 4, "ckpt_frequency": 2, "ckpt_epoch_frequency": 3, "ckpt_steps": 100},
    {"log_dir": "logs", "output_dir": "out", "device": "cpu", "log_with": ["wandb"], "save_total_limit": None},
    {"precision": "bf16", "logging_steps": 5, "accumulation_weighting": "positions", "progress_bar": False},
    {"fp16": True, "find_unused_parameters": False},
    {"precision": "apex", "fp16_opt_level": "O2"},
]
DISTILLATIONS = [
    {},
    {"temperature": 8, "kd_loss_type": "mse", "kd_loss_weight": 0.5, "hard_label_weight": 2},
    {"temperature_scheduler": ["flsw", 1, 2], "kd_loss_weight_scheduler": "linear_decay"},
    {"temperature_scheduler": ["cwsm", {"beta": 1}], "hard_label_weight_scheduler": "linear_growth"},
    {"temperature_scheduler": "constant", "probability_shift": True, "is_caching_logits": True},
    {"intermediate_matches": [MATCH, {**MATCH, "proj": ["linear", 384, 768, {"lr": 1e-3}]}, {**MATCH, "teacher": 1}]},
    {"intermediate_matches": [{**MATCH, "loss": "fsp", "layer_T": [0, 4], "layer_S": [0, 2], "proj": "linear"}]},
]


# ---- in and out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((TrainingConfig, settings) for settings in TRAININGS), *((DistillationConfig, item) for item in DISTILLATIONS)],
)
def test_dict_and_json_come_back(kind, settings, tmp_path):
    config = kind.from_dict(settings)
    assert config == kind(**settings)
    for name, value in settings.items():
        if name != "intermediate_matches":
            assert getattr(config, name) == value
    assert kind.from_dict(config.to_dict()) == config
    config.to_json_file(tmp_path / "config.json")
    assert kind.from_json_file(tmp_path / "config.json") == config
    assert kind.from_json_file(str(tmp_path / "config.json")) == config
    assert set(json.loads((tmp_path / "config.json").read_text())) == {item.name for item in dataclasses.fields(kind)}


@pytest.mark.parametrize("settings", DISTILLATIONS)
def test_the_user_s_dict_is_left_alone(settings):
    before = copy.deepcopy(settings)
    config = DistillationConfig.from_dict(settings)
    config.to_dict()["temperature"] = 100
    assert settings == before
    for match in config.intermediate_matches:
        if isinstance(match.proj, list):
            match.proj[0] = "relu"
            match.proj[-1]["lr"] = 5
        if isinstance(match.layer_S, list):
            match.layer_S.append(9)
    assert settings == before


def test_a_config_s_dict_is_its_own():
    config = DistillationConfig(intermediate_matches=[{**MATCH, "proj": ["linear", 4, 8, {"lr": 1.0}]}])
    config.to_dict()["intermediate_matches"][0]["proj"][3]["lr"] = 2.0
    assert config.intermediate_matches[0].proj[3] == {"lr": 1.0}


def test_matches_as_objects():
    match = IntermediateMatch(**MATCH)
    config = DistillationConfig(intermediate_matches=[match, MATCH])
    assert config.intermediate_matches == [match, match]
    assert IntermediateMatch.from_dict(None) is None


def test_json_null(tmp_path):
    nulls = {
        TrainingConfig: ["ckpt_steps", "log_dir", "device", "log_with", "save_total_limit"],
        DistillationConfig: [
            *("temperature_scheduler", "hard_label_weight_scheduler", "kd_loss_weight_scheduler"),
            "intermediate_matches",
        ],
    }
    for kind, names in nulls.items():
        (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(names)))
        config = kind.from_json_file(tmp_path / "config.json")
        assert config == kind(save_total_limit=None) if kind is TrainingConfig else config == kind()
    matches = [None, {**MATCH, "proj": None}]
    assert DistillationConfig(intermediate_matches=matches) == DistillationConfig(intermediate_matches=[MATCH])


def test_json_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{temperature: 4}")
    with pytest.raises(ValueError, match=r"config\.json' must be a JSON file"):
        DistillationConfig.from_json_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(TypeError, match=r"DistillationConfig\.from_dict's argument must be a dict, got \[1, 2\]"):
        DistillationConfig.from_json_file(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        TrainingConfig.from_json_file(tmp_path / "none.json")


@pytest.mark.parametrize("kind", [TrainingConfig, DistillationConfig])
def test_repr_has_a_line_a_field(kind):
    config = kind()
    lines = repr(config).splitlines()
    assert lines[0] == f"{kind.__name__}:"
    assert lines[1:] == [f"  {item.name} : {getattr(config, item.name)}" for item in dataclasses.fields(kind)]
    assert str(config) == repr(config)


# ---- unknown keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "key", "near"),
    [
        (TrainingConfig.from_dict, "gradient_acumulation_steps", "gradient_accumulation_steps"),
        (TrainingConfig.from_dict, "outputdir", "output_dir"),
        (DistillationConfig.from_dict, "temprature", "temperature"),
        (DistillationConfig.from_dict, "kd_weight", "kd_loss_weight"),
        (DistillationConfig.from_dict, "KD_LOSS_WEIGHT", "kd_loss_weight"),
        (lambda settings: IntermediateMatch.from_dict({**MATCH, **settings}), "project", "proj"),
        (lambda settings: DistillationConfig(intermediate_matches=[{**MATCH, **settings}]), "layer_s", "layer_S"),
    ],
)
def test_unknown_key(make, key, near):
    with pytest.raises(KeyError, match=f"unknown key '{key}'; did you mean '{near}'"):
        make({key: 1})


def test_missing_key():
    for name in MATCH:
        with pytest.raises(KeyError, match=f"must have the key '{name}'"):
            IntermediateMatch.from_dict({key: value for key, value in MATCH.items() if key != name})


# ---- ranges and types --------------------------------------------------------------------------------------------

COUNTS = ["gradient_accumulation_steps", "ckpt_frequency", "ckpt_epoch_frequency", "logging_steps"]


@pytest.mark.parametrize("name", [*COUNTS, "ckpt_steps", "save_total_limit"])
def test_counts(name):
    assert getattr(TrainingConfig(**{name: 3.0}), name) == 3
    assert isinstance(getattr(TrainingConfig(**{name: 3.0}), name), int)
    for value, error, rule in (
        (0, ValueError, "at least 1"),
        (-2, ValueError, "at least 1"),
        (1.5, ValueError, "a whole number"),
        (math.inf, ValueError, "a whole number"),
        (math.nan, ValueError, "a whole number"),
        ("2", TypeError, "a whole number"),
        (True, TypeError, "a whole number"),
    ):
        with pytest.raises(error, match=f"^{name} must be {rule}, got {value!r}"):
            TrainingConfig(**{name: value})


@pytest.mark.parametrize("name", ["fp16", "data_parallel", "find_unused_parameters", "progress_bar"])
@pytest.mark.parametrize("value", [1, 0, None, "False"])
def test_switches(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got {value!r}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "fp32"}, ValueError, "precision must be one of the known names, got 'fp32'; .*known: no, bf16"),
        ({"precision": "bf61"}, ValueError, "did you mean 'bf16'"),
        ({"fp16": True, "precision": "bf16"}, ValueError, "fp16=True and precision='bf16' contradict each other"),
        ({"fp16_opt_level": "O2"}, ValueError, "setting of NVIDIA Apex; ask for it with precision='apex'"),
        ({"fp16_opt_level": "O7", "precision": "apex"}, ValueError, "fp16_opt_level .*'O7'"),
        ({"accumulation_weighting": "tokens"}, ValueError, "accumulation_weighting .*'tokens'; known: micro_batch"),
        ({"device": "gpu"}, ValueError, "device must be a device's name such as 'cuda', .*got 'gpu'"),
        ({"device": 0}, TypeError, "device must be a device's name"),
        ({"output_dir": None}, TypeError, "output_dir must be a path, got None"),
        ({"log_dir": 3}, TypeError, "log_dir must be a path, got 3"),
        ({"local_rank": -2}, ValueError, "local_rank must be at least -1, got -2"),
        ({"local_rank": 0, "data_parallel": True}, ValueError, "data_parallel and local_rank exclude each other"),
        ({"teacher_precision": "int4"}, ValueError, "^teacher_precision .*got 'int4'; .*known: no, bf16, fp16, int8"),
        ({"teacher_precision": True}, ValueError, "^teacher_precision .*got True"),
        ({"teacher_precision": "bf16", "precision": "apex"}, ValueError, "teacher_precision is not for .*'apex'"),
        ({"compile": "both"}, ValueError, "^compile must be True, False, 'teacher' or 'student', got 'both'"),
        ({"compile": 1}, ValueError, "^compile must be True, False, 'teacher' or 'student', got 1"),
        (
            {"compile": True, "data_parallel": True},
            ValueError,
            "compile and data_parallel exclude each other: .*torchrun",
        ),
        ({"compile": True, "teacher_precision": "int8"}, ValueError, "compile=True cannot .*; use compile='student'"),
        ({"compile": "teacher", "teacher_precision": "int8"}, ValueError, "compile='teacher' cannot compile a teacher"),
        ({"stack_matches": "yes"}, TypeError, "^stack_matches must be True, False or None, got 'yes'"),
    ],
)
def test_bad_training_settings(settings, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**settings)


def test_devices():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert TrainingConfig().device == best
    assert TrainingConfig(device=torch.device("cpu")).device == "cpu"
    missing = "mps" if best != "mps" else "cuda"
    with pytest.raises(ValueError, match=f"device '{missing}' is not available on this machine; leave device out"):
        TrainingConfig(device=missing)


def test_fp16_is_a_precision():
    assert TrainingConfig(fp16=True).precision == "fp16"
    assert TrainingConfig(fp16=True, precision="apex").precision == "apex"
    assert TrainingConfig().precision == "no"


@pytest.mark.parametrize(
    ("wanted", "sides"),
    [(False, set()), (True, {"teacher", "student"}), ("teacher", {"teacher"}), ("student", {"student"})],
)
def test_what_compile_asks_for(wanted, sides):
    config = TrainingConfig(compile=wanted)
    assert {side for side in ("teacher", "student") if config.compiles(side)} == sides
    assert TrainingConfig.from_dict(config.to_dict()).compile is wanted


def test_making_a_config_makes_no_folder(tmp_path):
    TrainingConfig(output_dir=tmp_path / "out", log_dir=tmp_path / "logs")
    assert not any(tmp_path.iterdir())
    assert TrainingConfig(output_dir=Path("a") / "b").output_dir == "a/b"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "^temperature must be greater than 0, got 0"),
        ({"temperature": -1.5}, ValueError, "^temperature must be greater than 0, got -1.5"),
        ({"temperature": math.nan}, ValueError, "^temperature must be finite, got nan"),
        ({"temperature": "4"}, TypeError, "^temperature must be a number, got '4'"),
        ({"temperature": None}, TypeError, "^temperature must be a number, got None"),
        ({"kd_loss_weight": -1}, ValueError, "^kd_loss_weight must be at least 0, got -1"),
        ({"hard_label_weight": -0.1}, ValueError, "^hard_label_weight must be at least 0, got -0.1"),
        ({"hard_label_weight": math.inf}, ValueError, "^hard_label_weight must be finite"),
        ({"kd_loss_type": "cross_entropy"}, ValueError, "^kd_loss_type .*got 'cross_entropy'; .*known: .*ce"),
        ({"kd_loss_type": ["cross_entropy"]}, ValueError, "^kd_loss_type .*known: .*ce"),
        ({"kd_loss_type": ["ce", {"beta": 2}]}, ValueError, "KD loss 'ce' has no constant 'beta'"),
        (
            {"kd_loss_type": ["ce", 2]},
            TypeError,
            r"must be a name or a list \[name, {constant: value}\], got \['ce', 2\]",
        ),
        ({"kd_loss_weight_scheduler": ["linear_decay", 1]}, TypeError, "kd_loss_weight_scheduler .* function"),
        ({"logit_transform": "standard"}, ValueError, "^logit_transform .*got 'standard'"),
        ({"kd_loss_weight_scheduler": "linear_dekay"}, ValueError, "did you mean 'linear_decay'"),
        ({"hard_label_weight_scheduler": 3}, ValueError, "^hard_label_weight_scheduler"),
        ({"temperature_scheduler": "flws"}, ValueError, "^temperature_scheduler .*did you mean 'flsw'"),
        (
            {"temperature_scheduler": "flsw"},
            ValueError,
            r"'flsw' needs its parameters: write \['flsw', beta, gamma, eps\]",
        ),
        ({"temperature_scheduler": "cwsm"}, ValueError, r"'cwsm' needs its parameters: write \['cwsm', beta\]"),
        ({"temperature_scheduler": ["flsw", 1]}, TypeError, r"\['flsw', 1\]: .*gamma"),
        ({"temperature_scheduler": ["cwsm", 1, 2]}, TypeError, r"\['cwsm', 1, 2\]"),
        ({"temperature_scheduler": ["flsw", {"beta": 1, "gama": 2}]}, TypeError, "gama"),
        ({"temperature_scheduler": ["flsw", 1, -2]}, ValueError, "gamma must be at least 0, got -2"),
        ({"probability_shift": 1}, TypeError, "^probability_shift must be True or False, got 1"),
        ({"is_caching_logits": "yes"}, TypeError, "^is_caching_logits must be True or False, got 'yes'"),
        ({"intermediate_matches": MATCH}, TypeError, "^intermediate_matches must be a list of matches"),
        ({"intermediate_matches": ["hidden"]}, TypeError, "an intermediate match must be a dict, got 'hidden'"),
    ],
)
def test_bad_distillation_settings(settings, error, message):
    with pytest.raises(error, match=message):
        DistillationConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature": "hiden"}, ValueError, "^feature of an intermediate match .*did you mean 'hidden'"),
        ({"loss": "hidden_mes"}, ValueError, "^loss of an intermediate match .*did you mean 'hidden_mse'"),
        ({"weight": -1}, ValueError, "^weight of an intermediate match must be at least 0, got -1"),
        ({"weight": "1"}, TypeError, "^weight of an intermediate match must be a number, got '1'"),
        ({"layer_T": 1.5}, ValueError, "^layer_T must be a whole number, got 1.5"),
        ({"layer_S": "2"}, TypeError, "^layer_S must be a whole number, got '2'"),
        ({"layer_S": [0, 1]}, ValueError, r"both be numbers or both be lists, got 4 and \[0, 1\]"),
        ({"loss": "fsp"}, ValueError, "^layer_T of a match with loss 'fsp' must be a list of two layers, got 4"),
        ({"loss": "nst", "layer_T": [0, 1]}, ValueError, "^layer_S of a match with loss 'nst' .*, got 2"),
        ({"loss": "mmd", "layer_T": [0, 1, 2], "layer_S": [0, 1]}, ValueError, "list of two layers"),
        ({"teacher": -1}, ValueError, "^teacher of an intermediate match must be at least 0, got -1"),
        (
            {"proj": "conv"},
            ValueError,
            "^the first item of proj .*got 'conv'; known: linear, gaussian, .*tanh",
        ),
        ({"proj": "linea"}, ValueError, "did you mean 'linear'"),
        ({"proj": ["linear", 384]}, ValueError, r"^proj must be a name, .*got \['linear', 384\]"),
        ({"proj": ["linear", 384, 768, 1, 2]}, ValueError, "^proj must be a name"),
        ({"proj": []}, ValueError, "^proj must be a name"),
        ({"proj": ["linear", 384, "768"]}, TypeError, "^dim_T of proj .*must be a whole number, got '768'"),
        ({"proj": ["linear", 0, 768]}, ValueError, "^dim_S of proj .*must be at least 1, got 0"),
    ],
)
def test_bad_matches(changes, error, message):
    with pytest.raises(error, match=message):
        IntermediateMatch(**{**MATCH, **changes})


# ---- forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proj", "expected"),
    [
        (None, None),
        ("linear", Projection("linear")),
        (["relu"], Projection("relu")),
        (["linear", {"lr": 1e-3}], Projection("linear", options={"lr": 1e-3})),
        (["tanh", 384, 768], Projection("tanh", 384, 768)),
        (("tanh", 384, 768), Projection("tanh", 384, 768)),
        (["linear", 384.0, 768, {"lr": 1e-3}], Projection("linear", 384, 768, {"lr": 1e-3})),
    ],
)
def test_forms_of_proj(proj, expected):
    assert parse_projection(proj) == expected
    match = IntermediateMatch(**MATCH, proj=proj)
    assert match.projection == expected
    again = IntermediateMatch.from_dict(json.loads(json.dumps(dataclasses.asdict(match))))
    assert again == match


def test_tuples_and_whole_floats():
    match = IntermediateMatch(**{**MATCH, "loss": "nst", "layer_T": (0, 4.0), "layer_S": (0, 2)})
    assert (match.layer_T, match.layer_S) == ([0, 4], [0, 2])
    assert IntermediateMatch(**{**MATCH, "layer_T": -1}).layer_T == -1
    config = DistillationConfig(temperature_scheduler=("flsw", 1, 2), intermediate_matches=(MATCH,))
    assert config.temperature_scheduler == ["flsw", 1, 2]
    assert len(config.intermediate_matches) == 1


def test_temperature_schedulers_are_made():
    assert DistillationConfig().make_temperature_scheduler() is None
    assert DistillationConfig(temperature_scheduler="constant").make_temperature_scheduler()(0, 0, 3) == 3
    flsw = DistillationConfig(temperature_scheduler=["flsw", {"gamma": 2, "beta": 0}]).make_temperature_scheduler()
    assert flsw(torch.randn(4, 3), torch.randn(4, 3), 5.0).tolist() == [5.0] * 4  # beta 0 spreads nothing


def test_functions_of_the_user():
    register_new("kd_loss", "mine", lambda logits_S, logits_T, temperature: logits_S.mean())
    register_new("temperature_scheduler", "mine", lambda logits_S, logits_T, base: base / 2)
    try:
        config = DistillationConfig(kd_loss_type="mine", temperature_scheduler="mine")
        assert config.make_temperature_scheduler()(0, 0, 8) == 4
        assert DistillationConfig.from_dict(config.to_dict()) == config
    finally:
        del KD_LOSS_MAP["mine"], TEMPERATURE_SCHEDULER["mine"]
