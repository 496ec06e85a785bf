"""Counters for everything that happens, by name. One table of names; an unknown name is a bug.

Counters only grow. ``Stats`` is not thread-safe: each belongs to the thread that drives its owner
(tiers count in their job results, which the owner's thread adds).
"""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.errors import RefusalReason

_PLACES: Mapping[str, str] = {"disk": "the disk", "redis": "the Redis server", "mooncake": "the Mooncake Store", "object": "the bucket"}

_LOWER: Mapping[str, str] = {
    "stored_blocks": "blocks written to {}",
    "loaded_blocks": "blocks promoted from {}",
    "evicted_blocks": "blocks evicted from {}",
    "not_admitted_blocks": "blocks not written to {} because what it has is worth more",
    "used_once_blocks": "blocks not written to {} because they were used only once",
    "over_budget_blocks": "blocks not written to {} because the day's bytes were used up",
    "expired_blocks": "blocks whose time to live in {} ended",
    "missing_blocks": "blocks {} did not have after all",
    "corrupt_blocks": "blocks from {} that failed verification",
    "rejected_blocks": "blocks {} declined",
    "failed_blocks": "blocks lost to errors of {} or while it was offline",
    "dropped_blocks": "blocks that were given up in {} to make room",
    "skipped_blocks": "blocks evicted from host memory before there was time to write them to {}",
    "offline": "times {} was taken offline",
}

_DISK: Mapping[str, str] = {
    "hung_reads": "times reads of {} did not end in time, so that it was offline until they did",
    "hung_writes": "times writes to {} did not end in time, so that it was offline until they did",
    "unmarked_resets": "resets that {} had not noted after two seconds; nothing is stored there before it has",
}

_ENCRYPTED: Mapping[str, str] = {
    "other_key_records": "values in {} that were encrypted with another key, or not at all",
    "forged_records": "values in {} whose encryption was not that of the key they named",
}

_REMOTE: Mapping[str, str] = {
    "timeouts": "calls of {} that missed a deadline",
    "connect_errors": "connections to {} that failed or broke",
    "auth_errors": "calls that {} refused for their user",
    "protocol_errors": "answers of {} that made no sense",
    "server_errors": "calls that {} answered with an error",
    "refusals": "blocks that {} refused, being full or read-only",
    "retries": "calls of {} made again",
    "hedged_reads": "reads of {} asked for a second time",
    "shared_loads": "loads that needed no read of {} of their own",
    "damaged_records": "values in {} that were not whole",
    "other_version_records": "values in {} that another version of kvtier wrote in a way that this one cannot read",
    "foreign_records": "values in {} that were not the block asked for",
    "failed_removals": "blocks that stayed in {} although they were removed",
    "probes": "times {} was asked what it has of a prompt",
    "probed_blocks": "blocks found in {} that way",
}


def _of_lower_tiers() -> dict[str, str]:
    """The counters of every kind of tier below host memory."""
    found = {}
    for tier, place in _PLACES.items():
        names = {**_LOWER, **_ENCRYPTED, **_DISK} if tier == "disk" else {**_LOWER, **_ENCRYPTED, **_REMOTE}
        found.update({f"{tier}.{name}": text.format(place) for name, text in names.items()})
    return found


COUNTERS: Mapping[str, str] = {
    "lookup.blocks": "blocks asked for",
    "lookup.hit_blocks": "blocks found in some tier",
    "host.stored_blocks": "blocks committed to host memory",
    "host.loaded_blocks": "blocks handed to the engine from host memory",
    "host.evicted_blocks": "blocks evicted from host memory",
    "host.not_admitted_blocks": "blocks not stored because what host memory has is worth more",
    "host.expired_blocks": "blocks whose time to live in host memory ended",
    "host.adopted_blocks": "blocks in the host memory of a daemon that died, verified and taken over by the next one",
    "host.damaged_blocks": "blocks in the host memory of a daemon that died that failed verification",
    "host.unrecorded_blocks": "blocks in host memory that the next daemon would not find, should this one die",
    "store.refused_blocks": "blocks not stored because no slot could be freed",
    "store.aborted_blocks": "blocks whose copy into the arena failed or was given up",
    "load.failed_blocks": "blocks whose copy to the engine failed; the engine recomputes them",
    "load.stale_slots": "loads refused because the slot had a new tenant",
    "gpu.stored_blocks": "blocks put into the pool in device memory",
    "gpu.loaded_blocks": "blocks handed to the engine from the pool in device memory",
    "gpu.evicted_blocks": "blocks that left the pool in device memory for others",
    "gpu.not_admitted_blocks": "blocks not put into the pool in device memory because what it has is worth more",
    "gpu.expired_blocks": "blocks whose time to live in device memory ended",
    **_of_lower_tiers(),
    "promote.refused_blocks": "promotions that found no slot",
    "probe.skipped": "prompts that a shared tier was not asked for, because loading was estimated slower than computing",
    "probe.refused": "prompts that a shared tier was not asked for, because too many questions were under way",
    "probe.timeouts": "requests that stopped waiting for the answer of a shared tier",
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
    "blend.requests": "requests whose prompt was to begin with reused chunks, partly computed anew; those that failed or were unsure too",
    "blend.tokens": "tokens of chunks that those requests did not compute as a prompt",
    "blend.chosen_tokens": "those of them that were computed anew",
    "blend.chunks": "chunks that requests named",
    "blend.hit_chunks": "chunks that requests named and that were there",
    "blend.failed": "requests whose chunks could not be put together; the engine computes the prompt",
    "blend.too_few": "requests that were computed because too few of their chunks were there",
    "blend.stored_chunks": "chunks stored, computed behind their anchor or copied from a prompt that was computed",
    "blend.unstored_chunks": "chunks not stored: no room, too many waiting, or computing or copying them failed",
    **{f"blend.refused_{reason.value}": f"requests whose chunks were not reused: {reason.value}" for reason in RefusalReason},
    "record.lost_lines": "lines of the recording that could not be written",
    "daemon.sessions": "times the node daemon was reached",
    "daemon.lost": "times the node daemon was lost: gone, or it refused",
    "daemon.timeouts": "times the node daemon was given up because it did not answer by the deadline",
    "daemon.missed_calls": "calls that were answered with a miss because there was no node daemon",
    "daemon.unknown_counters": "counters that engines of another version told a node daemon, which does not know them",
    "daemon.void_copies": "copies whose slots belonged to a node daemon that was lost before they ended",
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
