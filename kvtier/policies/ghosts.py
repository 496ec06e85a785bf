"""Ghosts: what ``hazard`` remembers of blocks that are not here, by pieces of prompts.

What leaves together, and what is turned away together, is a piece of one prompt. It comes back, if at all, from its first block on,
because a prompt can only be used from its beginning. So a piece is found by its first key, and how much of it is meant is seen by
comparing the others: sixteen bytes a block, exact, and one look-up a piece.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from kvtier.policies.segments import Segment
from kvtier.types import KEY_BYTES, BlockKey

MIN_BYTES = 8 << 20
BYTES_PER_BLOCK = 64
"""how much is remembered: at least so many bytes for each block of the tier"""
PIECE_BYTES = 320
"""what a piece costs besides its keys"""
MAX_MERGED = 256
"""pieces of up to so many blocks take in what was before them in the prompt; longer ones would be copied too often"""

L = TypeVar("L")


class Known(NamedTuple, Generic[L]):
    """What is remembered of some blocks in a row. ``segment`` None: nothing."""

    segment: Segment[L] | None
    num_blocks: int
    had_child: bool
    """some prompt went on behind the last of them"""


class _Piece(Generic[L]):
    """Blocks in a row of one segment."""

    __slots__ = ("data", "had_child", "segment")

    def __init__(self, data: bytes, segment: Segment[L], had_child: bool) -> None:
        self.data = data
        """their keys"""
        self.segment = segment
        self.had_child = had_child


class Ghosts(Generic[L]):
    """The pieces, the oldest of which are forgotten where they become too many. Pure."""

    __slots__ = ("_max_bytes", "_num_bytes", "_pieces")

    def __init__(self) -> None:
        self._pieces: OrderedDict[BlockKey, _Piece[L]] = OrderedDict()
        self._num_bytes = 0
        self._max_bytes = MIN_BYTES

    def resize(self, num_blocks: int) -> None:
        """The tier holds so many blocks. What is remembered only grows."""
        self._max_bytes = max(self._max_bytes, num_blocks * BYTES_PER_BLOCK)

    def put(self, keys: Sequence[BlockKey], segment: Segment[L], *, had_child: bool, following: BlockKey | None = None) -> None:
        """Remembers blocks in a row, at least one. ``had_child``: some prompt went on behind the last of them; ``following``: the block
        that was behind it and left before, if it did."""
        for key in keys:
            if key in self._pieces:
                self._forget(key)
        data = b"".join(keys)
        after = None if following is None else self._pieces.get(following)
        if after is not None and following is not None and after.segment is segment and len(after.data) <= MAX_MERGED * KEY_BYTES:
            self._take(following)
            data, had_child = data + after.data, after.had_child
        self._keep(_Piece(data, segment, had_child))
        while self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._pieces)))

    def take(self, keys: Sequence[BlockKey]) -> list[Known[L]]:
        """Forgets what is remembered of blocks in a row and returns it, in their order."""
        found: list[Known[L]] = []
        pieces = self._pieces
        unknown = position = 0
        while position < len(keys):
            key = keys[position]
            if key not in pieces:
                unknown += 1
                position += 1
                continue
            if unknown:
                found.append(Known(None, unknown, False))
                unknown = 0
            piece = self._take(key)
            length = len(piece.data) // KEY_BYTES
            count = _num_common(piece.data, keys[position : position + length])
            if is_part := count < length:
                self._keep(_Piece(piece.data[count * KEY_BYTES :], piece.segment, piece.had_child))
            position += count
            if found and found[-1].segment is piece.segment:
                count += found.pop().num_blocks
            found.append(Known(piece.segment, count, piece.had_child or is_part))
        if unknown:
            found.append(Known(None, unknown, False))
        return found

    def _keep(self, piece: _Piece[L]) -> None:
        key = BlockKey(piece.data[:KEY_BYTES])
        self._forget(key)
        self._pieces[key] = piece
        self._num_bytes += len(piece.data) + PIECE_BYTES

    def _take(self, key: BlockKey) -> _Piece[L]:
        piece = self._pieces.pop(key)
        self._num_bytes -= len(piece.data) + PIECE_BYTES
        return piece

    def _forget(self, key: BlockKey) -> None:
        if key in self._pieces:
            piece = self._take(key)
            piece.segment.forget(len(piece.data) // KEY_BYTES)


def _num_common(data: bytes, keys: Sequence[BlockKey]) -> int:
    """How many leading keys are those of a piece; at least the first is."""
    mine = b"".join(keys)
    if data.startswith(mine):
        return len(keys)
    low, high = 1, len(keys) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if data.startswith(mine[: middle * KEY_BYTES]):
            low = middle
        else:
            high = middle - 1
    return low
