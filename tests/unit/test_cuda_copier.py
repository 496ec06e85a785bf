"""The copier of CUDA devices, against a simulated device that puts everything off and sees what was not waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.copy.base import BlockCopy
from kvtier.copy.cuda_calibrate import calibrate
from kvtier.copy.cuda_choice import CopyTable, Measured, Way
from kvtier.copy.cuda_copier import ArenaPlace, CopierOptions, CudaCopier
from kvtier.copy.cuda_runs import runs_of
from kvtier.copy.cuda_ways import CopySettings
from kvtier.layout import KVLayout, Segment
from kvtier.testing.simulated_cuda import RaceError, SimulatedCuda

SLICE = 64 << 10
SMALL = CopySettings(slice_bytes=SLICE, num_buffers=2, num_blocks=2)


class Rig:
    """An engine's pages on a simulated device, an arena, and a copier between them."""

    def __init__(
        self,
        sizes: list[int],
        num_blocks: int = 6,
        *,
        forced: Way | None = None,
        fail_at: int | None = None,
        layers: list[range] | None = None,
        **more: Any,
    ) -> None:
        self.device = SimulatedCuda(**more)
        random = np.random.default_rng(5)
        self.strides = [size + 16 for size in sizes]
        self.sizes = sizes
        self.memory = [self.device.allocate(num_blocks * stride) for stride in self.strides]
        self.pages = [
            memory.room[memory.address - memory.room.ctypes.data :][: num_blocks * stride]
            for memory, stride in zip(self.memory, self.strides, strict=True)
        ]
        for page in self.pages:
            page[:] = random.integers(0, 256, len(page), dtype=np.uint8)
        self.slot_bytes = -(-sum(sizes) // 4096) * 4096
        room = np.empty(num_blocks * self.slot_bytes + 4096, np.uint8)
        self.arena = room[-room.ctypes.data % 4096 :][: num_blocks * self.slot_bytes]
        self.arena[:] = random.integers(0, 256, len(self.arena), dtype=np.uint8)
        segments = tuple(
            Segment(memory.address, stride, size) for memory, stride, size in zip(self.memory, self.strides, sizes, strict=True)
        )
        self.copier = CudaCopier(
            KVLayout(segments, num_blocks),
            self.device,
            ArenaPlace(self.arena.ctypes.data, len(self.arena)),
            compute_stream=lambda: self.device.compute,
            options=CopierOptions(SMALL, forced=forced, layers=layers),
        )
        if fail_at is not None:
            self.device.fail_at = len(self.device.log) + fail_at

    def copies(self, pairs: list[tuple[int, int]]) -> list[BlockCopy]:
        return [BlockCopy(block, slot * self.slot_bytes) for block, slot in pairs]

    def ranges(self, block: int) -> list[tuple[int, int]]:
        """The addresses of an engine block."""
        starts = [memory.address + block * stride for memory, stride in zip(self.memory, self.strides, strict=True)]
        return [(start, start + size) for start, size in zip(starts, self.sizes, strict=True)]

    def fill(self, block: int, value: int) -> None:
        """What the engine computes: fills a block, some time."""

        def run() -> None:
            for page, stride, size in zip(self.pages, self.strides, self.sizes, strict=True):
                page[block * stride : block * stride + size] = value

        self.device.submit("compute", self.device.compute, run, writes=self.ranges(block))

    def block(self, block: int) -> bytes:
        return b"".join(
            page[block * stride : block * stride + size].tobytes()
            for page, stride, size in zip(self.pages, self.strides, self.sizes, strict=True)
        )

    def slot(self, slot: int) -> bytes:
        return self.arena[slot * self.slot_bytes :][: sum(self.sizes)].tobytes()


SHAPES = st.lists(st.sampled_from([16, 48, 4096, 6144, 30_000, 65_536]), min_size=1, max_size=4)


@given(SHAPES, st.sampled_from(list(Way)), st.permutations(range(6)), st.integers(0, 10_000), st.booleans())
def test_every_way_moves_every_byte_in_order(sizes: list[int], way: Way, slots: list[int], seed: int, is_load: bool) -> None:
    """Whatever the way, the slices and the order in which the device gets to it: the bytes of each block, and no others."""
    rig = Rig(sizes, forced=way, seed=seed)
    pairs = list(zip([4, 1, 0, 5], slots, strict=False))
    pages = [page.copy() for page in rig.pages]
    expected = {block: rig.slot(slot) if is_load else rig.block(block) for block, slot in pairs}
    event = rig.copier.scatter(rig.copies(pairs)) if is_load else rig.copier.gather(rig.copies(pairs))
    event.wait()
    assert event.done()
    assert expected == {block: rig.block(block) if is_load else rig.slot(slot) for block, slot in pairs}
    untouched = [block for block in range(6) if block not in expected or not is_load]
    for page, before, stride in zip(rig.pages, pages, rig.strides, strict=True):
        for block in untouched:
            assert before[block * stride : (block + 1) * stride].tobytes() == page[block * stride : (block + 1) * stride].tobytes()
    rig.copier.close()


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("seed", range(5))
def test_stores_see_what_the_engine_computed(way: Way, seed: int) -> None:
    """A gather starts after everything that was on the compute stream, though nothing of it has run yet."""
    rig = Rig([6144, 4096], forced=way, seed=seed)
    rig.fill(2, 77)
    rig.copier.gather(rig.copies([(2, 0)])).wait()
    assert {77} == set(rig.slot(0))


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("seed", range(5))
def test_loads_wait_for_the_blocks_last_reader(way: Way, seed: int) -> None:
    """A scatter into a block that the engine still computes on comes after that, and computing after the load is ordered by it."""
    rig = Rig([6144, 4096], forced=way, seed=seed)
    expected = rig.slot(3)
    rig.fill(2, 77)
    event = rig.copier.scatter(rig.copies([(2, 3)]))
    event.order_compute()
    seen: list[bytes] = []
    rig.device.submit("attention", rig.device.compute, lambda: seen.append(rig.block(2)), reads=rig.ranges(2))
    rig.device.finish()
    assert [expected] == seen


@pytest.mark.parametrize("way", Way)
def test_missing_synchronisation_is_seen(way: Way) -> None:
    """The double would notice: an engine that does not wait for a load, a host that does not wait for a store, one that frees too soon."""
    rig = Rig([6144], forced=way)
    rig.copier.scatter(rig.copies([(2, 3)]))
    with pytest.raises(RaceError, match="compute on stream 0 does not wait for"):
        rig.fill(2, 1)
    event = rig.copier.gather(rig.copies([(1, 0)]))
    place = rig.arena.ctypes.data
    with pytest.raises(RaceError, match="host reads on stream -1 does not wait"):
        rig.device.host_access("host reads", reads=[(place, place + 8)])
    event.wait()
    rig.device.host_access("host reads", reads=[(place, place + 8)])


def test_a_copier_that_does_not_wait_for_the_engine_is_seen() -> None:
    """A copy on a stream of its own, without the compute stream's event, is a race and is called one."""
    rig = Rig([6144], forced=Way.DMA)
    rig.fill(2, 77)
    wrong = rig.device.open_stream(is_urgent=False)
    start = rig.ranges(2)[0][0]
    arrays = (np.array([rig.arena.ctypes.data], np.uint64), np.array([start], np.uint64), np.array([64], np.int64))
    with pytest.raises(RaceError, match="copy on stream"):
        rig.device.copy(wrong, *arrays)


@pytest.mark.parametrize("way", Way)
def test_stores_and_loads_run_beside_each_other(way: Way) -> None:
    """They use different streams, and those of loads are the urgent ones."""
    rig = Rig([6144, 4096], forced=way)
    start = len(rig.device.log)
    rig.copier.gather(rig.copies([(0, 0)]))
    stores = {operation.stream for operation in rig.device.log[start:]}
    start = len(rig.device.log)
    rig.copier.scatter(rig.copies([(1, 1)]))
    loads = {operation.stream for operation in rig.device.log[start:]}
    assert set() == stores & loads
    assert loads <= rig.device.urgent_streams
    assert set() == stores & rig.device.urgent_streams
    rig.device.finish()


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("is_load", [True, False])
def test_slices_are_bounded(way: Way, is_load: bool) -> None:
    """Nothing larger than a slice is submitted at once, so a load waits for one slice of a store at most."""
    rig = Rig([4096, 4096, 32_768], num_blocks=24, forced=way)
    start = len(rig.device.log)
    copies = rig.copies([(block, block) for block in range(24)])
    (rig.copier.scatter if is_load else rig.copier.gather)(copies).wait()
    sizes = [sum(end - begin for begin, end in operation.writes) for operation in rig.device.log[start:]]
    assert max(sizes) <= SLICE
    assert len(sizes) >= 24 * 40_960 // SLICE


def test_staging_overlaps_kernels_and_transfers() -> None:
    """With two buffers the second slice's transfer needs nothing of the first slice's kernel; the third one's does."""
    rig = Rig([32_768, 32_768], forced=Way.STAGED)
    start = len(rig.device.log)
    rig.copier.scatter(rig.copies([(block, block) for block in range(4)]))
    copies = [it for it in rig.device.log[start:] if it.name == "copy"]
    kernels = [it for it in rig.device.log[start:] if it.name == "paged_copy"]
    assert [4, 4] == [len(copies), len(kernels)]
    kernel_stream = kernels[0].stream
    seen = [copy.seen.get(kernel_stream, 0) for copy in copies]
    assert [0, 0, kernels[0].number, kernels[1].number] == seen
    rig.device.finish()


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("fail_at", range(4))
def test_a_copy_that_fails_half_way_has_stopped(way: Way, fail_at: int) -> None:
    """When the error arrives nothing of the copy runs any more: its blocks and slots may be used again at once."""
    rig = Rig([32_768, 32_768], forced=way, fail_at=fail_at)
    with pytest.raises(RuntimeError, match="could not be submitted"):
        rig.copier.gather(rig.copies([(block, block) for block in range(6)]))
    rig.device.fail_at = None
    for block in range(6):
        rig.fill(block, 1)
    start = rig.arena.ctypes.data
    rig.device.host_access("reuse", writes=[(start, start + len(rig.arena))])


@pytest.mark.parametrize("bad", [BlockCopy(6, 0), BlockCopy(-1, 0), BlockCopy(0, -1), BlockCopy(0, 6 * 8192 - 8191)])
@pytest.mark.parametrize("way", Way)
def test_out_of_bounds_submits_nothing(way: Way, bad: BlockCopy) -> None:
    """One bad id or offset, and no byte moves."""
    rig = Rig([8192], forced=way)
    before = len(rig.device.log)
    for move in (rig.copier.gather, rig.copier.scatter):
        with pytest.raises(IndexError, match="outside"):
            move([*rig.copies([(0, 0)]), bad])
    assert before == len(rig.device.log)


def test_batches_go_the_way_that_was_measured() -> None:
    """By the size of the runs, not of the layout's pieces: blocks that lie side by side on both ends are one run."""
    rig = Rig([4096])
    figures = [(Way.DMA, 4096, 1e9), (Way.STAGED, 4096, 9e9), (Way.DMA, 65_536, 9e9), (Way.STAGED, 65_536, 1e9)]
    measured = tuple(Measured("load", way, size, rate) for way, size, rate in figures)
    rig.copier.table = CopyTable(measured, {Way.BULK: "not now"})
    rig.copier.scatter(rig.copies([(1, 1), (3, 2)])).wait()
    assert "paged_copy" == rig.device.log[-1].name
    layout = KVLayout((Segment(rig.memory[0].address, 4096, 4096),), 6)
    copier = CudaCopier(
        layout,
        rig.device,
        ArenaPlace(rig.arena.ctypes.data, len(rig.arena)),
        compute_stream=lambda: rig.device.compute,
        options=CopierOptions(SMALL, CopyTable(measured, {Way.BULK: "not now"})),
    )
    copier.scatter([BlockCopy(block, 4096 * block) for block in range(6)]).wait()
    assert "copy" == rig.device.log[-1].name
    copier.scatter([BlockCopy(block, 4096 * (5 - block)) for block in range(6)]).wait()
    assert "paged_copy" == rig.device.log[-1].name


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(list(Way)), st.integers(0, 10_000))
def test_layers_arrive_one_after_the_other(segments_of_layers: list[int], way: Way, seed: int) -> None:
    """Waiting for a layer's event is enough for what is computed from that layer; all together are the whole blocks."""
    layers, total = [], 0
    for count in segments_of_layers:
        layers.append(range(total, total + count))
        total += count
    rig = Rig([[4096, 6144, 48][index % 3] for index in range(total)], forced=way, seed=seed, layers=layers)
    pairs = [(4, 0), (1, 3)]
    expected = {block: rig.slot(slot) for block, slot in pairs}
    events = rig.copier.scatter_layers(rig.copies(pairs))
    assert rig.copier.num_layers == len(layers) == len(events)
    seen: dict[tuple[int, int], bytes] = {}
    for number, (layer, event) in enumerate(zip(layers, events, strict=True)):
        event.order_compute()
        reads = [rig.ranges(block)[index] for block, _ in pairs for index in layer]

        def attend(number: int = number, layer: range = layer) -> None:
            for block, _ in pairs:
                start, stop = sum(rig.sizes[: layer.start]), sum(rig.sizes[: layer.stop])
                seen[number, block] = rig.block(block)[start:stop]

        rig.device.submit("attention", rig.device.compute, attend, reads=reads)
    rig.device.finish()
    assert expected == {block: b"".join(seen[number, block] for number in range(len(layers))) for block, _ in pairs}


