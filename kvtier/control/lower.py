"""One tier below host memory, as the planner sees it: its blocks, its room, and what waits to be written to it."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvtier.control.absent import AbsentKeys
from kvtier.control.admission import Admission
from kvtier.control.commands import Forget, Remove
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.residency import Residency
from kvtier.types import BlockKey


class WriteMode(enum.Enum):
    """When a block in host memory is written to the tier below."""

    THROUGH = "through"
    """as soon as it is in host memory"""
    BACK = "back"
    """``WRITE_BACK_DELAY_S`` after it came to host memory, or when host memory's policy has let it go before"""
    ON_EVICT = "on_evict"
    """only when host memory's policy has let it go"""


WRITE_BACK_DELAY_S = 5.0
_DELAY_S = {WriteMode.THROUGH: 0.0, WriteMode.BACK: WRITE_BACK_DELAY_S, WriteMode.ON_EVICT: math.inf}
MAX_JOB_BYTES = 32 << 20
"""upper bound of one demotion, so that loads never wait long behind a store"""


MAX_KNOWN_BLOCKS = 1 << 20
"""of a tier that others share; it may hold any number"""


@dataclass(frozen=True, slots=True)
class LowerTierSpec:
    """What the planner must be told of a lower tier."""

    residency: Residency
    max_blocks: Callable[[int], int | None]
    """blocks of a size it holds when it holds nothing else; None: unbounded"""
    write: WriteMode
    max_in_flight_bytes: int
    admission: Admission | None = None
    """which blocks are written at all; None: all"""
    is_exclusive: bool = False
    """a block that is promoted leaves the tier, and is written again when it leaves host memory"""
    is_shared: bool = False
    """others write to it too: it is asked what it holds, and a block that is forgotten here stays there"""


class LowerTier:
    """Book-keeping of one lower tier. ``bit`` is its place in the index's masks."""

    __slots__ = ("_in_flight_blocks", "_urgent", "_waiting", "absent", "bit", "in_flight_bytes", "index", "online", "residency", "spec")

    def __init__(self, index: int, spec: LowerTierSpec) -> None:
        self.index = index
        self.bit = 1 << index
        self.spec = spec
        self.residency = spec.residency
        self.online = True
        self.absent = AbsentKeys()
        """what a shared tier was found not to hold"""
        self.in_flight_bytes = 0
        self._in_flight_blocks: dict[int, int] = {}
        self._waiting: OrderedDict[BlockKey, float] = OrderedDict()
        self._urgent: dict[BlockKey, None] = {}
        """to be written as soon as possible, whatever the write mode; in order"""

    def committed(self, entry: Entry, now: float) -> bool:
        """A block came to host memory: if it is not here, queue it as the write mode says. False: it is not admitted."""
        if (entry.readable | entry.busy) & self.bit:
            return True
        if self.spec.admission is not None and not self.spec.admission.wants(entry.key):
            return False
        self._waiting[entry.key] = now + _DELAY_S[self.spec.write]
        return True

    def came_back(self, entry: Entry, now: float) -> None:
        """A block that was here is in host memory and here no more: queue it, admitted as it was."""
        self._waiting[entry.key] = now + _DELAY_S[self.spec.write]

    def touched(self, keys: Sequence[BlockKey], index: Index, now: float) -> None:
        """Blocks were used: queue those that only this was wanting for."""
        if self.spec.admission is None:
            return
        for key in self.spec.admission.used(keys, lambda key: (entry := index.get(key)) is not None and bool(entry.readable & HOST)):
            if not (index[key].readable | index[key].busy) & self.bit and key not in self._urgent and key not in self._waiting:
                self._waiting[key] = now + _DELAY_S[self.spec.write]

    def dropped(self, keys: Sequence[BlockKey], *, everywhere: bool = False) -> Remove | Forget:
        """The command for blocks that the planner has forgotten here. ``everywhere``: they leave also a tier that others share."""
        return Forget(self.index, tuple(keys)) if self.spec.is_shared and not everywhere else Remove(self.index, tuple(keys))

    def write_soon(self, key: BlockKey) -> None:
        """A block in host memory that is not here is to be written before all others, whatever the write mode."""
        self._waiting.pop(key, None)
        self._urgent[key] = None

    def is_waiting_for(self, key: BlockKey) -> bool:
        """Whether a block was asked for by ``write_soon`` and its write has not begun."""
        return key in self._urgent

    def wants(self, key: BlockKey) -> bool:
        """Whether a block waits to be written here."""
        return self.online and (key in self._waiting or key in self._urgent)

    def hurry(self, key: BlockKey) -> None:
        """If a block waits to be written here, it is to be written before others."""
        if key in self._waiting:
            self.write_soon(key)

    def forget_waiting(self, key: BlockKey) -> bool:
        """Takes a block out of the queue; whether it was there."""
        was_waiting = key in self._waiting or key in self._urgent
        self._waiting.pop(key, None)
        self._urgent.pop(key, None)
        return was_waiting

    def due(self, now: float) -> Iterator[BlockKey]:
        """Takes out of the queue what is to be written now, oldest first, while it is consumed."""
        while self.has_due(now):
            if self._urgent:
                key = next(iter(self._urgent))
                del self._urgent[key]
                yield key
            else:
                yield self._waiting.popitem(last=False)[0]

    def has_due(self, now: float) -> bool:
        """Whether something waits to be written now."""
        return bool(self._urgent) or (bool(self._waiting) and next(iter(self._waiting.values())) <= now)

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
