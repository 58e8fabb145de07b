"""The short way in: ``distill(teacher, student, recipe=...)`` runs all stages of a published recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from textbrewer import checks, engine, recipes
from textbrewer.adaptors import Adaptor, one_each
from textbrewer.configurations import TrainingConfig
from textbrewer.distillers.targets import make_target
from textbrewer.files import replaced
from textbrewer.names import suggestion
from textbrewer.recipes import Stage
from textbrewer.recipes.lengths import lengths_of
from textbrewer.recipes.optimisation import make_optimizer
from textbrewer.stage_training import StageTraining
from textbrewer.students import init_student_from_teacher
from textbrewer.teacher_cache import TeacherCache, fingerprint

__all__ = ["distill"]

logger = logging.getLogger("textbrewer")

_RECORD = "distill.json"


def distill(
    teacher: nn.Module | Sequence[nn.Module],
    student: nn.Module | int,
    recipe: str = "hidden",
    *,
    dataloader: Iterable[Any],
    num_epochs: int | None = None,
    num_steps: int | None = None,
    learning_rate: float | None = None,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    output_dir: str | os.PathLike[str] = "./distilled",
    callback: Callable[..., Any] | None = None,
    adaptor_T: Adaptor | str | Sequence[Adaptor | str] = "auto",
    adaptor_S: Adaptor | str = "auto",
    target: str | Sequence[Any] | None = None,
    kd_loss_type: str | list[Any] | None = None,
    teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
    is_caching_logits: bool = False,
    train_config: TrainingConfig | None = None,
    max_grad_norm: float = 1.0,
    resume: bool = True,
    **settings: Any,
) -> nn.Module:
    """Distil a teacher, or several of one task, into a student by a published recipe.

    >>> student = textbrewer.distill(teacher, 3, recipe="tinybert", dataloader=loader, num_epochs=10)
    >>> student = textbrewer.distill([teacher, second, third], 3, recipe="cofi-dynamic", dataloader=loader)

    The stages of the recipe run one after the other and share the given length. Each writes its checkpoints into a
    folder of its own, ``output_dir/1-intermediate`` and so on; the same call goes on where it was interrupted.

    Args:
        teacher: the teacher, fine-tuned where the recipe is about a task; it is left as it is. Of a list the recipe is
            made for the first: that one shows its layers, and all of them their logits.
        student: the student, which is trained in place; or how many of the teacher's layers to make one of
            (:func:`textbrewer.students.init_student_from_teacher`, without dropout).
        recipe: a name of ``textbrewer.recipes.RECIPES``.
        dataloader: yields batches, as for :meth:`GeneralDistiller.train`.
        num_epochs: passes over the data in all, shared by the stages; 3 if ``num_steps`` is not given either.
        num_steps: optimiser steps in all; counts before ``num_epochs``. Needed if the dataloader has no length.
        learning_rate: of all stages that do not set their own; 3e-4 by default.
        optimizer: ``f(model, learning_rate) -> optimizer``, called for each stage; by default AdamW with weight decay
            0.01 on all matrices (:func:`textbrewer.recipes.make_optimizer`). The rate warms up over the first tenth of
            each stage's steps and then falls linearly to zero.
        output_dir: folder of checkpoints, one folder a stage.
        callback: ``callback(model=student, step=global_step)`` after each checkpoint, of which there is one at each
            stage's end too.
        adaptor_T: what the teacher's outputs mean; ``"auto"`` for a transformers model. Of several teachers one for
            all, or a list of one each.
        adaptor_S: what the student's outputs mean, likewise.
        target: how several teachers become one KD loss, as for :class:`MultiTeacherDistiller`; ``None``: by the mean of
            their logits.
        kd_loss_type: another loss between the logits, in all stages that compare probabilities of classes: ``"mse"``
            for a regression (with temperature 1), ``"sigmoid"`` where a row has several classes; ``None``: the
            recipe's.
        teacher_cache: where the teacher's outputs are stored and found again, see ``GeneralDistiller``. Only for the
            run's own teacher: another one that a recipe trains on the way is not stored.
        is_caching_logits: keep what each stage needs of the teacher's outputs in main memory, see
            ``DistillationConfig``; batches then keep their rows.
        train_config: precision, device, logging, accumulation and the like; checkpoints come every ``ckpt_steps``
            optimiser steps, once a pass if it is ``None``. Its ``output_dir`` is set here; each stage logs into a
            folder of its own below ``log_dir``.
        max_grad_norm: gradients are clipped to this norm; not positive: no clipping.
        resume: go on with what ``output_dir`` holds of the same call, which is told by the recipe, its settings, the
            length and the teacher's weights, not by the data: what is finished is not trained again. ``False``: begin
            anew (checkpoints of an earlier call are replaced as the new ones come).
        **settings: the recipe's own settings, such as ``temperature=2``.

    Returns:
        The student.

    Raises:
        KeyError: if the recipe is unknown.
        TypeError, ValueError: if an argument cannot work, or ``output_dir`` holds another distillation; the message
            says what to do.
    """
    checks.is_a(is_caching_logits, bool, "is_caching_logits", "True or False")
    checks.is_a(resume, bool, "resume", "True or False")
    config = TrainingConfig() if train_config is None else train_config
    checks.is_a(config, TrainingConfig, "train_config", "a TrainingConfig")
    rate = 3e-4 if learning_rate is None else learning_rate
    checks.number(rate, "learning_rate", above=0)
    teachers, adaptors, blend = _teachers(teacher, adaptor_T, target)
    pupil, stages = _stages(recipe, teachers, student, settings)
    _refuse_for_peers(recipe, stages, len(teachers), teacher_cache is not None or is_caching_logits)
    stages = recipes.with_kd_loss(stages, kd_loss_type, recipe)
    accumulation = config.gradient_accumulation_steps
    if not callable(make := make_optimizer if optimizer is None else optimizer):
        raise TypeError(f"optimizer must be a function (model, learning_rate) -> optimizer, got {make!r}")
    lengths, a_pass = lengths_of(stages, engine.size_of(dataloader), num_epochs, num_steps, accumulation)
    record = {"recipe": recipe, "settings": _plain(settings), "steps": lengths, "rate": rate}
    record |= {"accumulation": accumulation, "max_grad_norm": max_grad_norm, **_models(teachers, pupil)}
    record |= _plain({"kd_loss_type": kd_loss_type} | ({"target": blend} if len(teachers) > 1 else {}))
    began = _begin(Path(output_dir), record, resume)
    arguments = {"dataloader": dataloader, "scheduler_class": LambdaLR, "max_grad_norm": max_grad_norm}
    run = StageTraining(
        *(teachers, pupil, adaptors, adaptor_S, blend, teacher_cache, is_caching_logits),
        *(make, rate, arguments, callback),
    )
    for number, (stage, steps) in enumerate(zip(stages, lengths, strict=True), 1):
        logger.info("%s, stage %d of %d: %s, %d steps", recipe, number, len(stages), stage.name, steps)
        run.train(stage, steps, _of_stage(config, output_dir, f"{number}-{stage.name}", min(steps, a_pass)), began)
    return pupil


def _of_stage(config: TrainingConfig, folder: str | os.PathLike[str], name: str, every: int) -> TrainingConfig:
    """Return a stage's configuration: with folders of its own, and a checkpoint each so many steps by default."""
    log_dir = None if config.log_dir is None else os.path.join(config.log_dir, name)
    return dataclasses.replace(
        config, output_dir=os.path.join(folder, name), log_dir=log_dir, ckpt_steps=config.ckpt_steps or every
    )


