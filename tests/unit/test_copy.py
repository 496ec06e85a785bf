"""All copiers move the same bytes to the same places, and none moves a byte out of bounds."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import _core, _fallback
from kvtier.copy.base import BlockCopier, BlockCopy
from kvtier.copy.cpu import NativeCopier
from kvtier.layout import KVLayout, Segment

torch = pytest.importorskip("torch")
from kvtier.copy.torch_copier import TorchCopier  # noqa: E402 - only where there is torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
TWINS = [_core.copy_blocks, _fallback.copy_blocks]


@dataclass(frozen=True)
class Shape:
    """Segments as (gap before block 0, stride, length), and how many blocks and slots there are."""

    segments: tuple[tuple[int, int, int], ...]
    num_blocks: int
    num_slots: int

    @property
    def block_bytes(self) -> int:
        return sum(length for _, _, length in self.segments)


class Memory:
    """An engine's pages, one array per segment, and an arena; all filled with noise."""

    def __init__(self, shape: Shape, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.shape = shape
        self.pages: list[Bytes] = [
            random.integers(0, 256, gap + shape.num_blocks * stride, dtype=np.uint8) for gap, stride, _ in shape.segments
        ]
        self.arena: Bytes = random.integers(0, 256, shape.num_slots * shape.block_bytes + 3, dtype=np.uint8)

    def layout(self) -> KVLayout:
        """Where the pages really are."""
        pairs = zip(self.pages, self.shape.segments, strict=True)
        segments = tuple(Segment(page.ctypes.data + gap, stride, length) for page, (gap, stride, length) in pairs)
        return KVLayout(segments, self.shape.num_blocks)

    def native(self) -> NativeCopier:
        """The copier of the CPU."""
        return NativeCopier(self.layout(), arena_address=self.arena.ctypes.data, arena_bytes=self.arena.nbytes)

    def torch(self, staged_blocks: int = 2) -> TorchCopier:
        """The copier by torch, with so small a staging buffer that it must be used more than once."""
        views = [
            torch.from_numpy(page)[gap:].view(self.shape.num_blocks, stride)[:, :length].view(torch.int8)
            for page, (gap, stride, length) in zip(self.pages, self.shape.segments, strict=True)
        ]
        return TorchCopier(views, self.arena.data, staging_bytes=staged_blocks * self.shape.block_bytes)

    def move(self, copies: list[BlockCopy], *, to_arena: bool) -> None:
        """The oracle: slices of numpy arrays."""
        for copy in copies:
            start = copy.arena_offset
            for page, (gap, stride, length) in zip(self.pages, self.shape.segments, strict=True):
                first = gap + copy.block_id * stride
                if to_arena:
                    self.arena[start : start + length] = page[first : first + length]
                else:
                    page[first : first + length] = self.arena[start : start + length]
                start += length

    def contents(self) -> list[bytes]:
        """Every byte."""
        return [page.tobytes() for page in (*self.pages, self.arena)]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    segments = tuple((draw(st.integers(0, 5)), length + draw(st.integers(0, 40)), length) for length in lengths)
    return Shape(segments, draw(st.integers(1, 8)), draw(st.integers(1, 8)))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Shape, list[BlockCopy]]:
    """Distinct blocks and distinct places that do not overlap, at odd offsets."""
    shape = draw(shapes())
    blocks = draw(st.permutations(range(shape.num_blocks)))
    slots = draw(st.permutations(range(shape.num_slots)))
    shift = draw(st.integers(0, 3))
    return shape, [BlockCopy(block, slot * shape.block_bytes + shift) for block, slot in zip(blocks, slots, strict=False)]


def both_directions(shape: Shape, copies: list[BlockCopy], make: Callable[[Memory], BlockCopier]) -> None:
    """``make``'s copier leaves the memory as the oracle does."""
    for to_arena in (True, False):
        expected, actual = Memory(shape, 5), Memory(shape, 5)
        expected.move(copies, to_arena=to_arena)
        copier = make(actual)
        event = copier.gather(copies) if to_arena else copier.scatter(copies)
        event.wait()
        assert event.done()
        assert expected.contents() == actual.contents()


@settings(max_examples=120, deadline=None)
@given(batches())
def test_copiers_agree_with_numpy(batch: tuple[Shape, list[BlockCopy]]) -> None:
    """Whatever the segments, strides, blocks and offsets: the named bytes move, and no other byte changes."""
    shape, copies = batch
    both_directions(shape, copies, Memory.native)
    both_directions(shape, copies, Memory.torch)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_twins_agree_on_overlapping_batches(shape: Shape, data: st.DataObject) -> None:
    """A batch is copied one block after the other, so the last of two copies to one place wins."""
    offsets = st.integers(0, shape.num_slots * shape.block_bytes + 3 - shape.block_bytes)
    drawn = data.draw(st.lists(st.tuples(st.integers(0, shape.num_blocks - 1), offsets), max_size=12))
    copies = [BlockCopy(block, offset) for block, offset in drawn]
    for to_arena in (True, False):
        expected = Memory(shape, 5)
        expected.move(copies, to_arena=to_arena)
        for twin in TWINS:
            actual = Memory(shape, 5)
            assert len(copies) * shape.block_bytes == run(twin, actual, copies, to_arena=to_arena)
            assert expected.contents() == actual.contents()


def run(twin: Callable[..., int], memory: Memory, copies: list[BlockCopy], *, to_arena: bool) -> int:
    """Calls the function behind the copier."""
    layout = memory.layout()
    paged = array("q", [layout.num_blocks])
    for segment in layout.segments:
        paged.extend((segment.base_address, segment.stride_bytes, segment.num_bytes))
    ids = np.array([copy.block_id for copy in copies], "i8")
    offsets = np.array([copy.arena_offset for copy in copies], "i8")
    return twin(paged, memory.arena.ctypes.data, memory.arena.nbytes, ids, offsets, to_arena)


