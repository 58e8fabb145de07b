"""Numbers of bytes, read and said."""

from __future__ import annotations

import re

from textbrewer import checks

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes, of a number or a text such as ``"20GB"`` (powers of ten).

    Raises:
        TypeError, ValueError: if it is neither, or not positive.
    """
    checks.is_a(size, (int, str), "max_bytes", "a number of bytes, or a text such as '20GB'")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?B?)\s*", size.upper())
        if match is None:
            raise ValueError(f"max_bytes must be a number of bytes, or a text such as '500MB' or '20GB', got {size!r}")
        number, unit = match.groups()
        size = int(float(number) * _UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"])
    checks.integer(size, "max_bytes", minimum=1)
    return int(size)


def in_bytes(count: float) -> str:
    """Return a number of bytes as a reader would say it."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
