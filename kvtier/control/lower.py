"""One tier below host memory, as the planner sees it: its blocks, its room, and what waits to be written to it."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvtier.control.index import Entry
from kvtier.control.residency import Residency
from kvtier.types import BlockKey


class WriteMode(enum.Enum):
    """When a block in host memory is written to the tier below."""

    THROUGH = "through"
    """as soon as it is in host memory"""
    BACK = "back"
    """``WRITE_BACK_DELAY_S`` after it came to host memory, or when it is evicted from there before"""
    ON_EVICT = "on_evict"
    """only when it is, or is soon to be, evicted from host memory"""


WRITE_BACK_DELAY_S = 5.0
_DELAY_S = {WriteMode.THROUGH: 0.0, WriteMode.BACK: WRITE_BACK_DELAY_S, WriteMode.ON_EVICT: math.inf}
MAX_JOB_BYTES = 32 << 20
"""upper bound of one demotion, so that loads never wait long behind a store"""


@dataclass(frozen=True, slots=True)
class LowerTierSpec:
    """What the planner must be told of a lower tier."""

    residency: Residency
    max_blocks: Callable[[int], int | None]
    """blocks of a size it holds when it holds nothing else; None: unbounded"""
    write: WriteMode
    max_in_flight_bytes: int


class LowerTier:
    """Book-keeping of one lower tier. ``bit`` is its place in the index's masks."""

    __slots__ = ("_in_flight_blocks", "_urgent", "_waiting", "bit", "in_flight_bytes", "index", "online", "residency", "spec")

    def __init__(self, index: int, spec: LowerTierSpec) -> None:
        self.index = index
        self.bit = 1 << index
        self.spec = spec
        self.residency = spec.residency
        self.online = True
        self.in_flight_bytes = 0
        self._in_flight_blocks: dict[int, int] = {}
        self._waiting: OrderedDict[BlockKey, float] = OrderedDict()
        self._urgent: dict[BlockKey, None] = {}
        """to be written as soon as possible, whatever the write mode; in order"""

    def committed(self, entry: Entry, now: float) -> None:
        """A block came to host memory and is not here: queue it as the write mode says."""
        if not (entry.readable | entry.busy) & self.bit:
            self._waiting[entry.key] = now + _DELAY_S[self.spec.write]

    def write_soon(self, key: BlockKey) -> None:
        """A block in host memory that is not here is to be written before all others, whatever the write mode."""
        self._waiting.pop(key, None)
        self._urgent[key] = None

    def is_waiting_for(self, key: BlockKey) -> bool:
        """Whether a block was asked for by ``write_soon`` and its write has not begun."""
        return key in self._urgent

    def wants_on_evict(self, entry: Entry) -> bool:
        """Whether a block that leaves host memory must be written here first.

        Not with write-through: there a block still waits only because the tier cannot keep up, and holding its slot would
        turn new blocks away for the sake of old ones.
        """
        return self.online and self.spec.write is not WriteMode.THROUGH and entry.key in self._waiting

    def forget_waiting(self, key: BlockKey) -> bool:
        """Takes a block out of the queue; whether it was there."""
        was_waiting = key in self._waiting or key in self._urgent
        self._waiting.pop(key, None)
        self._urgent.pop(key, None)
        return was_waiting

    def due(self, now: float, num_dirty: float) -> Iterator[BlockKey]:
        """Takes out of the queue what is to be written now, oldest first, while it is consumed.

        Beside what is due, that is everything above ``num_dirty`` blocks.
        """
        while self.has_due(now, num_dirty):
            if self._urgent:
                key = next(iter(self._urgent))
                del self._urgent[key]
                yield key
            else:
                yield self._waiting.popitem(last=False)[0]

    def has_due(self, now: float, num_dirty: float) -> bool:
        """Whether something waits to be written now."""
        waiting = self._waiting
        return bool(self._urgent) or (bool(waiting) and (len(waiting) > num_dirty or next(iter(waiting.values())) <= now))

    def has_budget(self) -> bool:
        """Whether another demotion may start."""
        return self.online and self.in_flight_bytes < self.spec.max_in_flight_bytes

    def shortage(self, num_blocks: int, num_bytes: int) -> int:
        """How many blocks of a size must leave before ``num_blocks`` more fit."""
        bound = self.spec.max_blocks(num_bytes)
        if bound is None:
            return 0
        return num_blocks + self.residency.count(num_bytes) + self._in_flight_blocks.get(num_bytes, 0) - bound

    def started(self, num_blocks: int, num_bytes: int) -> None:
        """Counts blocks that are on their way here."""
        self.in_flight_bytes += num_blocks * num_bytes
        self._in_flight_blocks[num_bytes] = self._in_flight_blocks.get(num_bytes, 0) + num_blocks

    def finished(self, num_blocks: int, num_bytes: int) -> None:
        """Counts them off again."""
        self.in_flight_bytes -= num_blocks * num_bytes
        self._in_flight_blocks[num_bytes] -= num_blocks

    @property
    def will_write(self) -> bool:
        """Whether something is queued that will be written without being evicted."""
        return self.online and (bool(self._urgent) or (bool(self._waiting) and self.spec.write is not WriteMode.ON_EVICT))
