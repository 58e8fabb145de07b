"""What a module computes with beside its weights: the functions of its class, and its settings."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Modules of torch show most settings in their repr, those of transformers have theirs in the model's configuration.
_LIBRARIES = ("torch.", "transformers.")
_CHANGING_METHODS = {
    *("append", "appendleft", "extend", "insert", "remove", "clear", "pop", "popitem", "popleft", "update"),
    *("setdefault", "add", "discard", "sort", "reverse", "move_to_end"),
    *("copy_", "add_", "sub_", "mul_", "div_", "fill_", "zero_"),
}
_READS = {"LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME"}
_METHODS = {"LOAD_ATTR", "LOAD_METHOD"}
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"}
_STORES_ITEM = {"STORE_SUBSCR", "DELETE_SUBSCR"}
_COPIES = {"COPY", "DUP_TOP_TWO"}
_DEEPEST = 6


def functions_of(kind: type[nn.Module]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the functions of a class and of those it is derived from, but for those of torch and transformers."""
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(_LIBRARIES):
            continue
        for name, member in sorted(vars(base).items()):
            for function in _functions_in(member):
                yield f"{base.__qualname__}.{name}", function


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, and of its class, that are plain values, lists, dicts or tensors.

    Left out is what its forward pass writes (counters, stores of results), what is private and of a library, and what
    transformers sets, which its configuration has.
    """
    kind = type(module)
    if kind.__module__.startswith("transformers."):
        return {}
    own = [function.__code__ for _, function in functions_of(kind)]
    of_class = _class_attributes(kind)
    set_here = set(of_class).union(*map(_stored, own))
    left_out = {"training", *_written_while_running(kind), *_set_by_transformers(kind)}
    values = {**of_class, **vars(module)}
    return {
        name: value
        for name, value in values.items()
        if name not in left_out
        and (name in set_here or not name.startswith("_"))
        and _is_setting(value)
        # Its first use stores its value under its name.
        and not isinstance(of_class.get(name), functools.cached_property)
    }


def written(code: types.CodeType) -> set[str]:
    """Return the names of the attributes and globals that a function stores, or whose content it changes."""
    found = _stored(code)
    for part in _parts(code):
        steps = list(dis.get_instructions(part))
        found.update(step.argval for number, step in enumerate(steps) if _is_changed(steps, number))
    return found


def names_in(code: types.CodeType) -> set[str]:
    """Return the global and attribute names that a function's code has, and the functions' within it."""
    return {name for part in _parts(code) for name in part.co_names}


def _functions_in(member: Any) -> list[Any]:
    if isinstance(member, property):
        found = [member.fget, member.fset]
    elif isinstance(member, functools.cached_property):
        found = [member.func]
    else:
        member = getattr(member, "__func__", member)
        found = [member if inspect.isfunction(member) else getattr(member, "__wrapped__", None)]
    return [function for function in found if inspect.isfunction(function)]


def _class_attributes(kind: type[nn.Module]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not object and not base.__module__.startswith(_LIBRARIES):
            values.update({name: value for name, value in vars(base).items() if not name.startswith("__")})
    return values


def _is_setting(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufcSU"
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth < _DEEPEST and all(_is_setting(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return depth < _DEEPEST and all(_is_setting(item, depth + 1) for item in value.values())
    return isinstance(value, (str, int, float, complex, bool, bytes, type(None), torch.dtype))


def _written_while_running(kind: type[nn.Module]) -> set[str]:
    """Return the names that ``forward`` and the functions of the class that it calls write."""
    by_name: dict[str, list[types.CodeType]] = {}
    for name, function in functions_of(kind):
        by_name.setdefault(name.rpartition(".")[2], []).extend(_codes(function))
    found: set[str] = set()
    reached: set[str] = set()
    ahead = {"forward", "__call__"}
    while ahead:
        reached |= ahead
        codes = [code for name in ahead for code in by_name.get(name, [])]
        found.update(*map(written, codes))
        ahead = {name for code in codes for name in names_in(code)} & by_name.keys() - reached
    return found


def _set_by_transformers(kind: type[nn.Module]) -> set[str]:
    bases = [base for base in kind.__mro__ if base.__module__.startswith("transformers.")]
    functions = [member for base in bases for member in vars(base).values() if inspect.isfunction(member)]
    return {name for function in functions for name in _stored(function.__code__)}


def _codes(function: Any) -> list[types.CodeType]:
    """Return the code of a function, and of the functions that it decorates."""
    inner = getattr(function, "__wrapped__", None)
    return [function.__code__, *(_codes(inner) if inspect.isfunction(inner) else [])]


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)


def _stored(code: types.CodeType) -> set[str]:
    return {step.argval for part in _parts(code) for step in dis.get_instructions(part) if step.opname in _STORES}


def _is_changed(steps: list[dis.Instruction], number: int) -> bool:
    """Return whether the content of what an instruction reads is changed: by a method, or by storing an item."""
    if steps[number].opname not in _READS:
        return False
    # How many values are on the stack from this one on; an item of it counts as itself. x[i] += y copies x and i.
    depth, is_next, copied = 1, True, False
    for step in steps[number + 1 :]:
        if is_next and step.opname in _METHODS:
            return step.argval in _CHANGING_METHODS
        copied = copied or (depth == 2 and step.opname in _COPIES)
        if step.opname in _STORES_ITEM and depth == 2 + copied:
            return True
        before, depth = depth, depth + dis.stack_effect(step.opcode, step.arg, jump=False)
        is_next = depth == 1 and before == 2 and step.opname in ("BINARY_SUBSCR", "BINARY_OP")
        if depth < 1 or (depth == 1 and not is_next):
            return False
    return False
