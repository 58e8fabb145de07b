"""Pruned models made again from what was saved, in any process."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression import saving
from textbrewer.compression.gates import has_gates
from textbrewer.compression.low_rank_manifest import restore_low_rank_
from textbrewer.compression.module_numbers import restore_numbers_, set_shapes_
from textbrewer.compression.quantized_weights import assemble
from textbrewer.compression.shrink import shrink_
from textbrewer.compression.sites import HIDDEN, find_layout, hidden_width

__all__ = ["load"]

_ATTENTIONS = ("eager", "sdpa")
"""Ways to compute attention that every machine has."""


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return a model that :func:`textbrewer.compression.save` wrote.

    Args:
        path: the folder.
        model: a model as the saved one was before it was pruned, with as many layers, heads and units or more; left as
            it is. Needed for classes that are not transformers' own.

    Returns:
        A new model on the CPU (or where ``model`` is), in eval mode, all its parameters to be trained (of a quantised
        one none), in the dtypes that they were saved in.

    Raises:
        ImportError: if the model is quantised, without torchao.
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, the files do not belong together, or the manifest does not fit the model.
        TypeError: if ``model`` is no model.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    tensors = _read_tensors(folder, manifest["id"])
    if model is None:
        model = _built(folder, manifest)
    else:
        checks.is_a(model, nn.Module, "model", "a torch.nn.Module, or None")
        if has_gates(model):
            raise ValueError("model must not be masked to load weights into it; pass one as it was before")
        model = copy.deepcopy(model)
    try:
        for name in manifest["absent"]:
            parent, _, part = name.rpartition(".")
            model.get_submodule(parent)._modules[part] = None
        tensors = assemble(tensors, manifest.get("quantized", {}))
        if manifest.get("numbers") is None:
            _resize(model, manifest)
        else:
            restore_numbers_(model, manifest["numbers"])
            theirs = tensors | {name: tensors[source] for name, source in manifest["aliases"].items()}
            set_shapes_(model, theirs, manifest["low_rank"])
        restore_low_rank_(model, manifest["low_rank"])
        _fill(model, tensors, manifest["aliases"])
        if manifest.get("quantized"):
            model.requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the manifest in {str(folder)!r} must fit {type(model).__name__}, and does not: {error}"
        ) from error
    return model.eval()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the checked manifest of a folder."""
    path = _existing(folder, saving.MANIFEST_FILE)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != saving.FORMAT:
        raise ValueError(f"{str(path)!r} must be a manifest that compression.save wrote")
    if manifest.get("version") != saving.VERSION:
        raise ValueError(
            f"{str(path)!r} must be of version {saving.VERSION}, got {manifest.get('version')!r}: use the release that "
            "wrote it, or save the model again"
        )
    kinds = {"id": str, "class": str, "layers": dict, "units": dict, "low_rank": dict, "absent": list, "aliases": dict}
    for field, kind in kinds.items():
        if not isinstance(manifest.get(field), kind):
            raise ValueError(f"{str(path)!r} is damaged: it must have {field!r}, a {kind.__name__}")
    for field in ("layers", "units"):
        if any(not isinstance(size, int) or size < 1 for size in manifest[field].values()):
            raise ValueError(f"{str(path)!r} is damaged: {field!r} must be numbers of at least 1")
    if not _is_width(manifest.get("hidden")):
        raise ValueError(f"{str(path)!r} is damaged: 'hidden' must be a width of at least 1, and fields of the config")
    return manifest


def _is_width(hidden: Any) -> bool:
    """Return whether this is what a manifest says of the hidden width; those of earlier releases say nothing."""
    if hidden is None:
        return True
    if not isinstance(hidden, dict) or not isinstance(hidden.get("built"), dict):
        return False
    sizes = [hidden.get("width"), *hidden["built"].values()]
    return all(isinstance(size, int) and size >= 1 for size in sizes)


