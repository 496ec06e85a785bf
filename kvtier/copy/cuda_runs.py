"""Which bytes a batch of blocks moves: runs, as long as they can be. Pure arithmetic on arrays; the CPU twin of the kernels' indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Addresses = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Runs:
    """Bytes that lie side by side on both ends: addresses on either side, and lengths."""

    paged: Addresses
    contiguous: Addresses
    num_bytes: Ints

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def total_bytes(self) -> int:
        """Of all runs together."""
        return int(self.num_bytes.sum())

    def slices(self, max_bytes: int) -> Iterator[Runs]:
        """The same bytes in the same order, at most ``max_bytes`` at a time. Longer runs are cut."""
        whole = self._cut(max_bytes)
        ends = np.cumsum(whole.num_bytes)
        start = 0
        while start < len(whole):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
            yield Runs(whole.paged[start:stop], whole.contiguous[start:stop], whole.num_bytes[start:stop])
            start = stop

    def _cut(self, max_bytes: int) -> Runs:
        if not len(self) or int(self.num_bytes.max()) <= max_bytes:
            return self
        parts = -(-self.num_bytes // max_bytes)
        index = np.repeat(np.arange(len(self)), parts)
        position = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
        start = position * max_bytes
        num_bytes = np.minimum(self.num_bytes[index] - start, max_bytes)
        moved = start.astype(np.uint64)
        return Runs(self.paged[index] + moved, self.contiguous[index] + moved, num_bytes)


def runs_of(table: np.ndarray[Any, np.dtype[np.void]], block_ids: Ints, offsets: Ints, contiguous: int) -> Runs:
    """The runs of some blocks, in the order in which they lie in their slots.

    Args:
        table: segments as ``cuda_params.segment_table`` makes them; the first lies at each block's offset
        block_ids: the engine's blocks
        offsets: of each block's bytes, from ``contiguous``
    """
    in_slot = table["slot_offset"] - table["slot_offset"][0]
    paged = (table["base"][None, :] + (block_ids[:, None] * table["stride"][None, :]).astype(np.uint64)).ravel()
    other = np.uint64(contiguous) + (offsets[:, None] + in_slot[None, :]).astype(np.uint64).ravel()
    num_bytes = np.broadcast_to(table["num_bytes"], (len(block_ids), len(table))).ravel()
    return joined(Runs(paged, other, num_bytes))


def joined(runs: Runs) -> Runs:
    """Neighbouring runs that go on where the one before ends, on both sides, as one."""
    if len(runs) < 2:
        return runs
    moved = runs.num_bytes.astype(np.uint64)
    goes_on = (runs.paged[:-1] + moved[:-1] == runs.paged[1:]) & (runs.contiguous[:-1] + moved[:-1] == runs.contiguous[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    return Runs(runs.paged[starts], runs.contiguous[starts], np.add.reduceat(runs.num_bytes, starts))
