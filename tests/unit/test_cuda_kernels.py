"""The kernels' own text, run on the CPU: they touch the bytes that numpy says, and no others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.copy import cuda_params, cuda_rows
from kvtier.copy.cuda_params import BulkRing, DeviceTable, merged, paged_copy, segment_table
from kvtier.copy.cuda_rows import pairs_per_item, place_params
from kvtier.copy.cuda_runs import Runs, joined, runs_of
from kvtier.copy.rope import NUMPY_OF_STORAGE
from kvtier.layout import KVLayout, Segment
from kvtier.testing.cuda_rows import RowCase
from tests.cuda_on_cpu import PLACE_KERNELS, KernelsOnCpu

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelsOnCpu:
    return KernelsOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.mark.parametrize("name", ["segment", "paged_copy", "row_token", "place_rows"])
def test_structs_lie_alike_on_both_sides(kernels: KernelsOnCpu, name: str) -> None:
    """Python writes each member where the kernels read it."""
    dtype: np.dtype[Any] = getattr(cuda_params if hasattr(cuda_params, name.upper()) else cuda_rows, name.upper())
    assert dtype.names is not None
    assert dtype.fields is not None
    assert [*(dtype.fields[field][1] for field in dtype.names), dtype.itemsize] == kernels.struct_layout(name)


@settings(max_examples=200)
@given(left=st.integers(0, 2**40), right=st.integers(0, 2**40), num_bytes=st.integers(0, 10_000))
def test_split_covers_all_bytes_with_aligned_words(kernels: KernelsOnCpu, left: int, right: int, num_bytes: int) -> None:
    """Head, words and tail are all bytes, once; words are aligned on both sides and as wide as can be."""
    width, head, num_words, tail = kernels.split(left, right, num_bytes)
    assert num_bytes == head + width * num_words + tail
    assert min(head, num_words, tail) >= 0
    assert max(head, tail) < width or num_words == 0
    if num_words:
        assert [0, 0] == [(left + head) % width, (right + head) % width]
    assert width == next(bits for bits in (16, 8, 4, 1) if (left - right) % bits == 0)


class Memory:
    """Pages, one array a segment, an arena, and copies between them; a pattern fills everything."""

    def __init__(self, segments: list[tuple[int, int, int]], num_blocks: int, num_slots: int, *, align: int = 1, shift: int = 0) -> None:
        self.pages = [aligned(gap + num_blocks * stride, seed) for seed, (gap, stride, _) in enumerate(segments)]
        self.layout = KVLayout(
            tuple(
                Segment(page.ctypes.data + gap, stride, length) for page, (gap, stride, length) in zip(self.pages, segments, strict=True)
            ),
            num_blocks,
        )
        self.slot_bytes = -(-self.layout.block_bytes // align) * align
        self.arena = aligned(num_slots * self.slot_bytes + shift + 64, 99)
        self.segments = segments
        self.shift = shift

    def offset(self, slot: int) -> int:
        return self.shift + slot * self.slot_bytes

    def move(self, block: int, slot: int, *, to_paged: bool) -> None:
        """The oracle."""
        start = self.offset(slot)
        for page, (gap, stride, length) in zip(self.pages, self.segments, strict=True):
            first = gap + block * stride
            if to_paged:
                page[first : first + length] = self.arena[start : start + length]
            else:
                self.arena[start : start + length] = page[first : first + length]
            start += length

    def contents(self) -> list[bytes]:
        return [array.tobytes() for array in (*self.pages, self.arena)]


def aligned(num_bytes: int, seed: int) -> Bytes:
    """Noise that starts at a multiple of 128, as device memory does."""
    room = np.empty(num_bytes + 128, np.uint8)
    start = -room.ctypes.data % 128
    place = room[start : start + num_bytes]
    place[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    return place


def table_of(layout: KVLayout, chunk_bytes: int) -> DeviceTable:
    rows = segment_table(layout.segments, chunk_bytes)
    return DeviceTable(rows, rows.ctypes.data, chunk_bytes)


@st.composite
def batches(draw: st.DrawFn, unit: int = 1) -> tuple[list[tuple[int, int, int]], int, list[tuple[int, int]], int]:
    """Segments of odd sizes, how many blocks, which block goes to which slot, where slots start. All a multiple of ``unit``."""
    lengths = [unit * length for length in draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))]
    segments = [(unit * draw(st.integers(0, 3)), length + unit * draw(st.integers(0, 5)), length) for length in lengths]
    num_blocks = draw(st.integers(1, 6))
    blocks = draw(st.permutations(range(num_blocks)))[: draw(st.integers(1, num_blocks))]
    slots = draw(st.permutations(range(num_blocks)))
    return segments, num_blocks, list(zip(blocks, slots, strict=False)), unit * draw(st.integers(0, 3))


def run_on(memory: Memory, pairs: list[tuple[int, int]], chunk_bytes: int, *, to_paged: bool, num_stages: int = 0) -> cuda_params.Record:
    """The parameters of the launch; the table is kept alive by the memory."""
    table = table_of(memory.layout, chunk_bytes)
    memory.table = table  # type: ignore[attr-defined]
    block_ids = np.array([block for block, _ in pairs], np.int64)
    offsets = np.array([memory.offset(slot) for _, slot in pairs], np.int64)
    return paged_copy(table, memory.arena.ctypes.data, block_ids, offsets, to_paged=to_paged, num_stages=num_stages)


@given(batches(), st.sampled_from([16, 32, 64, 8192]), st.booleans())
def test_paged_copy_moves_what_numpy_moves(kernels: KernelsOnCpu, batch: Any, chunk_bytes: int, to_paged: bool) -> None:
    """Whatever sizes and alignments: the blocks' bytes move, all others stay as they were."""
    segments, num_blocks, pairs, shift = batch
    expected, actual = (Memory(segments, num_blocks, num_blocks, shift=shift) for _ in range(2))
    for block, slot in pairs:
        expected.move(block, slot, to_paged=to_paged)
    kernels.paged_copy(run_on(actual, pairs, chunk_bytes, to_paged=to_paged))
    assert expected.contents() == actual.contents()


