"""Which block lies where in RAM: the index that is asked, and the places of its blocks. Not thread-safe, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvtier.io import PAGE_BYTES
from kvtier.memory.slab import SlabAllocator
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.tiers.disk.geometry import Geometry
from kvtier.types import BlockKey, BlockMeta


class Entry(NamedTuple):
    """What the index knows of a readable block. About 250 bytes with its key and its share of the dict and of the segment."""

    place: int
    num_bytes: int
    sequence: int
    parent: BlockKey | None
    namespace: bytes


class _Tenants:
    """The keys in the slots of one segment."""

    __slots__ = ("keys", "num_live", "record_pages")

    def __init__(self, record_pages: int, pages_per_segment: int) -> None:
        self.record_pages = record_pages
        self.keys: list[BlockKey | None] = [None] * (pages_per_segment // record_pages)
        self.num_live = 0


class Places:
    """Hands out places of records and remembers who lives there, readable or still being written."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._pages_per_segment = geometry.pages_per_segment
        self._allocator = SlabAllocator(geometry.num_segments * geometry.segment_bytes, geometry.segment_bytes)
        self._tenants: dict[int, _Tenants] = {}
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    def take(self, key: BlockKey, num_bytes: int) -> int | None:
        """A place for a block's record, or None where its size has no free slot and may have no further segment."""
        if self._num_live >= self._geometry.max_entries:
            return None
        record_bytes = record_bytes_for(num_bytes)
        offset = self._allocator.allocate(record_bytes)
        if offset is None:
            return None
        place = offset // PAGE_BYTES
        self._settle(key, place, record_bytes)
        return place

    def adopt(self, key: BlockKey, place: int, num_bytes: int) -> bool:
        """Marks a place as taken, at recovery. False where no such record can be there."""
        record_bytes = record_bytes_for(num_bytes)
        if self._num_live >= self._geometry.max_entries or not num_bytes:
            return False
        try:
            self._allocator.adopt(place * PAGE_BYTES, record_bytes)
        except ValueError:
            return False
        self._settle(key, place, record_bytes)
        return True

    def give_back(self, place: int) -> None:
        """Frees a place for the next ``take``."""
        segment, page = divmod(place, self._pages_per_segment)
        tenants = self._tenants[segment]
        tenants.keys[page // tenants.record_pages] = None
        tenants.num_live -= 1
        if not tenants.num_live:
            del self._tenants[segment]
        self._num_live -= 1
        self._allocator.free(place * PAGE_BYTES)

    def crowded_out(self, num_bytes: int) -> list[BlockKey]:
        """The blocks to drop so that a size without a free slot gets a segment of another one; empty where nothing would help.

        Only an engine of before stored blocks of another size. Nobody else makes room among them.
        """
        record_bytes = record_bytes_for(num_bytes)
        if record_bytes > self._geometry.segment_bytes:
            return []
        return [self._key_at(offset // PAGE_BYTES) for offset in self._allocator.crowded_out(record_bytes)]

    def check(self) -> list[str]:
        """Broken promises in words."""
        problems = self._allocator.check()
        if sum(tenants.num_live for tenants in self._tenants.values()) != self._num_live:
            problems.append("the segments' tenants are miscounted")
        return problems

    def _key_at(self, place: int) -> BlockKey:
        segment, page = divmod(place, self._pages_per_segment)
        tenants = self._tenants[segment]
        key = tenants.keys[page // tenants.record_pages]
        assert key is not None, "the allocator and the tenants disagree"
        return key

    def _settle(self, key: BlockKey, place: int, record_bytes: int) -> None:
        segment, page = divmod(place, self._pages_per_segment)
        tenants = self._tenants.get(segment)
        if tenants is None:
            tenants = self._tenants[segment] = _Tenants(record_bytes // PAGE_BYTES, self._pages_per_segment)
        tenants.keys[page // tenants.record_pages] = key
        tenants.num_live += 1
        self._num_live += 1


def metas(index: dict[BlockKey, Entry]) -> Iterator[BlockMeta]:
    """The blocks of an index, in its order."""
    for key, entry in list(index.items()):
        yield BlockMeta(key, entry.parent, entry.num_bytes)
