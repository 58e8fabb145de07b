"""Queries, keys, values and attention scores that matches name, heard inside models that do not return them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor, auto_adaptor
from textbrewer.configurations import TrainingConfig
from textbrewer.hooks import Capture, attention_modules, resolve
from textbrewer.hooks.attention import qkv_tap
from textbrewer.hooks.own_scores import left_out, own_scores, position_tap
from textbrewer.losses.masking import full_precision
from textbrewer.matching import PlannedMatch
from textbrewer.teacher_cache.contents import layers_of, resolved

__all__ = ["InnerFeatures", "asked_of_student", "asked_of_teachers", "listening_inside"]

Layers = dict[str, set[int]]
"""Numbers of layers by feature; negative ones count from the end."""

_PARTS = {"query": ("query",), "key": ("key",), "value": ("value",), "scores": ("query", "key")}


class InnerFeatures:
    """Adds features of self-attention to what a model returns, where ``adaptor="auto"`` reads them.

    Lists as long as the model has layers, ``None`` for those that nobody asked for: nothing is computed for these.
    Scores have the module's own scale, and the rotation (Llama) or bias (T5) where it is known how the module applies
    it; where it is not, a warning says so.

    Args:
        model: a model whose outputs are dicts, as those of transformers are.
        layers: what is asked for.

    Raises:
        ValueError, KeyError: if its self-attention is not found, or has no projections of the usual names.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Iterable[int]]) -> None:
        self.model, self.layers = model, {feature: set(numbers) for feature, numbers in layers.items()}
        self.modules = attention_modules(model)
        self._attention = [resolve(model, name) for name in self.modules]
        self._position = position_tap(model, self._attention[0]) is not None
        if "scores" in self.layers:
            _tell_of_what_is_left_out(model, self._attention[0])
        heard: dict[str, Any] = {}
        for feature, numbers in self.layers.items():
            # The only one may be run several times, a layer each time: then all that it says is kept.
            places = {0} if len(self.modules) == 1 else resolved(numbers, len(self.modules))
            for place in sorted(places):
                for part in self._parts(feature):
                    name, attention = f"{part}/{place}", self._attention[place]
                    tap = position_tap(model, attention) if part == "position" else qkv_tap(model, attention, part)
                    heard[name] = None if tap is None else tap._replace(feature=name)
        self._capture = Capture(model, [tap for tap in heard.values() if tap is not None])

    def _parts(self, feature: str) -> tuple[str, ...]:
        return (*_PARTS[feature], "position") if feature == "scores" and self._position else _PARTS[feature]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen while the context is open."""
        with self._capture:
            # After the capture's own, so that a forward pass is complete when it is read.
            handle = self.model.register_forward_hook(self._add)
            try:
                yield
            finally:
                handle.remove()
                self._capture.clear()

    def _add(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, dict):
            for feature, tensors in self.read().items():
                outputs[feature] = tensors
        self._capture.clear()

    def read(self) -> dict[str, list[Tensor | None]]:
        """Return the features of the last forward pass, one entry a layer.

        Raises:
            ValueError: if one of several modules ran more than once, so that it is not known which layer is which.
        """
        outputs = self._capture.outputs
        if len(self.modules) == 1:
            said = {name.partition("/")[0]: calls for name, calls in outputs.items()}
            count = max(map(len, said.values()), default=0)
            parts = {(part, layer): call for part, calls in said.items() for layer, call in enumerate(calls)}
        else:
            often = [name for name, calls in outputs.items() if len(calls) > 1]
            if often:
                raise ValueError(
                    f"{type(self.model).__name__} runs {self.modules[int(often[0].partition('/')[2])]!r} several times "
                    "in a forward pass and has others beside it, so which layer is which is not known; capture them "
                    "with textbrewer.hooks.capture_qkv, and return them from an adaptor of your own"
                )
            count = len(self.modules)
            named = ((name.partition("/"), calls) for name, calls in outputs.items())
            parts = {(part, int(place)): calls[0] for (part, _, place), calls in named if calls}
        return {feature: self._layers(feature, parts, count) for feature in self.layers}

    def _layers(self, feature: str, parts: Mapping[tuple[str, int], Tensor], count: int) -> list[Tensor | None]:
        # A teacher that stops early runs some of its modules only: the others have no entry among the parts.
        there = {
            number
            for number in resolved(self.layers[feature], count)
            if all((part, number) in parts for part in self._parts(feature))
        }
        # The only module is that of every layer.
        attention = self._attention * count if len(self.modules) == 1 else self._attention
        return [
            _value([parts[part, number] for part in self._parts(feature)], attention[number])
            if number in there
            else None
            for number in range(count)
        ]


def _value(parts: Sequence[Tensor], attention: nn.Module) -> Tensor:
    """Return a feature of one layer, by its parts: itself, or the scores of queries and keys."""
    if len(parts) == 1:
        return parts[0]
    parts = full_precision(*parts)
    with torch.autocast(device_type=parts[0].device.type, enabled=False):
        return own_scores(attention, *parts)


def _tell_of_what_is_left_out(model: nn.Module, attention: nn.Module) -> None:
    if what := left_out(model, attention):
        checks.warn(
            f"matches of 'scores': those heard in {type(model).__name__} are products of its projected queries and "
            f"keys without {what}, so they are not its own scores. For these load it with "
            "attn_implementation='eager' and return the logarithm of its attention maps as 'scores' from an adaptor "
            "of your own (docs/matching.md), or match without 'scores' (attention=False in recipes that have it)"
        )


def asked_of_student(
    model: nn.Module, adaptors: Iterable[Adaptor], plan: Sequence[PlannedMatch]
) -> list[InnerFeatures]:
    """Return what to listen for in the student: nothing unless an adaptor is ``"auto"`` and a match names a feature.

    Args:
        model: the student.
        adaptors: its adaptors.
        plan: the intermediate matches of all tasks.
    """
    layers = (
        {}
        if auto_adaptor not in list(adaptors)
        else _named([(item.match.feature, item.match.layer_S) for item in plan])
    )
    return [InnerFeatures(model, layers)] if layers else []


def asked_of_teachers(
    models: Mapping[str, Sequence[nn.Module | None]],
    adaptors: Mapping[str, Sequence[Adaptor]],
    plans: Mapping[str, Sequence[PlannedMatch]],
) -> list[InnerFeatures]:
    """Return what to listen for in each teacher, likewise.

    Args:
        models: the teachers of each task.
        adaptors: theirs.
        plans: the intermediate matches of each task.
    """
    asked: dict[nn.Module, Layers] = {}
    for task, teachers in models.items():
        for number, model in enumerate(teachers):
            if model is None or adaptors[task][number] is not auto_adaptor:
                continue
            matches = [item.match for item in plans[task] if item.match.teacher == number]
            for feature, layers in _named([(match.feature, layers_of(match)) for match in matches]).items():
                asked.setdefault(model, {}).setdefault(feature, set()).update(layers)
    return [InnerFeatures(model, layers) for model, layers in asked.items()]


def _named(pairs: Iterable[tuple[str, int | list[int]]]) -> Layers:
    """Return the layers of inner features that matches name."""
    layers: Layers = {}
    for feature, numbers in pairs:
        if feature in _PARTS:
            layers.setdefault(feature, set()).update(numbers if isinstance(numbers, list) else [numbers])
    return layers


@contextmanager
def listening_inside(inner: Sequence[InnerFeatures], who: str, config: TrainingConfig) -> Iterator[None]:
    """Listen inside models while the context is open.

    Args:
        inner: what to listen for, in each model; none for no change.
        who: ``"teacher"`` or ``"student"``.
        config: how the training runs.

    Raises:
        ValueError: if the models are to be compiled or copied to several GPUs, where nothing can be heard inside.
    """
    if inner:
        features = " and ".join(sorted({feature for item in inner for feature in item.layers}))
        if config.compiles(who):
            other = "student" if who == "teacher" else "teacher"
            raise ValueError(
                f"compile={config.compile!r} and matches of {features} exclude each other: they listen to modules "
                f"inside the {who}, which a compiled model no longer calls one by one; use compile=False, "
                f"or compile={other!r} if that side's adaptor is your own"
            )
        if who == "student" and config.data_parallel:
            raise ValueError(
                f"data_parallel=True and matches of {features} exclude each other: they listen to modules inside the "
                "student, and its copies on several GPUs would all be heard at once; launch one process a GPU instead"
            )
    with ExitStack() as stack:
        for item in inner:
            stack.enter_context(item.attached())
        yield
