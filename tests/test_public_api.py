"""What TextBrewer 0.2.1 scripts rely on: names, argument order and defaults, and what importing the library costs."""

import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from functools import reduce

import pytest

NAMES = [
    "TrainingConfig",
    "DistillationConfig",
    "BasicTrainer",
    "BasicDistiller",
    "GeneralDistiller",
    "MultiTeacherDistiller",
    "MultiTaskDistiller",
    "Distillers",
    "FEATURES",
    "ADAPTOR_KEYS",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "WEIGHT_SCHEDULER",
    "TEMPERATURE_SCHEDULER",
    "register_new",
    "losses",
    "presets",
    "configurations",
    "schedulers",
    "projections",
    "utils",
    "data_utils",
    "distillers",
]

# The names of the tables' entries in TextBrewer 0.2.1.
TABLES = {
    "KD_LOSS_MAP": {"mse", "ce"},
    "MATCH_LOSS_MAP": {
        *("attention_mse_sum", "attention_mse", "attention_ce_mean", "attention_ce", "hidden_mse", "cos", "pkd"),
        *("gram", "fsp", "mmd", "nst"),
    },
    "PROJ_MAP": {"linear", "relu", "tanh"},
    "WEIGHT_SCHEDULER": {"linear_decay", "linear_growth"},
    "TEMPERATURE_SCHEDULER": {"constant", "flsw", "cwsm"},
    "FEATURES": {"hidden", "attention"},
    "ADAPTOR_KEYS": {"logits", "logits_mask", "losses", "inputs_mask", "labels", "hidden", "attention"},
    "Distillers": {"Basic", "General", "MultiTeacher", "MultiTask", "Train"},
}

# A default that is meant to differ from TextBrewer's; the comment beside it says why.
OTHER = object()


def _train(
    self, optimizer, dataloader, num_epochs=None, scheduler_class=None, scheduler_args=None, scheduler=None,
    max_grad_norm=-1.0, num_steps=None, callback=None, batch_postprocessor=None, **args,
): ...  # fmt: skip


def _train_basic_trainer(
    self, optimizer, dataloader, num_epochs, scheduler_class=None, scheduler_args=None, scheduler=None,
    max_grad_norm=-1.0, num_steps=None, callback=None, batch_postprocessor=None, **args,
): ...  # fmt: skip


def _train_tasks(
    self, optimizer, dataloaders, num_steps, scheduler_class=None, scheduler_args=None, scheduler=None,
    max_grad_norm=-1.0, tau=1, callback=None, batch_postprocessors=None, **args,
): ...  # fmt: skip


def _training_config(
    gradient_accumulation_steps=1, ckpt_frequency=1, ckpt_epoch_frequency=1, ckpt_steps=None, log_dir=None,
    output_dir="./saved_models",
    device=OTHER,  # theirs is "cuda" at import time; ours is the best device there is
    fp16=False, fp16_opt_level="O1", data_parallel=False, local_rank=-1,
): ...  # fmt: skip


def _distillation_config(
    temperature=4, temperature_scheduler="none", hard_label_weight=0, hard_label_weight_scheduler="none",
    kd_loss_type="ce", kd_loss_weight=1, kd_loss_weight_scheduler="none", probability_shift=False,
    intermediate_matches=OTHER,  # None there, an empty list here; either reads as [] afterwards, see below
    is_caching_logits=False,
): ...  # fmt: skip


def _distiller(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S): ...


def _general_distiller(
    train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S, custom_matches=None
): ...  # fmt: skip


