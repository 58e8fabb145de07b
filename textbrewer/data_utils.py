"""Random edits of a token sequence, to make more text for the teacher to label.

Each function takes one sequence (a list, a tuple or a one-dimensional array of tokens or token ids) and returns a new
one of the same kind; the sequence given is never changed. Without ``generator`` the numbers come from numpy's global
generator, so that ``numpy.random.seed`` repeats what TextBrewer drew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from textbrewer import checks

__all__ = ["deleting", "long_disorder", "masking", "n_gram_sampling", "short_disorder"]

Tokens = TypeVar("Tokens", bound="list[Any] | tuple[Any, ...] | NDArray[Any]")
Generator: TypeAlias = np.random.Generator | np.random.RandomState

# What happens to the tokens a b c, by the number drawn: kept, bac, cba, cab, bca.
_ORDERS = ((0,), (1, 0), (2, 1, 0), (2, 0, 1), (1, 2, 0))


def masking(tokens: Tokens, p: float = 0.1, mask: Any = "[MASK]", generator: Generator | None = None) -> Tokens:
    """Replace each token by ``mask`` with probability ``p``, independently.

    Args:
        tokens: one sequence of tokens or token ids.
        p: probability of replacing a token.
        mask: what replaces it: the mask token, or its id where ``tokens`` holds ids.
        generator: where the random numbers come from; numpy's global generator by default.

    Returns:
        New sequence of the same length and kind. An array of strings is widened where ``mask`` needs it.

    Raises:
        ValueError: if ``p`` is not a probability or ``tokens`` has more than one dimension.
        TypeError: if ``tokens`` is no sequence, or an array that cannot hold ``mask``.
    """
    length, probability = _length(tokens), _probability(p)
    chosen = _legacy_or_new(generator).random(length) < probability
    if isinstance(tokens, np.ndarray):
        if not length:
            return cast(Tokens, tokens.copy())
        outputs = tokens.astype(_dtype_with(tokens.dtype, mask))
        outputs[chosen] = mask
        return cast(Tokens, outputs)
    replaced = [mask if hit else token for token, hit in zip(tokens, chosen, strict=True)]
    return cast(Tokens, tuple(replaced) if isinstance(tokens, tuple) else replaced)


def deleting(tokens: Tokens, p: float = 0.1, generator: Generator | None = None) -> Tokens:
    """Delete each token with probability ``p``, independently.

    Args:
        tokens: one sequence of tokens or token ids.
        p: probability of deleting a token.
        generator: where the random numbers come from; numpy's global generator by default.

    Returns:
        New sequence of the same kind with the tokens that are left, which may be none.

    Raises:
        ValueError: if ``p`` is not a probability or ``tokens`` has more than one dimension.
        TypeError: if ``tokens`` is no sequence.
    """
    length, probability = _length(tokens), _probability(p)
    kept = _legacy_or_new(generator).binomial(1, 1 - probability, length)
    return _take(tokens, np.flatnonzero(kept))


def n_gram_sampling(
    tokens: Tokens,
    p_ng: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    l_ng: Sequence[int] = (1, 2, 3, 4, 5),
    generator: Generator | None = None,
) -> Tokens:
    """Return a random span of the tokens: its length drawn from ``l_ng``, its place uniformly.

    Args:
        tokens: one sequence of tokens or token ids.
        p_ng: probability of each length, summing to 1.
        l_ng: the lengths to draw from, at least 1 each.
        generator: where the random numbers come from; numpy's global generator by default.

    Returns:
        New sequence of the same kind with the tokens of the span: all of ``tokens`` where the length drawn is longer.

    Raises:
        ValueError: if ``p_ng`` is not a distribution over ``l_ng``, a length is below 1, or ``tokens`` has more than
            one dimension.
        TypeError: if ``tokens`` is no sequence.
    """
    available = _length(tokens)
    probabilities = _distribution(p_ng, len(l_ng), "p_ng", f"one for each length in l_ng, {list(l_ng)}")
    for length in l_ng:
        checks.integer(_plain(length), "each length in l_ng", minimum=1)
    random = _legacy_or_new(generator)
    span = min(int(random.choice(list(l_ng), p=probabilities)), available)
    integer = random.integers if isinstance(random, np.random.Generator) else random.randint
    start = int(integer(0, available - span + 1))
    return _take(tokens, range(start, start + span))


def short_disorder(
    tokens: Tokens, p: Sequence[float] = (0.9, 0.1, 0, 0, 0), generator: Generator | None = None
) -> Tokens:
    """Change the order of neighbouring tokens.

    From left to right, the tokens ``a b c`` from the present place on become, with the five probabilities of ``p``:
    ``abc`` (kept), ``bac``, ``cba``, ``cab``, ``bca``; what was moved is not moved again. Where only two tokens are
    left, each of the last four swaps them.

    Args:
        tokens: one sequence of tokens or token ids.
        p: the five probabilities, summing to 1.
        generator: where the random numbers come from; numpy's global generator by default.

    Returns:
        New sequence of the same length and kind.

    Raises:
        ValueError: if ``p`` is not a distribution over the five cases, or ``tokens`` has more than one dimension.
        TypeError: if ``tokens`` is no sequence.
    """
    length = _length(tokens)
    probabilities = _distribution(p, len(_ORDERS), "p", "for abc, bac, cba, cab, bca")
    random = _legacy_or_new(generator)
    order: list[int] = []
    while (place := len(order)) < length - 1:
        case = int(random.choice(len(_ORDERS), p=probabilities))
        moved = _ORDERS[1] if case and place == length - 2 else _ORDERS[case]
        order += [place + step for step in moved]
    order += range(len(order), length)
    return _take(tokens, order)


def long_disorder(tokens: Tokens, p: float = 0.1, length: float = 20, generator: Generator | None = None) -> Tokens:
    """Swap the two halves of spans of ``length`` tokens.

    From left to right, the span that starts at the present place is swapped with probability ``p``; a swapped span
    is not touched again. For example ``long_disorder(list(range(11)), p=1, length=0.4)`` returns
    ``[2, 3, 0, 1, 6, 7, 4, 5, 8, 9, 10]``.

    Args:
        tokens: one sequence of tokens or token ids.
        p: probability of swapping at a place.
        length: tokens in a span if at least 2; a share of the sequence, rounded down, if at most 1. An odd number of
            tokens is rounded up. Spans without a token, and spans longer than the sequence, swap nothing.
        generator: where the random numbers come from; numpy's global generator by default.

    Returns:
        New sequence of the same length and kind.

    Raises:
        ValueError: if ``p`` is not a probability, ``length`` is not positive or between 1 and 2, or ``tokens`` has
            more than one dimension.
        TypeError: if ``tokens`` is no sequence.
    """
    total, probability = _length(tokens), _probability(p)
    half = _half_span(total, _plain(length))
    random = _legacy_or_new(generator)
    order: list[int] = []
    while half and (place := len(order)) <= total - 2 * half:
        if random.random() < probability:
            order += [*range(place + half, place + 2 * half), *range(place, place + half)]
        else:
            order.append(place)
    order += range(len(order), total)
    return _take(tokens, order)


def _legacy_or_new(generator: Generator | None) -> Generator:
    """Return the generator to draw from; the module ``numpy.random`` has the methods of a RandomState."""
    if generator is None:
        return cast(np.random.RandomState, np.random)
    checks.is_a(generator, (np.random.Generator, np.random.RandomState), "generator", "a numpy generator")
    return generator


def _length(tokens: object) -> int:
    """Return the number of tokens of one sequence."""
    checks.is_a(tokens, (list, tuple, np.ndarray), "tokens", "a list, tuple or numpy array of tokens")
    if isinstance(tokens, np.ndarray) and tokens.ndim != 1:
        raise ValueError(f"tokens must be one sequence, got an array of shape {tokens.shape}; pass one row at a time")
    return len(cast(Sequence[object], tokens))


def _take(tokens: Tokens, order: Iterable[int]) -> Tokens:
    """Return the tokens at the places ``order``, as a new sequence of the same kind."""
    if isinstance(tokens, np.ndarray):
        return cast(Tokens, tokens[np.fromiter(order, dtype=np.intp)])
    taken = [tokens[place] for place in order]
    return cast(Tokens, tuple(taken) if isinstance(tokens, tuple) else taken)


def _plain(value: Any) -> Any:
    """Return a numpy scalar as the Python number it holds."""
    return value.item() if isinstance(value, np.generic) else value


def _probability(p: Any) -> float:
    """Return ``p``, checked to lie between 0 and 1."""
    value = _plain(p)
    checks.is_a(value, (int, float), "p", "a number")
    if not 0 <= value <= 1:
        raise ValueError(f"p must be a probability between 0 and 1, got {value!r}")
    return float(value)


def _distribution(p: Any, cases: int, name: str, which: str) -> NDArray[np.floating[Any]]:
    """Return ``cases`` probabilities that sum to 1, to the tolerance of numpy's ``choice``."""
    values = np.asarray(p)
    if values.shape != (cases,) or values.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be {cases} probabilities ({which}), got {p!r}")
    floats = values if values.dtype.kind == "f" else values.astype(np.float64)
    tolerance = max(float(np.finfo(floats.dtype).eps), float(np.finfo(np.float64).eps)) ** 0.5
    if not cases or not (floats >= 0).all() or not abs(math.fsum(floats.tolist()) - 1) <= tolerance:
        raise ValueError(f"{name} must be probabilities that are at least 0 and sum to 1, got {p!r}")
    return floats


def _half_span(total: int, length: Any) -> int:
    """Return half the number of tokens in a span of :func:`long_disorder`."""
    checks.number(length, "length", above=0)
    if 1 < length < 2:
        raise ValueError(f"length must be at most 1 (a share) or at least 2 (tokens), got {length!r}")
    return (int(total * length if length <= 1 else length) + 1) // 2


def _dtype_with(dtype: np.dtype[Any], mask: Any) -> np.dtype[Any]:
    """Return the dtype of an array of ``dtype`` that can hold ``mask`` too: longer strings, else the same."""
    value = np.asarray(mask)
    if dtype.kind == "O":
        return dtype
    if dtype.kind in "US" and value.dtype.kind == dtype.kind:
        return np.promote_types(dtype, value.dtype)
    numbers = dtype.kind in "iuf" and value.dtype.kind in "iuf" and value.ndim == 0
    if not numbers or (dtype.kind in "iu" and value.astype(dtype) != value):
        raise TypeError(f"mask must be a value that an array of {dtype} can hold, got {mask!r}; pass the mask's id")
    return dtype
