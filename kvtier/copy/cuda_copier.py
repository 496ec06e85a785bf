"""Copies blocks between paged KV on a CUDA device and the arena, each batch the way that was measured to be the fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtier.copy.base import BlockCopy
from kvtier.copy.cuda_choice import DIRECTIONS, CopyTable, Direction, Way
from kvtier.copy.cuda_params import DeviceTable, merged, segment_table
from kvtier.copy.cuda_runs import Addresses, Ints, Runs, joined, runs_of
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent, DeviceMemory
from kvtier.copy.cuda_ways import (
    MIN_SLICE_BYTES,
    Batch,
    Bound,
    BulkCopies,
    CopySettings,
    CopyWay,
    DirectCopies,
    DmaCopies,
    Lane,
    StagedCopies,
    Staging,
)
from kvtier.layout import KVLayout, Segment

MAX_CHUNK_BYTES = 8192
"""that one warp, or one stage of a bulk kernel, copies at a time"""

SAMPLED_BLOCKS = 32
"""whose runs are looked at before a batch is submitted"""

DEVICE_BLOCKS = 256
"""thread blocks of a copy between two places of the device"""


@dataclass(frozen=True, slots=True)
class ArenaPlace:
    """Where slots lie: pinned host memory, or memory of the device."""

    address: int
    num_bytes: int
    is_on_device: bool = False


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

    def released(self) -> bool:
        """As ``done``."""
        return self.done()

    def order_compute(self) -> None:
        """Makes the engine's compute stream wait, not the caller."""
        self._runtime.wait(self._compute_stream(), self._event)


@dataclass(frozen=True, slots=True)
class CopierOptions:
    """How a :class:`CudaCopier` copies."""

    settings: CopySettings = field(default_factory=CopySettings)
    """what a copy may take of the device"""
    table: CopyTable = field(default_factory=CopyTable)
    """what was measured; without it the choice is by piece size alone"""
    forced: Way | None = None
    """the way to go whatever was measured"""
    layers: Sequence[range] | None = None
    """the segments of each layer, in the order of the forward pass, together all segments; None: copies by layer are not wanted"""


