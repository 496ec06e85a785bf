"""Chunks on their way into the cache: computed by the workers, one a step, or copied from the blocks of a request; and stored."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from kvtier.blend.chunks import Chunk
from kvtier.blend.layout import Placement
from kvtier.cache import Cache
from kvtier.connectors.messages import CaptureJob, ChunkSlots, EntryJob
from kvtier.types import SlotRef

MAX_WAITING_CHUNKS = 256
"""chunks that are to be computed and stored; more are not stored"""
MAX_DEFERRED_STEPS = 32
"""steps with prompts to compute, after which a chunk is computed beside them"""


@dataclass(slots=True)
class _Entry:
    """A chunk that is to be stored."""

    chunk: Chunk
    tenant: str
    anchor_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    """of the chunk, where it is computed"""
    read_block_ids: Sequence[int] = ()
    """engine blocks that what is copied was computed from"""
    remaining: int = 0
    failed: bool = False
    is_spread: bool = False
    """over several steps"""


class ChunkEntries:
    """Queues chunks that no tier holds, orders them one by one, and takes in what became of them. One thread, the scheduler half's."""

    def __init__(self, engine: Cache, num_workers: int, step_tokens: int) -> None:
        """``step_tokens``: one that is longer with what it is computed behind is spread over steps, so many tokens in each at most."""
        self._engine = engine
        self._step_tokens = step_tokens
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

    @property
    def is_spread(self) -> bool:
        """Whether the workers may still be computing a chunk that needs several steps."""
        return any(entry.is_spread for entry in self._running.values())

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
        self._waiting.append(_Entry(chunk, tenant, anchor_ids, token_ids))
        self._keys.add(chunk.key)

    def take(self, *, is_prefilling: bool) -> list[EntryJob]:
        """The chunk that this step begins to compute: at most one, none beside prompts unless it has waited for long, and none beside
        one that needs several steps."""
        if not self._waiting or self.is_spread:
            return []
        if is_prefilling and self._num_deferred_steps < MAX_DEFERRED_STEPS:
            self._num_deferred_steps += 1
            return []
        self._num_deferred_steps = 0
        entry = self._waiting.popleft()
        chunk = entry.chunk
        self._keys.discard(chunk.key)  # until there are slots for it
        anchor_key = chunk.anchor.key + self._num_resets.to_bytes(8, "little")
        entry.is_spread = len(entry.anchor_ids) + len(entry.token_ids) > self._step_tokens
        begun = self._begin(entry)
        if begun is None:
            return []
        job_id, slots = begun
        return [EntryJob(job_id, chunk.key, anchor_key, entry.anchor_ids, entry.token_ids, slots, entry.is_spread)]

    def capture(self, at: Placement, tenant: str, block_ids: Sequence[int]) -> list[CaptureJob]:
        """Has a wanted chunk copied in this step. ``block_ids``: those of the request's tokens up to its end, and no others."""
        begun = self._begin(_Entry(at.chunk, tenant, read_block_ids=block_ids))
        if begun is None:
            return []
        job_id, slots = begun
        return [CaptureJob(job_id, at.start, at.end, at.shift, tuple(block_ids), slots)]

    def void(self, block_ids: AbstractSet[int]) -> None:
        """What was computed from these engine blocks is wrong: chunks that are copied from there are not stored."""
        for entry in self._running.values():
            entry.failed = entry.failed or not block_ids.isdisjoint(entry.read_block_ids)

    def _begin(self, entry: _Entry) -> tuple[int, ChunkSlots] | None:
        """The job's id, and slots for all of a chunk; None where there is no room."""
        plan = self._engine.begin_store(entry.chunk.block_keys, 0, entry.tenant, pooled=False)
        with contextlib.ExitStack() as undo:
            if plan.slots:
                undo.callback(self._engine.abort_store, plan.job_id)
            if plan.num_refused or plan.num_declined or not plan.slots:
                self._engine.stats.add("blend.unstored_chunks")
                return None
            slots = chunk_slots(plan.positions, plan.slots)
            entry.remaining = self._num_workers
            self._running[plan.job_id] = entry
            self._keys.add(entry.chunk.key)
            undo.pop_all()
        return plan.job_id, slots

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
