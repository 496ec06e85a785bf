"""The slab allocator keeps its promises under every order of calls, and stays small and fast."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from kvtier.errors import InvariantError
from kvtier.memory.slab import PAGE_BYTES, SlabAllocator
from kvtier.testing.arena_machine import SlabMachine

TestSlab = SlabMachine.TestCase

EXTENT_BYTES = 16 * PAGE_BYTES


def fill(slab: SlabAllocator, num_bytes: int) -> list[int]:
    """Allocates until nothing is left."""
    return [offset for _ in range(slab.available(num_bytes)) if (offset := slab.allocate(num_bytes)) is not None]


def test_offsets_ascend_while_nothing_was_freed() -> None:
    """A fresh slab hands out its range from the start, so that what was reserved first is used first."""
    slab = SlabAllocator(4 * EXTENT_BYTES, EXTENT_BYTES)
    offsets = fill(slab, 3 * PAGE_BYTES)
    assert sorted(offsets) == offsets
    assert 4 * 5 == len(offsets) == slab.max_slots(3 * PAGE_BYTES)


@pytest.mark.parametrize(("capacity_bytes", "extent_bytes"), [(1, 0), (1, 4095), (1, -4096), (-1, 4096)])
def test_impossible_sizes_are_refused(capacity_bytes: int, extent_bytes: int) -> None:
    """Extents are whole pages, and nothing is negative."""
    with pytest.raises(ValueError, match="_bytes must"):
        SlabAllocator(capacity_bytes, extent_bytes)


@pytest.mark.parametrize("num_bytes", [0, -1, -5000])
def test_nothing_cannot_be_allocated(num_bytes: int) -> None:
    """A slot has at least one byte."""
    with pytest.raises(ValueError, match="num_bytes must be positive"):
        SlabAllocator(EXTENT_BYTES, EXTENT_BYTES).allocate(num_bytes)


def test_a_block_larger_than_everything_has_no_slot() -> None:
    """``max_slots`` tells the caller so at start, and nothing is handed out."""
    slab = SlabAllocator(EXTENT_BYTES, EXTENT_BYTES)
    assert 0 == slab.max_slots(EXTENT_BYTES + 1) == slab.available(EXTENT_BYTES + 1)
    assert slab.allocate(EXTENT_BYTES + 1) is None


def test_the_short_end_is_used() -> None:
    """The rest of the capacity that is no whole extent takes the sizes that fit there."""
    slab = SlabAllocator(EXTENT_BYTES + 2 * PAGE_BYTES, EXTENT_BYTES)
    assert 18 == len(fill(slab, PAGE_BYTES))
    other = SlabAllocator(EXTENT_BYTES + 2 * PAGE_BYTES, EXTENT_BYTES)
    assert 1 == len(fill(other, EXTENT_BYTES))
    assert [EXTENT_BYTES] == fill(other, 2 * PAGE_BYTES)


def test_an_empty_extent_serves_another_size() -> None:
    """The last free of an extent gives it back to all sizes."""
    slab = SlabAllocator(2 * EXTENT_BYTES, EXTENT_BYTES)
    small = fill(slab, PAGE_BYTES)
    assert slab.allocate(EXTENT_BYTES) is None
    for offset in small[:16]:
        slab.free(offset)
    assert 0 == slab.allocate(EXTENT_BYTES)


@pytest.mark.parametrize("emptier", [0, 1, 2])
def test_crowding_out_names_the_emptiest_extent(emptier: int) -> None:
    """Freeing what ``crowded_out`` names makes room, at the smallest loss."""
    slab = SlabAllocator(3 * EXTENT_BYTES, EXTENT_BYTES)
    small = fill(slab, PAGE_BYTES)
    slab.free(small[16 * emptier + 4])
    expected = small[16 * emptier : 16 * emptier + 4] + small[16 * emptier + 5 : 16 * emptier + 16]
    assert expected == slab.crowded_out(EXTENT_BYTES)
    assert [] == slab.crowded_out(PAGE_BYTES)
    for offset in expected:
        slab.free(offset)
    assert emptier * EXTENT_BYTES == slab.allocate(EXTENT_BYTES)


def test_the_limit_only_grows() -> None:
    """Nothing above the limit is handed out, and a lower limit changes nothing."""
    slab = SlabAllocator(2 * EXTENT_BYTES, EXTENT_BYTES, limit_bytes=3 * PAGE_BYTES)
    assert 3 == len(fill(slab, PAGE_BYTES))
    slab.set_limit(PAGE_BYTES)
    assert 3 * PAGE_BYTES == slab.limit_bytes
    slab.set_limit(EXTENT_BYTES + PAGE_BYTES)
    assert 14 == len(fill(slab, PAGE_BYTES))
    slab.set_limit(1 << 40)
    assert 2 * EXTENT_BYTES == slab.limit_bytes
    assert 15 == len(fill(slab, PAGE_BYTES))


@pytest.mark.parametrize("offset", [-PAGE_BYTES, 0, 1, PAGE_BYTES, 5 * EXTENT_BYTES, 1 << 60, -(1 << 60)])
def test_freeing_what_is_not_live_is_a_bug(offset: int) -> None:
    """A double free or an unknown offset raises, before anything changes."""
    slab = SlabAllocator(2 * EXTENT_BYTES, EXTENT_BYTES)
    slab.allocate(PAGE_BYTES)
    slab.allocate(PAGE_BYTES)
    slab.free(0)
    if offset == PAGE_BYTES:
        slab.free(offset)
    with pytest.raises(InvariantError, match="was freed"):
        slab.free(offset)
    assert [] == slab.check()


@pytest.mark.parametrize("num_extents", [1, 2, 4])
def test_a_negative_offset_is_never_live(num_extents: int) -> None:
    """Offsets are not counted from the end, even where every slot is live."""
    slab = SlabAllocator(num_extents * EXTENT_BYTES, EXTENT_BYTES)
    fill(slab, PAGE_BYTES)
    for page in range(-80, 0):
        with pytest.raises(InvariantError, match="was freed"):
            slab.free(page * PAGE_BYTES)
    assert [] == slab.check()


def test_recovery_in_any_order() -> None:
    """A slab that adopts the live slots of another one in random order can hand out exactly the others."""
    rng = random.Random(1)
    first = SlabAllocator(8 * EXTENT_BYTES, EXTENT_BYTES)
    live = dict.fromkeys(fill(first, PAGE_BYTES)[:70], PAGE_BYTES)
    live |= dict.fromkeys(fill(first, 3 * PAGE_BYTES), 3 * PAGE_BYTES)
    kept = rng.sample(sorted(live), 50)
    second = SlabAllocator(8 * EXTENT_BYTES, EXTENT_BYTES)
    for offset in kept:
        second.adopt(offset, live[offset])
    assert [] == second.check()
    new = fill(second, PAGE_BYTES) + fill(second, 3 * PAGE_BYTES)
    assert not set(new) & set(kept)
    assert [] == second.check()


def test_an_adopted_slot_can_be_adopted_again() -> None:
    """A slot that was adopted, freed and adopted again is nobody else's."""
    slab = SlabAllocator(EXTENT_BYTES, EXTENT_BYTES)
    slab.adopt(0, PAGE_BYTES)
    slab.adopt(PAGE_BYTES, PAGE_BYTES)
    slab.free(0)
    slab.adopt(0, PAGE_BYTES)
    assert [number * PAGE_BYTES for number in range(2, 16)] == sorted(fill(slab, PAGE_BYTES))
    assert [] == slab.check()