@pytest.mark.parametrize("to_paged", [True, False])
def test_paged_copy_of_many_words_a_thread(kernels: KernelsOnCpu, to_paged: bool) -> None:
    """The unrolled loop and its rest: whole chunks and one of an odd length."""
    shapes = [[(0, 40_000, 40_000), (16, 8192, 8192)], [(1, 9001, 8999), (3, 5000, 4997)]]
    for segments, num_threads in itertools.product(shapes, (32, 512)):
        expected, actual = (Memory(segments, 3, 3) for _ in range(2))
        for block, slot in ((2, 0), (0, 2)):
            expected.move(block, slot, to_paged=to_paged)
        kernels.paged_copy(run_on(actual, [(2, 0), (0, 2)], 8192, to_paged=to_paged), 4, num_threads)
        assert expected.contents() == actual.contents()


@given(
    batches(unit=16),
    st.sampled_from([16, 32, 64, 2048]),
    st.integers(3, 16),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_bulk_copy_waits_for_everything(
    kernels: KernelsOnCpu,
    batch: Any,
    chunk_bytes: int,
    num_stages: int,
    num_warps: int,
    to_paged: bool,
    late_loads: bool,
    late_stores: bool,
) -> None:
    """However early or late the copy engine moves bytes: the right ones arrive, no stage is reused too soon or shared, nothing hangs."""
    segments, num_blocks, pairs, shift = batch
    expected, actual = (Memory(segments, num_blocks, num_blocks, align=16, shift=shift) for _ in range(2))
    for block, slot in pairs:
        expected.move(block, slot, to_paged=to_paged)
    params = run_on(actual, pairs, chunk_bytes, to_paged=to_paged, num_stages=num_stages)
    ring = BulkRing(num_warps, num_stages, chunk_bytes)
    assert 0 == kernels.bulk_copy(params, ring, 3, late_loads=late_loads, late_stores=late_stores)
    assert expected.contents() == actual.contents()


@given(st.integers(1, 512))
def test_a_ring_fits_and_keeps_the_bus_busy(units: int) -> None:
    """Whatever the chunk: it fits into every device, with two loads under way in each warp; from 2 KiB on, 32 KiB and more a block."""
    ring = BulkRing.of(16 * units)
    assert ring.shared_bytes <= 99 << 10
    assert 3 <= ring.num_stages <= 16
    assert 1 <= ring.num_warps <= 16
    if ring.chunk_bytes >= 2048:
        assert ring.num_warps * (ring.num_stages - 1) * ring.chunk_bytes >= 32 << 10


@given(batches(), st.sampled_from([16, 48, 8192]), st.data())
def test_items_are_the_runs_in_chunks(kernels: KernelsOnCpu, batch: Any, chunk_bytes: int, data: st.DataObject) -> None:
    """The kernels' chunks, joined again, are the runs that the CPU's arithmetic gives, also for a part of the segments."""
    segments, num_blocks, pairs, shift = batch
    memory = Memory(segments, num_blocks, num_blocks, shift=shift)
    first = data.draw(st.integers(0, len(segments) - 1))
    stop = data.draw(st.integers(first + 1, len(segments)))
    table = table_of(memory.layout, chunk_bytes).part(first, stop)
    block_ids = np.array([block for block, _ in pairs], np.int64)
    offsets = np.array([memory.offset(slot) for _, slot in pairs], np.int64)
    params = paged_copy(table, memory.arena.ctypes.data, block_ids, offsets, to_paged=True)
    items = kernels.items(params)
    assert max(length for _, _, length in items) <= chunk_bytes
    columns = np.array(items, np.int64).T
    actual = joined(Runs(columns[0].astype(np.uint64), columns[1].astype(np.uint64), columns[2]))
    expected = runs_of(table.rows, block_ids, offsets, memory.arena.ctypes.data)
    for side in ("paged", "contiguous", "num_bytes"):
        assert getattr(expected, side).tolist() == getattr(actual, side).tolist()


def test_indices_have_64_bits(kernels: KernelsOnCpu) -> None:
    """A block far behind 4 GiB in memory and in the arena lies where it should."""
    rows = segment_table([Segment(2**44, 2**21, 4096), Segment(2**45, 2**33, 4096)], 4096)
    table = DeviceTable(rows, rows.ctypes.data, 4096)
    block_ids, offsets = np.array([2**20 + 1]), np.array([2**40])
    items = kernels.items(paged_copy(table, 2**46, block_ids, offsets, to_paged=True))
    assert [(2**44 + (2**20 + 1) * 2**21, 2**46 + 2**40, 4096), (2**45 + (2**20 + 1) * 2**33, 2**46 + 2**40 + 4096, 4096)] == items


@given(batches(), st.integers(1, 300))
def test_runs_are_the_layout_and_slices_are_bounded(batch: Any, max_bytes: int) -> None:
    """Runs are each block's segments; slices are the same bytes in the same order, none larger than asked."""
    segments, num_blocks, pairs, shift = batch
    memory = Memory(segments, num_blocks, num_blocks, shift=shift)
    rows = segment_table(merged(memory.layout).segments, 64)
    runs = runs_of(rows, np.array([p[0] for p in pairs]), np.array([memory.offset(p[1]) for p in pairs]), memory.arena.ctypes.data)
    expected = set()
    for block, slot in pairs:
        place = memory.arena.ctypes.data + memory.offset(slot)
        for segment in memory.layout.segments:
            paged = segment.base_address + block * segment.stride_bytes
            expected |= {(paged + k, place + k) for k in range(segment.num_bytes)}
            place += segment.num_bytes
    assert expected == bytes_of(runs)
    slices = list(runs.slices(max_bytes))
    assert all(part.total_bytes <= max_bytes for part in slices)
    assert runs.total_bytes == sum(part.total_bytes for part in slices)
    assert expected == set().union(*map(bytes_of, slices))


def bytes_of(runs: Runs) -> set[tuple[int, int]]:
    columns = zip(runs.paged.tolist(), runs.contiguous.tolist(), runs.num_bytes.tolist(), strict=True)
    return {(paged + k, contiguous + k) for paged, contiguous, length in columns for k in range(length)}


def test_neighbours_become_one_run() -> None:
    """Segments side by side in every block, and blocks side by side on both ends."""
    layout = KVLayout((Segment(1000, 96, 32), Segment(1032, 96, 64)), 8)
    rows = segment_table(merged(layout).segments, 64)
    assert 1 == len(rows)
    runs = runs_of(rows, np.array([3, 4, 6]), np.array([0, 96, 192]), 0)
    assert [(1288, 0, 192), (1576, 192, 96)] == list(
        zip(runs.paged.tolist(), runs.contiguous.tolist(), runs.num_bytes.tolist(), strict=True)
    )
    apart = KVLayout((Segment(1000, 64, 32), Segment(1032, 96, 64)), 8)
    assert apart == merged(apart)


class TestRows:
    """The kernels that put rows into place give the bits of the CPU's rotation, and touch nothing else."""

    @given(
        st.sampled_from(PLACE_KERNELS),
        st.sampled_from([1, 3, 4, 8, 32]),
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from([0, 1, 4]),
        st.integers(0, 10_000),
    )
    def test_kernels_agree_with_the_twin(
        self, kernels: KernelsOnCpu, kernel: str, num_pairs: int, num_heads: int, num_blocks: int, gap: int, seed: int
    ) -> None:
        """Any storage, pairing, alignment, and set of tokens that move or stay."""
        _, pairs, storage = kernel.split("_")
        case = RowCase(seed, pairs=pairs, storage=storage, num_heads=num_heads, num_pairs=num_pairs, num_blocks=num_blocks, gap=gap)  # type: ignore[arg-type]
        expected = case.expected()
        parts = {"source": case.source, "keys": case.keys, "values": case.values, "tokens": case.tokens, "cos_sin": case.table}
        place = case.placement(**{name: part.ctypes.data for name, part in parts.items()})
        kernels.place_rows(kernel, place_params(place, case.storage))
        assert [part.tobytes() for part in expected] == [case.keys.tobytes(), case.values.tobytes()]

    def test_wide_accesses_are_taken_only_where_all_are_aligned(self) -> None:
        """A stride, an address or a number of pairs that does not fit means one pair at a time."""
        place = RowCase(1, pairs="neox", storage="bf16", num_heads=2, num_pairs=8, num_blocks=2).placement(
            source=256, keys=512, values=1024, tokens=8, cos_sin=4
        )
        assert 4 == pairs_per_item(place, 2)
        for bad in ({"source": 260}, {"keys": 2}, {"values": 12}, {"value_offset": 4}, {"source_head_stride": 36}, {"num_pairs": 6}):
            assert 1 == pairs_per_item(replace(place, **bad), 2)

    def test_every_storage_has_a_kernel(self) -> None:
        """And both pairings."""
        assert {f"place_{pairs}_{storage}" for pairs in ("neox", "interleaved") for storage in NUMPY_OF_STORAGE} == set(PLACE_KERNELS)
