"""LoRA students: a frozen model with small trained additions to its linear maps, by ``peft``.

>>> student = lora_(model, rank=8)
>>> distiller = GeneralDistiller(train_config, distill_config, teacher, student, "auto", "auto")
>>> ...                                              # optimiser over student.parameters(), train as any student
>>> save_adapter(student, "adapter")                 # the additions alone: a few megabytes
>>> plain = merge_lora(student)                      # or the model with the additions in its weights
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from textbrewer import checks
from textbrewer.compression.low_rank_layers import choose_maps, is_linear_map, matrix_of, shared_parameters
from textbrewer.hooks import resolve

__all__ = ["load_adapter", "lora_", "merge_lora", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def lora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] = "auto",
    dropout: float = 0.0,
    also_train: Sequence[str] = (),
) -> Any:
    r"""Freeze a model, in place, and give its linear maps small trainable additions.

    .. math::
        y = W x + b + \frac{\alpha}{r} B A \, \mathrm{dropout}(x), \qquad B = 0 \text{ at first}

    so that the outputs are at first those of the model. A distiller takes the result as any other student, with
    ``adaptor="auto"`` too; it returns hidden states and attentions as the model does. If teacher and student are to
    start from the same weights, the teacher must be a copy, made before.

    Args:
        model: the student; the additions are put inside it.
        rank: :math:`r`, the width of the additions.
        alpha: :math:`\alpha`; the additions are scaled by ``alpha / rank``.
        targets: ``"auto"``: every linear map (``nn.Linear``, transformers' ``Conv1D``) but output heads and shared
            weights. Else names, whole or the last parts, or patterns: ``["query", "value"]``, ``["*.layer.5.*"]``.
        dropout: chance by which an input of the additions is zeroed in training.
        also_train: names of modules, such as a fresh ``"classifier"``, that are trained whole, as a copy that is saved
            with the additions.

    Returns:
        The ``peft.PeftModel`` around the model: train, save and call this one.

    Raises:
        ImportError: without peft.
        TypeError, ValueError, KeyError: if an argument cannot work, or the model has additions already.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, section 4.1.
    """
    checks.is_a(model, nn.Module, "model", "a torch module")
    checks.integer(rank, "rank", minimum=1)
    checks.number(alpha, "alpha", above=0)
    checks.number(dropout, "dropout", minimum=0, below=1)
    checks.is_a(also_train, (list, tuple), "also_train", "a list of names of modules")
    for name in also_train:
        checks.is_a(name, str, "an entry of also_train", "the name of a module")
    peft = _peft()
    _check_plain(model, "lora_")
    names = _targets(model, targets, also_train)
    _check_also_train(model, also_train, names)
    config = peft.LoraConfig(
        r=int(rank),
        lora_alpha=alpha,
        lora_dropout=dropout,
        # One expression for exactly these names: peft takes a list for the ends of names.
        target_modules="|".join(re.escape(name) for name in names),
        modules_to_save=list(also_train) or None,
        fan_in_fan_out=all(type(resolve(model, name)) is not nn.Linear for name in names),
    )
    return peft.get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Return the model with its additions put into its weights: of its own class again, no larger and no slower.

    All parameters are trainable afterwards. The model given is used up.

    Args:
        model: of :func:`lora_` or :func:`load_adapter`.

    Raises:
        ImportError: without peft.
        TypeError: if the model has no additions.
        ValueError: if merged weights are not finite.
    """
    _check_adapted(model)
    plain = model.merge_and_unload(safe_merge=True)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return plain


def save_adapter(model: Any, path: str | os.PathLike[str]) -> None:
    """Write the additions alone into a folder, in peft's format: ``PeftModel.from_pretrained`` reads it too.

    Each file takes the place of an old one only when it is whole. Nothing is looked up anywhere, and no model card is
    written.

    Args:
        model: of :func:`lora_` or :func:`load_adapter`.
        path: the folder, made if need be.

    Raises:
        ImportError: without peft.
        TypeError: if the model has no additions.
    """
    _check_adapted(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".adapter.tmp-{os.getpid()}"
    try:
        model.save_pretrained(str(temporary), selected_adapters=["default"], save_embedding_layers=False)
        for name in (_WEIGHTS, _CONFIG):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], trainable: bool = False) -> Any:
    """Put saved additions into a fresh model with the weights they were trained on, in place.

    Args:
        model: the model as it was given to :func:`lora_`.
        path: folder written by :func:`save_adapter`.
        trainable: whether the additions are to be trained further.

    Returns:
        The ``peft.PeftModel`` around the model.

    Raises:
        ImportError: without peft.
        ValueError: if the folder holds no LoRA adapter, or one of another model; this one is then untouched.
    """
    checks.is_a(model, nn.Module, "model", "a torch module")
    peft, folder = _peft(), Path(path)
    _check_plain(model, "load_adapter")
    try:
        kind = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("peft_type")
        with safe_open(str(folder / _WEIGHTS), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"path must be a folder written by save_adapter, got {str(folder)!r}: {error}") from error
    if kind != "LORA":
        raise ValueError(f"path must hold a LoRA adapter, got {str(folder)!r} with one of type {kind!r}")
    _check_fits(model, shapes, folder)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'textbrewer[lora]'") from error
    return peft


