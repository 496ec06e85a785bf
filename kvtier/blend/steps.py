"""Work in steps: a computation that can be left alone between two layers, and gone on with later."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[int, None, T]
"""yields behind each layer how many token-layers it has computed since the last time; returns what came of it"""


def finish(steps: Generator[Any, Any, T]) -> T:
    """Does all of it that is left, and returns what came of it."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
