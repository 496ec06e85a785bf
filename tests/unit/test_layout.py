"""A stride table names every byte of a block once, in memory order and in the fewest pieces, for every layout there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import NativeCopier
from kvtier.layout import Axis, KVLayout, Segment, StrideTable

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
NAMES = ("kv", "layer", "block", "head", "token")
LAYOUTS = {
    "token-major, K and V apart": ("layer", "kv", "block", "token", "head"),
    "head-major, K and V apart": ("layer", "kv", "block", "head", "token"),
    "token-major, K and V in the block": ("layer", "block", "kv", "token", "head"),
    "heads outside of the blocks": ("layer", "head", "block", "token", "kv"),
    "all layers in the block": ("block", "layer", "kv", "head", "token"),
    "all layers in the block, by head": ("block", "head", "layer", "kv", "token"),
    "K of all layers, then V of all layers": ("kv", "layer", "block", "token", "head"),
    "layers inside of tokens": ("kv", "block", "token", "layer", "head"),
}
"""outermost first, as engines have them"""


@dataclass(frozen=True)
class Case:
    """A tensor: its dimensions, outermost first, how many steps and how much room after each, and the bytes at each place."""

    order: tuple[str, ...]
    counts: dict[str, int]
    gaps: dict[str, int]
    item_bytes: int

    def strides(self) -> tuple[dict[str, int], int]:
        """Bytes from step to step, and the extent of everything."""
        strides, extent = {}, self.item_bytes
        for name in reversed(self.order):
            strides[name] = extent + self.gaps[name]
            extent = self.counts[name] * strides[name]
        return strides, extent

    def table(self, base_address: int) -> StrideTable:
        """The same as a table, its axes in an order that has nothing to do with memory."""
        strides, _ = self.strides()
        axes = tuple(Axis(self.counts[name], strides[name]) for name in NAMES if name != "block")
        return StrideTable(base_address, Axis(self.counts["block"], strides["block"]), axes, self.item_bytes)

    def blocks(self, memory: Bytes) -> Bytes:
        """The oracle: each block's bytes in memory order, ``[num_blocks, block_bytes]``, by numpy alone."""
        strides, _ = self.strides()
        inner = [name for name in self.order if name != "block"]
        shape = [self.counts[name] for name in ("block", *inner)] + [self.item_bytes]
        view = np.lib.stride_tricks.as_strided(memory, shape, [strides[name] for name in ("block", *inner)] + [1], writeable=False)
        return view.reshape(self.counts["block"], -1).copy()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    order = draw(st.one_of(st.sampled_from(sorted(LAYOUTS.values())), st.permutations(NAMES).map(tuple)))
    counts = {name: draw(st.integers(1, 4)) for name in NAMES}
    gaps = {name: draw(st.sampled_from([0, 0, 0, 1, 7, 64])) for name in NAMES}
    return Case(order, counts, gaps, draw(st.integers(1, 70)))


GUARD = 100


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_every_layout_is_gathered_and_scattered_byte_for_byte(case: Case, data: st.DataObject) -> None:
    """Whatever the order and the gaps of the dimensions: a slot holds the block's bytes in memory order, and no other byte changes."""
    _, extent = case.strides()
    noise = np.random.default_rng(3)
    memory: Bytes = noise.integers(0, 256, extent + 2 * GUARD, dtype=np.uint8)
    table = case.table(memory.ctypes.data + GUARD)
    layout = KVLayout.of([table])
    expected = case.blocks(memory[GUARD:])
    assert expected.shape == (layout.num_blocks, layout.block_bytes)
    assert table.extent_bytes <= extent
    chosen = data.draw(st.lists(st.integers(0, layout.num_blocks - 1), unique=True))
    arena: Bytes = noise.integers(0, 256, (len(chosen) + 1) * (layout.block_bytes + 3), dtype=np.uint8)
    copies = [BlockCopy(block, index * (layout.block_bytes + 3) + 1) for index, block in enumerate(chosen)]
    copier = NativeCopier(layout, arena_address=arena.ctypes.data, arena_bytes=arena.nbytes)

    wanted = arena.copy()
    for copy in copies:
        wanted[copy.arena_offset : copy.arena_offset + layout.block_bytes] = expected[copy.block_id]
    copier.gather(copies)
    assert wanted.tobytes() == arena.tobytes()

    before = memory.copy()
    for copy in copies:
        arena[copy.arena_offset : copy.arena_offset + layout.block_bytes] ^= 255
    copier.scatter(copies)
    flipped = case.blocks(memory[GUARD:])
    for block in range(layout.num_blocks):
        assert (expected[block] ^ (255 if block in chosen else 0)).tobytes() == flipped[block].tobytes()
    assert len(chosen) * layout.block_bytes == np.count_nonzero(before != memory)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_segments_are_as_few_as_can_be(case: Case) -> None:
    """No two neighbouring segments lie side by side in every block: they would be one."""
    segments = case.table(4096).segments()
    assert math.prod(case.counts[name] for name in NAMES if name != "block") * case.item_bytes == sum(s.num_bytes for s in segments)
    for left, right in itertools.pairwise(segments):
        assert left.base_address + left.num_bytes < right.base_address


