"""All copiers move the same bytes to the same places, and none moves a byte out of bounds."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

    def native(self, num_threads: int = 2) -> NativeCopier:
        """The copier of the CPU."""
        return NativeCopier(self.layout(), arena_address=self.arena.ctypes.data, arena_bytes=self.arena.nbytes, num_threads=num_threads)

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
    both_directions(shape, copies, lambda memory: memory.native())
    both_directions(shape, copies, lambda memory: memory.torch())


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data(), st.integers(1, 3))
def test_twins_agree_on_what_they_copy_and_what_they_refuse(shape: Shape, data: st.DataObject, num_threads: int) -> None:
    """Two blocks that would go to one place, or places that overlap, are refused; else both move the same bytes."""
    offsets = st.integers(0, shape.num_slots * shape.block_bytes + 3 - shape.block_bytes)
    drawn = data.draw(st.lists(st.tuples(st.integers(0, shape.num_blocks - 1), offsets), max_size=5))
    copies = [BlockCopy(block, offset) for block, offset in drawn]
    for to_arena in (True, False):
        expected = Memory(shape, 5)
        is_refused = collides(shape, copies, to_arena=to_arena)
        if not is_refused:
            expected.move(copies, to_arena=to_arena)
        messages = set()
        for twin in TWINS:
            actual = Memory(shape, 5)
            if is_refused:
                with pytest.raises(ValueError, match="apart") as error:
                    run(twin, actual, copies, to_arena=to_arena, num_threads=num_threads)
                messages.add(str(error.value))
            else:
                assert len(copies) * shape.block_bytes == run(twin, actual, copies, to_arena=to_arena, num_threads=num_threads)
            assert expected.contents() == actual.contents()
        assert is_refused == (len(messages) == 1)


def collides(shape: Shape, copies: list[BlockCopy], *, to_arena: bool) -> bool:
    """Pair by pair: the same block twice as a target, or places in the arena that overlap without being one and the same source."""
    for left, right in itertools.combinations(copies, 2):
        gap = abs(left.arena_offset - right.arena_offset)
        if gap < shape.block_bytes and not (gap == 0 and not to_arena):
            return True
        if left.block_id == right.block_id and not to_arena:
            return True
    return False


def run(twin: Callable[..., int], memory: Memory, copies: list[BlockCopy], *, to_arena: bool, num_threads: int = 1) -> int:
    """Calls the function behind the copier."""
    layout = memory.layout()
    paged = array("q", [layout.num_blocks])
    for segment in layout.segments:
        paged.extend((segment.base_address, segment.stride_bytes, segment.num_bytes))
    ids = np.array([copy.block_id for copy in copies], "i8")
    offsets = np.array([copy.arena_offset for copy in copies], "i8")
    return twin(paged, memory.arena.ctypes.data, memory.arena.nbytes, ids, offsets, to_arena, num_threads)


LARGE = Shape(tuple((gap, 140_040, length) for gap, length in ((0, 140_001), (3, 64), (1, 70_040), (63, 4096), (0, 65), (7, 9))), 40, 40)


@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize("num_blocks", [4, 25, 41])
def test_large_batches_take_another_way_to_the_same_end(num_blocks: int, num_threads: int) -> None:
    """The core copies them past the caches, in lanes and on several threads: neither alignment, odd lengths nor the number of blocks
    must show, and every byte around what is copied stays."""
    copies = [BlockCopy((7 * slot) % 40, slot * LARGE.block_bytes + slot % 3) for slot in range(num_blocks - 1)]
    copies = [BlockCopy(copy.block_id, copy.arena_offset + 2 * index) for index, copy in enumerate(copies)]
    shape = replace(LARGE, num_slots=42)
    both_directions(shape, copies, lambda memory: memory.native(num_threads))


@pytest.mark.parametrize("to_arena", [True, False])
def test_one_large_block_is_copied_whole(to_arena: bool) -> None:
    """A batch of few long segments is cut into pieces; the cuts must not show."""
    shape = Shape(((5, 5_000_003, 5_000_001), (0, 70, 33)), 2, 1)
    expected, actual = Memory(shape, 5), Memory(shape, 5)
    copies = [BlockCopy(1, 3)]
    expected.move(copies, to_arena=to_arena)
    run(_core.copy_blocks, actual, copies, to_arena=to_arena, num_threads=2)
    assert expected.contents() == actual.contents()


def test_several_threads_may_copy_at_once() -> None:
    """Whoever finds the core's threads taken copies alone: nobody waits for ever, and nobody's bytes get mixed up."""
    memories = [Memory(LARGE, seed) for seed in range(4)]
    expected = [Memory(LARGE, seed) for seed in range(4)]
    copies = [BlockCopy(slot, slot * LARGE.block_bytes) for slot in range(40)]
    for memory in expected:
        memory.move(copies, to_arena=True)

    def copy(memory: Memory) -> None:
        copier = memory.native(2)
        for _ in range(5):
            copier.gather(copies)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(copy, memories))
    for memory, right in zip(memories, expected, strict=True):
        assert right.contents() == memory.contents()


def test_nothing_is_under_way_when_a_copy_returns() -> None:
    """The engine may write into its blocks at once: what was stored is what was there before."""
    pages, arena = np.zeros(8 << 20, np.uint8), np.zeros(8 << 20, np.uint8)
    layout = KVLayout((Segment(pages.ctypes.data, 64 << 10, 64 << 10),), 128)
    copier = NativeCopier(layout, arena_address=arena.ctypes.data, arena_bytes=arena.nbytes, num_threads=2)
    copies = [BlockCopy(number, number << 16) for number in range(128)]
    for value in range(100):
        copier.gather(copies)
        pages.fill(value + 1)
        assert (arena == value).all()


FORKS = """
import os, threading, time
import numpy as np
from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import NativeCopier
from kvtier.layout import KVLayout, Segment

