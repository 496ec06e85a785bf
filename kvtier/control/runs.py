"""Blocks in runs, each block of a run being the parent of the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from kvtier.types import BlockKey


class Linked(Protocol):
    """A block and the one before it."""

    @property
    def key(self) -> BlockKey:
        """Its key."""

    @property
    def parent(self) -> BlockKey | None:
        """The key of the one before it."""


L = TypeVar("L", bound=Linked)


def runs_of(blocks: Iterable[L]) -> list[list[L]]:
    """The blocks, parents before their children, cut where one does not continue the one before it."""
    runs: list[list[L]] = []
    for block in blocks:
        if runs and runs[-1][-1].key == block.parent:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
