"""Which layers of a deep stack stand for a shallower one: of students that begin as them, and of layer maps."""

from __future__ import annotations

__all__ = ["evenly_spaced"]


def evenly_spaced(count: int, total: int) -> list[int]:
    r"""Return ``count`` of ``total`` layers at equal distances, numbered from 1, the last one always among them.

    .. math:: g(m) = \frac{m N}{M}, \quad m = 1 \ldots M

    with :math:`M` of :math:`N` layers, rounded to the nearest whole number (halves up) where M does not divide N. 12 to
    4 layers: 3, 6, 9, 12; 12 to 5 layers: 2, 5, 7, 10, 12.

    Args:
        count: how many, M, from 1 to ``total``.
        total: of how many, N.

    Reference:
        Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, sections 3.1 and 4.2; the rounding is ours.
    """
    return [(2 * m * total + count) // (2 * count) for m in range(1, count + 1)]
