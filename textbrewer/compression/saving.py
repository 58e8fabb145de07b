"""Pruned models on disk: tensors, config, and a manifest of the shapes that no config can say.

A folder holds ``model.safetensors``, ``config.json`` (transformers' own, where the model has one),
``generation_config.json`` (where there is one) and ``shapes.json``, which is written last.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.compression.gates import has_gates
from textbrewer.compression.hidden import building_fields
from textbrewer.compression.low_rank_manifest import low_rank_manifest
from textbrewer.compression.module_numbers import module_numbers
from textbrewer.compression.quantized_weights import is_fake_quantized, take_apart
from textbrewer.compression.sites import Layout, find_layout, hidden_width, towers_of
from textbrewer.compression.structure import STRUCTURES
from textbrewer.compression.structure.structure import kind_of
from textbrewer.files import replaced

__all__ = ["CONFIG_FILE", "FORMAT", "GENERATION_FILE", "MANIFEST_FILE", "TENSORS_FILE", "VERSION", "save"]

FORMAT = "textbrewer-compressed-model"
VERSION = 1
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MANIFEST_FILE = "shapes.json"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a folder, from which :func:`textbrewer.compression.load` makes it again.

    Any model: pruned, factorised or quantised after that, trained since, or none of these. Of one without a known
    structure, the whole numbers that its modules keep (channels, heads) are written down. Each file is written under a
    temporary name and renamed, the manifest last; what else is in the folder (a tokenizer) stays.

    Args:
        model: what :meth:`~textbrewer.compression.masked.Masked.shrink` returned, for instance.
        path: the folder, made if need be.

    Raises:
        ValueError: if the model is masked and not shrunk, fake-quantised and not converted, quantised in another way
            than this library's, or the path is a file.
        TypeError: if it is no model.
    """
    checks.is_a(model, nn.Module, "model", "a torch.nn.Module; of a Masked, what shrink() returns")
    if has_gates(model):
        raise ValueError("model must be shrunk to be saved, as its masks are no part of it; save masked.shrink()")
    if any(is_fake_quantized(module) for module in model.modules()):
        raise ValueError("model must be converted to be saved, as it is fake-quantised still: convert_qat_(model)")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, got the file {os.fspath(path)!r}")
    tensors, aliases = _tensors(model)
    identity = uuid.uuid4().hex
    manifest = {**_manifest(model), "quantized": take_apart(tensors), "aliases": aliases, "id": identity}
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / TENSORS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "id": identity})
    for file, config in ((CONFIG_FILE, "config"), (GENERATION_FILE, "generation_config")):
        _write_config(getattr(model, config, None), folder / file)
    with replaced(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _manifest(model: nn.Module) -> dict[str, Any]:
    """Return what must be known of a model beside its config and tensors."""
    layout = find_layout(model) if kind_of(model) in STRUCTURES else None
    kind = type(model)
    return {
        "format": FORMAT,
        "version": VERSION,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "layers": {} if layout is None else {stack.path: len(stack.blocks) for stack in layout.stacks},
        "units": {} if layout is None else {site.name: site.units for site in layout.sites if site.inner is not None},
        "hidden": None if layout is None else _hidden(model, layout),
        "numbers": module_numbers(model) if layout is None else None,
        "low_rank": low_rank_manifest(model),
        "absent": [
            f"{name}.{part}" if name else part
            for name, module in model.named_modules()
            for part, child in module._modules.items()
            if child is None
        ],
    }


def _hidden(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return how wide the hidden states are, and what the config must say for the class to make a model to cut down."""
    fields = building_fields(model, layout.structure, towers_of(layout))
    return {"width": hidden_width(model, layout), "built": fields}


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's saved tensors, each once, and the other names of those that are tied."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    saved = model.state_dict().keys()
    for name, tensor in named:
        if name not in saved:
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            # Of its own memory: safetensors takes no two tensors that share some.
            tensors[name] = tensor.detach().cpu().clone().contiguous()
    return tensors, aliases


def _write_config(config: Any, path: Path) -> None:
    if config is None or not hasattr(config, "to_json_file"):
        path.unlink(missing_ok=True)  # of what was saved here before
        return
    with replaced(path) as temporary:
        config.to_json_file(temporary, use_diff=True)
