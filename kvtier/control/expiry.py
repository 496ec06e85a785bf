"""Time to live of one tier's blocks: who has expired by now, in O(1) per block.

With one time to live per tier the order of deadlines is the order of refreshes, so one ordered dict does.
"""

from __future__ import annotations

from collections import OrderedDict

from kvtier.types import BlockKey


class ExpiryQueue:
    """Deadlines of blocks. ``sliding``: use refreshes the deadline; otherwise it counts from insertion."""

    __slots__ = ("_deadlines", "sliding", "ttl_s")

    def __init__(self, ttl_s: float, *, sliding: bool) -> None:
        self.ttl_s = ttl_s
        self.sliding = sliding
        self._deadlines: OrderedDict[BlockKey, float] = OrderedDict()

    def insert(self, key: BlockKey, now: float) -> None:
        """Starts (or restarts) the time of a block."""
        self._deadlines[key] = now + self.ttl_s
        self._deadlines.move_to_end(key)

    def touch(self, key: BlockKey, now: float) -> None:
        """Marks a use; refreshes a sliding deadline. An absent key is fine."""
        if self.sliding and key in self._deadlines:
            self.insert(key, now)

    def remove(self, key: BlockKey) -> None:
        """Forgets a block; an absent key is fine."""
        self._deadlines.pop(key, None)

    def expired(self, now: float) -> list[BlockKey]:
        """Takes out and returns the blocks whose time is over, oldest deadline first."""
        out: list[BlockKey] = []
        deadlines = self._deadlines
        while deadlines:
            key, deadline = next(iter(deadlines.items()))
            if deadline > now:
                break
            del deadlines[key]
            out.append(key)
        return out

    def __len__(self) -> int:
        return len(self._deadlines)
