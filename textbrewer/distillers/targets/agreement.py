"""The point of least norm in the convex hull of a few vectors, with capped weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Steps between two weights; a handful of vectors needs a few dozen.
_MOST_STEPS = 10_000


def least_norm_weights(gram: NDArray[Any], cap: float) -> NDArray[np.float64]:
    r"""Return the weights :math:`\arg\min_w \frac12 w^\top G w` with :math:`\sum_k w_k = 1`, :math:`0 \le w_k \le C`.

    Weight is moved between two vectors at a time, exactly as far as it helps, and each time between those two that
    promise most (sequential minimal optimisation, as for support vector machines), until no move helps.

    Args:
        gram: :math:`G`, the vectors' inner products, ``(K, K)``.
        cap: :math:`C`, at least 1/K.

    Returns:
        ``(K,)``; equal weights where the matrix is zero or not finite.

    Reference:
        Platt, "Sequential Minimal Optimization", 1998; the choice of the pair after Keerthi et al., 2001.
    """
    count = len(gram)
    weights = np.full(count, 1.0 / count)
    scale = float(np.trace(gram))
    if not np.isfinite(gram).all() or scale <= 0:
        return weights
    matrix = np.asarray(gram, dtype=np.float64) / scale
    for _ in range(_MOST_STEPS):
        slope = matrix @ weights
        rises = np.where(weights < cap, slope, np.inf)
        falls = np.where(weights > 0, slope, -np.inf)
        to, origin = int(rises.argmin()), int(falls.argmax())
        gain = slope[origin] - slope[to]
        if gain <= 1e-12:
            break
        curvature = matrix[to, to] + matrix[origin, origin] - 2 * matrix[to, origin]
        room = min(weights[origin], cap - weights[to])
        move = min(room, gain / curvature) if curvature > 0 else room
        weights[to] += move
        weights[origin] = 0.0 if move == weights[origin] else weights[origin] - move
        if move == room and weights[origin] > 0:
            weights[to] = cap
    return weights
