"""Moving a prefix between host memory and a lower tier: copy first, and drop the source only of what has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.control.books import Books
from kvtier.control.index import Entry, children_of
from kvtier.control.operations import HOST_TIER, Operations
from kvtier.control.promotion import Promoter
from kvtier.types import BlockKey


@dataclass(slots=True)
class Move:
    """A move and how far it is. Read it at any time; only the planner changes it."""

    keys: tuple[BlockKey, ...]
    """what the source held of the prefix and of what continues it, children before their parents"""
    prefix: tuple[BlockKey, ...]
    source: int
    target: int
    copied_blocks: int = 0
    """blocks of ``keys`` that the target holds"""
    moved_blocks: int = 0
    """blocks that have left the source, once ``is_done``"""
    is_done: bool = False


class Mover:
    """Open moves. Pure: ``step`` looks at what the tiers hold."""

    def __init__(self, books: Books, operations: Operations, promoter: Promoter) -> None:
        self._books = books
        self._operations = operations
        self._promoter = promoter
        self._open: list[Move] = []

    def start(self, keys: Sequence[BlockKey], source: int, target: int, now: float) -> Move:
        """See :meth:`Planner.move`."""
        index = self._books.index
        named = [entry for key in keys if (entry := index.get(key)) is not None]
        behind = index.subtree(named[-1])[:-1] if named and named[-1].key == keys[-1] else []
        here = tuple(entry.key for entry in (*behind, *reversed(named)) if entry.readable & 1 << source)
        move = Move(here, tuple(keys), source, target)
        self._open.append(move)
        self._copy(move, now)
        self._look(move, now)
        return move

    def cancel(self, move: Move) -> None:
        """Ends a move where it is: what was copied stays in both tiers. One that is done is fine."""
        self._end(move)

    def step(self, now: float) -> None:
        """Ends the moves whose copies are done."""
        for move in list(self._open):
            self._look(move, now)

    def _look(self, move: Move, now: float) -> None:
        entries = [entry for key in move.keys if (entry := self._books.index.get(key)) is not None]
        copied = sum(1 for entry in entries if entry.readable & 1 << move.target)
        has_grown = copied > move.copied_blocks
        move.copied_blocks = copied
        if self._is_pending(move, entries):
            return
        if move.target == HOST_TIER and copied < len(entries) and has_grown:
            # slots were still in use by other copies; there may be more now
            self._copy(move, now)
            if self._is_pending(move, entries):
                return
        move.moved_blocks = len(self._operations.drop(move.prefix, move.source, 1 << move.target))
        self._books.stats.add("control.moved_blocks", move.moved_blocks)
        self._end(move)

    def _copy(self, move: Move, now: float) -> None:
        entries = [entry for key in reversed(move.keys) if (entry := self._books.index.get(key)) is not None]
        if move.target == HOST_TIER:
            for entry in entries:
                if entry is entries[-1] or not children_of(entry):
                    self._promoter.promote(self._chain(entry), now)
            return
        tier = self._books.lower[move.target - 1]
        for entry in entries:
            if not (entry.readable | entry.busy) & tier.bit:
                tier.write_soon(entry.key)

    def _chain(self, entry: Entry) -> list[BlockKey]:
        """The keys from the beginning of a prompt to a block."""
        chain = [entry.key]
        while entry.parent is not None and (parent := self._books.index.get(entry.parent)) is not None:
            entry = parent
            chain.append(entry.key)
        return chain[::-1]

    def _is_pending(self, move: Move, entries: Sequence[Entry]) -> bool:
        if any(entry.busy & 1 << move.target for entry in entries):
            return True
        if move.target == HOST_TIER:
            return False
        tier = self._books.lower[move.target - 1]
        return tier.online and any(tier.is_waiting_for(key) for key in move.keys)

    def _end(self, move: Move) -> None:
        if not move.is_done:
            move.is_done = True
            self._open.remove(move)

    def __len__(self) -> int:
        return len(self._open)
