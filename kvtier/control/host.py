"""Moving blocks in and out of host memory: the steps that the planner's plans are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvtier.control.commands import BlockEvent
from kvtier.control.demotion import Demoter
from kvtier.control.device_pool import DevicePool
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.lower import LowerTier
from kvtier.control.residency import Residency
from kvtier.stats import Stats
from kvtier.types import BlockKey, BlockMeta

MAX_EVENTS = 100_000


class Room(NamedTuple):
    """How many leading blocks find a slot now, and how many behind them are turned away because they are worth less than what is there."""

    num_blocks: int
    num_declined: int


class HostMemory:
    """Slots, residency and index of host memory, kept in step with each other; tells what becomes readable or stops being so."""

    def __init__(self, index: Index, space: HostSpace, residency: Residency, demoter: Demoter, stats: Stats, *, events: bool) -> None:
        self.device: DevicePool | None = None
        """second copies of blocks; whatever leaves host memory leaves it too"""
        self.events: deque[BlockEvent] | None = deque(maxlen=MAX_EVENTS) if events else None
        self.residency = residency
        self._index = index
        self._space = space
        self._demoter = demoter
        self._stats = stats
        self._num_bytes = 0
        """size of the block that was stored last"""

    def make_room(self, count: int, num_bytes: int, now: float, tenant: str, incoming: Sequence[BlockMeta] = ()) -> Room:
        """Evicts exactly as many blocks as are missing for a tenant.

        ``incoming``: the blocks that want the room, if the policy may turn some of them away; in the order of their prompt.
        """
        space = self._space
        self._num_bytes = num_bytes
        num_declined = 0
        short = count - space.available(num_bytes) - space.draining(num_bytes)
        if short > 0 and not space.growing:
            victims = self.residency.victims(short, num_bytes, now, tenant, incoming[-short:])
            num_declined = victims.num_declined
            self._evict(victims.keys, now)
            self._stats.add("host.not_admitted_blocks", num_declined)
            if not num_declined and not space.available(num_bytes) and not space.draining(num_bytes):
                self._crowd_out(num_bytes, now)
        return Room(min(count - num_declined, space.available(num_bytes)), num_declined)

    def open_slots(self, blocks: Sequence[BlockMeta], tenant: str) -> list[Entry]:
        """Slots for blocks that are about to be filled; the leading part where there are too few."""
        entries: list[Entry] = []
        ensure, take = self._index.ensure, self._space.take
        for key, parent, num_bytes in blocks:
            entry = ensure(key, parent, num_bytes, tenant)
            if not take(entry):
                self._index.drop_if_gone(entry)
                break
            entry.busy |= HOST
            entries.append(entry)
        return entries

    def close_slot(self, entry: Entry) -> None:
        """A copy into a slot came to nothing."""
        entry.busy &= ~HOST
        self._space.vacate((entry,))
        self._index.drop_if_gone(entry)

    def filled(self, entries: Sequence[Entry], blocks: Sequence[BlockMeta], now: float, *, is_use: bool = True) -> None:
        """Copies into slots are complete: the blocks, ``entries[i].meta == blocks[i]``, are readable. They come in the given order.

        ``is_use``: as for :meth:`Residency.insert`.
        """
        for entry in entries:
            entry.busy &= ~HOST
            entry.readable |= HOST
        self._space.filled(entries)
        if blocks:
            self.residency.insert(blocks, now, is_use=is_use)
        if self.events is not None:
            for entry in entries:
                self.tell(True, self.residency.name, entry)

    def give_up(self, entry: Entry) -> None:
        """A block that is not evicted but worthless, expired or unwanted leaves."""
        self.residency.remove(entry.key, entry.num_bytes)
        self._left((entry,))

    def forget_lower(self, tier: LowerTier, key: BlockKey) -> None:
        """A block is no longer in a lower tier."""
        entry = self._index.get(key)
        if entry is None or not entry.readable & tier.bit:
            return
        tier.residency.remove(key, entry.num_bytes)
        entry.readable &= ~tier.bit
        self.tell(False, tier.residency.name, entry)
        self._index.drop_if_gone(entry)

    def tell(self, stored: bool, tier: str, entry: Entry) -> None:
        """Notes an event if somebody asks for them."""
        if self.events is not None:
            self.events.append(BlockEvent(stored, tier, entry.meta))

    def let_go_ahead(self, now: float) -> None:
        """Where there is a victim buffer: lets blocks go before their room is needed."""
        if self._num_bytes:
            self.residency.let_go(self._num_bytes, self._space.available(self._num_bytes), now)

    def _evict(self, keys: Sequence[BlockKey], now: float) -> None:
        entries = [entry for key in keys if (entry := self._index.get(key)) is not None]
        self._left(entries)
        self._stats.add("host.evicted_blocks", len(entries))

    def _left(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.readable &= ~HOST
        self._space.vacate(entries)
        self._demoter.forget_waiting(entries)
        if self.device is not None:
            for entry in entries:
                self.device.drop(entry.key)
        if self.events is not None:
            for entry in entries:
                self.tell(False, self.residency.name, entry)
        drop_if_gone = self._index.drop_if_gone
        for entry in entries:
            drop_if_gone(entry)

    def _crowd_out(self, num_bytes: int, now: float) -> None:
        """Blocks of another size hold every extent: the emptiest extent's tenants leave."""
        tenants = self._space.crowd(num_bytes)
        if not tenants or any(entry.busy & HOST for entry in tenants):
            return
        for entry in tenants:
            self.residency.remove(entry.key, entry.num_bytes)
        self._evict([entry.key for entry in tenants], now)
