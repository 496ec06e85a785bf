"""How a block lies in an engine's paged KV memory and in a slot: data, not classes.

A :class:`KVLayout` describes the bytes of one engine block as *segments*. Segment ``s`` of engine block ``b``
starts at ``base_address + b * stride_bytes`` and is ``num_bytes`` long. In a slot the segments of a block lie one after
the other in the layout's order. Only a connector knows what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous run of bytes per engine block (for example: one layer's K and V)."""

    base_address: int
    """address of block 0's first byte, as ``tensor.data_ptr()`` gives it"""
    stride_bytes: int
    """distance between the same segment of neighbouring blocks"""
    num_bytes: int


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

    @property
    def block_bytes(self) -> int:
        """Bytes of one engine block on this worker."""
        return sum(segment.num_bytes for segment in self.segments)
