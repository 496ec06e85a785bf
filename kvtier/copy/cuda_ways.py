"""The ways of copying blocks between paged KV on a CUDA device and host memory, or a pool on the device.

Each direction has a lane of two streams, so that copies by the copy engines and kernels overlap, and loads never queue behind
stores. What a way submits to a lane is in order with everything that was submitted to that lane before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kvtier.copy.cuda_choice import Direction, Way
from kvtier.copy.cuda_params import BULK_CAPABILITY, MAX_BLOCKS, BulkRing, DeviceTable, paged_copy
from kvtier.copy.cuda_runs import Addresses, Ints, Runs, joined, runs_of
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent, DeviceMemory, Launch

MIN_SLICE_BYTES = 64 << 10
MAX_SLICE_BYTES = 16 << 20
MAX_THREAD_BLOCKS = 1024
COPY_THREADS = 512
WARP_THREADS = 32


@dataclass(frozen=True, slots=True)
class CopySettings:
    """How much a copy may take of a device.

    Raises:
        ValueError: a setting is out of bounds; names it, its value and the bounds.
    """

    slice_bytes: int = 8 << 20
    """the most that is submitted at a time; also the size of a staging buffer"""
    num_buffers: int = 3
    """staging buffers of each direction"""
    num_blocks: int = 4
    """thread blocks of a kernel: no more multiprocessors than this are busy with it"""

    def __post_init__(self) -> None:
        bounds = (
            ("slice_bytes", self.slice_bytes, MIN_SLICE_BYTES, MAX_SLICE_BYTES),
            ("num_buffers", self.num_buffers, 2, 16),
            ("num_blocks", self.num_blocks, 1, MAX_THREAD_BLOCKS),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; allowed: {low} to {high}")


@dataclass(frozen=True, slots=True)
class Lane:
    """The streams of one direction."""

    transfer: int
    """for the copy engines"""
    kernel: int


@dataclass(frozen=True, slots=True)
class Bound:
    """What the ways of one copier share."""

    runtime: CudaRuntime
    settings: CopySettings
    lanes: Mapping[Direction, Lane]
    table: DeviceTable
    arena_address: int
    is_on_device: bool = False
    """the arena is device memory, not the host's"""

    @property
    def block_bytes(self) -> int:
        """Bytes of one engine block, as far as the table goes."""
        return int(self.table.rows["num_bytes"].sum())

    @property
    def blocks_per_slice(self) -> int:
        """Blocks that are submitted at a time; one, if need be larger than a slice."""
        return max(1, self.settings.slice_bytes // self.block_bytes)

    def part(self, first: int, stop: int) -> Bound:
        """The same for some neighbouring segments: of every block their bytes alone."""
        moved = int(self.table.rows["slot_offset"][first] - self.table.rows["slot_offset"][0])
        return replace(self, table=self.table.part(first, stop), arena_address=self.arena_address + moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks to copy, and where each starts in the arena."""

    block_ids: Ints
    offsets: Ints

    def part(self, start: int, stop: int) -> Batch:
        """Some of the blocks."""
        return Batch(self.block_ids[start:stop], self.offsets[start:stop])

    def parts(self, size: int) -> Iterator[Batch]:
        """All blocks in order, at most ``size`` at a time."""
        return (self.part(start, start + size) for start in range(0, len(self), size))

    def __len__(self) -> int:
        return len(self.block_ids)


class CopyWay(Protocol):
    """One way of copying, bound to a layout and an arena."""

    way: Way

    def submit(self, batch: Batch, direction: Direction, after: DeviceEvent) -> DeviceEvent:
        """Starts the copies; the returned event is their end. They touch paged memory only after ``after``."""


class DmaCopies:
    """The copy engines, told of all runs at once. The best for large runs; costs no multiprocessor."""

    way = Way.DMA

    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    def submit(self, batch: Batch, direction: Direction, after: DeviceEvent) -> DeviceEvent:
        bound, stream = self._bound, self._bound.lanes[direction].transfer
        bound.runtime.wait(stream, after)
        for part in batch.parts(bound.blocks_per_slice):  # so that the first copy starts before the last one is worked out
            runs = runs_of(bound.table.rows, part.block_ids, part.offsets, bound.arena_address)
            for few in runs.slices(bound.settings.slice_bytes):
                bound.runtime.copy(stream, *_ends(few, direction), few.num_bytes)
        return bound.runtime.record(stream)


class BulkCopies:
    """A kernel straight between host memory and the pages, which lets the bulk copy engine do the work.

    Raises:
        ValueError: the device or the layout does not allow it; says what.
    """

    way = Way.BULK

    def __init__(self, bound: Bound) -> None:
        if bound.runtime.capability < BULK_CAPABILITY:
            raise ValueError(f"compute capability {bound.runtime.capability / 10} has no bulk copies")
        if not bound.runtime.reads_host_memory:
            raise ValueError("kernels cannot address host memory on this device")
        rows = bound.table.rows
        for name in ("num_bytes", "slot_offset", "stride", "base"):
            if (rows[name] % 16).any():
                raise ValueError(
                    f"bulk copies need multiples of 16 bytes, and a segment's {name} is {int(rows[name][rows[name] % 16 != 0][0])}"
                )
        if bound.arena_address % 16:
            raise ValueError(f"bulk copies need multiples of 16 bytes, and the arena is at {bound.arena_address}")
        self._bound = bound
        self._ring = BulkRing.of(bound.table.chunk_bytes)

    def submit(self, batch: Batch, direction: Direction, after: DeviceEvent) -> DeviceEvent:
        misplaced = batch.offsets[batch.offsets % 16 != 0]
        if len(misplaced):
            raise ValueError(f"bulk copies need multiples of 16 bytes, and a block starts at arena offset {int(misplaced[0])}")
        ring = self._ring
        launch = functools.partial(Launch, "bulk_copy", num_threads=WARP_THREADS * ring.num_warps, shared_bytes=ring.shared_bytes)
        return _launch_slices(self._bound, batch, direction, after, launch, num_stages=ring.num_stages)


class DirectCopies:
    """A kernel whose threads read one side and write the other. Between two places on the device nothing is faster.

    Raises:
        ValueError: kernels cannot address the arena.
    """

    way = Way.DIRECT

    def __init__(self, bound: Bound) -> None:
        if not (bound.is_on_device or bound.runtime.reads_host_memory):
            raise ValueError("kernels cannot address host memory on this device")
        self._bound = bound

    def submit(self, batch: Batch, direction: Direction, after: DeviceEvent) -> DeviceEvent:
        return _launch_slices(self._bound, batch, direction, after, functools.partial(Launch, "paged_copy", num_threads=COPY_THREADS))


class Buffer:
    """One staging buffer, and when it may be filled again."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.freed: DeviceEvent | None = None


class Ring:
    """Buffers that are used by turns."""

    def __init__(self, address: int, size: int, count: int) -> None:
        self._buffers = [Buffer(address + index * size) for index in range(count)]
        self._next = 0

    def take(self) -> Buffer:
        """The buffer that was taken the longest ago."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer


class Staging:
    """The staging buffers of both directions, in device memory.

    Raises:
        MemoryError: they do not fit; says how much they take and how much there is.
    """

    def __init__(self, runtime: CudaRuntime, settings: CopySettings) -> None:
        size, count = settings.slice_bytes, settings.num_buffers
        try:
            self._memory: DeviceMemory = runtime.allocate(2 * count * size)
        except MemoryError as error:
            needed = f"num_buffers={count} staging buffers of slice_bytes={size} for each direction take {2 * count * size} bytes"
            raise MemoryError(f"{needed}: {error}") from error
        first = self._memory.address
        self.rings: Mapping[Direction, Ring] = {"load": Ring(first, size, count), "store": Ring(first + count * size, size, count)}

    def close(self) -> None:
        """Gives the memory back; nothing may be running. Idempotent."""
        self._memory.close()


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring segments that together fit into a staging buffer, of every block."""

    table: DeviceTable
    slot_offset: int
    num_bytes: int
    padded_bytes: int
    """from one block to the next in a staging buffer"""


class StagedCopies:
    """A kernel gathers pieces into a staging buffer, or scatters them; the copy engines move the buffer's blocks.

    A ring of buffers a direction lets the kernel of one slice run beside the copy of another::

        load:   transfer  | copy 0 | copy 1 | copy 2 | wait 0, copy 3
                kernel             | scatter 0 | scatter 1 | ...
        store:  kernel    | gather 0 | gather 1 | gather 2 | wait 0, gather 3
                transfer             | copy 0 | copy 1 | ...

    Raises:
        ValueError: one segment is larger than a buffer, or the arena is where the buffers would be; says so.
    """

    way = Way.STAGED

    def __init__(self, bound: Bound, staging: Staging) -> None:
        if bound.is_on_device:
            raise ValueError("what lies on the device needs no staging there")
        self._bound = bound
        self._staging = staging
        self._groups = list(_groups(bound.table, bound.settings.slice_bytes))

    def submit(self, batch: Batch, direction: Direction, after: DeviceEvent) -> DeviceEvent:
        step = self._load_slice if direction == "load" else self._store_slice
        # the transfers of a load only fill staging buffers, so they need not wait
        self._bound.runtime.wait(self._bound.lanes[direction].kernel, after)
        event = after
        for group in self._groups:
            blocks = min(MAX_BLOCKS, self._bound.settings.slice_bytes // group.padded_bytes)
            for part in batch.parts(blocks):
                event = step(group, part, self._staging.rings[direction])
        return event

    def _load_slice(self, group: _Group, batch: Batch, ring: Ring) -> DeviceEvent:
        runtime, lane = self._bound.runtime, self._bound.lanes["load"]
        buffer = ring.take()
        if buffer.freed is not None:
            runtime.wait(lane.transfer, buffer.freed)
        runs = self._staged_runs(group, batch, buffer)
        runtime.copy(lane.transfer, runs.paged, runs.contiguous, runs.num_bytes)
        runtime.wait(lane.kernel, runtime.record(lane.transfer))
        runtime.launch(lane.kernel, self._kernel(group, batch, buffer, to_paged=True))
        buffer.freed = runtime.record(lane.kernel)
        return buffer.freed

    def _store_slice(self, group: _Group, batch: Batch, ring: Ring) -> DeviceEvent:
        runtime, lane = self._bound.runtime, self._bound.lanes["store"]
        buffer = ring.take()
        if buffer.freed is not None:
            runtime.wait(lane.kernel, buffer.freed)
        runtime.launch(lane.kernel, self._kernel(group, batch, buffer, to_paged=False))
        runtime.wait(lane.transfer, runtime.record(lane.kernel))
        runs = self._staged_runs(group, batch, buffer)
        runtime.copy(lane.transfer, runs.contiguous, runs.paged, runs.num_bytes)
        buffer.freed = runtime.record(lane.transfer)
        return buffer.freed

    def _kernel(self, group: _Group, batch: Batch, buffer: Buffer, *, to_paged: bool) -> Launch:
        places = np.arange(len(batch), dtype=np.int64) * group.padded_bytes
        params = paged_copy(group.table, buffer.address, batch.block_ids, places, to_paged=to_paged)
        return Launch("paged_copy", params, self._bound.settings.num_blocks, COPY_THREADS)

    def _staged_runs(self, group: _Group, batch: Batch, buffer: Buffer) -> Runs:
        """Between a staging buffer, in ``paged``'s place, and the arena."""
        staged = buffer.address + np.arange(len(batch), dtype=np.uint64) * np.uint64(group.padded_bytes)
        arena = (self._bound.arena_address + group.slot_offset + batch.offsets).astype(np.uint64)
        return joined(Runs(staged, arena, np.full(len(batch), group.num_bytes, np.int64)))


def _groups(table: DeviceTable, slice_bytes: int) -> Iterator[_Group]:
    sizes = [int(size) for size in table.rows["num_bytes"]]
    if max(sizes) > slice_bytes:
        raise ValueError(f"a segment has {max(sizes)} bytes, more than a staging buffer of slice_bytes={slice_bytes}")
    first = total = 0
    for index, size in enumerate([*sizes, slice_bytes + 1]):
        if total + size > slice_bytes and total:
            yield _Group(
                table.part(first, index),
                int(table.rows["slot_offset"][first] - table.rows["slot_offset"][0]),
                total,
                min(-(-total // 16) * 16, slice_bytes),
            )
            first, total = index, 0
        total += size


def _launch_slices(
    bound: Bound, batch: Batch, direction: Direction, after: DeviceEvent, launch: Callable[..., Launch], *, num_stages: int = 0
) -> DeviceEvent:
    """One kernel a slice, straight between pages and arena. Nobody waits for a bus on the device, so there slices need not be short."""
    stream = bound.lanes[direction].kernel
    bound.runtime.wait(stream, after)
    for part in batch.parts(MAX_BLOCKS if bound.is_on_device else min(MAX_BLOCKS, bound.blocks_per_slice)):
        params = paged_copy(
            bound.table, bound.arena_address, part.block_ids, part.offsets, to_paged=direction == "load", num_stages=num_stages
        )
        bound.runtime.launch(stream, launch(params=params, num_blocks=bound.settings.num_blocks))
    return bound.runtime.record(stream)


def _ends(runs: Runs, direction: Direction) -> tuple[Addresses, Addresses]:
    """Where runs go and where they come from."""
    return (runs.paged, runs.contiguous) if direction == "load" else (runs.contiguous, runs.paged)
