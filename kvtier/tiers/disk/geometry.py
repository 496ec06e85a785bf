"""How a capacity is divided: segments, index, and room for the small files. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.errors import TierError
from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import record_bytes_for

_MIN_INDEX_BYTES = 512 << 10
_INDEX_SHARE = 256
"""one part of the capacity in this many may be the index file"""
_SMALL_FILES_BYTES = 8 * PAGE_BYTES
"""lock, format and clean, each at most a page, and the new versions that replace them"""
_MAX_SEGMENT_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class Geometry:
    """The division of one capacity. The sum of all files never exceeds ``capacity_bytes``."""

    capacity_bytes: int
    segment_bytes: int
    num_segments: int
    index_bytes: int
    """size of the index file. It is reserved twice: a new index is complete before it replaces the old one."""
    max_entries: int
    """blocks the index can name however its tree is filled"""

    @property
    def pages_per_segment(self) -> int:
        """Places of one segment."""
        return self.segment_bytes // PAGE_BYTES

    def max_blocks(self, num_bytes: int) -> int:
        """How many blocks of ``num_bytes`` fit when there is nothing else."""
        return min(self.num_segments * (self.segment_bytes // record_bytes_for(num_bytes)), self.max_entries)


def _max_entries(index_bytes: int) -> int:
    """Entries that fit while a transaction copies the pages it changes and those of two earlier ones are not free yet.

    An entry takes about 130 bytes in a tree filled in random order.  In a small index a transaction may touch every
    page (4 x 130 bytes); in a large one it touches a bounded number of pages, for which 8 MiB are set aside.
    """
    return max((index_bytes - (64 << 10)) // 640, (index_bytes - (8 << 20)) // 192)


def divide(capacity_bytes: int, segment_bytes: int) -> Geometry:
    """Divides a capacity. Raises TierError where it does not hold one segment and the index, or a size is impossible."""
    if segment_bytes % PAGE_BYTES or not 2 * PAGE_BYTES <= segment_bytes < _MAX_SEGMENT_BYTES:
        raise TierError(f"segment_bytes is {segment_bytes}: it must be a multiple of {PAGE_BYTES}, at least {2 * PAGE_BYTES}, below 4 GiB")
    index_bytes = max(_MIN_INDEX_BYTES, capacity_bytes // _INDEX_SHARE & -PAGE_BYTES)
    num_segments = (capacity_bytes - 2 * index_bytes - _SMALL_FILES_BYTES) // segment_bytes
    if num_segments < 1:
        least = segment_bytes + 2 * _MIN_INDEX_BYTES + _SMALL_FILES_BYTES
        least = max(least, (segment_bytes + _SMALL_FILES_BYTES) * _INDEX_SHARE // (_INDEX_SHARE - 2) + PAGE_BYTES)
        raise TierError(
            f"the disk tier's capacity of {capacity_bytes} bytes does not hold one segment of {segment_bytes} bytes and the index: "
            f"set at least {least} bytes, or smaller segments"
        )
    return Geometry(capacity_bytes, segment_bytes, num_segments, index_bytes, _max_entries(index_bytes))
