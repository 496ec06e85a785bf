"""Counters for everything that happens, by name. One table of names; an unknown name is a bug.

Counters only grow. ``Stats`` is not thread-safe: each belongs to the thread that drives its owner
(tiers count in their job results, which the owner's thread adds).
"""

from __future__ import annotations

from collections.abc import Mapping

COUNTERS: Mapping[str, str] = {
    "lookup.blocks": "blocks asked for",
    "lookup.hit_blocks": "blocks found in some tier",
    "host.stored_blocks": "blocks committed to host memory",
    "host.loaded_blocks": "blocks handed to the engine from host memory",
    "host.evicted_blocks": "blocks evicted from host memory",
    "host.expired_blocks": "blocks whose time to live in host memory ended",
    "store.refused_blocks": "blocks not stored because no slot could be freed",
    "store.aborted_blocks": "blocks whose copy into the arena failed or was given up",
    "load.failed_blocks": "blocks whose copy to the engine failed; the engine recomputes them",
    "load.stale_slots": "loads refused because the slot had a new tenant",
    "gpu.stored_blocks": "blocks put into the pool in device memory",
    "gpu.loaded_blocks": "blocks handed to the engine from the pool in device memory",
    "gpu.evicted_blocks": "blocks that left the pool in device memory for others",
    "gpu.expired_blocks": "blocks whose time to live in device memory ended",
    "disk.stored_blocks": "blocks written to disk",
    "disk.loaded_blocks": "blocks promoted from disk",
    "disk.evicted_blocks": "blocks evicted from disk",
    "disk.expired_blocks": "blocks whose time to live on disk ended",
    "disk.missing_blocks": "blocks the disk tier did not have after all",
    "disk.corrupt_blocks": "blocks that failed verification",
    "disk.rejected_blocks": "blocks the disk tier declined",
    "disk.failed_blocks": "blocks lost to I/O errors or an offline tier",
    "disk.dropped_blocks": "blocks the disk tier gave up to make room for another slot size",
    "disk.skipped_blocks": "blocks evicted from host memory before there was time to write them to disk",
    "disk.unadmitted_blocks": "blocks not written to disk because they were used only once",
    "disk.over_budget_blocks": "blocks not written to disk because the day's bytes were used up",
    "disk.offline": "times the disk tier was taken offline",
    "promote.refused_blocks": "promotions that found no slot",
    "promote.timeouts": "requests that stopped waiting for a promotion",
    "recompute.refused_blocks": "blocks that were computed although a tier held them, because loading was estimated slower",
    "recompute.estimated_load_ms": "what loading those was estimated to take, in milliseconds",
    "recompute.estimated_compute_ms": "what computing those was estimated to take, in milliseconds",
    "recompute.probes": "loads that were made although estimated slower, to measure again",
    "pin.expired": "pins that ended by their deadline",
    "control.evicted_blocks": "blocks dropped from a tier by the control API",
    "control.moved_blocks": "blocks moved from one tier to another by the control API",
    "hint.taken": "hints that were acted on or refused",
    "hint.prefetches": "promotions that hints asked for",
    "hint.refused": "hints that would have kept more than their share",
    "hint.unknown_sessions": "hints for sessions that no request has named",
    "hint.bad": "options of requests that made no sense and were left out",
    "record.lost_lines": "lines of the recording that could not be written",
    "connector.errors": "unexpected errors inside kvtier that became misses",
    "index.reset": "times the whole cache was forgotten on request",
}


class Stats:
    """A bag of named counters.

    >>> stats = Stats()
    >>> stats.add("host.stored_blocks", 3)
    >>> stats["host.stored_blocks"]
    3
    """

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Adds ``amount`` to the counter. Raises KeyError for a name that is not in ``COUNTERS``."""
        self._values[name] += amount

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def snapshot(self) -> dict[str, int]:
        """A copy of all counters."""
        return dict(self._values)

    def since(self, earlier: Mapping[str, int]) -> dict[str, int]:
        """The counters that grew since ``earlier`` (a snapshot), with their growth."""
        return {name: value - earlier.get(name, 0) for name, value in self._values.items() if value != earlier.get(name, 0)}
