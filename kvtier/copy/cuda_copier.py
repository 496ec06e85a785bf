"""Copies blocks between paged KV on a CUDA device and the arena, each batch the way that was measured to be the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.copy.base import BlockCopy
from kvtier.copy.cuda_choice import DIRECTIONS, CopyTable, Direction, Way
from kvtier.copy.cuda_params import SEGMENT, DeviceTable, merged, segment_table
from kvtier.copy.cuda_runs import runs_of
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent, DeviceMemory
from kvtier.copy.cuda_ways import Batch, Bound, BulkCopies, CopySettings, CopyWay, DmaCopies, Lane, StagedCopies
from kvtier.layout import KVLayout

MAX_CHUNK_BYTES = 8192
"""that one warp, or one stage of a bulk kernel, copies at a time"""


@dataclass(frozen=True, slots=True)
class ArenaPlace:
    """Pinned host memory."""

    address: int
    num_bytes: int


class DeviceCopyEvent:
    """The end of a copy, and of what it was ordered after."""

    def __init__(self, event: DeviceEvent, runtime: CudaRuntime, compute_stream: Callable[[], int]) -> None:
        self._event = event
        self._runtime = runtime
        self._compute_stream = compute_stream

    def done(self) -> bool:
        """Whether the copy has finished; never waits."""
        return self._event.done()

    def wait(self) -> None:
        """Waits until the copy has finished."""
        self._event.wait()

    def order_compute(self) -> None:
        """Makes the engine's compute stream wait, not the caller."""
        self._runtime.wait(self._compute_stream(), self._event)


class CudaCopier:
    """A :class:`~kvtier.copy.base.BlockCopier` for one CUDA device. Asynchronous; loads and stores run beside each other.

    Every copy starts after all that the engine had submitted to its compute stream. Where submitting fails half-way, what was
    submitted has ended when the error is raised. The caller keeps alive what ``layout`` and ``arena`` point to.

    Args:
        compute_stream: the stream that the engine computes on at the time of the call
        settings: what a copy may take of the device
        table: what was measured; without it the choice is by piece size alone
        forced: the way to go whatever was measured

    Raises:
        ValueError: ``forced`` is impossible here; says why.
        MemoryError: the staging buffers do not fit into the device's memory.
    """

    is_async = True

    def __init__(
        self,
        layout: KVLayout,
        runtime: CudaRuntime,
        arena: ArenaPlace,
        *,
        compute_stream: Callable[[], int],
        settings: CopySettings | None = None,
        table: CopyTable | None = None,
        forced: Way | None = None,
    ) -> None:
        self._runtime = runtime
        self._arena = arena
        self._compute_stream = compute_stream
        self._num_blocks = layout.num_blocks
        self._block_bytes = layout.block_bytes
        self._lanes = open_lanes(runtime)
        self._segments, device_table = upload_segments(layout, runtime, self._lanes["load"].transfer)
        self._bound = Bound(runtime, settings or CopySettings(), self._lanes, device_table, arena.address)
        self._forced = forced
        self._ways: dict[Way, CopyWay] = {}
        try:
            self.table = self._bind(table or CopyTable())
        except BaseException:
            self.close()
            raise

    def gather(self, copies: Sequence[BlockCopy]) -> DeviceCopyEvent:
        """Engine -> arena. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, "store")

    def scatter(self, copies: Sequence[BlockCopy]) -> DeviceCopyEvent:
        """Arena -> engine. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, "load")

    def choose(self, batch: Batch, direction: Direction) -> Way:
        """The way that a batch goes."""
        runs = runs_of(self._bound.table.rows, batch.block_ids, batch.offsets, self._arena.address)
        return self.table.choose(direction, runs.total_bytes / max(1, len(runs)), forced=self._forced)

    def close(self) -> None:
        """Waits for running copies and gives device memory back. Idempotent."""
        self._drain()
        for way in self._ways.values():
            way.close()
        self._segments.close()

    def _copy(self, copies: Sequence[BlockCopy], direction: Direction) -> DeviceCopyEvent:
        batch = self._checked(copies)
        way = self._ways[self.choose(batch, direction)]
        try:
            event = way.submit(batch, direction, self._runtime.record(self._compute_stream()))
        except BaseException:
            # the caller takes the blocks and slots of a failed copy back at once
            self._drain()
            raise
        return DeviceCopyEvent(event, self._runtime, self._compute_stream)

    def _checked(self, copies: Sequence[BlockCopy]) -> Batch:
        last_offset = self._arena.num_bytes - self._block_bytes
        for copy in copies:
            if not 0 <= copy.block_id < self._num_blocks:
                raise IndexError(f"block id {copy.block_id} is outside [0, {self._num_blocks})")
            if not 0 <= copy.arena_offset <= last_offset:
                raise IndexError(f"a block of {self._block_bytes} bytes at arena offset {copy.arena_offset} is outside the arena")
        block_ids = np.fromiter((copy.block_id for copy in copies), np.int64, len(copies))
        return Batch(block_ids, np.fromiter((copy.arena_offset for copy in copies), np.int64, len(copies)))

    def _bind(self, table: CopyTable) -> CopyTable:
        """Makes the ways that can be chosen; the others are refused in the returned table."""
        self._ways, refused = bind_ways(self._bound)
        bound = CopyTable(table.measured, {**table.refused, **refused})
        for direction in DIRECTIONS:
            bound.choose(direction, self._block_bytes, forced=self._forced)
        return bound

    def _drain(self) -> None:
        for lane in self._lanes.values():
            for stream in (lane.transfer, lane.kernel):
                self._runtime.record(stream).wait()


def open_lanes(runtime: CudaRuntime) -> dict[Direction, Lane]:
    """Streams for both directions; the device prefers those of loads, which requests wait for."""
    return {
        direction: Lane(runtime.open_stream(is_urgent=direction == "load"), runtime.open_stream(is_urgent=direction == "load"))
        for direction in DIRECTIONS
    }


def upload_segments(layout: KVLayout, runtime: CudaRuntime, stream: int) -> tuple[DeviceMemory, DeviceTable]:
    """The layout's table in device memory; the memory must live as long as the table is used."""
    segments = merged(layout).segments
    chunk_bytes = min(MAX_CHUNK_BYTES, -(-max(segment.num_bytes for segment in segments) // 16) * 16)
    rows = segment_table(segments, chunk_bytes)
    memory = runtime.allocate(len(rows) * SEGMENT.itemsize)
    target, source = (np.array([address], np.uint64) for address in (memory.address, rows.ctypes.data))
    runtime.copy(stream, target, source, np.array([rows.nbytes], np.int64))
    runtime.record(stream).wait()
    return memory, DeviceTable(rows, memory.address, chunk_bytes)


def bind_ways(bound: Bound) -> tuple[dict[Way, CopyWay], dict[Way, str]]:
    """The ways that this device and layout allow, and why the others are not allowed."""
    ways: dict[Way, CopyWay] = {Way.DMA: DmaCopies(bound)}
    refused: dict[Way, str] = {}
    for way, make in ((Way.BULK, BulkCopies), (Way.STAGED, StagedCopies)):
        try:
            ways[way] = make(bound)
        except ValueError as error:
            refused[way] = str(error)
    return ways, refused