# The signatures of TextBrewer 0.2.1.
SIGNATURES = {
    "TrainingConfig": _training_config,
    "TrainingConfig.from_json_file": lambda json_filename: ...,
    "TrainingConfig.from_dict": lambda dict_object: ...,
    "DistillationConfig": _distillation_config,
    "DistillationConfig.from_json_file": lambda json_filename: ...,
    "DistillationConfig.from_dict": lambda dict_object: ...,
    "configurations.IntermediateMatch": lambda layer_T, layer_S, weight, loss, feature, proj=None: ...,
    "BasicTrainer": lambda train_config, model, adaptor: ...,
    "BasicTrainer.train": _train_basic_trainer,
    "BasicDistiller": _distiller,
    "BasicDistiller.train": _train,
    "BasicDistiller.compute_loss": lambda self, results_S, results_T: ...,
    "GeneralDistiller": _general_distiller,
    "GeneralDistiller.train": _train,
    "GeneralDistiller.compute_loss": lambda self, results_S, results_T: ...,
    "MultiTeacherDistiller": _distiller,
    "MultiTeacherDistiller.train": _train,
    "MultiTaskDistiller": _distiller,
    "MultiTaskDistiller.train": _train_tasks,
    "register_new": lambda map_name, name, func: ...,
    "losses.kd_mse_loss": lambda logits_S, logits_T, temperature=1: ...,
    "losses.kd_ce_loss": lambda logits_S, logits_T, temperature=1: ...,
    "losses.att_mse_loss": lambda attention_S, attention_T, mask=None: ...,
    "losses.att_mse_sum_loss": lambda attention_S, attention_T, mask=None: ...,
    "losses.att_ce_loss": lambda attention_S, attention_T, mask=None: ...,
    "losses.att_ce_mean_loss": lambda attention_S, attention_T, mask=None: ...,
    "losses.hid_mse_loss": lambda state_S, state_T, mask=None: ...,
    "losses.cos_loss": lambda state_S, state_T, mask=None: ...,
    "losses.pkd_loss": lambda state_S, state_T, mask=None: ...,
    "losses.fsp_loss": lambda state_S, state_T, mask=None: ...,
    "losses.mmd_loss": lambda state_S, state_T, mask=None: ...,
    "schedulers.linear_growth_weight_scheduler": lambda x: ...,
    "schedulers.linear_decay_weight_scheduler": lambda x: ...,
    "schedulers.constant_temperature_scheduler": lambda logits_S, logits_T, base_temperature: ...,
    "schedulers.flsw_temperature_scheduler_builder": lambda beta, gamma, eps=1e-4: ...,
    "schedulers.cwsm_temperature_scheduler_builder": lambda beta: ...,
    "projections.linear_projection": lambda dim_in, dim_out: ...,
    "projections.projection_with_activation": lambda act_fn: ...,
    "utils.display_parameters": lambda model, max_level=None: ...,
    "data_utils.masking": lambda tokens, p=0.1, mask="[MASK]": ...,
    "data_utils.deleting": lambda tokens, p=0.1: ...,
    "data_utils.n_gram_sampling": lambda tokens, p_ng=[0.2, 0.2, 0.2, 0.2, 0.2], l_ng=[1, 2, 3, 4, 5]: ...,
    "data_utils.short_disorder": lambda tokens, p=[0.9, 0.1, 0, 0, 0]: ...,
    "data_utils.long_disorder": lambda tokens, p=0.1, length=20: ...,
}


def differences(ours, theirs):
    """Return why a call that fits ``theirs`` could fail or mean something else with ``ours``."""
    own = list(inspect.signature(ours).parameters.values())
    original = list(inspect.signature(theirs).parameters.values())
    found = []
    if original and original[-1].kind is inspect.Parameter.VAR_KEYWORD:
        original.pop()
        if not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in own):
            found.append("takes no further keyword arguments")
    for number, item in enumerate(original):
        if number >= len(own) or own[number].name != item.name or own[number].kind is not item.kind:
            found.append(f"argument {number} must be {item.name}")
        elif item.default is not item.empty and not _same(own[number].default, item.default):
            found.append(f"{item.name} must be {item.default!r}, is {own[number].default!r}")
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for item in own[len(original) :]:
        if item.default is item.empty and item.kind not in variable:
            found.append(f"{item.name} is new and has no default")
    return found