def test_layers_that_do_not_divide_the_segments() -> None:
    """Are refused."""
    with pytest.raises(ValueError, match=r"layers \[range\(0, 1\)\] do not divide 2 segments"):
        Rig([4096, 4096], layers=[range(1)])


class TestRefusals:
    """What cannot be done is said at the start, with names and numbers."""

    def test_no_memory_for_the_ring(self) -> None:
        """The arguments, what they add up to, and what there is; nothing stays allocated."""
        with pytest.raises(
            MemoryError, match=r"num_buffers=2 staging buffers of slice_bytes=65536 for each direction take 262144 bytes: \d+ bytes"
        ):
            Rig([4096], memory_bytes=200_000)

    @pytest.mark.parametrize(
        ("name", "value"), [("slice_bytes", 1000), ("slice_bytes", (16 << 20) + 1), ("num_buffers", 1), ("num_blocks", 0)]
    )
    def test_settings_out_of_bounds(self, name: str, value: int) -> None:
        """Named, with the bounds."""
        with pytest.raises(ValueError, match=rf"{name} is {value}; allowed: \d+ to \d+"):
            CopySettings(**{name: value})

    def test_bulk_copies_where_they_cannot_be(self) -> None:
        """Older devices and layouts that are not of 16-byte units go the other ways; forcing is an error that says why."""
        assert "compute capability 8.0 has no bulk copies" in Rig([4096], capability=80).copier.table.refused[Way.BULK]
        assert "num_bytes is 4090" in Rig([4090]).copier.table.refused[Way.BULK]
        with pytest.raises(ValueError, match=r"copying by bulk was asked for, but .*num_bytes is 4090"):
            Rig([4090], forced=Way.BULK)

    def test_segments_too_large_to_stage(self) -> None:
        """Go by the copy engines."""
        refused = Rig([SLICE + 16]).copier.table.refused
        assert f"a segment has {SLICE + 16} bytes, more than a staging buffer of slice_bytes={SLICE}" == refused[Way.STAGED]

    def test_closing_gives_everything_back(self) -> None:
        """After running copies have ended, once or twice."""
        rig = Rig([4096])
        free = rig.device.free_bytes
        other = Rig([4096])
        other.copier.close()
        other.copier.close()
        taken = free - other.device.free_bytes
        assert taken == -(2 * 2 * SLICE + 40)


