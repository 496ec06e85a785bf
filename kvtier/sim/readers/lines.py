"""What the readers of JSON lines share: reading line by line, and saying what is wrong with one."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from kvtier.errors import TraceError

MAX_TOKENS = 1 << 40
"""a request with more tokens is a mistake"""
_SHOWN = 60


class BadLineError(ValueError):
    """What was expected of a line. For the loop of :func:`read_lines`, which adds file and number."""


def open_file(path: Path) -> IO[bytes]:
    """The file for reading, unpacked where its name ends in ``.gz``. Raises TraceError where that cannot be."""
    try:
        return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, take: Callable[[Any], None], *, skip_bad: bool, first_line: int = 1) -> int:
    """Hands the JSON value of each line to ``take``; empty lines are fine. Returns how many broken lines were skipped.

    Raises:
        TraceError: the file cannot be read, or a line is broken (without ``skip_bad``): names file, line and what was expected.
    """
    num_skipped = 0
    for number, line in numbered_lines(path):
        if number < first_line or not line.strip():
            continue
        try:
            take(parse(line))
        except BadLineError as error:
            if not skip_bad:
                raise TraceError(f"{path}:{number}: {error}") from None
            num_skipped += 1
    return num_skipped


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1. Raises TraceError where reading fails."""
    with open_file(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (OSError, EOFError) as error:
            raise TraceError(f"{path}:{number + 1}: cannot be read: {error}") from None


def parse(line: bytes) -> Any:
    """The JSON value of a line. Raises BadLineError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"expected a JSON value, found {_shown(line.decode('utf-8', 'replace').strip())} ({error})") from None


def an_object(value: Any) -> dict[str, Any]:
    """The value as an object. Raises BadLineError."""
    if not isinstance(value, dict):
        raise BadLineError(f"expected a JSON object, found {_shown(value)}")
    return value


def number_of(record: dict[str, Any], name: str, *, low: float = 0.0, default: float | None = None) -> float:
    """A finite number of at least ``low``. Raises BadLineError."""
    value = record.get(name, default)
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < low:
        raise BadLineError(f"expected `{name}` to be a number of at least {low:g}, found {_found(record, name)}")
    return number


def count_of(record: dict[str, Any], name: str, *, low: int = 0, default: int | None = None) -> int:
    """A whole number of at least ``low`` and of at most ``MAX_TOKENS``. Raises BadLineError."""
    value = record.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_TOKENS:
        raise BadLineError(f"expected `{name}` to be a whole number of at least {low}, found {_found(record, name)}")
    return value


def ids_of(record: dict[str, Any], name: str, *, texts: bool = False) -> list[Any]:
    """A list of whole numbers (``texts``: or of texts). Raises BadLineError."""
    value = record.get(name)
    kinds = (int, str) if texts else (int,)
    if not isinstance(value, list) or not all(isinstance(item, kinds) and not isinstance(item, bool) for item in value):
        what = "whole numbers or texts" if texts else "whole numbers"
        raise BadLineError(f"expected `{name}` to be a list of {what}, found {_found(record, name)}")
    return value


def _found(record: dict[str, Any], name: str) -> str:
    return _shown(record[name]) if name in record else "no such field"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
