"""Chunks on their way into the cache: computed by the workers, one a step, and stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.blend.chunks import Chunk
from kvtier.cache import Cache
from kvtier.connectors.messages import ChunkSlots, EntryJob
from kvtier.types import SlotRef

MAX_WAITING_CHUNKS = 256
"""chunks that are to be computed and stored; more are not stored"""
MAX_DEFERRED_STEPS = 32
"""steps with prompts to compute, after which a chunk is computed beside them"""


@dataclass(slots=True)
class _Entry:
    """A chunk that is to be stored."""

    chunk: Chunk
    anchor_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    tenant: str
    remaining: int = 0
    failed: bool = False


class ChunkEntries:
    """Queues chunks that no tier holds, orders them one by one, and takes in what became of them. One thread, the scheduler half's."""

    def __init__(self, engine: Cache, num_workers: int) -> None:
        self._engine = engine
        self._num_workers = num_workers
        self._waiting: deque[_Entry] = deque()
        self._running: dict[int, _Entry] = {}
        self._keys: set[bytes] = set()
        """of all of them"""
        self._num_deferred_steps = 0
        self._num_resets = 0
        """KV from before the last one, an anchor's too, must not be used"""

    @property
    def has_work(self) -> bool:
        """Whether workers compute chunks, or are going to."""
        return bool(self._running or self._waiting)

    def __contains__(self, job_id: int) -> bool:
        """Whether the workers have not all reported this one."""
        return job_id in self._running

    def wants(self, chunk: Chunk) -> bool:
        """Whether a chunk is neither in the cache nor on its way there."""
        return chunk.key not in self._keys and self._engine.match(chunk.block_keys).hit_blocks < len(chunk.block_keys)

    def add(self, chunk: Chunk, anchor_ids: tuple[int, ...], token_ids: tuple[int, ...], tenant: str) -> None:
        """Queues a chunk that is wanted; too many are not stored."""
        if len(self._keys) >= MAX_WAITING_CHUNKS:
            self._engine.stats.add("blend.unstored_chunks")
            return
        self._waiting.append(_Entry(chunk, anchor_ids, token_ids, tenant))
        self._keys.add(chunk.key)

    def take(self, *, is_prefilling: bool) -> list[EntryJob]:
        """The chunk that this step computes and stores: at most one, and none beside prompts unless it has waited for long."""
        if not self._waiting:
            return []
        if is_prefilling and self._num_deferred_steps < MAX_DEFERRED_STEPS:
            self._num_deferred_steps += 1
            return []
        self._num_deferred_steps = 0
        entry = self._waiting.popleft()
        chunk = entry.chunk
        plan = self._engine.begin_store(chunk.block_keys, 0, entry.tenant, pooled=False)
        if plan.num_refused or plan.num_declined or not plan.slots:
            if plan.slots:
                self._engine.abort_store(plan.job_id)
            self._keys.discard(chunk.key)
            self._engine.stats.add("blend.unstored_chunks")
            return []
        entry.remaining = self._num_workers
        self._running[plan.job_id] = entry
        slots = chunk_slots(plan.positions, plan.slots)
        anchor_key = chunk.anchor.key + self._num_resets.to_bytes(8, "little")
        return [EntryJob(plan.job_id, chunk.key, anchor_key, entry.anchor_ids, entry.token_ids, slots)]

    def advance(self, job_id: int, count: int, *, has_failed: bool) -> None:
        """So many workers have reported a chunk."""
        entry = self._running[job_id]
        entry.remaining -= count
        entry.failed = entry.failed or has_failed
        if entry.remaining > 0:
            return
        del self._running[job_id]
        self._keys.discard(entry.chunk.key)
        if entry.failed:
            self._engine.abort_store(job_id)
        else:
            self._engine.commit_store(job_id)
        self._engine.stats.add("blend.unstored_chunks" if entry.failed else "blend.stored_chunks")

    def reset(self) -> None:
        """The cache is being reset: chunks that wait are not stored, and later ones need their anchor computed anew."""
        self._num_resets += 1
        self._drop_waiting()

    def give_up(self) -> None:
        """No worker is going to compute those that wait."""
        self._engine.stats.add("blend.unstored_chunks", len(self._waiting))
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        for entry in self._waiting:
            self._keys.discard(entry.chunk.key)
        self._waiting.clear()


def chunk_slots(positions: Sequence[int], slots: Sequence[SlotRef]) -> ChunkSlots:
    """Where the blocks of a chunk at these positions lie."""
    return ChunkSlots(tuple(positions), tuple(ref.slot for ref in slots), tuple(ref.generation for ref in slots))
