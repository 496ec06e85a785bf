"""Sizes and durations as people write them: ``8GiB``, ``500MB``, ``30s``, ``2h``. Exact in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "PiB": 1 << 50,
}
"""Unit -> bytes."""

DURATION_UNITS: Mapping[str, Fraction] = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
"""Unit -> seconds."""

MAX_SIZE_BYTES = (1 << 63) - 1
MAX_DURATION_S = 3_155_760_000
"""a hundred years"""

_QUANTITY = re.compile(r"([-+]?[0-9]{1,30}(?:\.[0-9]{1,400})?)[ ]?([A-Za-z]*)", re.ASCII)
_SIZE_EXAMPLES = "8GiB, 500MB, or a whole number of bytes"
_DURATION_EXAMPLES = "30s, 5min, 2h, or a number of seconds"


def parse_size(value: object) -> int:
    """The number of bytes that a size such as ``8GiB`` or a whole number means.

    Raises:
        ValueError: it is no size, is negative, is not a whole number of bytes, or is beyond 8 EiB.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        num_bytes = Fraction(value)
    elif isinstance(value, str):
        num_bytes = _parse(value, SIZE_UNITS, "B", f"not a size; write {_SIZE_EXAMPLES}")
    else:
        raise ValueError(f"not a size; write {_SIZE_EXAMPLES}")  # noqa: TRY004 - what a user wrote is wrong, not the call
    if num_bytes.denominator != 1:
        raise ValueError("not a whole number of bytes")
    if not 0 <= num_bytes <= MAX_SIZE_BYTES:
        raise ValueError("a size must not be negative" if num_bytes < 0 else "too large: sizes end below 8EiB")
    return int(num_bytes)


def parse_duration(value: object) -> float:
    """The number of seconds that a duration such as ``5min`` or a number means.

    Raises:
        ValueError: it is no duration, is negative, not finite, or longer than a hundred years.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        seconds = Fraction(value)
    elif isinstance(value, str):
        seconds = _parse(value, DURATION_UNITS, "s", f"not a duration; write {_DURATION_EXAMPLES}")
    else:
        raise ValueError(f"not a duration; write {_DURATION_EXAMPLES}")
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError("a duration must not be negative" if seconds < 0 else "too long: durations end at a hundred years")
    return float(seconds)


def format_size(num_bytes: int) -> str:
    """The shortest exact way to write a size: ``format_size(8 << 30) == "8GiB"``. :func:`parse_size` reads it back."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB", "PB", "TB", "GB", "MB"):
        if num_bytes and num_bytes % SIZE_UNITS[unit] == 0:
            return f"{num_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{num_bytes}B"


def format_duration(duration_s: float) -> str:
    """The shortest exact way to write a duration: ``format_duration(300.0) == "5min"``. :func:`parse_duration` reads it back."""
    for unit in ("d", "h", "min"):
        count = Fraction(duration_s) / DURATION_UNITS[unit]
        if count and count.denominator == 1:
            return f"{count}{unit}"
    if duration_s == int(duration_s):
        return f"{int(duration_s)}s"
    return f"{Decimal(repr(duration_s)):f}s"


def _parse(text: str, units: Mapping[str, int] | Mapping[str, Fraction], bare: str, complaint: str) -> Fraction:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(complaint)
    number, unit = match.groups()
    scale = units.get(unit or bare)
    if scale is None:
        alike = [name for name in units if name.lower() == unit.lower() or name[0].lower() == unit.lower()]
        hint = f"; did you mean {' or '.join(number + name for name in alike)}?" if alike else ""
        raise ValueError(f"{unit} is not a unit{hint or '; ' + complaint.partition('; ')[2]}")
    return Fraction(number) * scale
