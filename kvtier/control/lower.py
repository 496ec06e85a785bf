"""One tier below host memory, as the planner sees it: its blocks, its room, and what waits to be written to it."""

from __future__ import annotations

import enum
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
    """only when it is evicted from host memory"""


WRITE_BACK_DELAY_S = 5.0
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

    __slots__ = ("_in_flight_blocks", "_waiting", "bit", "in_flight_bytes", "index", "online", "residency", "spec")

    def __init__(self, index: int, spec: LowerTierSpec) -> None:
        self.index = index
        self.bit = 1 << index
        self.spec = spec
        self.residency = spec.residency
        self.online = True
        self.in_flight_bytes = 0
        self._in_flight_blocks: dict[int, int] = {}
        self._waiting: OrderedDict[BlockKey, float] = OrderedDict()

    def committed(self, entry: Entry, now: float) -> None:
        """A block came to host memory and is not here: queue it as the write mode says."""
        if entry.readable & self.bit or entry.busy & self.bit or self.spec.write is WriteMode.ON_EVICT:
            return
        self._waiting[entry.key] = now + (WRITE_BACK_DELAY_S if self.spec.write is WriteMode.BACK else 0.0)

    def wants_on_evict(self, entry: Entry) -> bool:
        """Whether a block that leaves host memory must be written here first.

        Not with write-through: there a block still waits only because the tier cannot keep up, and holding its slot would
        turn new blocks away for the sake of old ones.
        """
        if entry.readable & self.bit or entry.busy & self.bit or not self.online:
            return False
        return self.spec.write is WriteMode.ON_EVICT or (self.spec.write is WriteMode.BACK and entry.key in self._waiting)

    def forget_waiting(self, key: BlockKey) -> bool:
        """Takes a block out of the queue; whether it was there."""
        return self._waiting.pop(key, None) is not None

    def due(self, now: float) -> Iterator[BlockKey]:
        """Takes out of the queue what is to be written now, oldest first, while it is consumed."""
        waiting = self._waiting
        while waiting:
            key, due = next(iter(waiting.items()))
            if due > now:
                return
            del waiting[key]
            yield key

    def has_due(self, now: float) -> bool:
        """Whether something waits to be written now."""
        return bool(self._waiting) and next(iter(self._waiting.values())) <= now

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
    def num_waiting(self) -> int:
        """Blocks queued for writing."""
        return len(self._waiting)

    def clear_waiting(self) -> None:
        """Forgets the queue."""
        self._waiting.clear()
