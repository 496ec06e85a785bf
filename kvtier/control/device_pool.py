"""The pool of slots in device memory, in front of host memory: second copies of blocks that host memory holds too.

New blocks pass through it on their way to host memory, so that the engine's own blocks are free as soon as they were copied within the
device; and they stay, until newer ones need the room, so that a hit need not cross the bus.  Because host memory has everything that
the pool has, a slot can be given up at any time, without a write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvtier.control.residency import Residency
from kvtier.memory.leases import LeaseTable
from kvtier.stats import Stats
from kvtier.types import BlockKey, BlockMeta

NO_SLOT = -1


class DevicePool:
    """Slots ``0 .. num_slots - 1``, the same on every rank; all of one size. Pure; ``now`` in seconds.

    A slot is free when its block has left and no job uses it any more.
    """

    def __init__(self, num_slots: int, block_bytes: int, residency: Residency, stats: Stats) -> None:
        self.residency = residency
        self._num_slots = num_slots
        self._block_bytes = block_bytes
        self._stats = stats
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[BlockKey, int] = {}
        self._leases = LeaseTable()
        self._filling: dict[int, list[tuple[BlockMeta, int]]] = {}
        """job -> blocks on their way into slots"""

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def begin_fill(self, job_id: int, metas: Sequence[BlockMeta], now: float) -> tuple[int, ...]:
        """Slots for blocks that a job is about to copy through the pool; ``NO_SLOT`` where there is none. Ends by ``end``."""
        wanted = [meta for meta in metas if meta.key not in self._slots][: self._num_slots]
        self._make_room(wanted, now)
        slots = dict(zip((meta.key for meta in wanted), iter(self._take, None), strict=False))
        self._filling.setdefault(job_id, []).extend((meta, slots[meta.key]) for meta in wanted if meta.key in slots)
        return tuple(slots.get(meta.key, NO_SLOT) for meta in metas)

    def begin_load(self, job_id: int, metas: Sequence[BlockMeta], now: float) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """A slot for each block (``NO_SLOT``: none), and whether the block is there already; else it is to be put there.

        Ends by ``end_read`` of the slots that are ready, and ``end_fill``.
        """
        ready = tuple(meta.key in self._slots for meta in metas)
        for meta, is_ready in zip(metas, ready, strict=True):
            if is_ready:
                self._leases.lease(self._slots[meta.key], job_id)
        slots = {meta.key: self._slots[meta.key] for meta, is_ready in zip(metas, ready, strict=True) if is_ready}
        absent = [meta for meta, is_ready in zip(metas, ready, strict=True) if not is_ready]
        slots.update(zip((meta.key for meta in absent), self.begin_fill(job_id, absent, now), strict=True))
        self._stats.add(f"{self.residency.name}.loaded_blocks", sum(ready))
        return tuple(slots[meta.key] for meta in metas), ready

    def end_fill(self, job_id: int, failed: Iterable[BlockKey], now: float) -> None:
        """A job's copies are over: what did not fail is readable, the tail of a prompt first in order of use."""
        bad = set(failed)
        before = len(self._slots)
        for meta, slot in reversed(self._filling.pop(job_id, ())):
            if meta.key in bad or meta.key in self._slots:
                self._free.append(slot)
                continue
            self._slots[meta.key] = slot
            self.residency.insert((meta,), now)
        self._stats.add(f"{self.residency.name}.stored_blocks", len(self._slots) - before)

    def end_read(self, job_id: int, slots: Iterable[int]) -> None:
        """A job no longer reads these slots."""
        for slot in slots:
            if self._leases.release(slot, job_id):
                self._free.append(slot)

    # ---- keeping ------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        """Marks blocks as used, in the given order."""
        self.residency.touch(keys, self._block_bytes, now)

    def drop(self, key: BlockKey) -> None:
        """Gives a block up, because host memory does; an absent one is fine."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self.residency.remove(key, self._block_bytes)
            self._vacate(slot)

    def expire(self, now: float) -> None:
        """Gives up what has expired."""
        for key in self.residency.expire(lambda _tips: set(), now):
            self._stats.add(f"{self.residency.name}.expired_blocks")
            self.drop(key)

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def leftovers(self) -> int:
        """Slots that jobs use."""
        return self._leases.num_leased + sum(len(blocks) for blocks in self._filling.values())

    def check(self) -> list[str]:
        """Broken promises in words; empty = healthy."""
        problems = []
        in_use = [*self._slots.values(), *self._free, *(slot for blocks in self._filling.values() for _, slot in blocks)]
        if len(in_use) != len(set(in_use)):
            problems.append("a slot of the device pool is in use twice")
        if len(in_use) != self._num_slots and not self._leases.num_leased:
            problems.append(f"{self._num_slots - len(in_use)} slots of the device pool are lost")
        if len(self.residency) != len(self._slots):
            problems.append(f"the device pool's policy knows {len(self.residency)} blocks, the pool {len(self._slots)}")
        return problems

    # ---- inside -------------------------------------------------------------------------------------------------

    def _make_room(self, blocks: Sequence[BlockMeta], now: float) -> None:
        short = len(blocks) - len(self._free)
        if short <= 0:
            return
        victims, num_declined = self.residency.victims(short, self._block_bytes, now, incoming=blocks[-short:])
        for key in victims:
            self._vacate(self._slots.pop(key))
        self._stats.add(f"{self.residency.name}.evicted_blocks", len(victims))
        self._stats.add(f"{self.residency.name}.not_admitted_blocks", num_declined)

    def _take(self) -> int | None:
        return self._free.pop() if self._free else None

    def _vacate(self, slot: int) -> None:
        if self._leases.retire(slot):
            self._free.append(slot)