pages, arena = np.arange(8 << 20, dtype=np.uint8), np.zeros(8 << 20, np.uint8)
layout = KVLayout((Segment(pages.ctypes.data, 1 << 20, 1 << 20),), 8)
copier = NativeCopier(layout, arena_address=arena.ctypes.data, arena_bytes=arena.nbytes, num_threads=2)
copies = [BlockCopy(number, number << 20) for number in range(8)]

def again_and_again():
    while True:
        copier.gather(copies)

def num_helpers():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return names.count("kvtier-copy\\n")

has_help = len(os.sched_getaffinity(0)) > 1
copier.gather(copies)
threading.Thread(target=again_and_again, daemon=True).start()
for _ in range(10):
    child = os.fork()
    if not child:
        arena[:] = 0
        copier.gather(copies)
        os._exit(0 if (arena == pages).all() and num_helpers() == has_help else 1)
    assert os.waitpid(child, 0)[1] == 0
assert num_helpers() == has_help
print("ended")
"""


def test_a_fork_has_threads_of_its_own_and_nothing_waits_for_them_at_the_end() -> None:
    """A child that was forked in the middle of a copy copies; and a process with a copy under way ends."""
    outcome = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert (0, "ended\n") == (outcome.returncode, outcome.stdout), outcome.stderr


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
        (ValueError, (array("q", [5, base, 2**62, 10]), arena, 71, one, one, True)),
        (ValueError, (array("q", [1, base, 2**63 - base, 10]), arena, 71, one, one, True)),
        (ValueError, (array("q", [1, 1, 2**62, 2**62, 1, 2**62, 2**62]), arena, 2**63 - 1, array("q"), array("q"), True)),
        (ValueError, (paged, 0, 71, one, one, True)),
        (ValueError, (paged, arena, -1, one, one, True)),
        (ValueError, (paged, arena, 71, one, array("q"), True)),
        (ValueError, (paged, arena, 71, one, one, True, 0)),
        (TypeError, (paged, arena, 71, one, one)),
        (TypeError, (paged, arena, 71, one, one, True, 1, 1)),
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


NOTHING_OF_MUCH = """
import resource
from array import array
from kvtier import _core
limit = 4 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(_core.copy_blocks(array("q", [1, 4096, 1 << 50, 1 << 50]), 4096, 8, array("q"), array("q"), True))
"""


def test_no_blocks_take_no_time_however_large_they_are() -> None:
    """A block is divided into pieces where one is copied, not before: those of a PiB would fill the memory."""
    outcome = subprocess.run([sys.executable, "-c", NOTHING_OF_MUCH], capture_output=True, text=True, timeout=60, check=False)
    assert (0, "0\n") == (outcome.returncode, outcome.stdout), outcome.stderr


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
    copies = [BlockCopy(number, number << 20) for number in range(16)]
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    with switch_interval(30.0):
        thread.start()
        try:
            while len(ticks) < 3:
                time.sleep(0.001)
            before = len(ticks)
            for _ in range(64):
                copier.gather(copies)
            during = len(ticks) - before
        finally:
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
