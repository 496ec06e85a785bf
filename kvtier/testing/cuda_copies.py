"""What every CUDA device must do, as tests to subclass: on a real one, and on the simulated one."""

from __future__ import annotations

import itertools
import unittest
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.copy.base import BlockCopy
from kvtier.copy.cuda_calibrate import calibrate, move_on_cpu
from kvtier.copy.cuda_choice import DIRECTIONS, CopyTable, Direction, Way
from kvtier.copy.cuda_copier import ArenaPlace, CopierOptions, CudaCopier
from kvtier.copy.cuda_params import MAX_BLOCKS, segment_table
from kvtier.copy.cuda_rows import launch_place_rows
from kvtier.copy.cuda_runs import runs_of
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceMemory
from kvtier.copy.cuda_ways import CopySettings
from kvtier.copy.rope import NUMPY_OF_STORAGE, Pairs
from kvtier.layout import KVLayout, Segment
from kvtier.testing.cuda_rows import RowCase

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
GUARD_BYTES = 256
IDLE = "nothing was shown: the engine's stream was done before the copies behind it were submitted"
SMALL = CopySettings(slice_bytes=1 << 20, num_buffers=2, num_blocks=4)


@dataclass(frozen=True, slots=True)
class Shape:
    """Segments as (gap before block 0, distance between blocks, length)."""

    name: str
    segments: tuple[tuple[int, int, int], ...]
    num_blocks: int

    @property
    def block_bytes(self) -> int:
        """Of all segments."""
        return sum(length for _, _, length in self.segments)


SHAPES = (
    Shape("keys and values apart, 6 KiB", ((0, 6144, 6144),) * 12, 40),
    Shape("keys and values side by side, 64 KiB", ((0, 65_536, 65_536),) * 4, 24),
    Shape("all layers of a block side by side", ((0, 90_112, 90_112),), 30),
    Shape("latent attention, 18 KiB", ((0, 18_432, 18_432),) * 5, 20),
    Shape("pages with a gap behind each", ((64, 5120, 4096), (0, 4352, 4224), (16, 48, 32)), 33),
    Shape("odd sizes at odd addresses", ((1, 1003, 1001), (6, 6146, 6145), (4, 12, 5), (8, 9000, 8200)), 37),
    Shape("pieces larger than a chunk", ((0, 24_592, 24_592), (0, 8208, 8208)), 19),
    Shape("more blocks than two launches take", ((0, 64, 48), (0, 96, 96)), 2 * MAX_BLOCKS + 44),
)