def _check_plain(model: nn.Module, who: str) -> None:
    """Raise ValueError if a model has additions already."""
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError(f"model must have no adapters of peft yet for {who}; merge them first: merge_lora(model)")


def _check_adapted(model: Any) -> None:
    checks.is_a(model, _peft().PeftModel, "model", "a model with additions, of lora_ or load_adapter")


def _targets(model: nn.Module, targets: str | Sequence[str], also_train: Sequence[str]) -> list[str]:
    """Return the dotted names of the maps that get additions; of themselves none in what is trained whole."""
    if targets == "auto":
        whole = tuple(f"{name}." for name in also_train)
        names = [name for name in choose_maps(model, to_wrap=True).maps if not f"{name}.".startswith(whole)]
        if not names:
            raise ValueError("model must have linear maps beside its output heads, got none; name them in targets")
        return names
    checks.is_a(targets, (list, tuple), "targets", "'auto' or a list of names such as ['query', 'value']")
    linear = [name for name, module in model.named_modules() if name and isinstance(module, nn.Module)]
    linear = [name for name in linear if is_linear_map(resolve(model, name))]
    found: list[str] = []
    for target in targets:
        checks.is_a(target, str, "an entry of targets", "a name such as 'query'")
        fits = [name for name in linear if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")]
        if not fits:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"targets must name linear maps of the model, got {target!r}; known: {', '.join(kinds)}")
        found += fits
    if not found:
        raise ValueError(f"targets must name at least one linear map, got {targets!r}")
    for name, reason in choose_maps(model, include=found, to_wrap=True).left.items():
        raise ValueError(f"targets must be maps that can be changed alone, got {name!r}: {reason}")
    return list(dict.fromkeys(found))


def _check_also_train(model: nn.Module, also_train: Sequence[str], targets: Sequence[str]) -> None:
    """Raise for modules that cannot be trained whole beside the additions."""
    shared = shared_parameters(model)
    for name in also_train:
        module = resolve(model, name)
        others = [other for other, _ in model.named_modules() if other.endswith(name) and other not in also_train]
        if others:
            raise ValueError(
                f"also_train={name!r} means {others[0]!r} too, as peft goes by the end of names; list both"
            )
        if any(target == name or target.startswith(f"{name}.") for target in targets):
            raise ValueError(f"also_train={name!r} must be no target, or around one; leave it out of one of both")
        for parameter in module.parameters():
            if id(parameter) in shared:
                raise ValueError(
                    f"also_train={name!r} must not share weights, got {' and '.join(shared[id(parameter)])}"
                )


def _check_fits(model: nn.Module, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise ValueError unless every saved tensor has its place in a model."""
    modules, own = dict(model.named_modules()), model.state_dict()
    for key, shape in shapes.items():
        name = key.removeprefix(_PREFIX)
        module = modules.get(re.split(r"\.lora_[AB]\.", name)[0])
        if ".lora_A." in name or ".lora_B." in name:
            axis = 1 if ".lora_A." in name else 0
            fits = module is not None and is_linear_map(module) and shape[axis] == matrix_of(module).shape[axis]
        else:
            fits = name in own and tuple(own[name].shape) == shape
        if not fits:
            raise ValueError(
                f"the adapter in {str(folder)!r} must be one of this model, got {name!r} of shape {shape}, which has "
                f"no place in {type(model).__name__}"
            )