def test_what_is_closed_leaves_nothing_on_the_device() -> None:
    """Neither memory nor streams, also after measuring: streams share the device's few queues."""
    device = SimulatedCuda()
    free_bytes = device.free_bytes
    table = calibrate(device, SMALL, piece_sizes=(4096,), total_bytes=1 << 20)
    page, arena = device.allocate(4096), np.zeros(4096, np.uint8)
    place, layout = ArenaPlace(arena.ctypes.data, 4096), KVLayout((Segment(page.address, 4096, 4096),), 1)
    copier = CudaCopier(layout, device, place, compute_stream=lambda: device.compute, options=CopierOptions(SMALL, table))
    copier.gather([BlockCopy(0, 0)]).wait()
    for _ in range(2):
        copier.close()
    page.close()
    assert free_bytes == device.free_bytes
    assert set(range(len(device.streams))) - device.closed_streams == {device.compute}


def test_the_first_copy_starts_before_the_last_is_worked_out() -> None:
    """The copy engines are told of a batch slice by slice, each worked out when the one before it is on its way."""
    rig = Rig([16_384, 16_384], num_blocks=40, forced=Way.DMA)
    sizes: list[int] = []

    def counted(table: Any, block_ids: Any, offsets: Any, contiguous: int) -> Any:
        sizes.append(len(block_ids))
        return runs_of(table, block_ids, offsets, contiguous)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtier.copy.cuda_ways.runs_of", counted)
        rig.copier.gather(rig.copies([(block, block) for block in range(40)])).wait()
    assert [2] * 20 == sizes