class CudaCopier:
    """A :class:`~kvtier.copy.base.BlockCopier` for one CUDA device. Asynchronous; loads and stores run beside each other.

    Every copy starts after all that the engine had submitted to its compute stream. Where submitting fails half-way, what was
    submitted has ended when the error is raised. The caller keeps alive what ``layout`` and ``arena`` point to.

    Args:
        arena: of the device, or registered with it
        compute_stream: the stream that the engine computes on at the time of the call

    Raises:
        ValueError: the forced way is impossible here, or the layers do not divide the segments; says why.
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
        options: CopierOptions | None = None,
    ) -> None:
        options = options or CopierOptions()
        self._layout = layout
        self._runtime = runtime
        self._arena = arena
        self._compute_stream = compute_stream
        self._num_blocks = layout.num_blocks
        self._block_bytes = layout.block_bytes
        self._forced = options.forced
        segments, layers = merged_by_layer(layout, options.layers)
        self.num_layers = len(layers)
        self._staging = Staging(runtime, options.settings)
        self._lanes = open_lanes(runtime)
        try:
            self._segments, rows = upload_segments(segments, runtime, self._lanes["load"].transfer)
        except BaseException:
            close_lanes(runtime, self._lanes)
            self._staging.close()
            raise
        self._whole = Bound(runtime, options.settings, self._lanes, rows, arena.address, arena.is_on_device)
        try:
            self._ways, refused = bind_ways(self._whole, self._staging)
            self.table = CopyTable(options.table.measured, {**options.table.refused, **refused})
            for direction in DIRECTIONS:
                self.table.choose(direction, self._block_bytes, forced=self._forced)
            parts = [self._whole.part(layer.start, layer.stop) for layer in layers]
            self._layers = [(part.table, bind_ways(part, self._staging)[0]) for part in parts]
        except BaseException:
            self.close()
            raise

    def gather(self, copies: Sequence[BlockCopy]) -> DeviceCopyEvent:
        """Engine -> arena. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, "store")

    def scatter(self, copies: Sequence[BlockCopy]) -> DeviceCopyEvent:
        """Arena -> engine. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, "load")

    def scatter_layers(self, copies: Sequence[BlockCopy]) -> list[DeviceCopyEvent]:
        """Arena -> engine, layer after layer; one event a layer, each of which ends after those before it."""
        batch = self._checked(copies)
        way = self.choose(self._layers[0][0], batch, "load")
        with self._stopping_on_error():
            after = self._runtime.record(self._compute_stream())
            return [self._event(ways[way].submit(batch, "load", after)) for _, ways in self._layers]

    def gather_layers(self, copies: Sequence[BlockCopy]) -> DeviceLayerStore:
        """Engine -> arena, each layer as soon as it is computed. See :class:`~kvtier.copy.base.LayerStorer`."""
        return DeviceLayerStore(self, self._checked(copies))

    def read_pieces(self, to: Addresses, offsets: Ints, num_bytes: int) -> DeviceCopyEvent:
        """Arena -> device memory, by the copy engines. See :class:`~kvtier.copy.base.PieceReader`."""
        if num_bytes < 0 or (len(offsets) and not 0 <= int(offsets.min()) <= int(offsets.max()) <= self._arena.num_bytes - num_bytes):
            raise IndexError(f"{num_bytes} bytes at one of the arena offsets {offsets} are outside [0, {self._arena.num_bytes})")
        stream = self._lanes["load"].transfer
        runs = joined(Runs(to, np.uint64(self._arena.address) + offsets.astype(np.uint64), np.full(len(to), num_bytes, np.int64)))
        with self._stopping_on_error():
            self._runtime.wait(stream, self._runtime.record(self._compute_stream()))
            for part in runs.slices(self._whole.settings.slice_bytes):
                self._runtime.copy(stream, part.paged, part.contiguous, part.num_bytes)
            return self._event(self._runtime.record(stream))

    def store_layer(self, layer: int, batch: Batch) -> DeviceCopyEvent:
        """Copies one layer of some blocks, after what the engine has submitted so far."""
        way = self.choose(self._layers[0][0], batch, "store")  # one way for all layers, so that the last one ends last
        with self._stopping_on_error():
            return self._event(self._layers[layer][1][way].submit(batch, "store", self._runtime.record(self._compute_stream())))

    def choose(self, table: DeviceTable, batch: Batch, direction: Direction) -> Way:
        """The way that a batch goes: by the length of its first blocks' runs."""
        sample = batch.part(0, SAMPLED_BLOCKS)
        runs = runs_of(table.rows, sample.block_ids, sample.offsets, self._arena.address)
        return self.table.choose(direction, runs.total_bytes / max(1, len(runs)), forced=self._forced)

    def to_device(self, place: ArenaPlace) -> CudaCopier:
        """A copier between the same pages and memory of the device, which lives on after this one is closed.

        Its copies last so short that they may use all multiprocessors. Raises as the constructor does.
        """
        options = CopierOptions(CopySettings(slice_bytes=MIN_SLICE_BYTES, num_blocks=DEVICE_BLOCKS), forced=Way.DIRECT)
        return CudaCopier(self._layout, self._runtime, place, compute_stream=self._compute_stream, options=options)

    def close(self) -> None:
        """Waits for running copies and gives device memory back. Idempotent."""
        self._drain()
        lanes, self._lanes = self._lanes, {}
        close_lanes(self._runtime, lanes)
        self._staging.close()
        self._segments.close()

    def _copy(self, copies: Sequence[BlockCopy], direction: Direction) -> DeviceCopyEvent:
        batch = self._checked(copies)
        way = self._ways[self.choose(self._whole.table, batch, direction)]
        with self._stopping_on_error():
            return self._event(way.submit(batch, direction, self._runtime.record(self._compute_stream())))

    def _event(self, event: DeviceEvent) -> DeviceCopyEvent:
        return DeviceCopyEvent(event, self._runtime, self._compute_stream)

    @contextlib.contextmanager
    def _stopping_on_error(self) -> Iterator[None]:
        """The caller takes the blocks and slots of a copy that failed back at once: nothing of it may run then."""
        try:
            yield
        except BaseException:
            self._drain()
            raise

    def _checked(self, copies: Sequence[BlockCopy]) -> Batch:
        last_offset = self._arena.num_bytes - self._block_bytes
        for copy in copies:
            if not 0 <= copy.block_id < self._num_blocks:
                raise IndexError(f"block id {copy.block_id} is outside [0, {self._num_blocks})")
            if not 0 <= copy.arena_offset <= last_offset:
                raise IndexError(f"a block of {self._block_bytes} bytes at arena offset {copy.arena_offset} is outside the arena")
        block_ids = np.fromiter((copy.block_id for copy in copies), np.int64, len(copies))
        return Batch(block_ids, np.fromiter((copy.arena_offset for copy in copies), np.int64, len(copies)))

    def _drain(self) -> None:
        for lane in self._lanes.values():
            for stream in (lane.transfer, lane.kernel):
                self._runtime.record(stream).wait()


