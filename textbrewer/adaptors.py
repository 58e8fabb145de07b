"""What a model's outputs mean: the views that losses read, and the ready-made adaptor for transformers models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from textbrewer import checks

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "Adaptor",
    "Views",
    "auto_adaptor",
    "auto_arguments",
    "normalise",
    "one_each",
    "resolve",
]

FEATURES = ["hidden", "attention", "query", "key", "value", "scores"]
"""Features of intermediate layers that an adaptor may return and a match may name."""

ADAPTOR_KEYS = ["logits", "logits_mask", "losses", "inputs_mask", "labels", *FEATURES]
"""Keys of the dict that an adaptor may return."""

Adaptor = Callable[[Any, Any], Mapping[str, Any]]
"""``adaptor(batch, model_outputs)``: returns a dict with some of :data:`ADAPTOR_KEYS`."""

_LISTS = ("logits", "logits_mask", "losses", "labels")
IGNORED_LABEL = -100


class Views(dict[str, Any]):
    """An adaptor's dict in its normal form, which ``compute_loss`` receives.

    Args:
        entries: keys of :data:`ADAPTOR_KEYS`. ``logits``, ``logits_mask``, ``losses`` and ``labels`` are lists of
            tensors (one a prediction head), those of :data:`FEATURES` sequences of tensors (one a layer),
            ``inputs_mask`` a tensor ``(batch, length)``.
        projected: the student's features after their projection, by the number of the match.
        captured: outputs of modules named by custom matches, by the number of the custom match.

    ``reduced`` holds teacher features in the smaller form that a loss also takes, by the number of the match;
    ``learned`` what a distiller learns beside the student, such as the weights of several teachers.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        projected: Mapping[int, Any] | None = None,
        captured: Mapping[int, Any] | None = None,
    ) -> None:
        super().__init__(entries)
        self.projected = dict(projected or {})
        self.captured = dict(captured or {})
        self.reduced: dict[int, Any] = {}
        self.learned: Any = None


def normalise(results: Any, who: str = "adaptor") -> dict[str, Any]:
    """Return an adaptor's result with single tensors as lists and entries that are ``None`` or empty left out.

    Args:
        results: what the adaptor returned.
        who: the argument it came from, for messages.

    Raises:
        TypeError: if it is not a dict, or an entry is of another kind than its key says.
        KeyError: if it has an unknown key; the message names the nearest known one.
    """
    if not isinstance(results, Mapping):
        raise TypeError(f"{who} must return a dict with keys of {ADAPTOR_KEYS}, got {type(results).__name__}")
    if not results.keys() <= _KNOWN:
        checks.known_keys(results, [*ADAPTOR_KEYS, *_extra_keys()], f"the dict returned by {who}")
    views: dict[str, Any] = {}
    for key, value in results.items():
        if value is None:
            continue
        if key in _LISTS:
            value = list(value) if isinstance(value, (list, tuple)) else [value]
            if not value:
                continue
            for item in value:
                if not isinstance(item, Tensor):
                    raise TypeError(f"{who}: {key!r} must be a tensor or a list of tensors, got {type(item).__name__}")
        elif key == "inputs_mask":
            if not isinstance(value, Tensor):
                raise TypeError(f"{who}: 'inputs_mask' must be a tensor (batch, length), got {type(value).__name__}")
        elif not isinstance(value, (Sequence, Tensor)):
            raise TypeError(f"{who}: {key!r} must be a list of tensors, one a layer, got {type(value).__name__}")
        views[key] = value
    return views


_KNOWN = set(ADAPTOR_KEYS)


def _extra_keys() -> list[str]:
    """Features that a user appended to :data:`FEATURES` after import."""
    return [name for name in FEATURES if name not in ADAPTOR_KEYS]


def resolve(adaptor: Adaptor | str, name: str) -> Adaptor:
    """Return the adaptor itself, or the ready-made one for ``"auto"``.

    Raises:
        TypeError: if it is neither a function nor ``"auto"``.
    """
    if isinstance(adaptor, str) and adaptor == "auto":
        return auto_adaptor
    if not callable(adaptor):
        raise TypeError(f'{name} must be a function (batch, model_outputs) -> dict, or "auto", got {adaptor!r}')
    return adaptor


def one_each(given: Adaptor | str | Sequence[Adaptor | str], count: int, name: str, whose: str) -> list[Adaptor | str]:
    """Return an adaptor for each of several models, of one for all of them or a list.

    Args:
        given: one adaptor, or a list of them.
        count: how many models there are.
        name: the argument's name.
        whose: what the models are, for the message.

    Raises:
        ValueError: if there are not as many as models.
    """
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if len(several) != count:
        raise ValueError(f"{name} must be one adaptor, or one a {whose} ({count}), got {len(several)}")
    return several


