"""Measures every way of copying at start: per direction and piece size, on memory of its own, and checks every byte."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.copy.cuda_choice import DIRECTIONS, CopyTable, Direction, Measured, Way
from kvtier.copy.cuda_copier import bind_ways, close_lanes, open_lanes, upload_segments
from kvtier.copy.cuda_params import segment_table
from kvtier.copy.cuda_runs import Runs, runs_of
from kvtier.copy.cuda_runtime import CudaRuntime
from kvtier.copy.cuda_ways import Batch, Bound, CopySettings, CopyWay, Staging
from kvtier.layout import Segment

_LOG = logging.getLogger(__name__)

PIECE_BYTES = (2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10)
TOTAL_BYTES = 16 << 20
"""copied by each call that is timed"""
PIECES_PER_BLOCK = 32
ROUNDS = 3

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def page_aligned(num_bytes: int) -> Bytes:
    """Host memory that may be registered: none of its pages is anybody else's."""
    room = np.empty(-(-num_bytes // 4096) * 4096 + 4096, np.uint8)
    return room[-room.ctypes.data % 4096 :][:num_bytes]


class Scratch:
    """Memory to measure on: pages on the device, pinned host memory in place of an arena, and what is in both before a check.

    Raises:
        MemoryError: the device has no room.
    """

    def __init__(self, runtime: CudaRuntime, num_bytes: int) -> None:
        self.runtime = runtime
        self.device = runtime.allocate(num_bytes)
        self.host = page_aligned(num_bytes)
        self.page_noise, self.host_noise = (np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8) for seed in (1, 2))
        self.stream = runtime.open_stream(is_urgent=False)
        """in the engine's place"""
        try:
            self._pinned = runtime.register(self.host.ctypes.data, num_bytes)
        except BaseException:
            self.device.close()
            runtime.close_stream(self.stream)
            raise

    def close(self) -> None:
        """Gives both back."""
        self._pinned.close()
        self.device.close()
        self.runtime.close_stream(self.stream)

    def plain_copy(self, to: int, source: int) -> None:
        """Copies as much as there is, at once."""
        size = np.array([len(self.host)], np.int64)
        self.runtime.copy(self.stream, np.array([to], np.uint64), np.array([source], np.uint64), size)
        self.runtime.record(self.stream).wait()


@dataclass(frozen=True, slots=True)
class _Workload:
    """Blocks of pieces of one size, in an order in which no two lie side by side on both ends."""

    segments: list[Segment]
    batch: Batch

    @classmethod
    def of(cls, address: int, piece_bytes: int, total_bytes: int) -> _Workload:
        num_pieces = min(PIECES_PER_BLOCK, max(1, total_bytes // piece_bytes))
        num_blocks = max(1, total_bytes // (num_pieces * piece_bytes))
        segments = [Segment(address + index * num_blocks * piece_bytes, piece_bytes, piece_bytes) for index in range(num_pieces)]
        block_ids = np.random.default_rng(3).permutation(num_blocks).astype(np.int64)
        return cls(segments, Batch(block_ids, np.arange(num_blocks, dtype=np.int64) * (num_pieces * piece_bytes)))

    @property
    def total_bytes(self) -> int:
        return len(self.batch) * sum(segment.num_bytes for segment in self.segments)


def calibrate(
    runtime: CudaRuntime,
    settings: CopySettings,
    *,
    piece_sizes: Sequence[int] = PIECE_BYTES,
    total_bytes: int = TOTAL_BYTES,
    clock: Callable[[], float] = time.perf_counter,
    without: Collection[Way] = (),
) -> CopyTable:
    """The table for this device; takes a second or two. A way that fails or moves bytes wrongly is in it as wrong, and logged.

    Args:
        without: ways that are not tried, and refused in the table

    Raises:
        MemoryError: the device has no room for ``total_bytes`` and the staging buffers.
    """
    measured: list[Measured] = []
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(contextlib.closing(Scratch(runtime, total_bytes)))
        staging = stack.enter_context(contextlib.closing(Staging(runtime, settings)))
        lanes = open_lanes(runtime)
        stack.callback(close_lanes, runtime, lanes)
        for piece_bytes in piece_sizes:
            work = _Workload.of(scratch.device.address, piece_bytes, total_bytes)
            memory, table = upload_segments(work.segments, runtime, lanes["load"].transfer)
            ways, _ = bind_ways(Bound(runtime, settings, lanes, table, scratch.host.ctypes.data), staging)
            for direction, way in itertools.product(DIRECTIONS, ways.values()):
                if way.way not in without:
                    measured.append(_measure(scratch, work, way, direction, clock))
            memory.close()
    return CopyTable(tuple(measured), dict.fromkeys(without, "it was not to be tried"))


def _measure(scratch: Scratch, work: _Workload, way: CopyWay, direction: Direction, clock: Callable[[], float]) -> Measured:
    rate, is_right = 0.0, False
    piece_bytes = work.segments[0].num_bytes
    try:
        is_right = _moves_right(scratch, work, way, direction)
        rate = work.total_bytes / _median_s(scratch, work, way, direction, clock)
    except RuntimeError:
        # what the device cannot do: the other ways are measured all the same
        _LOG.warning("kvtier: copying by %s failed (%s, pieces of %d bytes)", way.way.value, direction, piece_bytes, exc_info=True)
        is_right = False
    if not is_right:
        _LOG.error("kvtier: copying by %s is wrong here and not used (%s, pieces of %d bytes)", way.way.value, direction, piece_bytes)
    return Measured(direction, way.way, piece_bytes, rate, is_right)


def _median_s(scratch: Scratch, work: _Workload, way: CopyWay, direction: Direction, clock: Callable[[], float]) -> float:
    """Of whole calls, as the caller waits for them: submitting counts. The check before was the warm-up."""
    times = []
    for _ in range(ROUNDS):
        start = clock()
        way.submit(work.batch, direction, scratch.runtime.record(scratch.stream)).wait()
        times.append(clock() - start)
    return max(statistics.median(times), 1e-9)


def _moves_right(scratch: Scratch, work: _Workload, way: CopyWay, direction: Direction) -> bool:
    """Whether after a copy both sides hold what the same copy in plain memory gives."""
    pages = scratch.page_noise.copy()
    scratch.host[:] = scratch.host_noise
    scratch.plain_copy(scratch.device.address, pages.ctypes.data)
    way.submit(work.batch, direction, scratch.runtime.record(scratch.stream)).wait()
    result = np.empty_like(pages)
    scratch.plain_copy(result.ctypes.data, scratch.device.address)
    host = scratch.host_noise.copy()
    moved = [Segment(it.base_address - scratch.device.address + pages.ctypes.data, it.stride_bytes, it.num_bytes) for it in work.segments]
    move_on_cpu(runs_of(segment_table(moved, 4096), work.batch.block_ids, work.batch.offsets, host.ctypes.data), direction)
    return bool(np.array_equal(pages, result) and np.array_equal(host, scratch.host))


def move_on_cpu(runs: Runs, direction: Direction) -> None:
    """The same copy by the CPU, in plain memory: what the result must be."""
    for paged, other, num_bytes in zip(runs.paged.tolist(), runs.contiguous.tolist(), runs.num_bytes.tolist(), strict=True):
        to, source = (paged, other) if direction == "load" else (other, paged)
        ctypes.memmove(to, source, num_bytes)
