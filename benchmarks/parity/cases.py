"""The cases of the comparison, as data: what is built, configured and trained, for each.

Where the library differs from the original by design, there is no case: weight schedulers (the original's start a step
late and overwrite the configured weight), clipping with projections (the original clips the student alone), an
accumulation that does not divide the loader (the original drops the rest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EPOCHS = {"num_epochs": 2}  # 8 batches each: 16 optimiser steps
# SGD unless a case is about the optimiser: a wrong factor on a loss, which Adam would cancel, shows.
SGD = ("SGD", {"lr": 0.1, "momentum": 0.9})
ADAMW = ("AdamW", {"lr": 2e-3, "weight_decay": 0.0})
DECAY = ("AdamW", {"lr": 2e-3, "weight_decay": 0.1})
MASKED_GRAM_NOTE = "original with its main branch's masked formula (divides by the hidden width)"


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        name: the case's name.
        distiller: the class of textbrewer that trains.
        config: arguments of DistillationConfig.
        training: arguments of TrainingConfig.
        train: arguments of ``train`` beside the loader, the optimiser, and what the next fields name.
        keys: what the student's adaptor returns; the teacher's returns the same without losses and labels.
        head: the models' head (see ``tiny.TinyEncoder``).
        outputs: what the models return, dict or tuple.
        batch: the form of a batch (see ``tiny.make_collate``).
        widths: hidden widths of the teachers; several for a multi-teacher or multi-task run.
        optimiser: ``AdamW`` or ``SGD``, then its arguments.
        groups: whether biases and norms are a parameter group of their own, without weight decay.
        scheduler: None, ``class`` (``scheduler_class``) or ``object`` (``scheduler``).
        shuffle: whether the loader shuffles.
        random_words: whether making a batch draws random numbers.
        postprocess: whether a ``batch_postprocessor`` that draws random numbers is given.
        callback: whether a callback evaluates the student on a shuffled loader at each checkpoint.
        note: what the table should say of it.
        reference: whether it belongs to the recorded reference of the fast test.
    """

    name: str
    distiller: str
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=lambda: dict(EPOCHS))
    keys: tuple[str, ...] = ("logits",)
    head: str = "class"
    outputs: str = "dict"
    batch: str = "tuple"
    widths: tuple[int, ...] = (48,)
    optimiser: tuple[str, Mapping[str, Any]] = SGD
    groups: bool = False
    scheduler: str | None = None
    shuffle: bool = False
    random_words: bool = False
    postprocess: bool = False
    callback: bool = False
    note: str = ""
    reference: bool = False


def steps(number: int, checkpoint: int) -> dict[str, Any]:
    """Return the fields of a run of ``number`` optimiser steps that saves every ``checkpoint`` of them."""
    return {"train": {"num_steps": number}, "training": {"ckpt_steps": checkpoint}}


def basic_cases() -> list[Case]:
    """Return the cases of BasicDistiller's losses and data."""

    def case(name: str, **fields: Any) -> Case:
        return Case(f"basic_{name}", "BasicDistiller", **fields)

    labels, masked = ("logits", "labels"), ("logits", "logits_mask")
    flsw, cwsm = {"temperature_scheduler": ["flsw", 1, 2]}, {"temperature_scheduler": ["cwsm", 1]}
    return [
        case("ce"),
        case("mse", config={"kd_loss_type": "mse", "temperature": 2}),
        case("tuple_outputs", outputs="tuple", config={"temperature": 8}),
        case(
            "hard_labels",
            keys=("logits", "losses"),
            config={"hard_label_weight": 0.5, "kd_loss_weight": 0.7},
            reference=True,
        ),
        case("hard_labels_only", keys=("logits", "losses"), config={"hard_label_weight": 1, "kd_loss_weight": 0}),
        case("probability_shift", keys=labels, config={"probability_shift": True}, reference=True),
        case("probability_shift_tags", keys=labels, head="tags", config={"probability_shift": True}),
        case("flsw", config=flsw, reference=True),
        case("flsw_tags", config=flsw, head="tags"),
        case("cwsm", config=cwsm),
        case("cwsm_masked_tags", config=cwsm, head="tags", keys=masked, reference=True),
        case("logits_mask", head="tags", keys=masked),
        case("logits_mask_mse", head="tags", keys=masked, config={"kd_loss_type": "mse"}),
        case("two_heads", head="span", keys=("logits", "losses"), config={"hard_label_weight": 1}),
        case("two_heads_masked", head="two_tags", keys=masked),
        case("batch_dict", batch="dict", train={**EPOCHS, "scale": 1.5}, note="with an extra argument to the models"),
        case("batch_teacher_student", batch="sides"),
        case("batch_teacher_cache", batch="cache"),
        case("cached", config={"is_caching_logits": True}),
        case("cached_shuffle", config={"is_caching_logits": True}, shuffle=True, batch="dict", reference=True),
        case("cached_masked", config={"is_caching_logits": True}, head="tags", keys=masked),
        case("cached_probability_shift", config={"is_caching_logits": True, "probability_shift": True}, keys=labels),
        case("cached_postprocessor", config={"is_caching_logits": True}, postprocess=True),
    ]


