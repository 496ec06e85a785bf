"""Places for blocks of several sizes in one address range. Pure: no I/O, no clock, no threads.

The range is divided into *extents*. An extent is cut into slots of one size at a time; when its last slot is freed it
goes back to the common pool, where any size may take it.  Nothing is rounded to powers of two and nothing is moved.

Memory: one byte per slot of an extent in use, 8 to 36 bytes more while a slot that was used is free again, and about
400 bytes per extent.
"""

from __future__ import annotations

from kvtier.errors import InvariantError

PAGE_BYTES = 4096
EXTENT_BYTES = 64 << 20
"""of host memory"""
"""slot sizes and offsets are multiples of this"""


def slot_bytes_for(num_bytes: int) -> int:
    """Size of the slot that holds ``num_bytes``: rounded up to whole pages. Raises ValueError below 1 byte."""
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, not {num_bytes}")
    return (num_bytes + 4095) & -4096


class _SizeClass:
    """All extents that are cut into slots of one size."""

    __slots__ = ("num_free", "num_slots", "open", "slot_bytes")

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = 0
        self.num_free = 0
        self.open: list[_Extent] = []
        """extents with at least one free slot; the last one is served first"""


_NOBODY = _SizeClass(0)


class _Extent:
    """One extent. Every slot below ``next_slot`` that is not taken is in ``free``; from there on those adopted and freed."""

    __slots__ = ("base", "free", "index", "next_slot", "num_free", "num_slots", "owner", "position", "slot_bytes", "taken")

    def __init__(self, index: int, base: int) -> None:
        self.index = index
        self.base = base
        self.owner = _NOBODY
        self.slot_bytes = 1
        self.num_slots = 0
        self.num_free = 0
        self.next_slot = 0
        self.position = -1
        """place in the pool or in the owner's ``open``; meaningless while in neither"""
        self.free: list[int] = []
        self.taken = bytearray()


def _push(extents: list[_Extent], extent: _Extent) -> None:
    extent.position = len(extents)
    extents.append(extent)


def _remove(extents: list[_Extent], extent: _Extent) -> None:
    """Takes ``extent`` out of an unordered list in O(1): the last one moves to its place."""
    last = extents.pop()
    if last is not extent:
        last.position = extent.position
        extents[last.position] = last