def _same(own, original):
    if original is OTHER:
        return own is not inspect.Parameter.empty
    if isinstance(original, list):
        return list(own) == original
    return own == original and isinstance(own, bool) == isinstance(original, bool)


def find(path):
    """Return a public object by its dotted name inside the package."""
    root = importlib.import_module("textbrewer")
    return reduce(getattr, path.split("."), root)


@pytest.mark.parametrize("name", NAMES)
def test_name_is_importable(name):
    namespace = {}
    exec(f"from textbrewer import {name}", namespace)
    assert namespace[name] is find(name)
    assert name in find("__all__")


def test_every_name_of_all_exists():
    missing = [name for name in find("__all__") if not hasattr(importlib.import_module("textbrewer"), name)]
    assert missing == []


def test_version_is_that_of_the_installed_package():
    assert find("__version__") == importlib.metadata.version("textbrewer")


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="GenerelDistiller"):
        find("GenerelDistiller")


@pytest.mark.parametrize(("table", "names"), TABLES.items())
def test_table_holds_the_original_names(table, names):
    assert names <= set(find(table))


def test_distillers_table_names_the_classes():
    classes = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller", "BasicTrainer"]
    keys = ["Basic", "General", "MultiTeacher", "MultiTask", "Train"]
    assert [find("Distillers")[key] for key in keys] == [find(name) for name in classes]


@pytest.mark.parametrize("given", [{}, {"intermediate_matches": None}, {"intermediate_matches": []}])
def test_no_matches_is_an_empty_list(given):
    assert find("DistillationConfig")(**given).intermediate_matches == []


@pytest.mark.parametrize(("path", "original"), SIGNATURES.items())
def test_signature_is_the_original(path, original):
    assert differences(find(path), original) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (lambda a, b=1: ..., lambda a, b=1: ..., []),
        (lambda a=0, b=1.0: ..., lambda a, b=1: ..., []),
        (lambda a, b=1, c=2, *, d=3: ..., lambda a, b=1: ..., []),
        (lambda a, *, extra=None, **args: ..., lambda a, **args: ..., []),
        (lambda a=(1, 2): ..., lambda a=[1, 2]: ..., []),
        (lambda b, a: ..., lambda a, b: ..., ["argument 0 must be a", "argument 1 must be b"]),
        (lambda a, b=2: ..., lambda a, b=1: ..., ["b must be 1, is 2"]),
        (lambda a=1: ..., lambda a=True: ..., ["a must be True, is 1"]),
        (lambda a: ..., lambda a, b=1: ..., ["argument 1 must be b"]),
        (lambda a, *, b=1: ..., lambda a, b=1: ..., ["argument 1 must be b"]),
        (lambda a, c: ..., lambda a: ..., ["c is new and has no default"]),
        (lambda a: ..., lambda a, **args: ..., ["takes no further keyword arguments"]),
        (lambda a: ..., lambda a=OTHER: ..., [f"a must be {OTHER!r}, is {inspect.Parameter.empty!r}"]),
    ],
)
def test_differences_finds_them(ours, theirs, expected):
    assert differences(ours, theirs) == expected


IMPORT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import textbrewer
end = time.perf_counter()
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"torch": middle - start, "total": end - start, "loaded": loaded}))
"""


def _import_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick_and_loads_no_optional_package():
    """Under two seconds with torch, or, on a machine where torch alone takes longer, under twice torch's own time."""
    runs = [_import_in_a_fresh_process() for _ in range(3)]
    best = min(runs, key=lambda run: run["total"])
    assert best["total"] < max(2.0, 2 * best["torch"])
    assert {"transformers", "matplotlib", "onnx", "lmdb", "peft"} & set(best["loaded"]) == set()
    assert {"torch", "textbrewer"} <= set(best["loaded"])