def _teachers(
    given: Any, adaptor: Adaptor | str | Sequence[Adaptor | str], target: str | Sequence[Any] | None
) -> tuple[list[nn.Module], list[Adaptor | str], str | Sequence[Any]]:
    """Return the teachers, an adaptor of each, and the target; by default the mean of the logits.

    Raises:
        KeyError, TypeError, ValueError: if one of them cannot be, or there is a target and one teacher.
    """
    teachers = list(given) if isinstance(given, (list, tuple, nn.ModuleList)) else [given]
    if not teachers:
        raise ValueError("teacher must be a torch module, or a list of at least one, got none")
    for number, teacher in enumerate(teachers):
        checks.is_a(teacher, nn.Module, f"teacher[{number}]" if len(teachers) > 1 else "teacher", "a torch module")
    if target is not None and len(teachers) == 1:
        raise ValueError(f"target={target!r} is for several teachers, and there is one; leave it out, or give a list")
    blend = "mean_logits" if target is None else target
    make_target(blend, len(teachers))
    return teachers, one_each(adaptor, len(teachers), "adaptor_T", "teacher"), blend


def _stages(
    recipe: str, teachers: list[nn.Module], student: nn.Module | int, settings: dict[str, Any]
) -> tuple[nn.Module, list[Stage]]:
    """Return the student, the given one or so many layers of the first teacher, and the stages of the recipe."""
    make = recipes.get(recipe)
    _, _, *known = inspect.signature(make).parameters.values()
    names = [parameter.name for parameter in known]
    for name in settings:
        if name not in names and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            raise TypeError(f"recipe {recipe!r} has no setting {name!r}; {suggestion(name, names)}")
    if isinstance(student, int) and not isinstance(student, bool):
        # Of a teacher in half precision too: the updates of a training are lost in its rounding.
        student = init_student_from_teacher(teachers[0], layers=student, dropout=0.0).float()
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch module, or a number of layers, got {student!r}")
    if any(item.dtype == torch.float16 and item.requires_grad for item in student.parameters()):
        raise ValueError(
            "student must have its weights in float32 to be trained, got float16; call student.float() first, and set "
            "precision in train_config for a training in half precision"
        )
    try:
        return student, make(teachers[0], student, **settings)
    except TypeError as error:
        raise TypeError(f"recipe {recipe!r}: {error}") from error


