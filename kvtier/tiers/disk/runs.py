"""Runs: records that lie side by side, moved by one transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.tiers.disk.pending import PendingRead, PendingStore

_RUN_BYTES = 8 << 20
"""enough for the disk's full speed, few enough for the queue to be deep"""

Item = TypeVar("Item", PendingStore, PendingRead)


def into_runs(items: Sequence[Item], pages_per_segment: int) -> Iterator[list[Item]]:
    """Groups what is to be moved by neighbourhood on disk."""
    run: list[Item] = []
    run_bytes = 0
    next_place = -1
    for item in sorted(items, key=lambda item: item.entry.place):
        record_bytes = record_bytes_for(item.entry.num_bytes)
        is_neighbour = item.entry.place == next_place and next_place % pages_per_segment
        if run and not (is_neighbour and run_bytes + record_bytes <= _RUN_BYTES):
            yield run
            run, run_bytes = [], 0
        run.append(item)
        run_bytes += record_bytes
        next_place = item.entry.place + record_bytes // PAGE_BYTES
    if run:
        yield run
