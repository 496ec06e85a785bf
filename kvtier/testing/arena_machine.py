"""Hypothesis state machines for host memory: the slab against a naive model, and slots with leases and generations."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.errors import InvariantError
from kvtier.memory.arena import Arena
from kvtier.memory.leases import LeaseTable
from kvtier.memory.slab import PAGE_BYTES, SlabAllocator
from kvtier.types import SlotRef

EXTENT_BYTES = 8 * PAGE_BYTES
CAPACITY_BYTES = 4 * EXTENT_BYTES + 3 * PAGE_BYTES + 100
"""four extents, a shorter one, and some bytes that no slot can use"""
BLOCK_BYTES = (1, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 1, 5 * PAGE_BYTES, 8 * PAGE_BYTES, 8 * PAGE_BYTES + 1)
"""sizes that fill an extent exactly, that leave a rest, that fit once, and that never fit"""

STEPS = settings(max_examples=120, stateful_step_count=60, deadline=None)

sizes = st.sampled_from(BLOCK_BYTES)
places = st.integers(0, 1 << 16)
"""an index into what there is, whatever its length"""


def rounded(num_bytes: int) -> int:
    """Slot size of a block, written down a second time for the models."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class SlabModel:
    """The slab's promises in their most naive form: which slots are live, and everything else by looking at all."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.live: dict[int, int] = {}
        """offset -> slot bytes"""

    def usable_bytes(self, extent: int) -> int:
        """Bytes of an extent below the limit."""
        return max(0, min(EXTENT_BYTES, self.limit_bytes - extent * EXTENT_BYTES))

    def live_in(self, extent: int) -> dict[int, int]:
        """The live slots of an extent."""
        return {offset: size for offset, size in self.live.items() if offset // EXTENT_BYTES == extent}

    def num_extents(self) -> int:
        """How many extents there are, the short one included."""
        return -(-CAPACITY_BYTES // EXTENT_BYTES)

    def places_for(self, slot_bytes: int) -> set[int]:
        """Offsets where a slot of this size could be handed out now."""
        offsets: set[int] = set()
        for extent in range(self.num_extents()):
            live = self.live_in(extent)
            if set(live.values()) <= {slot_bytes}:
                grid = range(0, self.usable_bytes(extent) - slot_bytes + 1, slot_bytes)
                offsets |= {extent * EXTENT_BYTES + distance for distance in grid} - live.keys()
        return offsets

    def crowded_out(self, slot_bytes: int) -> list[set[int]]:
        """The live offsets of each extent that is as empty as any of another size and has room for a slot."""
        extents = [self.live_in(extent) for extent in range(self.num_extents()) if self.usable_bytes(extent) >= slot_bytes]
        foreign = [live for live in extents if live and slot_bytes not in live.values()]
        fewest = min((sum(live.values()) for live in foreign), default=0)
        return [set(live) for live in foreign if sum(live.values()) == fewest]


class SlabMachine(RuleBasedStateMachine):
    """Allocates, frees, adopts and grows at random; after every step slab and model agree on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SlabModel(0)
        self.slab = SlabAllocator(CAPACITY_BYTES, EXTENT_BYTES, limit_bytes=0)

    @rule(limit_bytes=st.integers(0, CAPACITY_BYTES + PAGE_BYTES))
    def set_limit(self, limit_bytes: int) -> None:
        self.slab.set_limit(limit_bytes)
        self.model.limit_bytes = max(self.model.limit_bytes, min(limit_bytes, CAPACITY_BYTES))

    @rule(num_bytes=sizes)
    def allocate(self, num_bytes: int) -> None:
        offset = self.slab.allocate(num_bytes)
        expected = self.model.places_for(rounded(num_bytes))
        assert bool(expected) == (offset is not None)
        if offset is not None:
            assert offset in expected
            self.model.live[offset] = rounded(num_bytes)

    @rule(num_bytes=sizes)
    def fill(self, num_bytes: int) -> None:
        for _ in range(self.slab.available(num_bytes)):
            self.allocate(num_bytes)
        assert self.slab.allocate(num_bytes) is None

    @precondition(lambda self: self.model.live)
    @rule(place=places)
    def free(self, place: int) -> None:
        offset = sorted(self.model.live)[place % len(self.model.live)]
        self.slab.free(offset)
        del self.model.live[offset]

    @rule(page=st.integers(-9, CAPACITY_BYTES // PAGE_BYTES + 9), extra_bytes=st.sampled_from([0, 0, 0, 1, PAGE_BYTES - 1]))
    def free_wrongly(self, page: int, extra_bytes: int) -> None:
        offset = page * PAGE_BYTES + extra_bytes
        if offset not in self.model.live:
            try:
                self.slab.free(offset)
            except InvariantError:
                return
            raise AssertionError(f"{offset} was freed, which is not live")

    @rule(num_bytes=sizes, page=st.integers(-9, CAPACITY_BYTES // PAGE_BYTES + 9))
    def adopt(self, num_bytes: int, page: int) -> None:
        offset = page * PAGE_BYTES
        expected = offset in self.model.places_for(rounded(num_bytes))
        try:
            self.slab.adopt(offset, num_bytes)
        except ValueError:
            assert not expected
            return
        assert expected
        self.model.live[offset] = rounded(num_bytes)

    @rule(num_bytes=sizes)
    def crowd_out(self, num_bytes: int) -> None:
        offsets = self.slab.crowded_out(num_bytes)
        expected = self.model.crowded_out(rounded(num_bytes))
        assert (set(offsets) in expected) if expected else not offsets
        for offset in offsets:
            self.slab.free(offset)
            del self.model.live[offset]
        if offsets:
            self.allocate(num_bytes)
            assert self.model.live

    @invariant()
    def agrees(self) -> None:
        assert [] == self.slab.check()
        assert self.model.limit_bytes == self.slab.limit_bytes
        assert sum(self.model.live.values()) == self.slab.used_bytes
        for num_bytes in BLOCK_BYTES:
            assert len(self.model.places_for(rounded(num_bytes))) == self.slab.available(num_bytes)
            assert len(SlabModel(CAPACITY_BYTES).places_for(rounded(num_bytes))) == self.slab.max_slots(num_bytes)


SlabMachine.TestCase.settings = STEPS


@dataclass(eq=False)
class Tenant:
    """A block in the arena: where it is, which bytes it wrote, and who reads it."""

    slot: SlotRef
    num_bytes: int
    content: bytes
    readers: list[int] = field(default_factory=list)
    retired: bool = False


class ArenaMachine(RuleBasedStateMachine):
    """Stores, leases, evicts and releases blocks at random, in a real arena, as the owner of the slots would.

    A leased slot keeps its generation and its bytes whatever happens, and no slot ever has the same generation twice.
    """

    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        path = f"/dev/shm/kvtier-machine-{os.getpid()}-{next(self.numbers)}"
        self.arena = Arena.open(path, CAPACITY_BYTES)
        self.arena.unlink()
        self.slab = SlabAllocator(CAPACITY_BYTES, EXTENT_BYTES, limit_bytes=self.arena.ready_bytes)
        self.leases = LeaseTable()
        self.tenants: list[Tenant] = []
        self.seen: set[SlotRef] = set()

    def teardown(self) -> None:
        self.arena.close()

    @rule(num_bytes=sizes, tag=st.integers(1, 255))
    def store(self, num_bytes: int, tag: int) -> None:
        offset = self.slab.allocate(num_bytes)
        if offset is None:
            return
        slot = SlotRef(offset // PAGE_BYTES, self.arena.bump(offset // PAGE_BYTES))
        assert slot not in self.seen
        self.seen.add(slot)
        content = bytes([tag]) * num_bytes
        self.arena.view(offset, num_bytes)[:] = content
        self.tenants.append(Tenant(slot, num_bytes, content))

    @precondition(lambda self: self.tenants)
    @rule(place=places, owner=st.integers(0, 3))
    def lease(self, place: int, owner: int) -> None:
        tenant = self.tenants[place % len(self.tenants)]
        try:
            self.leases.lease(tenant.slot.slot, owner)
        except InvariantError:
            assert tenant.retired
            return
        assert not tenant.retired
        tenant.readers.append(owner)

    @rule(place=places, owner=st.integers(0, 3))
    def release(self, place: int, owner: int) -> None:
        leased = [tenant for tenant in self.tenants if owner in tenant.readers]
        if not leased:
            return
        tenant = leased[place % len(leased)]
        tenant.readers.remove(owner)
        is_free = self.leases.release(tenant.slot.slot, owner)
        assert is_free == (tenant.retired and not tenant.readers)
        if is_free:
            self.free(tenant)

    @rule(owner=st.integers(0, 3))
    def release_owner(self, owner: int) -> None:
        leased = [tenant for tenant in self.tenants if owner in tenant.readers]
        for tenant in leased:
            tenant.readers = [reader for reader in tenant.readers if reader != owner]
        ended = [tenant for tenant in leased if tenant.retired and not tenant.readers]
        assert sorted(tenant.slot.slot for tenant in ended) == sorted(self.leases.release_owner(owner))
        for tenant in ended:
            self.free(tenant)

    @precondition(lambda self: self.tenants)
    @rule(place=places)
    def evict(self, place: int) -> None:
        tenant = self.tenants[place % len(self.tenants)]
        if tenant.retired:
            return
        tenant.retired = True
        is_free = self.leases.retire(tenant.slot.slot)
        assert is_free == (not tenant.readers)
        if is_free:
            self.free(tenant)

    def free(self, tenant: Tenant) -> None:
        """What the owner of the slots does once nobody uses one any more."""
        self.tenants.remove(tenant)
        self.slab.free(tenant.slot.slot * PAGE_BYTES)

    @invariant()
    def every_tenant_is_whole(self) -> None:
        for tenant in self.tenants:
            slot = tenant.slot
            assert slot.generation == self.arena.generations[slot.slot]
            assert tenant.content == self.arena.view(slot.slot * PAGE_BYTES, tenant.num_bytes)
            assert bool(tenant.readers) == self.leases.is_leased(slot.slot)

    @invariant()
    def books_are_in_order(self) -> None:
        assert [] == self.slab.check() + self.leases.check()
        assert [] == self.arena.check()
        assert sum(rounded(tenant.num_bytes) for tenant in self.tenants) == self.slab.used_bytes
        assert sum(bool(tenant.readers) for tenant in self.tenants) == self.leases.num_leased
        assert sum(tenant.retired for tenant in self.tenants) == self.leases.num_retired


ArenaMachine.TestCase.settings = STEPS