class DeviceLayerStore:
    """A store under way; see :class:`~kvtier.copy.base.LayerStore`."""

    def __init__(self, copier: CudaCopier, batch: Batch) -> None:
        self._copier = copier
        self._batch = batch
        self._last: DeviceCopyEvent | None = None

    def copy_layer(self, layer: int) -> None:
        """Starts to copy one layer."""
        self._last = self._copier.store_layer(layer, self._batch)

    def end(self) -> DeviceCopyEvent:
        """The end of the layer that was copied last, which is the end of all: they go through the same streams, in order."""
        assert self._last is not None, "no layer was copied"
        return self._last


def merged_by_layer(layout: KVLayout, layers: Sequence[range] | None) -> tuple[list[Segment], list[range]]:
    """Fewer segments for the same bytes, and which of them each layer has. Raises ValueError where the layers do not divide the layout."""
    if layers is None:
        segments = list(merged(layout).segments)
        return segments, [range(len(segments))]
    if [index for layer in layers for index in layer] != list(range(len(layout.segments))):
        raise ValueError(f"layers {list(layers)} do not divide {len(layout.segments)} segments")
    segments, places = [], []
    for layer in layers:
        part = merged(KVLayout(layout.segments[layer.start : layer.stop], layout.num_blocks)).segments
        places.append(range(len(segments), len(segments) + len(part)))
        segments.extend(part)
    return segments, places


def open_lanes(runtime: CudaRuntime) -> dict[Direction, Lane]:
    """Streams for both directions; the device prefers those of loads, which requests wait for."""
    return {
        direction: Lane(runtime.open_stream(is_urgent=direction == "load"), runtime.open_stream(is_urgent=direction == "load"))
        for direction in DIRECTIONS
    }


def close_lanes(runtime: CudaRuntime, lanes: Mapping[Direction, Lane]) -> None:
    """Ends the streams of lanes."""
    for lane in lanes.values():
        for stream in (lane.transfer, lane.kernel):
            runtime.close_stream(stream)


def upload_segments(segments: Sequence[Segment], runtime: CudaRuntime, stream: int) -> tuple[DeviceMemory, DeviceTable]:
    """The segments' table in device memory; the memory must live as long as the table is used."""
    chunk_bytes = min(MAX_CHUNK_BYTES, -(-max(segment.num_bytes for segment in segments) // 16) * 16)
    rows = segment_table(segments, chunk_bytes)
    memory = upload(rows, runtime, stream)
    return memory, DeviceTable(rows, memory.address, chunk_bytes)


def upload(rows: np.ndarray[Any, np.dtype[Any]], runtime: CudaRuntime, stream: int) -> DeviceMemory:
    """A copy of ``rows`` in device memory, complete on return."""
    memory = runtime.allocate(rows.nbytes)
    put(rows, memory.address, runtime, stream)
    return memory


def put(rows: np.ndarray[Any, np.dtype[Any]], address: int, runtime: CudaRuntime, stream: int) -> None:
    """Copies ``rows`` to device memory, complete on return."""
    target, source = (np.array([place], np.uint64) for place in (address, rows.ctypes.data))
    runtime.copy(stream, target, source, np.array([rows.nbytes], np.int64))
    runtime.record(stream).wait()


def bind_ways(bound: Bound, staging: Staging) -> tuple[dict[Way, CopyWay], dict[Way, str]]:
    """The ways that this device and layout allow, and why the others are not allowed."""
    ways: dict[Way, CopyWay] = {Way.DMA: DmaCopies(bound)}
    refused: dict[Way, str] = {}
    kernels: dict[Way, Callable[[], CopyWay]] = {
        Way.BULK: lambda: BulkCopies(bound),
        Way.STAGED: lambda: StagedCopies(bound, staging),
        Way.DIRECT: lambda: DirectCopies(bound),
    }
    for way, bind in kernels.items():
        try:
            ways[way] = bind()
        except ValueError as error:
            refused[way] = str(error)
    return ways, refused