class SlabAllocator:
    """Hands out offsets of slots. Every call is O(1) unless it says otherwise; not thread-safe.

    Offsets are multiples of 4096 and ascend as long as nothing was freed.  The end of the range that is shorter than an
    extent is used as well, for the sizes that fit there.  A size above ``extent_bytes`` never fits (``max_slots`` is 0).

    >>> slab = SlabAllocator(1 << 20, 1 << 16)
    >>> slab.allocate(5000), slab.allocate(5000), slab.available(5000)
    (0, 8192, 126)
    """

    __slots__ = ("_classes", "_extents", "_limit_bytes", "_num_whole", "_pool", "capacity_bytes", "extent_bytes")

    def __init__(self, capacity_bytes: int, extent_bytes: int, *, limit_bytes: int | None = None) -> None:
        """``limit_bytes``: nothing at or above it is handed out until ``set_limit`` raises it (default: the capacity).

        Raises ValueError where ``extent_bytes`` is not a positive multiple of 4096 or another size is negative.
        """
        if extent_bytes <= 0 or extent_bytes % PAGE_BYTES:
            raise ValueError(f"extent_bytes must be a positive multiple of {PAGE_BYTES}, not {extent_bytes}")
        if capacity_bytes < 0 or (limit_bytes is not None and limit_bytes < 0):
            raise ValueError(f"capacity_bytes and limit_bytes must not be negative, got {capacity_bytes} and {limit_bytes}")
        self.capacity_bytes = capacity_bytes
        self.extent_bytes = extent_bytes
        self._limit_bytes = capacity_bytes if limit_bytes is None else min(limit_bytes, capacity_bytes)
        self._num_whole = self._limit_bytes // extent_bytes
        """extents that lie below the limit as a whole; the next one, the *tail*, may lie there in part"""
        self._extents: list[_Extent] = []
        self._pool: list[_Extent] = []
        """whole extents that belong to no size and were used before; those not in ``_extents`` yet are free as well"""
        self._classes: dict[int, _SizeClass] = {}

    @classmethod
    def of_host(cls, capacity_bytes: int, block_bytes: int, *, limit_bytes: int | None = None) -> SlabAllocator:
        """The allocator of a host tier whose blocks mostly have this size."""
        capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        return cls(capacity_bytes, max(min(EXTENT_BYTES, capacity_bytes), slot_bytes_for(block_bytes)), limit_bytes=limit_bytes)

    @property
    def limit_bytes(self) -> int:
        """Every slot handed out ends at or below this."""
        return self._limit_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all live slots. O(sizes)."""
        return sum((c.num_slots - c.num_free) * c.slot_bytes for c in self._classes.values())

    def set_limit(self, limit_bytes: int) -> None:
        """Raises the limit, at most to the capacity. A value that is not above the present one changes nothing."""
        limit_bytes = min(limit_bytes, self.capacity_bytes)
        if limit_bytes <= self._limit_bytes:
            return
        tail_index = self._num_whole
        self._limit_bytes = limit_bytes
        self._num_whole = limit_bytes // self.extent_bytes
        if tail_index >= len(self._extents):
            return
        tail = self._extents[tail_index]
        if tail.owner is _NOBODY:
            if tail_index < self._num_whole:
                _push(self._pool, tail)
            return
        grown = self._usable_bytes(tail_index) // tail.slot_bytes - tail.num_slots
        tail.num_slots += grown
        tail.owner.num_slots += grown
        tail.owner.num_free += grown
        if grown and not tail.num_free:
            _push(tail.owner.open, tail)
        tail.num_free += grown

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a slot of at least ``num_bytes``, or None where nothing is free. Raises ValueError below 1 byte."""
        try:
            size_class = self._classes[(num_bytes + 4095) & -4096]
            extent = size_class.open[-1]
        except LookupError:
            widened = self._widen(num_bytes)
            if widened is None:
                return None
            size_class = widened
            extent = size_class.open[-1]
        if extent.free:
            slot = extent.free.pop()
        else:
            slot = extent.next_slot
            while extent.taken[slot]:
                slot += 1  # adopted
            extent.next_slot = slot + 1
        extent.taken[slot] = 1
        size_class.num_free -= 1
        extent.num_free = num_free = extent.num_free - 1
        if not num_free:
            size_class.open.pop()
        return extent.base + slot * extent.slot_bytes

    def free(self, offset: int) -> None:
        """Gives a slot back. Raises InvariantError where ``offset`` is not a live slot."""
        try:
            extent = self._extents[offset // self.extent_bytes]
            slot_bytes = extent.slot_bytes
            distance = offset - extent.base
            slot = distance // slot_bytes
            is_live = extent.taken[slot] and slot * slot_bytes == distance and offset >= 0
        except (IndexError, ZeroDivisionError):
            is_live = False
        if not is_live:
            raise InvariantError(f"offset {offset} was freed, but no slot is live there")
        extent.taken[slot] = 0
        owner = extent.owner
        owner.num_free += 1
        extent.num_free = num_free = extent.num_free + 1
        if num_free == 1:
            extent.position = len(owner.open)
            owner.open.append(extent)
        if num_free == extent.num_slots:
            self._give_back(extent, owner)
        else:
            extent.free.append(slot)

    def available(self, num_bytes: int) -> int:
        """How many slots for ``num_bytes`` can still be allocated when nothing is freed."""
        slot_bytes = slot_bytes_for(num_bytes)
        size_class = self._classes.get(slot_bytes)
        num_free = size_class.num_free if size_class is not None else 0
        num_unowned = len(self._pool) + max(0, self._num_whole - len(self._extents))
        num_free += num_unowned * (self.extent_bytes // slot_bytes)
        if len(self._extents) <= self._num_whole or self._extents[self._num_whole].owner is _NOBODY:
            num_free += self._usable_bytes(self._num_whole) // slot_bytes
        return num_free

    def max_slots(self, num_bytes: int) -> int:
        """How many slots for ``num_bytes`` fit into the whole capacity when nothing else is there."""
        slot_bytes = slot_bytes_for(num_bytes)
        num_whole, rest_bytes = divmod(self.capacity_bytes, self.extent_bytes)
        return num_whole * (self.extent_bytes // slot_bytes) + rest_bytes // slot_bytes

    def crowded_out(self, num_bytes: int) -> list[int]:
        """Live offsets of the extent with the fewest live bytes that belongs to another size and where ``num_bytes`` fit.

        Freeing them all makes room for ``num_bytes``.  Empty where there is no such extent.  O(extents).
        """
        slot_bytes = slot_bytes_for(num_bytes)
        emptiest: _Extent | None = None
        fewest_bytes = self.extent_bytes + 1
        for extent in self._extents:
            live_bytes = (extent.num_slots - extent.num_free) * extent.slot_bytes
            if extent.owner is _NOBODY or extent.slot_bytes == slot_bytes or live_bytes >= fewest_bytes:
                continue
            if self._usable_bytes(extent.index) >= slot_bytes:
                emptiest, fewest_bytes = extent, live_bytes
        if emptiest is None:
            return []
        return [emptiest.base + slot * emptiest.slot_bytes for slot, is_taken in enumerate(emptiest.taken) if is_taken]

    def adopt(self, offset: int, num_bytes: int) -> None:
        """Marks the slot of ``num_bytes`` at ``offset`` as handed out, for recovery. Right after construction O(1).

        Raises ValueError where it is taken, above the limit, not on the grid of its extent, or its extent has another size.
        """
        slot_bytes = slot_bytes_for(num_bytes)
        index, distance = divmod(offset, self.extent_bytes)
        slot, rest = divmod(distance, slot_bytes)
        if rest or offset < 0 or distance + slot_bytes > self._usable_bytes(index):
            raise ValueError(f"no slot of {num_bytes} bytes can start at {offset}")
        while len(self._extents) <= index:
            extent = self._new_extent()
            if extent.index < self._num_whole:
                _push(self._pool, extent)
        extent = self._extents[index]
        if extent.owner is _NOBODY:
            if index < self._num_whole:
                _remove(self._pool, extent)
            self._assign(extent, slot_bytes)
        elif extent.slot_bytes != slot_bytes:
            raise ValueError(f"offset {offset} lies in an extent of {extent.slot_bytes}-byte slots, not {slot_bytes}")
        owner = extent.owner
        if extent.taken[slot]:
            raise ValueError(f"the slot at {offset} is taken")
        if slot in extent.free:  # O(slots of an extent), but only where some were freed before
            extent.free.remove(slot)
        extent.taken[slot] = 1
        extent.num_free -= 1
        owner.num_free -= 1
        if not extent.num_free:
            _remove(owner.open, extent)

    def check(self) -> list[str]:
        """Every broken promise in words; empty = healthy. O(slots)."""
        problems = [problem for extent in self._extents for problem in self._check_extent(extent)]
        for size_class in self._classes.values():
            owned = [extent for extent in self._extents if extent.owner is size_class]
            counted = sum(extent.num_slots for extent in owned), sum(extent.num_free for extent in owned)
            if counted != (size_class.num_slots, size_class.num_free):
                problems.append(f"size {size_class.slot_bytes}: slots and free slots miscounted, really {counted}")
            problems += self._check_list(f"open extents of size {size_class.slot_bytes}", size_class.open)
        problems += self._check_list("pool", self._pool)
        return problems

    def _check_extent(self, extent: _Extent) -> list[str]:
        problems = []
        num_live = extent.num_slots - extent.num_free
        if num_live != sum(extent.taken):
            problems.append(f"extent {extent.index}: {num_live} live slots counted, {sum(extent.taken)} marked")
        if extent.owner is _NOBODY:
            is_pooled = self._is_listed(self._pool, extent)
            if num_live or is_pooled != (extent.index < self._num_whole):
                problems.append(f"extent {extent.index}: unowned, but live or not where unowned extents are")
            return problems
        free = set(extent.free)
        is_complete = all(extent.taken[slot] or slot in free for slot in range(extent.next_slot))
        if not is_complete or len(extent.free) != len(free) or any(extent.taken[slot] for slot in free):
            problems.append(f"extent {extent.index}: the free list is not the slots that are free")
        if not 0 < num_live <= extent.num_slots or extent.num_slots * extent.slot_bytes > self._usable_bytes(extent.index):
            problems.append(f"extent {extent.index}: {num_live} live of {extent.num_slots} slots")
        if self._is_listed(extent.owner.open, extent) != (extent.num_free > 0):
            problems.append(f"extent {extent.index}: not listed as what it is, full or open")
        return problems

    @staticmethod
    def _is_listed(extents: list[_Extent], extent: _Extent) -> bool:
        return 0 <= extent.position < len(extents) and extents[extent.position] is extent

    @staticmethod
    def _check_list(name: str, extents: list[_Extent]) -> list[str]:
        return [f"{name}: extent {e.index} misplaced" for place, e in enumerate(extents) if e.position != place]

    def _usable_bytes(self, index: int) -> int:
        """Bytes of the extent below the limit."""
        return max(0, min(self.extent_bytes, self._limit_bytes - index * self.extent_bytes))

    def _new_extent(self) -> _Extent:
        extent = _Extent(len(self._extents), len(self._extents) * self.extent_bytes)
        self._extents.append(extent)
        return extent

    def _widen(self, num_bytes: int) -> _SizeClass | None:
        """Gives another extent to the size of ``num_bytes``; None where there is none that fits."""
        slot_bytes = slot_bytes_for(num_bytes)
        if slot_bytes > self.extent_bytes:
            return None
        if self._pool:
            return self._assign(self._pool.pop(), slot_bytes)
        if len(self._extents) < self._num_whole:
            return self._assign(self._new_extent(), slot_bytes)
        if self._usable_bytes(self._num_whole) < slot_bytes:
            return None
        tail = self._extents[self._num_whole] if len(self._extents) > self._num_whole else self._new_extent()
        return self._assign(tail, slot_bytes) if tail.owner is _NOBODY else None

    def _assign(self, extent: _Extent, slot_bytes: int) -> _SizeClass:
        """Cuts an unowned extent, which is in no list, into slots of one size and opens it."""
        size_class = self._classes.get(slot_bytes)
        if size_class is None:
            size_class = self._classes[slot_bytes] = _SizeClass(slot_bytes)
        if extent.slot_bytes != slot_bytes:
            extent.slot_bytes = slot_bytes
            # one more than fit, so that an offset in the unusable rest of the extent is an index too
            extent.taken = bytearray(self.extent_bytes // slot_bytes + 1)
        extent.owner = size_class
        extent.num_slots = extent.num_free = self._usable_bytes(extent.index) // slot_bytes
        size_class.num_slots += extent.num_slots
        size_class.num_free += extent.num_slots
        _push(size_class.open, extent)
        return size_class

    def _give_back(self, extent: _Extent, owner: _SizeClass) -> None:
        """Returns an extent without live slots to the common pool; the next tenant starts with ascending slots."""
        _remove(owner.open, extent)
        owner.num_slots -= extent.num_slots
        owner.num_free -= extent.num_slots
        extent.owner = _NOBODY
        extent.num_slots = extent.num_free = 0
        extent.free.clear()
        extent.next_slot = 0
        if extent.index < self._num_whole:
            _push(self._pool, extent)
