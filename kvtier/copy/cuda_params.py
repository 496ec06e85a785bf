"""The parameter structs of the CUDA kernels as numpy records, and the table of segments that lies in device memory.

``csrc/cuda/paged_index.h`` declares the same structs; a test compares them member by member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.copy.cuda_runs import Ints
from kvtier.layout import KVLayout, Segment

MAX_BLOCKS = 512
"""of one launch of a copy kernel"""

BULK_CAPABILITY = 90
"""the first compute capability with the bulk copy engine, as 10 * major + minor"""

MIN_STAGES, MAX_STAGES = 3, 16
"""of one warp of the bulk kernel"""

Record = np.ndarray[Any, np.dtype[np.void]]
"""one element, or a table, of one of the types below"""

SEGMENT = np.dtype([("base", "<u8"), ("stride", "<i8"), ("num_bytes", "<i8"), ("slot_offset", "<i8"), ("first_chunk", "<i8")])

PAGED_COPY = np.dtype(
    [
        ("segments", "<u8"),
        ("contiguous", "<u8"),
        ("num_segments", "<i8"),
        ("num_blocks", "<i8"),
        ("chunk_bytes", "<i8"),
        ("chunks_per_block", "<i8"),
        ("to_paged", "<i8"),
        ("num_stages", "<i8"),
        ("block_ids", "<i8", (MAX_BLOCKS,)),
        ("offsets", "<i8", (MAX_BLOCKS,)),
    ]
)

BULK_SHARED_BYTES = 99 << 10
"""of a bulk kernel's block: what every device with the bulk copy engine has"""
BULK_STAGE_BYTES = 32
"""of shared memory, for each stage beside its chunk"""
BULK_MAX_WARPS = 16


@dataclass(frozen=True, slots=True)
class BulkRing:
    """The shared memory of a bulk kernel's block: rings of stages of one chunk each, one ring a warp."""

    num_warps: int
    num_stages: int
    """of each warp"""
    chunk_bytes: int

    @classmethod
    def of(cls, chunk_bytes: int) -> BulkRing:
        """As many warps as there can be with three stages each: two chunks that arrive and one that leaves.

        Raises:
            ValueError: not even one warp's stages fit.
        """
        total = BULK_SHARED_BYTES // (chunk_bytes + BULK_STAGE_BYTES)
        if total < MIN_STAGES:
            raise ValueError(f"{MIN_STAGES} stages of {chunk_bytes} bytes do not fit into {BULK_SHARED_BYTES} bytes")
        num_warps = min(BULK_MAX_WARPS, total // MIN_STAGES)
        return cls(num_warps, min(MAX_STAGES, total // num_warps), chunk_bytes)

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.num_warps * self.num_stages * (self.chunk_bytes + BULK_STAGE_BYTES)


@dataclass(frozen=True, slots=True)
class DeviceTable:
    """A layout's segments, or neighbouring ones of them, as the kernels read them."""

    rows: Record
    address: int
    """of the first row, in device memory"""
    chunk_bytes: int

    def part(self, first: int, stop: int) -> DeviceTable:
        """Some of the rows. They keep their chunk numbers and offsets; the kernels count from the first row's."""
        return DeviceTable(self.rows[first:stop], self.address + first * SEGMENT.itemsize, self.chunk_bytes)


def merged(layout: KVLayout) -> KVLayout:
    """The same bytes in fewer segments: neighbours that lie side by side in every block become one."""
    segments: list[Segment] = []
    for segment in layout.segments:
        last = segments[-1] if segments else None
        if last and last.base_address + last.num_bytes == segment.base_address and last.stride_bytes == segment.stride_bytes:
            total = last.num_bytes + segment.num_bytes
            if total <= last.stride_bytes:
                segments[-1] = Segment(last.base_address, last.stride_bytes, total)
                continue
        segments.append(segment)
    return KVLayout(tuple(segments), layout.num_blocks)


def segment_table(segments: Sequence[Segment], chunk_bytes: int) -> Record:
    """The kernels' table: where each segment lies in a slot, and how many chunks come before it."""
    table = np.zeros(len(segments), SEGMENT)
    slot_offset = first_chunk = 0
    for index, segment in enumerate(segments):
        table[index] = (segment.base_address, segment.stride_bytes, segment.num_bytes, slot_offset, first_chunk)
        slot_offset += segment.num_bytes
        first_chunk += num_chunks(segment.num_bytes, chunk_bytes)
    return table


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    """Chunks of one run of bytes; the last may be shorter."""
    return -(-num_bytes // chunk_bytes)


def paged_copy(table: DeviceTable, contiguous: int, block_ids: Ints, offsets: Ints, *, to_paged: bool, num_stages: int = 0) -> Record:
    """The parameters of a copy kernel.

    Args:
        table: the segments to copy; the first of them lies at each block's offset
        contiguous: address of the arena or of a staging buffer
        block_ids: at most :data:`MAX_BLOCKS`
        offsets: of each block's bytes, from ``contiguous``
        num_stages: of the bulk kernel's ring
    """
    rows, chunk_bytes = table.rows, table.chunk_bytes
    copy = np.zeros(1, PAGED_COPY)
    one = copy[0]
    one["segments"], one["contiguous"] = table.address, contiguous
    one["num_segments"], one["num_blocks"] = len(rows), len(block_ids)
    one["chunk_bytes"], one["num_stages"], one["to_paged"] = chunk_bytes, num_stages, to_paged
    one["chunks_per_block"] = int(rows["first_chunk"][-1] - rows["first_chunk"][0]) + num_chunks(int(rows["num_bytes"][-1]), chunk_bytes)
    one["block_ids"][: len(block_ids)] = block_ids
    one["offsets"][: len(offsets)] = offsets
    return copy