def test_check_finds_a_broken_book() -> None:
    """``check`` names what does not add up."""
    slab = SlabAllocator(2 * EXTENT_BYTES, EXTENT_BYTES)
    slab.allocate(PAGE_BYTES)
    slab._extents[0].taken[3] = 1
    assert any("extent 0" in problem for problem in slab.check())


def test_memory_per_live_slot_is_a_byte() -> None:
    """Live slots cost the allocator about a byte each: no object per slot."""
    num_slots = 100_000
    tracemalloc.start()
    slab = SlabAllocator(num_slots * 4 * PAGE_BYTES, 64 << 20)
    last = 0
    for _ in range(num_slots):
        last = slab.allocate(4 * PAGE_BYTES) or 0
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (num_slots - 1) * 4 * PAGE_BYTES == last
    assert 1.5 * num_slots > num_bytes


def pair_ns(num_slots: int) -> float:
    """Best time of a free and an allocate in a full slab of ``num_slots``."""
    slab = SlabAllocator(num_slots * 4 * PAGE_BYTES, 1000 * 4 * PAGE_BYTES)
    for _ in range(num_slots):
        slab.allocate(4 * PAGE_BYTES)
    offsets = [number * (num_slots // 5000) * 4 * PAGE_BYTES for number in range(5000)]
    best = float("inf")
    for _ in range(5):
        start = time.thread_time_ns()
        for offset in offsets:
            slab.free(offset)
            slab.allocate(4 * PAGE_BYTES)
        best = min(best, (time.thread_time_ns() - start) / len(offsets))
    return best


def test_the_cost_does_not_depend_on_the_number_of_slots() -> None:
    """Free and allocate take the same time with ten thousand slots and with half a million, at least when nobody else needs the machine."""
    assert any(2 * pair_ns(10_000) > pair_ns(500_000) for _ in range(5))
