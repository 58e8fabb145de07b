"""Hidden states and other inner outputs of models that do not return them.

>>> inner = capture(student, {"hidden": ["encoder.layer.0", "encoder.layer.1"]}).attach()
>>> def adaptor(batch, outputs):
...     return {"logits": outputs.logits, **inner.views()}

Queries, keys, values and attention scores: :mod:`textbrewer.hooks.attention`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from textbrewer import checks

__all__ = ["Capture", "Tap", "capture", "first_tensor", "resolve"]

Select: TypeAlias = Callable[[Any], Tensor]


def resolve(model: nn.Module, name: str | nn.Module) -> nn.Module:
    """Return a module inside ``model`` by its dotted name.

    Args:
        model: where to look.
        name: dotted name as in ``model.named_modules()``, ``""`` for the model itself; a module that is inside
            ``model`` is returned as it is.

    Raises:
        KeyError: if there is no module of that name; the message has the nearest names.
        ValueError: if ``name`` is a module that is not inside ``model``.
        TypeError: if ``name`` is neither a string nor a module.
    """
    if isinstance(name, nn.Module):
        if all(module is not name for module in model.modules()):
            raise ValueError(
                f"a module must be inside the model, got a {type(name).__name__} that {_kind(model)} has not"
            )
        return name
    checks.is_a(name, str, "the name of a module", "a dotted name such as 'encoder.layer.0', or a module")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise KeyError(f"{_kind(model)} has no module {name!r}; {_nearest(name, modules)}")
    return modules[name]


def first_tensor(output: Any) -> Tensor:
    """Return a module's output if it is a tensor, else the first tensor in the tuple, list or dict it is.

    Raises:
        TypeError: if there is none.
    """
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in (output, *values):
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"an output to capture must be a tensor or hold one, got {type(output).__name__}; pass select=")


class Tap(NamedTuple):
    """One place to listen at: the outputs of ``module``, called ``name``, reduced by ``select`` to ``feature``."""

    feature: str
    name: str
    module: nn.Module
    select: Select = first_tensor


class Capture:
    """Collects the outputs of modules inside a model during each of its forward passes.

    Made by :func:`capture` or :func:`~textbrewer.hooks.attention.capture_qkv`. It listens from :meth:`attach` to
    :meth:`detach`, or inside ``with``, and holds the model's last forward pass only.

    - Nothing is detached or copied: what is captured carries its graph for the backward pass, and a model that changes
      an output in place changes what was captured.
    - A module that is called several times in one pass adds one tensor per call, in order; a module that a feature
      names several times (layers that are one shared module) is listened to once.
    - Calls outside a forward pass of the model are not captured: a part used on its own, or the recomputation of
      gradient checkpointing. With ``use_reentrant=True`` torch runs that pass without a graph, and what is captured
      has no gradient: choose False.
    - A copy or pickle of the model made meanwhile is not listened to.
    - Attach before the first pass of a model compiled by ``torch.compile``. Not for ``nn.DataParallel``, whose
      replicas share the hooks.

    Args:
        model: whose forward passes count, by calling it (not its ``forward``).
        taps: where to listen.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self._model = model
        distinct: dict[tuple[str, int], Tap] = {}
        for tap in taps:
            distinct.setdefault((tap.feature, id(tap.module)), tap)
        self._taps = list(distinct.values())
        self._calls: list[list[Any]] = [[] for _ in self._taps]
        self._handles: list[RemovableHandle] = []
        self._running = False

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    @property
    def outputs(self) -> dict[str, list[Tensor]]:
        """What the last forward pass has given so far: for each feature its tensors, in the order of its modules.

        Raises:
            TypeError: if something is selected that is no tensor.
        """
        collected: dict[str, list[Tensor]] = {tap.feature: [] for tap in self._taps}
        for tap, calls in zip(self._taps, self._calls, strict=True):
            for output in calls:
                tensor = tap.select(output)
                checks.is_a(tensor, Tensor, f"what is selected from the output of {tap.name!r}", "a tensor")
                collected[tap.feature].append(tensor)
        return collected

    def views(self) -> dict[str, list[Tensor]]:
        """Return :attr:`outputs`, checked to be complete, for use in an adaptor.

        Raises:
            RuntimeError: if a module was not called in the last forward pass, which would shift the layers.
        """
        for tap, calls in zip(self._taps, self._calls, strict=True):
            if not calls:
                state = "in the last forward pass of the model" if self.attached else "as the capture is not attached"
                raise RuntimeError(f"nothing was captured of {tap.name!r} (feature {tap.feature!r}) {state}")
        return self.outputs

    def attach(self) -> Capture:
        """Start listening; without effect where it listens already."""
        if not self._handles:
            self._handles.append(self._model.register_forward_pre_hook(_Hook(self._begin)))
            for tap, calls in zip(self._taps, self._calls, strict=True):
                self._handles.append(tap.module.register_forward_hook(_Hook(self._recorder(calls))))
            # After the taps, so that the model's own output can be captured; and after a pass that failed too.
            self._handles.append(self._model.register_forward_hook(_Hook(self._end), always_call=True))
        return self

    def detach(self) -> None:
        """Stop listening and remove every hook. What was captured stays until :meth:`clear`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running = False

    def clear(self) -> None:
        """Forget what was captured, which frees the memory of its graph."""
        for calls in self._calls:
            calls.clear()

    def __enter__(self) -> Capture:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _begin(self, *call: object) -> None:
        self.clear()
        self._running = True

    def _end(self, *call: object) -> None:
        self._running = False

    def _recorder(self, calls: list[Any]) -> Callable[..., None]:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            # Selected from when it is read: gradient checkpointing recomputes what the module does, and checks that it
            # saves as many tensors as before.
            if self._running:
                calls.append(output)

        return record


def capture(
    model: nn.Module,
    modules: Mapping[str, Sequence[str | nn.Module]],
    select: Select | Mapping[str, Select] | None = None,
) -> Capture:
    """Return a :class:`Capture` of the outputs of modules.

    Args:
        model: the model whose forward passes count.
        modules: for each feature (``"hidden"``, ``"attention"`` ...) its modules, by dotted name or themselves. A
            forward pass gives the feature's tensors in this order.
        select: function of a module's output that returns the tensor wanted, called when the capture is read; one for
            all features or a dict of them by feature. By default :func:`first_tensor`.

    Returns:
        A capture that does not listen yet: use it in ``with``, or call ``attach()``.

    Raises:
        KeyError: if a name is not in the model, or ``select`` names a feature that ``modules`` has not.
        ValueError: if there is nothing to capture, or a module is not inside the model.
        TypeError: if ``modules`` holds something else.
    """
    checks.is_a(modules, Mapping, "modules", "a dict from features to lists of modules")
    if isinstance(select, Mapping):
        checks.known_keys(select, modules, "select")
    taps = []
    for feature, names in modules.items():
        checks.is_a(names, (list, tuple), f"modules[{feature!r}]", "a list of dotted names or modules")
        if not names:
            raise ValueError(f"modules[{feature!r}] must name at least one module, got {names!r}")
        chosen = select.get(feature) if isinstance(select, Mapping) else select
        taps += [Tap(feature, label(model, name), resolve(model, name), chosen or first_tensor) for name in names]
    if not taps:
        raise ValueError(f"modules must name at least one module, got {modules!r}")
    return Capture(model, taps)


def label(model: nn.Module, name: str | nn.Module) -> str:
    """Return the dotted name of a module inside ``model``, given by its name or itself."""
    if isinstance(name, str):
        return name
    return next((dotted for dotted, module in model.named_modules() if module is name), type(name).__name__)


class _Hook:
    """A hook that does nothing in a copy of its module: what it writes to belongs to the original."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *call: object) -> None:
        self._function(*call)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[..., None]]]:
        return _Hook, (_nothing,)


def _nothing(*call: object) -> None:
    """Do nothing: the hook left in a copied module."""


def _kind(model: nn.Module) -> str:
    return f"the model ({type(model).__name__})"


def _nearest(name: str, known: Mapping[str, nn.Module]) -> str:
    """Return a hint: names that resemble ``name``, else what the longest part of it that exists has inside."""
    near = difflib.get_close_matches(name, list(known), n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    parts = name.split(".")
    start = next(".".join(parts[:end]) for end in range(len(parts), -1, -1) if ".".join(parts[:end]) in known)
    return f"{start or 'the model'!r} has: {', '.join(dict(known[start].named_children())) or 'nothing'}"