@pytest.mark.parametrize(
    ("name", "num_segments", "num_bytes"),
    [
        ("token-major, K and V apart", 64, 32 << 10),
        ("head-major, K and V apart", 64, 32 << 10),
        ("token-major, K and V in the block", 32, 64 << 10),
        ("heads outside of the blocks", 256, 8 << 10),
        ("all layers in the block", 1, 2 << 20),
        ("all layers in the block, by head", 1, 2 << 20),
        ("K of all layers, then V of all layers", 64, 32 << 10),
        ("layers inside of tokens", 2, 1 << 20),
    ],
)
def test_the_pieces_of_a_model_of_8_billion_parameters(name: str, num_segments: int, num_bytes: int) -> None:
    """32 layers of 8 heads of 128 two-byte numbers, 16 tokens a block: how long the contiguous pieces are in each layout."""
    counts = {"kv": 2, "layer": 32, "block": 10, "head": 8, "token": 16}
    segments = Case(LAYOUTS[name], counts, dict.fromkeys(NAMES, 0), 256).table(4096).segments()
    assert [num_bytes] * num_segments == [segment.num_bytes for segment in segments]


def test_a_single_block_needs_no_stride() -> None:
    """The stride of an axis without neighbours is not looked at."""
    table = StrideTable(64, Axis(1, 0), (Axis(4, 8), Axis(1, -5)), 8)
    assert (Segment(64, 32, 32),) == table.segments()


@pytest.mark.parametrize(
    ("base", "blocks", "axis", "item_bytes", "message"),
    [
        (0, Axis(2, 8), Axis(1, 0), 8, "from address 0"),
        (64, Axis(2, 8), Axis(1, 0), 0, "items of 0 bytes"),
        (64, Axis(0, 8), Axis(1, 0), 8, r"count=0.*is empty"),
        (64, Axis(2, 8), Axis(-1, 8), 8, r"count=-1.*is empty"),
        (64, Axis(2, 15), Axis(2, 8), 8, r"stride_bytes=15.*overlaps what lies in 16 bytes"),
        (64, Axis(2, 16), Axis(2, 0), 8, r"stride_bytes=0.*overlaps"),
        (64, Axis(2, 16), Axis(2, -8), 8, r"stride_bytes=-8.*overlaps"),
        (64, Axis(3, 2**62), Axis(1, 0), 8, "end behind 9223372036854775808"),
    ],
)
def test_tables_that_name_no_memory_are_refused(base: int, blocks: Axis, axis: Axis, item_bytes: int, message: str) -> None:
    """Overlapping items and addresses beyond 63 bits are errors that name the number and the bound."""
    with pytest.raises(ValueError, match=message):
        StrideTable(base, blocks, (axis,), item_bytes)


def test_tensors_of_one_layout_have_equally_many_blocks() -> None:
    """A block is spread over all tensors."""
    tables = [StrideTable(4096 * number, Axis(number, 8), (), 8) for number in (1, 2)]
    with pytest.raises(ValueError, match=r"\[1, 2\] blocks"):
        KVLayout.of(tables)
    with pytest.raises(ValueError, match=r"\[\] blocks"):
        KVLayout.of([])
    assert KVLayout((Segment(8192, 8, 8), Segment(9000, 8, 8)), 2) == KVLayout.of([tables[1], StrideTable(9000, Axis(2, 8), (), 8)])