def _read_tensors(folder: Path, identity: str) -> dict[str, Tensor]:
    """Return the tensors of a folder, if they were saved with its manifest."""
    path = _existing(folder, saving.TENSORS_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("id") != identity:
                raise ValueError("it was not saved together with the manifest beside it; save the model again")
            # Copies: what the file gives lies in the file, and would go with it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error}") from error


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"compression.load needs {name} in {str(folder)!r}, which compression.save writes")
    return path


def _built(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """Return a model of a class of transformers, of the shapes that its config says.

    Raises:
        ValueError: if the class is another, or this release of transformers does not have it.
    """
    module, _, name = str(manifest["class"]).rpartition(".")
    if module.partition(".")[0] != "transformers":
        raise ValueError(
            f"model must be given for a {manifest['class']}, which is no class of transformers: pass "
            f"compression.load(path, model={name}(...)), built as it was before it was pruned"
        )
    path = _existing(folder, saving.CONFIG_FILE)
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(
            f"transformers must have a class {name!r}, as the manifest in {str(folder)!r} says, and release "
            f"{transformers.__version__} has none; install the one that the model was saved with, or pass model="
        )
    built = (manifest.get("hidden") or {}).get("built", {})
    config = kind.config_class(**{**json.loads(path.read_text(encoding="utf-8")), **built})
    if manifest.get("attention") in _ATTENTIONS:
        config._attn_implementation = manifest["attention"]
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced
        model: nn.Module = kind(config)
    if (folder / saving.GENERATION_FILE).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _resize(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Give a model the shapes of a manifest; which of its units stay does not matter, as all are filled.

    Raises:
        ValueError: if it has other places, or fewer units in one.
    """
    layout = find_layout(model)
    have = {stack.path: len(stack.blocks) for stack in layout.stacks}
    _check_sizes(have, manifest["layers"], "layers")
    shrink_(model, {path: _first(size, have[path]) for path, size in manifest["layers"].items() if size < have[path]})
    hidden = manifest.get("hidden")  # which folders of earlier releases do not have
    if hidden is not None:
        have = {HIDDEN: hidden_width(model, find_layout(model))}
        _check_sizes(have, {HIDDEN: hidden["width"]}, "features")
        if hidden["width"] < have[HIDDEN]:
            shrink_(model, {HIDDEN: _first(hidden["width"], have[HIDDEN])})
    have = {site.name: site.units for site in find_layout(model).sites if site.inner is not None}
    _check_sizes(have, manifest["units"], "units")
    shrink_(model, {name: _first(size, have[name]) for name, size in manifest["units"].items() if size < have[name]})


def _check_sizes(have: Mapping[str, int], wanted: Mapping[str, int], what: str) -> None:
    for name in have.keys() ^ wanted.keys():
        side = "model" if name in have else "manifest"
        raise ValueError(f"only the {side} has {what} in {name!r}")
    for name, size in wanted.items():
        if size > have[name]:
            raise ValueError(f"{name!r} must have {size} {what} or more, got {have[name]}")


def _first(size: int, total: int) -> Tensor:
    return torch.arange(total) < size


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Put tensors into a model, tied as they were.

    Raises:
        ValueError: if a name or a shape differs.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    saved = model.state_dict()
    mine = {name: tensor for name, tensor in named if name in saved}
    theirs = {**{name: name for name in tensors}, **aliases}
    for name in sorted(mine.keys() ^ theirs.keys()):
        raise ValueError(f"only the {'model' if name in mine else 'file'} has a tensor {name!r}")
    for name, source in theirs.items():
        if mine[name].shape != tensors[source].shape:
            raise ValueError(f"{name!r} must be {tuple(tensors[source].shape)}, got {tuple(mine[name].shape)}")
    placed: dict[str, Tensor] = {}
    for name, source in theirs.items():
        parent, _, leaf = name.rpartition(".")
        module, device = model.get_submodule(parent), mine[name].device
        if leaf in module._parameters:
            if source not in placed:
                placed[source] = nn.Parameter(tensors[source].to(device), tensors[source].is_floating_point())
            module._parameters[leaf] = placed[source]  # type: ignore[assignment]
        else:
            module._buffers[leaf] = tensors[source].to(device)
