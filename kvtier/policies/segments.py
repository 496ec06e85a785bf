"""Segments: blocks of one prompt that were last used together, the unit in which ``hazard`` keeps its statistics.

All blocks of a segment have their last use, their count and their gap in common, so the books cost a few entries a request
instead of one a block.
"""

from __future__ import annotations

from math import sqrt
from typing import Generic, TypeVar

from kvtier.policies.hazard_model import EDGES_S, NUM_BINS, HazardModel

MIN_SEGMENTS = 1 << 16
BLOCKS_PER_SEGMENT = 8
"""how many segments are remembered: at least one for so many blocks of the tier"""

L = TypeVar("L")


class Segment(Generic[L]):
    """Blocks of one prompt and their last use."""

    __slots__ = ("class_id", "gap_s", "id", "is_queued", "leaves", "num_alive", "num_blocks", "num_turns", "num_uses", "origin", "time_s")

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
        """candidates for eviction; the last one leaves first"""
        self.is_queued = False
        self.origin: Segment[L] | None = None
        """the segment that its blocks were in at their last use, where it is not this one: since then they have been spoken of"""

    def weight_of(self, num_blocks: int) -> float:
        """What blocks of it count in the statistics: between one per block (exact, but a few long prompts drown the rest) and one
        per segment."""
        return num_blocks / sqrt(self.num_blocks) if self.num_blocks > 0 else 0.0

    def forget(self, num_blocks: int) -> None:
        """Whether these blocks, which are not here, are used again will not be seen any more."""
        self.num_blocks -= num_blocks
        self.num_alive -= num_blocks
        if self.origin is not None:
            self.origin.forget(num_blocks)


class SegmentLog(Generic[L]):
    """The segments in the order of their making, the latest ones only. Tells the model how long they stay unused."""

    __slots__ = ("_due", "_next_id", "_passed", "_ring", "_size")

    def __init__(self) -> None:
        self._size = MIN_SEGMENTS
        self._ring: dict[int, Segment[L]] = {}
        self._next_id = 1
        self._passed = [1] * NUM_BINS
        """per bin the first segment that has not left it"""
        self._due = [0.0] * NUM_BINS
        """per bin when that one will, at the earliest"""

    def new(self, time_s: float) -> Segment[L]:
        """A segment whose use is now."""
        segment: Segment[L] = Segment(self._next_id, time_s)
        self._ring[self._next_id] = segment
        self._ring.pop(self._next_id - self._size, None)
        self._next_id += 1
        return segment

    def remembers(self, segment: Segment[L]) -> bool:
        """Whether it is one of the latest."""
        return segment.id >= self._next_id - self._size

    def resize(self, num_blocks: int) -> None:
        """The tier holds so many blocks. What is remembered only grows."""
        self._size = max(self._size, num_blocks // BLOCKS_PER_SEGMENT)

    def advance(self, now: float, model: HazardModel) -> None:
        """Whatever left a bin unused since the last call counts as such."""
        for position, due in enumerate(self._due):
            if due <= now:
                self._due[position] = self._pass(position, now, model)

    def _pass(self, position: int, now: float, model: HazardModel) -> float:
        """Counts those that have left a bin. Returns when the next one will, at the earliest."""
        ring = self._ring
        length_s = EDGES_S[position + 1]
        first = max(self._passed[position], self._next_id - self._size)
        while (segment := ring.get(first)) is not None and segment.time_s + length_s <= now:
            if segment.num_alive > 0:
                model.survived(segment.class_id, position, segment.num_alive / sqrt(segment.num_blocks))
            first += 1
        self._passed[position] = first
        return (now if segment is None else segment.time_s) + length_s