def _refuse_for_peers(recipe: str, stages: list[Stage], teachers: int, caches: bool) -> None:
    """Raise ValueError where all models of a stage learn, and there are several teachers or caches of their outputs."""
    if not any(stage.peers for stage in stages):
        return
    if teachers > 1:
        raise ValueError(f"recipe {recipe!r} has no stage that is taught, give one teacher; got {teachers}")
    if caches:
        raise ValueError(
            f"teacher_cache and is_caching_logits are not for recipe {recipe!r}, whose models all change at every "
            "step; leave them out"
        )


def _models(teachers: Sequence[nn.Module], student: nn.Module) -> dict[str, str]:
    """Return what is noted of the models: the teachers' weights, as hashes, and the student's size."""
    size = sum(parameter.numel() for parameter in student.parameters())
    return {
        "teacher": ", ".join(f"{type(teacher).__name__} {fingerprint.of_model(teacher)}" for teacher in teachers),
        "student": f"{type(student).__name__} of {size} parameters",
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON can hold them; a model is told by its class."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError:
            plain[name] = type(value).__name__
    return plain


def _begin(folder: Path, record: dict[str, Any], resume: bool) -> float:
    """Note in the output folder what is distilled there; refuse to go on with something else.

    What ended before its first checkpoint, by an error in its arguments for one, stands in nobody's way.

    Returns:
        When it began: older checkpoints are of another one.

    Raises:
        ValueError: if the folder holds another distillation.
    """
    path, began = folder / _RECORD, time.time()
    if resume and path.exists() and any(folder.glob("*/checkpoint-*")):
        found = json.loads(path.read_text(encoding="utf-8"))
        began = found.get("began", 0.0)
        other = sorted(name for name in record if name in found and found[name] != record[name])
        if other:
            raise ValueError(
                f"output_dir {str(folder)!r} holds another distillation ({other[0]} {found.get(other[0])!r}, here "
                f"{record[other[0]]!r}); name another folder, or begin anew with resume=False"
            )
    with replaced(path) as unfinished:
        unfinished.write_text(json.dumps({**record, "began": began}, indent=2) + "\n", encoding="utf-8")
    return began