class Memory:
    """Pages on the device and an arena on the host, both between guard bands, and what both should hold."""

    def __init__(self, runtime: CudaRuntime, shape: Shape, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.runtime = runtime
        self.shape = shape
        self.stream = runtime.open_stream(is_urgent=False)
        """the engine's"""
        starts, total = [], GUARD_BYTES
        for gap, stride, _ in shape.segments:
            starts.append(total + gap)
            total += -(-(gap + shape.num_blocks * stride) // GUARD_BYTES) * GUARD_BYTES + GUARD_BYTES
        self.device: DeviceMemory = runtime.allocate(total)
        self.pages = random.integers(0, 256, total, dtype=np.uint8)
        """what the device should hold, guard bands included"""
        strides = [(stride, length) for _, stride, length in shape.segments]
        self.starts = list(zip(starts, strides, strict=True))
        """(where block 0 lies in ``pages``, (distance between blocks, length)) of each segment"""
        self.layout = KVLayout(self._segments(self.device.address), shape.num_blocks)
        self.slot_bytes = -(-shape.block_bytes // 4096) * 4096
        room = np.empty(shape.num_blocks * self.slot_bytes + 2 * 4096 + 4096, np.uint8)
        self.host: Bytes = room[-room.ctypes.data % 4096 :][: shape.num_blocks * self.slot_bytes + 2 * 4096]
        self.host[:] = random.integers(0, 256, len(self.host), dtype=np.uint8)
        self.expected_host = self.host.copy()
        self.pinned = runtime.register(self.host.ctypes.data, len(self.host))
        self.arena = ArenaPlace(self.host.ctypes.data + 4096, shape.num_blocks * self.slot_bytes)
        self.put(self.pages)

    def close(self) -> None:
        """Gives the memory back."""
        self.pinned.close()
        self.device.close()

    def copier(self, forced: Way | None, *, layers: Sequence[range] | None = None) -> CudaCopier | None:
        """A copier of one way; None where the layout or the device does not allow that way."""
        free = CudaCopier(self.layout, self.runtime, self.arena, compute_stream=lambda: self.stream, options=CopierOptions(SMALL))
        free.close()
        if forced in free.table.refused:
            return None
        options = CopierOptions(SMALL, CopyTable(), forced, layers)
        return CudaCopier(self.layout, self.runtime, self.arena, compute_stream=lambda: self.stream, options=options)

    def copies(self, pairs: Sequence[tuple[int, int]]) -> list[BlockCopy]:
        """Blocks and slots."""
        return [BlockCopy(block, slot * self.slot_bytes) for block, slot in pairs]

    def expect(self, pairs: Sequence[tuple[int, int]], direction: Direction) -> None:
        """Does by the CPU what the device should do."""
        rows = segment_table(self._segments(self.pages.ctypes.data), 4096)
        blocks = np.array([block for block, _ in pairs], np.int64)
        offsets = np.array([4096 + slot * self.slot_bytes for _, slot in pairs], np.int64)
        move_on_cpu(runs_of(rows, blocks, offsets, self.expected_host.ctypes.data), direction)

    def span(self, layer: range) -> tuple[int, int]:
        """From where to where in ``pages`` some neighbouring segments lie, of all blocks."""
        (start, _), (last, (stride, _)) = self.starts[layer.start], self.starts[layer.stop - 1]
        return start, last + self.shape.num_blocks * stride

    def put(self, pages: Bytes) -> None:
        """Fills the device's memory."""
        self._plain(self.device.address, pages)
        self.runtime.record(self.stream).wait()

    def check(self, what: str) -> None:
        """Both sides hold what they should, every byte, guard bands included."""
        actual = np.zeros_like(self.pages)
        self.runtime.copy(self.stream, *_places(actual.ctypes.data, self.device.address), np.array([len(actual)], np.int64))
        self.runtime.record(self.stream).wait()
        assert self.pages.tobytes() == actual.tobytes(), f"{self.shape.name}, {what}: wrong bytes on the device"
        assert self.expected_host.tobytes() == self.host.tobytes(), f"{self.shape.name}, {what}: wrong bytes on the host"

    def _plain(self, to: int, source: Bytes) -> None:
        self.runtime.copy(self.stream, *_places(to, source.ctypes.data), np.array([len(source)], np.int64))

    def _segments(self, address: int) -> tuple[Segment, ...]:
        return tuple(Segment(address + start, stride, length) for start, (stride, length) in self.starts)


def _places(to: int, source: int) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.uint64]]]:
    return np.array([to], np.uint64), np.array([source], np.uint64)


