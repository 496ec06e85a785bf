"""Segments: runs of blocks of one prompt that were last used together, the unit in which ``hazard`` keeps its books.

All blocks of a segment have their last use, their count and their gap in common, so the books cost a few entries a request
instead of one a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import sqrt
from typing import Generic, TypeVar

from kvtier.policies.hazard_model import EDGES_S, NUM_BINS, HazardModel
from kvtier.types import BlockKey

MIN_SEGMENTS = 1 << 16
BLOCKS_PER_SEGMENT = 8
"""how many segments are remembered: at least one for so many blocks of the tier"""
MIN_GHOSTS = 1 << 16
GHOSTS_PER_BLOCK = 4
_HASH_BITS = 128
_HASH_MASK = (1 << _HASH_BITS) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""2^128 divided by the golden ratio, made odd: spreads keys of any make evenly (Knuth, multiplicative hashing)"""
_PRINT_MASK = 0x7FFFFFFF
_ID_MASK = 0xFFFFFFFF

L = TypeVar("L")


class Segment(Generic[L]):
    """A run of blocks and its last use."""

    __slots__ = ("class_id", "gap_s", "id", "is_queued", "leaves", "num_alive", "num_blocks", "num_turns", "num_uses", "time_s")

    def __init__(self, segment_id: int, time_s: float) -> None:
        self.id = segment_id
        self.time_s = time_s
        self.class_id = 0
        self.num_uses = 1
        self.num_turns = 1
        """uses of the conversation it belongs to"""
        self.gap_s = -1.0
        """smoothed time between uses; below 0: none yet"""
        self.num_blocks = 0
        self.num_alive = 0
        """blocks that have not been used again since"""
        self.leaves: list[L] = []
        """candidates for eviction; some may have ceased to be"""
        self.is_queued = False

    def weight_of(self, num_blocks: int) -> float:
        """What blocks of it count in the statistics: between one per block (exact, but a few long prompts drown the rest) and one
        per segment."""
        return num_blocks / sqrt(self.num_blocks) if self.num_blocks > 0 else 0.0


class SegmentLog(Generic[L]):
    """The segments in the order of their making, the latest ones only. Tells the model how long they stay unused."""

    __slots__ = ("_next_id", "_passed", "_ring", "_size")

    def __init__(self) -> None:
        self._size = MIN_SEGMENTS
        self._ring: dict[int, Segment[L]] = {}
        self._next_id = 1
        self._passed = [1] * NUM_BINS
        """per bin the first segment that has not left it"""

    def new(self, time_s: float) -> Segment[L]:
        """A segment whose use is now."""
        segment: Segment[L] = Segment(self._next_id, time_s)
        self._ring[self._next_id] = segment
        self._ring.pop(self._next_id - self._size, None)
        self._next_id += 1
        return segment

    def get(self, segment_id: int) -> Segment[L] | None:
        """A segment by the lower 32 bits of its id, if it is still remembered."""
        return self._ring.get(self._next_id - ((self._next_id - segment_id) & _ID_MASK))

    def resize(self, num_blocks: int) -> None:
        """The tier holds so many blocks. What is remembered only grows."""
        self._size = max(self._size, num_blocks // BLOCKS_PER_SEGMENT)

    def advance(self, now: float, model: HazardModel) -> None:
        """Whatever left a bin unused since the last call counts as such."""
        ring, passed, end = self._ring, self._passed, self._next_id
        for position in range(NUM_BINS):
            first = passed[position]
            if first >= end:
                continue
            first = max(first, end - self._size)
            born_before = now - EDGES_S[position + 1]
            while first < end and (segment := ring[first]).time_s <= born_before:
                if segment.num_alive > 0:
                    model.survived(segment.class_id, position, segment.weight_of(segment.num_alive))
                first += 1
            passed[position] = first


class GhostTable(Generic[L]):
    """Remembers of blocks that are not here in which segment they were: eight bytes each, in a table of fixed size.

    A key has one place; whoever comes later takes it over. 31 bits of its hash tell it from others. So a mix-up happens once in two
    billion times and costs at most a worse decision.
    """

    __slots__ = ("_log", "_shift", "_table")

    def __init__(self, log: SegmentLog[L]) -> None:
        self._log = log
        self._shift = 0
        self._table = array("Q")
        self.resize(0)

    def resize(self, num_blocks: int) -> None:
        """The tier holds so many blocks. A table that has become too small is begun anew."""
        size = max(MIN_GHOSTS, GHOSTS_PER_BLOCK * num_blocks)
        if len(self._table) < size // 2 or not self._table:
            bits = (size - 1).bit_length()
            self._shift = _HASH_BITS - bits
            self._table = array("Q", bytes(8 << bits))

    def put(self, key: BlockKey, segment: Segment[L], *, had_child: bool) -> None:
        """Remembers a block that is not here. ``had_child``: some prompt went on behind it."""
        hashed = int.from_bytes(key, "little") * _MULTIPLIER & _HASH_MASK
        place = hashed >> self._shift
        entry = self._table[place]
        if entry:
            other = self._log.get(entry & _ID_MASK)
            if other is not None:
                # Whether that one is used again will not be seen any more.
                other.num_alive -= 1
                other.num_blocks -= 1
        self._table[place] = (hashed >> 32 & _PRINT_MASK) << 33 | had_child << 32 | segment.id & _ID_MASK

    def pop(self, key: BlockKey) -> tuple[Segment[L] | None, bool]:
        """Forgets a block. Its segment (None: unknown), and whether it had a child."""
        hashed = int.from_bytes(key, "little") * _MULTIPLIER & _HASH_MASK
        place = hashed >> self._shift
        entry = self._table[place]
        if not entry or entry >> 33 != hashed >> 32 & _PRINT_MASK:
            return None, False
        self._table[place] = 0
        return self._log.get(entry & _ID_MASK), bool(entry >> 32 & 1)


def runs_of(segments: Sequence[Segment[L] | None]) -> list[tuple[Segment[L] | None, int]]:
    """Equal neighbours together: (segment, how many)."""
    out: list[tuple[Segment[L] | None, int]] = []
    for segment in segments:
        if out and out[-1][0] is segment:
            out[-1] = (segment, out[-1][1] + 1)
        else:
            out.append((segment, 1))
    return out