LARGE = Shape(tuple((gap, 70_040, length) for gap, length in ((0, 70_001), (3, 64), (1, 70_040), (63, 4096), (0, 65), (7, 9))), 40, 40)


def test_large_batches_take_another_way_to_the_same_end() -> None:
    """From 4 MiB on the core copies past the caches: alignment and odd lengths must not show."""
    copies = [BlockCopy((7 * slot) % 40, slot * (LARGE.block_bytes + 1)) for slot in range(39)]
    assert len(copies) * LARGE.block_bytes > 5 << 20
    both_directions(LARGE, copies, Memory.native)


SMALL = Shape(((0, 12, 10), (2, 7, 7)), 5, 4)  # 17 bytes a block, 71 in the arena


@pytest.mark.parametrize("make", [Memory.native, Memory.torch])
@pytest.mark.parametrize("bad", [BlockCopy(*bad) for bad in ((5, 0), (-1, 0), (2**62, 0), (0, 55), (0, -1), (0, 2**63 - 1), (0, -(2**63)))])
def test_out_of_bounds_moves_nothing(make: Callable[[Memory], BlockCopier], bad: BlockCopy) -> None:
    """One bad block id or offset, anywhere in the batch, is an IndexError before the first byte moves."""
    good = [BlockCopy(0, 0), BlockCopy(1, 54)]
    for position in range(3):
        memory = Memory(SMALL, 5)
        before = memory.contents()
        copies = [*good[:position], bad, *good[position:]]
        copier = make(memory)
        for move in (copier.gather, copier.scatter):
            with pytest.raises(IndexError, match="outside"):
                move(copies)
        assert before == memory.contents()


@pytest.mark.parametrize("twin", TWINS)
def test_malformed_calls_raise_the_same_everywhere(twin: Callable[..., int]) -> None:
    """The twins share their errors, and what is malformed moves nothing."""
    memory = Memory(SMALL, 5)
    before = memory.contents()
    arena, base = memory.arena.ctypes.data, memory.pages[0].ctypes.data
    paged, one = array("q", [5, base, 12, 10]), array("q", [0])
    cases: list[tuple[type[Exception], tuple[Any, ...]]] = [
        (ValueError, (array("q", [5]), arena, 71, one, one, True)),
        (ValueError, (array("q", [5, base, 12]), arena, 71, one, one, True)),
        (ValueError, (array("q", [0, base, 12, 10]), arena, 71, one, one, True)),
        (ValueError, (array("q", [5, base, 9, 10]), arena, 71, one, one, True)),
        (ValueError, (array("q", [5, base, 9, 0]), arena, 71, one, one, True)),
        (ValueError, (array("q", [5, 0, 12, 10]), arena, 71, one, one, True)),
        (ValueError, (paged, 0, 71, one, one, True)),
        (ValueError, (paged, arena, -1, one, one, True)),
        (ValueError, (paged, arena, 71, one, array("q"), True)),
        (IndexError, (paged, arena, 9, one, one, True)),
        (TypeError, (array("i", [5, 1, 12, 10]), arena, 71, one, one, True)),
        (TypeError, (paged, arena, 71, array("Q", [0]), one, True)),
        (TypeError, (paged, arena, 71, np.zeros(1), one, True)),
        (TypeError, (paged, arena, 71, [0], one, True)),
    ]
    for error, arguments in cases:
        with pytest.raises(error):
            twin(*arguments)
    assert before == memory.contents()


def test_torch_copier_refuses_what_it_would_copy_wrongly() -> None:
    """Rows of bytes, equally many, on one device."""
    arena = memoryview(bytearray(64))
    good = torch.zeros((4, 8), dtype=torch.int8)
    for bad in (good.float(), good.t(), good[:3], good[0], torch.zeros((4, 8), dtype=torch.int8, device="meta")):
        with pytest.raises(ValueError, match="KV tensor 1 must be int8"):
            TorchCopier([good, bad], arena)
    with pytest.raises(ValueError, match="no KV tensors"):
        TorchCopier([], arena)


@contextmanager
def switch_interval(seconds: float) -> Iterator[None]:
    """How long a Python thread keeps the GIL unless it gives it up."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_a_large_copy_lets_other_threads_run() -> None:
    """The GIL is given up, so an engine's other threads go on meanwhile."""
    shape = Shape(((0, 1 << 20, 1 << 20),), 16, 16)
    memory = Memory(shape, 5)
    copier = memory.native()
    copies = [BlockCopy(number % 16, (number % 16) << 20) for number in range(1024)]
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    with switch_interval(30.0):
        thread.start()
        while len(ticks) < 3:
            time.sleep(0.001)
        before = len(ticks)
        copier.gather(copies)
        during = len(ticks) - before
        stop.set()
        thread.join()
    assert during >= 5


def test_the_copier_reads_real_addresses() -> None:
    """Nothing is copied in between: what the layout's address holds at the time of the call is what moves."""
    page = (ctypes.c_uint8 * 8)(*range(8))
    arena = (ctypes.c_uint8 * 8)()
    layout = KVLayout((Segment(ctypes.addressof(page), 4, 4),), 2)
    copier = NativeCopier(layout, arena_address=ctypes.addressof(arena), arena_bytes=8)
    page[4] = 99
    copier.gather([BlockCopy(1, 0)])
    assert [99, 5, 6, 7, 0, 0, 0, 0] == list(arena)