class _Work:
    """What keeps an engine's stream busy. Whatever is submitted while it is must wait for it, and would be seen not to."""

    num_copies = 8

    def __init__(self, runtime: CudaRuntime, num_bytes: int) -> None:
        self._runtime = runtime
        self._memory = runtime.allocate(num_bytes)
        self._half = np.array([num_bytes // 2], np.int64)
        self._places = _places(self._memory.address, self._memory.address + num_bytes // 2)

    def submit(self, stream: int) -> None:
        """Queues it."""
        for _ in range(self.num_copies):
            self._runtime.copy(stream, *self._places, self._half)

    def close(self) -> None:
        """Gives its memory back."""
        self._memory.close()


class _OnDevice(ABC):
    """What needs a device."""

    rounds = 3
    """how often what might be a race is tried; raise it on a real device"""
    busy_bytes = 1 << 12
    """of device memory, one half of which is copied to the other again and again to keep a stream busy; on a real device, for some ms"""

    @abstractmethod
    def open_runtime(self) -> CudaRuntime:
        """The device."""


class WayContract(_OnDevice):
    """The copies of some ways. Subclass it once for each way where a broken one may take the process with it."""

    ways: Sequence[Way] = tuple(Way)

    def cases(
        self, shapes: Sequence[Shape] = SHAPES, *, layers: Callable[[Shape], Sequence[range]] | None = None
    ) -> Iterator[tuple[Memory, Way, CudaCopier]]:
        """All layouts, each by all ways that it allows. Where there is no such case the test is skipped: nothing was checked."""
        runtime, num_cases = self.open_runtime(), 0
        for seed, (shape, way) in enumerate(itertools.product(shapes, self.ways)):
            memory = Memory(runtime, shape, seed)
            copier = memory.copier(way, layers=None if layers is None else layers(shape))
            if copier is not None:
                num_cases += 1
                yield memory, way, copier
                copier.close()
            memory.close()
        if not num_cases:
            raise unittest.SkipTest(f"NOTHING WAS CHECKED: the device allows none of {[way.value for way in self.ways]}")

    def test_every_way_moves_every_byte_of_every_layout(self) -> None:
        """And no other byte, on either side; blocks and slots in any order."""
        for memory, way, copier in self.cases():
            for direction in DIRECTIONS:
                pairs = _pairs(memory.shape.num_blocks, memory.shape.num_blocks - 3, seed=1)
                move = copier.scatter if direction == "load" else copier.gather
                event = move(memory.copies(pairs))
                event.wait()
                assert event.done()
                memory.expect(pairs, direction)
                memory.check(f"{way.value}, {direction}")

    def test_loads_and_stores_at_once_again_and_again(self) -> None:
        """Half of the blocks are stored while the other half is loaded, and then the other way round; nothing of it mixes."""
        for memory, way, copier in self.cases():
            for number in range(self.rounds):
                pairs = _pairs(memory.shape.num_blocks, memory.shape.num_blocks, seed=number)
                half = len(pairs) // 2
                events = []
                for start in range(0, half, 5):
                    events.append(copier.gather(memory.copies(pairs[start : min(start + 5, half)])))
                    events.append(copier.scatter(memory.copies(pairs[half + start : min(half + start + 5, 2 * half)])))
                for event in events:
                    event.wait()
                memory.expect(pairs[:half], "store")
                memory.expect(pairs[half : 2 * half], "load")
                memory.check(f"{way.value}, round {number}")

    def test_copies_are_ordered_with_the_engines_stream(self) -> None:
        """Without the host's waiting: a store sees what was computed before it, and what is computed after a load sees the load."""
        for memory, way, copier in self.cases(SHAPES[:3]):
            work = _Work(memory.runtime, self.busy_bytes)
            stores, loads = [(block, block) for block in range(8)], [(block, block) for block in range(8, 16)]
            _compile(memory, copier)
            for number in range(self.rounds):
                pages = np.random.default_rng(100 + number).integers(0, 256, len(memory.pages), dtype=np.uint8)
                runtime, size = memory.runtime, np.array([len(pages)], np.int64)
                new, after = runtime.allocate(len(pages)), runtime.allocate(len(pages))
                runtime.copy(memory.stream, *_places(new.address, pages.ctypes.data), size)
                runtime.record(memory.stream).wait()
                work.submit(memory.stream)
                runtime.copy(memory.stream, *_places(memory.device.address, new.address), size)
                computed = runtime.record(memory.stream)
                stored = copier.gather(memory.copies(stores))
                loaded = copier.scatter(memory.copies(loads))
                assert not computed.done(), IDLE
                loaded.order_compute()
                runtime.copy(memory.stream, *_places(after.address, memory.device.address), size)
                result = np.zeros_like(pages)
                runtime.copy(memory.stream, *_places(result.ctypes.data, after.address), size)
                runtime.record(memory.stream).wait()
                stored.wait()
                memory.pages[:] = pages
                memory.expect(stores, "store")
                memory.expect(loads, "load")
                assert memory.pages.tobytes() == result.tobytes(), f"{memory.shape.name}, {way.value}: the engine saw too old bytes"
                memory.check(f"{way.value}, round {number}")
                new.close()
                after.close()
            work.close()

    def test_layers_arrive_in_order(self) -> None:
        """Each layer's event is the end of its bytes; all together are whole blocks."""
        for memory, way, copier in self.cases(SHAPES[:2], layers=_pairs_of_segments):
            pairs = _pairs(memory.shape.num_blocks, 10, seed=2)
            events = copier.scatter_layers(memory.copies(pairs))
            assert len(memory.shape.segments) == 2 * len(events)
            events[-1].wait()
            assert all(event.done() for event in events)
            memory.expect(pairs, "load")
            memory.check(f"{way.value}, by layers")

    def test_layers_are_stored_as_they_are_computed(self) -> None:
        """Each layer is written on the busy stream of the engine, then stored without the host waiting."""
        for memory, way, copier in self.cases(SHAPES[:2], layers=_pairs_of_segments):
            runtime = memory.runtime
            work = _Work(runtime, self.busy_bytes)
            _compile(memory, copier)
            pairs = _pairs(memory.shape.num_blocks, 10, seed=3)
            pages = np.random.default_rng(200).integers(0, 256, len(memory.pages), dtype=np.uint8)
            new = runtime.allocate(len(pages))
            runtime.copy(memory.stream, *_places(new.address, pages.ctypes.data), np.array([len(pages)], np.int64))
            store = copier.gather_layers(memory.copies(pairs))
            for index, layer in enumerate(_pairs_of_segments(memory.shape)):
                start, stop = memory.span(layer)
                work.submit(memory.stream)
                places = _places(memory.device.address + start, new.address + start)
                runtime.copy(memory.stream, *places, np.array([stop - start], np.int64))
                computed = runtime.record(memory.stream)
                store.copy_layer(index)
                assert not computed.done(), IDLE
                memory.pages[start:stop] = pages[start:stop]
            store.end().wait()
            memory.expect(pairs, "store")
            memory.check(f"{way.value}, by layers")
            runtime.record(memory.stream).wait()
            new.close()
            work.close()


class DeviceContract(_OnDevice):
    """What belongs to no one way: a pool on the device, the rotation of keys, and measuring all ways."""

    def test_a_pool_on_the_device_takes_blocks_and_gives_them_back(self) -> None:
        """The engine may write its blocks again as soon as they are gathered; what comes back is what was there."""
        runtime = self.open_runtime()
        for seed, shape in enumerate(SHAPES):
            memory = Memory(runtime, shape, seed)
            pool_bytes = shape.num_blocks * memory.slot_bytes
            pool = runtime.allocate(pool_bytes)
            outer = memory.copier(Way.DMA)
            assert outer is not None
            copier = outer.to_device(ArenaPlace(pool.address, pool_bytes, is_on_device=True))
            outer.close()
            pairs = _pairs(shape.num_blocks, shape.num_blocks, seed=seed)
            for number in range(self.rounds):
                copier.gather(memory.copies(pairs)).order_compute()
                memory.put(np.random.default_rng(number).integers(0, 256, len(memory.pages), dtype=np.uint8))
                copier.scatter(memory.copies(pairs)).order_compute()
                pages = np.random.default_rng(number).integers(0, 256, len(memory.pages), dtype=np.uint8)
                for start, (stride, length) in memory.starts:
                    for block in range(shape.num_blocks):
                        place = start + block * stride
                        pages[place : place + length] = memory.pages[place : place + length]
                memory.pages = pages
                memory.check(f"pool, round {number}")
            copier.close()
            pool.close()
            memory.close()

    def test_rows_are_placed_as_on_the_cpu(self) -> None:
        """Every storage, pairing and alignment, to the last bit; other bytes keep theirs."""
        runtime = self.open_runtime()
        for pairs, storage, gap in itertools.product(_PAIRS, NUMPY_OF_STORAGE, (0, 1)):
            case = RowCase(11, pairs=pairs, storage=storage, num_heads=4, num_pairs=32, num_blocks=60, gap=gap)
            assert case.expected()[0].tobytes() != case.keys.tobytes()
            self._check_rows(runtime, case, gap)

    @staticmethod
    def _check_rows(runtime: CudaRuntime, case: RowCase, gap: int) -> None:
        stream = runtime.open_stream(is_urgent=False)
        parts = {"source": case.source, "keys": case.keys, "values": case.values, "tokens": case.tokens, "cos_sin": case.table}
        memory = {name: runtime.allocate(part.nbytes + 64) for name, part in parts.items()}
        moved = {name: gap * case.source.itemsize * (name in ("source", "keys", "values")) for name in parts}
        at = {name: memory[name].address + moved[name] for name in parts}
        for name, part in parts.items():
            runtime.copy(stream, *_places(at[name], part.ctypes.data), np.array([part.nbytes], np.int64))
        launch_place_rows(runtime, stream, case.placement(**at), pairs=case.pairs, storage=case.storage)
        for name, expected in zip(("keys", "values"), case.expected(), strict=True):
            actual = np.zeros_like(expected)
            runtime.copy(stream, *_places(actual.ctypes.data, at[name]), np.array([actual.nbytes], np.int64))
            runtime.record(stream).wait()
            assert expected.tobytes() == actual.tobytes(), f"{name}, {case.pairs}, {case.storage}, gap {gap}"
        runtime.close_stream(stream)
        for each in memory.values():
            each.close()

    def test_calibration_finds_nothing_wrong(self) -> None:
        """Every way that the device has moves the right bytes and has a figure."""
        table = calibrate(self.open_runtime(), SMALL, piece_sizes=(2048, 6144, 32_768), total_bytes=2 << 20)
        assert [] == [it for it in table.measured if not it.is_right or it.bytes_per_s <= 0]
        assert {Way.DMA, Way.STAGED} <= {it.way for it in table.measured}


class CudaContract(WayContract, DeviceContract):
    """All of it. Subclass it, name the device, run it."""


_PAIRS: tuple[Pairs, ...] = ("neox", "interleaved")


def _compile(memory: Memory, copier: CudaCopier) -> None:
    """Kernels are compiled when they are first needed, which takes so long that no stream would be busy still."""
    copier.gather(memory.copies([(0, 0)])).wait()
    copier.scatter(memory.copies([(0, 0)])).wait()
    memory.expect([(0, 0)], "store")


def _pairs_of_segments(shape: Shape) -> list[range]:
    """Layers of a key and a value each."""
    return [range(index, index + 2) for index in range(0, len(shape.segments), 2)]


def _pairs(num_blocks: int, count: int, *, seed: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(seed)
    blocks, slots = random.permutation(num_blocks).tolist(), random.permutation(num_blocks).tolist()
    return list(zip(blocks, slots, strict=True))[:count]
