"""The slots of host memory: who lives where, who reads there, and when a slot may get a new tenant.

A slot is named by the index of its first 4 KiB page. It becomes free when its block has left *and* the last lease on
it has ended; leases end when a copy's completion was reported, never by a timer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvtier.control.index import Entry
from kvtier.memory.leases import LeaseTable
from kvtier.types import SlotRef

PAGE_BYTES = 4096
_GENERATION_MASK = 0xFFFFFFFF
_TENANTS_STEP = 4096


class SlotAllocator(Protocol):
    """What host space needs of an allocator (:class:`kvtier.memory.slab.SlabAllocator`)."""

    def allocate(self, num_bytes: int) -> int | None: ...
    def adopt(self, offset: int, num_bytes: int) -> None: ...
    def free(self, offset: int) -> None: ...
    def available(self, num_bytes: int) -> int: ...
    def crowded_out(self, num_bytes: int) -> list[int]: ...
    def check(self) -> list[str]: ...


class Generations(Protocol):
    """One number per page; readers of a slot compare it."""

    def __getitem__(self, slot: int, /) -> int: ...
    def __setitem__(self, slot: int, generation: int, /) -> None: ...


class SlotRegistry(Protocol):
    """Who wants to know at once which slots hold whole blocks."""

    def filled(self, entry: Entry, generation: int) -> None:
        """A block is complete in its slot, which has this generation."""

    def vacated(self, slot: int) -> None:
        """A block leaves its slot."""

    @property
    def num_waiting(self) -> int:
        """Blocks whose entry is not written or verified yet."""


class HostSpace:
    """Slots, their tenants, leases and generations. Pure; ``generations`` is the table readers compare with (plain ints in and out)."""

    def __init__(self, allocator: SlotAllocator, generations: Generations) -> None:
        self._allocator = allocator
        self._generations = generations
        self._leases = LeaseTable()
        self._tenants: list[Entry | None] = []
        """by slot; a slot behind the end has no tenant"""
        self._draining: dict[int, int] = {}
        """retired slots that are still leased -> size of their block"""
        self._draining_count: dict[int, int] = {}
        self.stuck: frozenset[int] = frozenset()
        """slots that are read by copies of which nobody knows when they end"""
        self.registry: SlotRegistry | None = None
        self.growing = False
        """whether more room is coming without eviction (the arena is still being prepared)"""

    def available(self, num_bytes: int) -> int:
        """How many blocks of this size find a slot right now."""
        return self._allocator.available(num_bytes)

    def draining(self, num_bytes: int) -> int:
        """How many slots of this size will be free as soon as the copies that use them are done; those that are ``stuck`` do not count."""
        count = self._draining_count.get(num_bytes, 0)
        return count - sum(self._draining.get(slot) == num_bytes for slot in self.stuck) if self.stuck else count

    def take(self, entry: Entry) -> bool:
        """Gives an entry a slot with a new generation. False where there is none."""
        offset = self._allocator.allocate(entry.num_bytes)
        if offset is None:
            return False
        slot = offset // PAGE_BYTES
        self._generations[slot] = (self._generations[slot] + 1) & _GENERATION_MASK
        try:
            self._tenants[slot] = entry
        except IndexError:
            self._tenants.extend([None] * (slot + _TENANTS_STEP - len(self._tenants)))
            self._tenants[slot] = entry
        entry.slot = slot
        return True

    def adopt(self, entry: Entry, slot: int) -> bool:
        """Gives an entry the slot in which its bytes lie already, with the generation that it has. False: that cannot be."""
        try:
            self._allocator.adopt(slot * PAGE_BYTES, entry.num_bytes)
        except ValueError:
            return False
        if slot >= len(self._tenants):
            self._tenants.extend([None] * (slot + _TENANTS_STEP - len(self._tenants)))
        self._tenants[slot] = entry
        entry.slot = slot
        return True

    def filled(self, entries: Iterable[Entry]) -> None:
        """The blocks of entries are complete in their slots."""
        if self.registry is not None:
            for entry in entries:
                self.registry.filled(entry, int(self._generations[entry.slot]))

    def vacate(self, entries: Sequence[Entry]) -> None:
        """Takes entries' slots away; a slot is free once no lease is left."""
        if self.registry is not None:
            for entry in entries:
                self.registry.vacated(entry.slot)
        tenants, retire, free = self._tenants, self._leases.retire, self._allocator.free
        for entry in entries:
            slot = entry.slot
            tenants[slot] = None
            entry.slot = -1
            if retire(slot):
                free(slot * PAGE_BYTES)
            else:
                self._draining[slot] = entry.num_bytes
                self._draining_count[entry.num_bytes] = self._draining_count.get(entry.num_bytes, 0) + 1

    def lease(self, slots: Iterable[int], owner: int) -> None:
        """Keeps slots from getting a new tenant while ``owner`` (a job) copies."""
        for slot in slots:
            self._leases.lease(slot, owner)

    def release(self, slots: Iterable[int], owner: int) -> None:
        """Ends leases; frees what was waiting for them."""
        for slot in slots:
            if self._leases.release(slot, owner):
                num_bytes = self._draining.pop(slot)
                self._draining_count[num_bytes] -= 1
                self._allocator.free(slot * PAGE_BYTES)

    def refs(self, slots: Sequence[int]) -> tuple[SlotRef, ...]:
        """Slots together with their present generations."""
        return SlotRef.many(slots, map(self._generations.__getitem__, slots))

    def crowd(self, num_bytes: int) -> list[Entry]:
        """The tenants that must leave for blocks of another size to get an extent; empty where that cannot help."""
        tenants = [self.tenant(offset // PAGE_BYTES) for offset in self._allocator.crowded_out(num_bytes)]
        present = [tenant for tenant in tenants if tenant is not None]
        return present if len(present) == len(tenants) else []

    def tenant(self, slot: int) -> Entry | None:
        """Who lives in a slot."""
        return self._tenants[slot] if 0 <= slot < len(self._tenants) else None

    @property
    def num_leases(self) -> int:
        """How many slots are leased."""
        return self._leases.num_leased

    def check(self) -> list[str]:
        """Broken promises in words; empty = healthy."""
        problems = list(self._allocator.check())
        tenants = [(slot, entry) for slot, entry in enumerate(self._tenants) if entry is not None]
        problems += [f"slot {slot}: its tenant believes to live in slot {entry.slot}" for slot, entry in tenants if entry.slot != slot]
        problems += [f"slot {slot} drains although it has a tenant" for slot in self._draining if self.tenant(slot) is not None]
        return problems
