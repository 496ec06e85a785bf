"""How a block lies in an engine's paged KV memory and in a slot: data, not classes.

A :class:`KVLayout` describes the bytes of one engine block as *segments*. Segment ``s`` of engine block ``b``
starts at ``base_address + b * stride_bytes`` and is ``num_bytes`` long. In a slot the segments of a block lie one after
the other in the layout's order. Only a connector knows what the bytes mean.

A :class:`StrideTable` says the same of a strided tensor, whatever its dimensions are called and in which order they lie, and gives its
segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

_ADDRESS_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous run of bytes per engine block (for example: one layer's K and V)."""

    base_address: int
    """address of block 0's first byte, as ``tensor.data_ptr()`` gives it"""
    stride_bytes: int
    """distance between the same segment of neighbouring blocks"""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of KV memory."""

    count: int
    stride_bytes: int
    """distance between neighbours; of no meaning where there is but one"""


@dataclass(frozen=True, slots=True)
class StrideTable:
    """Where the items of one KV tensor lie: item ``i, j, ...`` of block ``b`` at ``base + b * s + i * s0 + j * s1 + ...``.

    It covers token-major and head-major layouts, latent attention, K and V apart, together or interleaved, and several layers in one
    tensor: they differ in their numbers alone.

    Raises:
        ValueError: an axis without items, items that overlap, or addresses that are none.
    """

    base_address: int
    blocks: Axis
    axes: tuple[Axis, ...]
    """all other dimensions (K and V, layers, heads, tokens, whatever there is), in any order"""
    item_bytes: int
    """how many bytes lie together at each place: an element, or more"""

    def __post_init__(self) -> None:
        extent = self.item_bytes
        if self.base_address < 1 or self.item_bytes < 1:
            raise ValueError(f"items of {self.item_bytes} bytes from address {self.base_address} on")
        for axis in sorted((self.blocks, *self.axes), key=lambda axis: axis.stride_bytes):
            if axis.count < 1 or (axis.count > 1 and axis.stride_bytes < extent):
                raise ValueError(f"{axis} is empty, or overlaps what lies in {extent} bytes")
            extent += (axis.count - 1) * axis.stride_bytes
        if self.base_address + extent > _ADDRESS_LIMIT:
            raise ValueError(f"{extent} bytes from address {self.base_address} on end behind {_ADDRESS_LIMIT}")

    @property
    def extent_bytes(self) -> int:
        """From the first byte to behind the last one, gaps included."""
        return self.item_bytes + sum((axis.count - 1) * axis.stride_bytes for axis in (self.blocks, *self.axes))

    def segments(self) -> tuple[Segment, ...]:
        """A block's bytes in the fewest segments, in the order in which they lie in memory."""
        num_bytes = self.item_bytes
        outer: list[Axis] = []
        for axis in sorted(self.axes, key=lambda axis: axis.stride_bytes):
            if axis.count == 1:
                continue
            if axis.stride_bytes == num_bytes and not outer:
                num_bytes *= axis.count
            else:
                outer.append(axis)
        places = itertools.product(*(range(0, axis.count * axis.stride_bytes, axis.stride_bytes) for axis in reversed(outer)))
        stride = max(num_bytes, self.blocks.stride_bytes if self.blocks.count > 1 else 0)
        return tuple(Segment(self.base_address + sum(place), stride, num_bytes) for place in places)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All segments of an engine block on one worker, and how many blocks there are."""

    segments: tuple[Segment, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        if not self.segments or self.num_blocks <= 0:
            raise ValueError(f"a layout needs segments and blocks, got {len(self.segments)} and {self.num_blocks}")
        for index, segment in enumerate(self.segments):
            if segment.num_bytes <= 0 or segment.stride_bytes < segment.num_bytes:
                raise ValueError(f"segment {index} is {segment.num_bytes} bytes long with a stride of {segment.stride_bytes}")

    @classmethod
    def of(cls, tables: Sequence[StrideTable]) -> KVLayout:
        """The layout of blocks that are spread over several tensors, one table each. Raises ValueError unless all have equally many."""
        counts = {table.blocks.count for table in tables}
        if len(counts) != 1:
            raise ValueError(f"KV tensors with {sorted(counts)} blocks do not go together")
        return cls(tuple(segment for table in tables for segment in table.segments()), counts.pop())

    @property
    def block_bytes(self) -> int:
        """Bytes of one engine block on this worker."""
        return sum(segment.num_bytes for segment in self.segments)