def auto_arguments(adaptor: object, features: set[str]) -> dict[str, bool]:
    """Return the model arguments by which a transformers model returns ``features`` (none for a user's adaptor)."""
    if adaptor is not auto_adaptor:
        return {}
    arguments = {"hidden": "output_hidden_states", "attention": "output_attentions"}
    return {arguments[feature]: True for feature in sorted(features) if feature in arguments}


def auto_adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
    """Read the outputs of a transformers model.

    Understands sequence and token classification, question answering (two heads: start and end), masked,
    causal and sequence-to-sequence language models, by the fields of the output:

    - ``logits``: the logits, ``(batch, classes)`` or ``(batch, length, classes)``; start and end logits
      ``(batch, length)`` as two heads;
    - ``logits_mask`` (3-D logits only): positions with a label other than -100; without labels, positions that are
      not padding. For causal models the labels are those of the next token, and the last position does not count;
    - ``losses``: the model's own loss, where the batch has labels;
    - ``hidden``, ``attention``: ``hidden_states`` (0 is the embedding) and ``attentions``; of a
      sequence-to-sequence model those of the decoder;
    - ``inputs_mask``: the attention mask; of a sequence-to-sequence model the positions with a label.

    Queries, keys, values and attention scores are no outputs of these models: where a match names ``query``, ``key``,
    ``value`` or ``scores``, the distiller listens inside the model (:func:`textbrewer.hooks.attention_modules`) and
    adds the layers that matches name, block 0 first.

    Args:
        batch: the batch the model was called with, a dict.
        outputs: the model's output.

    Returns:
        A dict as an adaptor returns it.

    Raises:
        TypeError: if the output is not a transformers ``ModelOutput`` or the batch not a dict.
    """
    if not isinstance(batch, Mapping) or not isinstance(outputs, Mapping):
        raise TypeError(
            'adaptor="auto" reads dict batches and the outputs of transformers models, '
            f"got a batch of type {type(batch).__name__} and outputs of type {type(outputs).__name__}; "
            "pass a function (batch, model_outputs) -> dict instead"
        )
    kind = type(outputs).__name__
    if "start_logits" in outputs:
        return _question_answering(batch, outputs)
    views: dict[str, Any] = {"losses": outputs.get("loss"), "logits": outputs.get("logits")}
    labels = batch.get("labels")
    seq2seq = kind.startswith("Seq2Seq") and views["logits"] is not None and views["logits"].dim() == 3
    inputs_mask = None if seq2seq else batch.get("attention_mask")
    if "CausalLM" in kind:
        labels = None if labels is None else _next(labels, IGNORED_LABEL)
        position_mask = None if inputs_mask is None else _next(inputs_mask, 0)
        if position_mask is None and labels is None and views["logits"] is not None:
            position_mask = _next(torch.ones(views["logits"].shape[:2], device=views["logits"].device), 0)
    else:
        position_mask = inputs_mask
    if views["logits"] is not None and views["logits"].dim() == 3:
        views["logits_mask"] = position_mask if labels is None else labels != IGNORED_LABEL
    views["labels"] = labels
    views |= _features(outputs)
    views["inputs_mask"] = (labels != IGNORED_LABEL) if seq2seq and labels is not None else inputs_mask
    return views


def _question_answering(batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Start and end logits as two heads; a position past the end means "no answer here" and is ignored."""
    labels = None
    if batch.get("start_positions") is not None and batch.get("end_positions") is not None:
        length = outputs["start_logits"].shape[-1]
        labels = [
            torch.where(positions < length, positions, IGNORED_LABEL)
            for positions in (batch["start_positions"], batch["end_positions"])
        ]
    return {
        "logits": [outputs["start_logits"], outputs["end_logits"]],
        "losses": outputs.get("loss"),
        "labels": labels,
        "inputs_mask": batch.get("attention_mask"),
        **_features(outputs),
    }


def _features(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features of layers, of a model with encoder and decoder those of the decoder."""
    return {
        "hidden": outputs.get("hidden_states", outputs.get("decoder_hidden_states")),
        "attention": outputs.get("attentions", outputs.get("decoder_attentions")),
        **{name: outputs[name] for name in ("query", "key", "value", "scores") if name in outputs},
    }


def _next(values: Tensor, last: int) -> Tensor:
    """Return the values of the following position, ``last`` after the end: a causal model predicts the next token."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)