def loop_cases() -> list[Case]:
    """Return the cases of the training loop, run with BasicDistiller."""

    def case(name: str, **fields: Any) -> Case:
        return Case(f"loop_{name}", "BasicDistiller", **fields)

    window = {"gradient_accumulation_steps": 2}
    return [
        case("adamw", optimiser=ADAMW),
        case("weight_decay", optimiser=DECAY),
        case("weight_decay_groups", optimiser=DECAY, groups=True, reference=True),
        case("num_steps", **steps(20, 8)),
        case("num_steps_shuffle", **steps(20, 8), shuffle=True, reference=True),
        case("shuffle", shuffle=True),
        case("random_collate", shuffle=True, random_words=True),
        case("random_collate_num_steps", **steps(20, 3), shuffle=True, random_words=True),
        case("batch_postprocessor", postprocess=True, shuffle=True),
        case("scheduler_class", scheduler="class"),
        case("scheduler_object", scheduler="object"),
        case("accumulation", training=window, train={"num_epochs": 4}, reference=True),
        case("accumulation_num_steps", train={"num_steps": 16}, training={**window, "ckpt_steps": 4}, shuffle=True),
        case("clipping", train={**EPOCHS, "max_grad_norm": 0.05}),
        case("clipping_num_steps", train={"num_steps": 16, "max_grad_norm": 0.05}, training={"ckpt_steps": 16}),
        case("clipping_accumulation", train={"num_epochs": 4, "max_grad_norm": 0.05}, training=window, reference=True),
        case("callback", training={"ckpt_frequency": 2}, callback=True, shuffle=True),
        case("callback_num_steps", **steps(16, 5), callback=True, shuffle=True, random_words=True),
    ]


ATTENTION_LOSSES = ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean")
HIDDEN_LOSSES = ("hidden_mse", "cos", "pkd")
PAIR_LOSSES = ("fsp", "gram", "nst", "mmd")


def match(loss: str, weight: float = 1.0, proj: list[Any] | None = None) -> dict[str, Any]:
    """Return a match of the last student layer and the last teacher layer, or of two pairs of layers."""
    layers: dict[str, Any] = {"layer_S": 2, "layer_T": 4}
    if loss in ATTENTION_LOSSES:
        layers = {"layer_S": 1, "layer_T": 3}
    if loss in PAIR_LOSSES:
        layers = {"layer_S": [0, 2], "layer_T": [0, 4]}
    feature = "attention" if loss in ATTENTION_LOSSES else "hidden"
    return {**layers, "feature": feature, "loss": loss, "weight": weight, **({"proj": proj} if proj else {})}


def match_cases() -> list[Case]:
    """Return the cases of one match loss alone: no logits, so nothing else trains the student."""
    cases = []
    for loss in ATTENTION_LOSSES + HIDDEN_LOSSES + PAIR_LOSSES:
        feature = "attention" if loss in ATTENTION_LOSSES else "hidden"
        widths = (48,) if loss in (*ATTENTION_LOSSES, "nst", "mmd") else (32,)
        common = {"config": {"intermediate_matches": [match(loss)]}, "widths": widths}
        note = MASKED_GRAM_NOTE if loss in ("nst", "mmd") else ""
        cases.append(Case(f"match_{loss}", "GeneralDistiller", keys=(feature,), **common, reference=loss == "mmd"))
        if loss != "pkd":  # reads the first position alone: no mask enters
            keys = (feature, "inputs_mask")
            reference = loss == "attention_ce"
            cases.append(
                Case(f"match_{loss}_masked", "GeneralDistiller", keys=keys, **common, note=note, reference=reference)
            )
    return cases


