"""Copies blocks between an engine's KV memory on the CPU and the arena."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvtier import _native
from kvtier.copy.base import BlockCopy
from kvtier.layout import KVLayout


class FinishedCopy:
    """The event of a copy that was over when ``gather`` or ``scatter`` returned."""

    def done(self) -> bool:
        """True."""
        return True

    def wait(self) -> None:
        """Returns at once."""

    def released(self) -> bool:
        """True."""
        return True

    def order_compute(self) -> None:
        """Returns at once."""


FINISHED = FinishedCopy()


class NativeCopier:
    """A synchronous :class:`~kvtier.copy.base.BlockCopier` for memory that the CPU can address. Large copies give up the GIL.

    The caller keeps alive, for as long as it uses the copier, what ``layout`` and ``arena_address`` point to.
    """

    is_async = False

    def __init__(self, layout: KVLayout, *, arena_address: int, arena_bytes: int) -> None:
        self._paged = packed_segments(layout)
        self._arena_address = arena_address
        self._arena_bytes = arena_bytes

    def gather(self, copies: Sequence[BlockCopy]) -> FinishedCopy:
        """Engine -> arena. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, to_arena=True)

    def scatter(self, copies: Sequence[BlockCopy]) -> FinishedCopy:
        """Arena -> engine. See :class:`~kvtier.copy.base.BlockCopier`."""
        return self._copy(copies, to_arena=False)

    def _copy(self, copies: Sequence[BlockCopy], *, to_arena: bool) -> FinishedCopy:
        block_ids = array("q", [copy.block_id for copy in copies])
        offsets = array("q", [copy.arena_offset for copy in copies])
        _native.copy_blocks(self._paged, self._arena_address, self._arena_bytes, block_ids, offsets, to_arena)
        return FINISHED


def packed_segments(layout: KVLayout) -> array[int]:
    """A layout as the compiled core takes it: the number of blocks, then base, stride and length of each segment."""
    packed = array("q", [layout.num_blocks])
    for segment in layout.segments:
        packed.extend((segment.base_address, segment.stride_bytes, segment.num_bytes))
    return packed
