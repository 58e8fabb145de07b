"""What a teacher is: its structure and weights, and the function that reads its outputs, each as a short hash."""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textbrewer.teacher_cache.own_modules import functions_of, names_in, settings_of, written

_PLAIN = (str, int, float, bool, bytes, type(None), tuple, list, set, frozenset, dict, functools.partial)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
# Settings that change nothing in logits and features: where a model came from, the names of its labels, and how its own
# loss is computed, which transformers notes in the configuration during the first forward pass with labels.
_NO_MATTER = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
}


def of_model(model: nn.Module) -> str:
    """Return a hash of a model's structure, configuration, code and weights.

    Code and settings are those of the modules of the user's own; of libraries, the settings that are in no text.
    """
    digest = blake2b(digest_size=16)
    digest.update(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    digest.update(_ADDRESS.sub("", repr(model)).encode())
    config = getattr(model, "config", None)
    if config is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else config
        if isinstance(settings, Mapping):
            settings = {str(name): value for name, value in settings.items() if name not in _NO_MATTER}
        digest.update(_ADDRESS.sub("", json.dumps(settings, sort_keys=True, default=repr)).encode())
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__qualname__};".encode())
        _add(digest, settings_of(module), depth=0)
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        for name, function in functions_of(kind):
            digest.update(f"{name}={of_function(function)};".encode())
    for name, value in sorted({**model.state_dict(), **dict(model.named_buffers())}.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r};".encode())
            continue
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        flat = value.detach().reshape(-1).cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_function(function: Any) -> str:
    """Return a hash of what a function does: its code, defaults, and the plain values and functions that it names.

    Those it closes over, and those of its module: another module's are taken to stay as they are.
    """
    digest = blake2b(digest_size=8)
    _add(digest, function, depth=0)
    return digest.hexdigest()


def _add(digest: Any, value: Any, depth: int) -> None:
    """Add a function, or a value that one uses, to a hash."""
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *sorted(value.keywords.items())):
            _add(digest, part, depth + 1)
        return
    if inspect.ismethod(value):
        _add(digest, value.__func__, depth + 1)
        if not isinstance(value.__self__, type):
            _add(digest, getattr(value.__self__, "__dict__", None), depth + 1)
        return
    code = getattr(value, "__code__", None)
    if code is None and not isinstance(value, type) and callable(value) and depth < 4:
        # An object with __call__: its class's code and its plain attributes.
        digest.update(f"{type(value).__module__}.{type(value).__qualname__};".encode())
        digest.update(f"{getattr(value, '__qualname__', '')};".encode())
        _add(digest, getattr(type(value).__call__, "__code__", None), depth + 1)
        _add(digest, getattr(value, "__dict__", None), depth + 1)
    elif code is not None and depth < 4:
        _add(digest, code, depth + 1)
        for part in (value.__defaults__, value.__kwdefaults__):
            _add(digest, part, depth + 1)
        for cell in value.__closure__ or ():
            _add(digest, _content_of(cell), depth + 1)
        for name in sorted((names_in(code) - written(code)) & value.__globals__.keys()):
            part = value.__globals__[name]
            if isinstance(part, _PLAIN) or getattr(part, "__module__", None) == value.__module__:
                digest.update(f"{name}=".encode())
                _add(digest, part, depth + 1)
    elif hasattr(value, "co_code"):
        digest.update(value.co_code)
        digest.update(repr(value.co_names).encode())
        for constant in value.co_consts:
            _add(digest, constant, depth + 1)
    else:
        _add_value(digest, value, depth)


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # Not filled yet.
        return None


def _add_value(digest: Any, value: Any, depth: int) -> None:
    if isinstance(value, (str, int, float, complex, bool, bytes, type(None), torch.dtype)):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, (tuple, list)):
        digest.update(b"(" if isinstance(value, tuple) else b"[")
        for item in value:
            _add(digest, item, depth + 1)
        digest.update(b"]")
    elif isinstance(value, (set, frozenset)):
        _add(digest, sorted(_ADDRESS.sub("", repr(item)) for item in value), depth + 1)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}:{value.shape};".encode())
        digest.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, Tensor):
        array = value.detach().reshape(-1).cpu().contiguous()
        digest.update(f"{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(array.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            digest.update(_ADDRESS.sub("", f"{name!r};").encode())
            _add(digest, item, depth + 1)
        digest.update(b"}")
    else:
        kind = value if isinstance(value, type) else type(value)
        digest.update(f"{kind.__module__}.{kind.__qualname__};".encode())