def general_cases() -> list[Case]:
    """Return the cases of matches together, with projections, and of the loop around them."""

    def case(name: str, matches: list[dict[str, Any]], **fields: Any) -> Case:
        config = {"intermediate_matches": matches, **fields.pop("config", {})}
        return Case(f"general_{name}", "GeneralDistiller", config=config, **fields)

    def linear() -> list[dict[str, Any]]:
        return [match("hidden_mse", 2.0, ["linear", 32, 48])]

    features = ("logits", "hidden", "attention")
    everything = [match(loss, 0.5) for loss in (*ATTENTION_LOSSES, "nst")]
    everything += [match(loss, 0.5, ["linear", 32, 48]) for loss in (*HIDDEN_LOSSES, "fsp")]
    window = {"gradient_accumulation_steps": 2}
    own_rate = ["linear", 32, 48, {"lr": 1e-2, "weight_decay": 0.1}]
    return [
        case("no_matches", [], keys=("logits", "losses"), config={"hard_label_weight": 1}),
        case("all", everything, keys=(*features, "losses"), config={"hard_label_weight": 0.5}, reference=True),
        case("all_adamw", everything, keys=(*features, "losses"), config={"hard_label_weight": 0.5}, optimiser=ADAMW),
        case("all_masked", everything, keys=(*features, "inputs_mask"), note=MASKED_GRAM_NOTE),
        case("projection_linear", linear(), keys=features, reference=True),
        case("projection_relu", [match("hidden_mse", 2.0, ["relu", 32, 48])], keys=features),
        case("projection_tanh", [match("cos", 1.0, ["tanh", 32, 48])], keys=features),
        case(
            "projections_relu_two",
            [match(loss, 1.0, ["relu", 32, 48]) for loss in ("hidden_mse", "fsp")],
            keys=features,
        ),
        case("projection_own_rate", [match("hidden_mse", 1.0, own_rate)], keys=features, optimiser=DECAY),
        case("projection_scheduler_class", linear(), keys=features, scheduler="class"),
        case("projection_accumulation", linear(), keys=features, training=window, train={"num_epochs": 4}),
        case(
            "projection_num_steps", linear(), keys=features, **steps(20, 8), shuffle=True, callback=True, reference=True
        ),
        case(
            "clipping",
            [match("attention_mse"), match("nst")],
            keys=features,
            train={**EPOCHS, "max_grad_norm": 0.05},
            note="without projections: the original clips the student alone, the library both",
        ),
        case("probability_shift", linear(), keys=("labels", *features), config={"probability_shift": True}),
        case("callback", linear(), keys=features, training={"ckpt_frequency": 3}, callback=True, shuffle=True),
        case("batch_teacher_student", linear(), keys=features, batch="sides"),
        case("tags_masked", [match("attention_ce")], keys=(*features, "logits_mask", "inputs_mask"), head="tags"),
    ]


def several_cases() -> list[Case]:
    """Return the cases of several teachers, several tasks, and of BasicTrainer."""

    def teachers(name: str, **fields: Any) -> Case:
        return Case(f"multi_teacher{name}", "MultiTeacherDistiller", widths=(48, 32), **fields)

    def tasks(name: str, **fields: Any) -> Case:
        fields = {"keys": ("logits", "losses"), **fields}
        return Case(f"multi_task{name}", "MultiTaskDistiller", widths=(48, 48), head="tasks", batch="dict", **fields)

    def trainer(name: str, **fields: Any) -> Case:
        return Case(f"trainer_{name}", "BasicTrainer", keys=("losses",), **fields)

    cached, shift = {"is_caching_logits": True}, {"probability_shift": True}
    window = {"gradient_accumulation_steps": 2}
    projection = {"intermediate_matches": [match("hidden_mse", 1.0, ["linear", 32, 48]), match("attention_mse")]}
    features = ("logits", "hidden", "attention")
    return [
        teachers(""),
        teachers("_hard_labels", keys=("logits", "losses"), config={"hard_label_weight": 0.5}, batch="dict"),
        teachers("_probability_shift", keys=("logits", "labels"), config=shift, reference=True),
        teachers("_masked_tags", keys=("logits", "logits_mask"), head="tags", config={"kd_loss_type": "mse"}),
        teachers("_cached", config=cached, shuffle=True),
        teachers("_cached_probability_shift", keys=("logits", "labels"), config={**cached, **shift}),
        teachers("_num_steps_flsw", config={"temperature_scheduler": ["flsw", 1, 2]}, **steps(16, 4), shuffle=True),
        tasks("", **steps(16, 8), config={"hard_label_weight": 0.5}, shuffle=True, reference=True),
        tasks("_tau", train={"num_steps": 16, "tau": 0.5}, training={"ckpt_steps": 16}),
        tasks("_matches", **steps(16, 8), keys=features, config=projection, shuffle=True),
        tasks(
            "_accumulation_clipping",
            train={"num_steps": 16, "max_grad_norm": 0.05},
            training={**window, "ckpt_steps": 8},
        ),
        trainer("epochs", shuffle=True, reference=True),
        trainer(
            "num_steps",
            train={"num_epochs": None, "num_steps": 20},
            training={"ckpt_steps": 8},
            shuffle=True,
            scheduler="class",
        ),
        trainer("accumulation_clipping", training=window, train={"num_epochs": 4, "max_grad_norm": 0.5}, batch="dict"),
        trainer("callback", training={"ckpt_frequency": 2}, callback=True, shuffle=True, random_words=True),
    ]


CASES: tuple[Case, ...] = tuple(basic_cases() + loop_cases() + match_cases() + general_cases() + several_cases())
