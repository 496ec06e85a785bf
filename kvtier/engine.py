"""CacheEngine: the one object a connector or a script holds. It joins the planner, the arena and the tiers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.config import Config
from kvtier.control.commands import BlockEvent
from kvtier.control.device_pool import DevicePool
from kvtier.control.estimates import Estimates
from kvtier.control.hints import Hint, Hints
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.operations import HOST_TIER
from kvtier.control.planner import Planner
from kvtier.errors import ClosedError, ConfigError
from kvtier.hashing import Namespace
from kvtier.io import round_up_to_page
from kvtier.lower_tiers import open_lower_tiers, residency, spec_of
from kvtier.memory.arena import Arena
from kvtier.memory.slab import EXTENT_BYTES, SlabAllocator
from kvtier.memory.slot_table import SlotTable
from kvtier.sharing import Sharing
from kvtier.slot_recorder import SlotRecorder
from kvtier.stats import Stats
from kvtier.tiers.base import Tier
from kvtier.tiers.forks import leave_to_parent
from kvtier.transfer import TransferRunner
from kvtier.types import BlockKey, Damage, LoadPlan, PrefixMatch, StoreOrder, StorePlan
from kvtier.verbs import Verbs

__all__ = ["EXTENT_BYTES", "BlockEvent", "CacheEngine"]


class Attachment(Protocol):
    """What is served by the thread that drives an engine (:class:`~kvtier.Controller`)."""

    def serve(self) -> None:
        """Called by every ``poll``."""

    @property
    def has_work(self) -> bool:
        """Whether ``poll`` must be called on for it."""

    def close(self) -> None:
        """The engine is being closed."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What a :class:`CacheEngine` is put together from; it owns all of it."""

    planner: Planner
    runner: TransferRunner
    arena: Arena
    slab: SlabAllocator
    space: HostSpace
    tiers: Sequence[Tier]
    stats: Stats
    estimates: Estimates
    hints: Hints
    recorder: SlotRecorder | None = None


class CacheEngine:
    """KV blocks under keys, in host memory and the tiers below it.

    Not thread-safe: one thread drives it. No method waits for I/O except ``poll`` with a time-out and ``close``.
    After ``open`` nothing that goes wrong with storage raises: it becomes a miss and a counter in ``stats``.
    """

    arena_id = ""
    """which arena slots belong to, where it may be replaced while engines run; empty: it stays"""

    def __init__(self, parts: EngineParts, *, block_bytes: int, clock: Callable[[], float]) -> None:
        """Use :meth:`open`."""
        self.stats = parts.stats
        self.estimates = parts.estimates
        """how long loads and computing take; fed by the tiers and by the connector"""
        self.block_bytes = block_bytes
        self._planner = parts.planner
        self._runner = parts.runner
        self._arena = parts.arena
        self._slab = parts.slab
        self._space = parts.space
        self._tiers = parts.tiers
        self._recorder = parts.recorder
        self._clock = clock
        self.verbs = Verbs(
            self._planner,
            self._runner,
            parts.tiers,
            parts.slab,
            block_bytes=block_bytes,
            max_reserved_blocks=parts.hints.max_blocks,
            clock=clock,
        )
        """what the control API asks for"""
        self.sharing = Sharing(self._planner, self._runner, parts.estimates, block_bytes=block_bytes, clock=clock)
        """how tiers that other engines use too are asked"""
        self._hints = parts.hints
        self._attachment: Attachment | None = None
        self._closed = False
        self._grow()
        self._adopt()
        leave_to_parent(self)

    @classmethod
    def open(  # noqa: PLR0913 - by keyword
        cls,
        config: Config,
        *,
        namespace: Namespace,
        block_bytes: int,
        arena: Arena | None = None,
        slots: SlotTable | None = None,
        device_slots: int = 0,
        events: bool = False,
        clock: Callable[[], float] = time.monotonic,
        tiers: Sequence[Tier] | None = None,
        estimates: Estimates | None = None,
    ) -> CacheEngine:
        """Opens the tiers a configuration names and recovers what they hold. What fails leaves nothing open that is owned here.

        Args:
            config: the validated configuration.
            namespace: what the blocks belong to; its digest is echoed in every record.
            block_bytes: bytes of one block over all layers and ranks.
            arena: host memory, owned by the caller; made (and owned) here where it is None.
            slots: the table of that arena, kept true and owned here; the blocks that are in it already are verified and taken over.
            device_slots: blocks that fit into each worker's pool in device memory, where the configuration asks for one.
            events: whether ``take_events`` is going to be called.
            clock: seconds that do not go backwards.
            tiers: the tiers below host memory instead of those that ``config`` names (for tests); owned by the engine.
            estimates: where what is measured goes; made here where it is None.

        Raises:
            ConfigError: host memory cannot hold a single block.
            ArenaError: host memory cannot be had.
            TierError: a tier cannot be opened.
        """
        slab = SlabAllocator.of_host(usable_host_bytes(config, block_bytes), block_bytes, limit_bytes=0)  # grows with memory: _grow
        with contextlib.ExitStack() as undo:
            if arena is None:
                arena = undo.enter_context(_own_arena(config))
                arena.prefault()
            lower = list(tiers) if tiers is not None else open_lower_tiers(config, arena, block_bytes)
            for tier in lower:
                undo.callback(tier.close)
            stats = Stats()
            space = HostSpace(slab, arena.generations.data)  # a third of the cost of indexing numpy
            planner = _planner(config, lower, space, stats, events=events)
            if config.gpu is not None and device_slots:
                pool = residency("gpu", config.policy_of(config.gpu), config.gpu.ttl_s, config.gpu.ttl_mode)
                planner.use_device_pool(DevicePool(device_slots, block_bytes, pool, stats))
            _recover(planner, config, lower, clock())
            estimates = estimates or Estimates()
            runner = TransferRunner(planner, lower, arena, namespace.digest, stats, estimates)
            num_blocks = slab.max_slots(block_bytes)
            max_blocks = int(config.control.max_pinned_fraction * num_blocks)
            hints = Hints(planner, estimates, stats, max_blocks=max_blocks, capacity_blocks=num_blocks)
            recorder = space.registry = None if slots is None else SlotRecorder(slots, arena, stats)
            if recorder is not None:
                undo.callback(recorder.close)
            parts = EngineParts(planner, runner, arena, slab, space, lower, stats, estimates, hints, recorder)
            engine = cls(parts, block_bytes=block_bytes, clock=clock)
            undo.pop_all()
        return engine

    def match(self, keys: Iterable[BlockKey]) -> PrefixMatch:
        """The longest leading run of ``keys`` that some tier holds. Cheap; changes nothing; stops at the first miss."""
        return self._planner.match(keys)

    def promote(self, keys: Sequence[BlockKey]) -> int:
        """Starts to bring the leading run into host memory. Returns how many leading blocks are or will be there."""
        promised = self._planner.promote(keys, self._clock())
        self._runner.run()
        return promised

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Marks a prompt's blocks as used."""
        self._planner.touch(keys, self._clock())

    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None = None) -> int:
        """Keeps the leading run of ``keys`` that is present, for ``ttl_s`` seconds or until ``unpin``. Returns the pin's id."""
        return self._planner.pin(keys, None if ttl_s is None else self._clock() + ttl_s)

    def unpin(self, pin_id: int) -> None:
        """Ends a pin. One that has ended already is fine."""
        self._planner.unpin(pin_id, self._clock())

    def begin_load(self, keys: Sequence[BlockKey], *, pooled: bool = True) -> LoadPlan:
        """Leases the slots of the leading run of ``keys`` in host memory until ``end_load``.

        ``pooled``: the blocks may come out of the pool in device memory, or be put there on their way.
        """
        return self._planner.begin_load(keys, self._clock(), pooled=pooled)

    def end_load(self, job_id: int, failed: Collection[int] = (), *, partial: Collection[int] = (), forgets: bool = True) -> None:
        """Ends a load. Blocks at the positions ``failed`` are counted and, with ``forgets``, forgotten in host memory.

        ``partial``: of these blocks only a part was copied, so a copy put into the device pool on the way is not whole.
        """
        self._planner.end_load(job_id, failed, self._clock(), partial=partial, forgets=forgets)

    def begin_store(
        self, keys: Sequence[BlockKey], first: int, tenant: str = "", *, may_evict: bool = True, pooled: bool = True
    ) -> StorePlan:
        """Slots for a :class:`~kvtier.types.StoreOrder` of these fields."""
        return self.begin_stores([StoreOrder(keys, first, tenant, may_evict, pooled)])[0]

    def begin_stores(self, orders: Sequence[StoreOrder]) -> list[StorePlan]:
        """Slots for several, one after the other; ends behind the first that is ``broken``, which is to be asked again before the rest."""
        now, num_bytes = self._clock(), self.block_bytes
        plans: list[StorePlan] = []
        for order in orders:
            plans.append(self._planner.begin_store(order, num_bytes, now))
            if plans[-1].broken:
                break
        self._runner.run()
        return plans

    def commit_store(self, job_id: int, failed: Collection[int] = ()) -> None:
        """The slots of a store hold their blocks, except those at the indexes ``failed`` and what follows them."""
        self._planner.commit_store(job_id, failed, self._clock())

    def abort_store(self, job_id: int) -> None:
        """The slots of a store will not be filled."""
        self._planner.abort_store(job_id, self._clock())

    def poll(self, timeout_s: float = 0.0) -> None:
        """Takes results of the tiers in, ends what has expired, starts the writes that are due.

        Waits up to ``timeout_s`` for a first result where a tier has work. Call it once per engine step.
        """
        if self._closed:
            raise ClosedError("this CacheEngine is closed")
        self._grow()
        if self._recorder is not None:
            for job_id, is_right in self._recorder.take_verified():
                self._planner.commit_store(job_id, () if is_right else (0,), self._clock())
        self._runner.poll(self._clock(), timeout_s)
        if self._attachment is not None:
            self._attachment.serve()
        self._hints.tick(self._clock())
        self._planner.tick(self._clock())
        self._runner.run()

    @property
    def busy(self) -> bool:
        """Whether a tier has work whose result was not seen yet, or will get some without further calls but ``poll``."""
        return self._runner.busy or self._planner.has_work or (self._attachment is not None and self._attachment.has_work)

    @property
    def draining_blocks(self) -> int:
        """Slots that will be free as soon as the copies that still read them are done."""
        return self._planner.draining_blocks(self.block_bytes)

    @property
    def is_growing(self) -> bool:
        """Whether host memory is still being prepared; ``poll`` takes note of progress."""
        return self._space.growing

    def drain(self, timeout_s: float, *, also_stuck: bool = True) -> bool:
        """Polls until no tier (``also_stuck``: or none that answers) has work, at most ``timeout_s``. Returns whether none has."""
        deadline = time.monotonic() + timeout_s
        self.poll()
        while self.busy and time.monotonic() < deadline and (also_stuck or not self._runner.is_stuck):
            self.poll(0.05)
        return not self.busy

    def hint(self, hint: Hint) -> None:
        """Acts on what an orchestrator says. Raises UnknownSessionError or QuotaError, after which nothing has changed but a pin's end."""
        self._hints.take(hint, self._clock())
        self._runner.run()

    def hint_began(self, session: str) -> None:
        """A session has a request again."""
        self._hints.began(session, self._clock())

    def hint_ended(self, session: str, keys: Sequence[BlockKey], num_tokens: int) -> None:
        """A session's request has ended, with these blocks and so many tokens."""
        self._hints.ended(session, keys, num_tokens, self._clock())

    def hint_keep(self, keys: Sequence[BlockKey]) -> None:
        """A request of high priority has ended."""
        self._hints.keep(keys, self._clock())

    def attach(self, attachment: Attachment) -> None:
        """Lets ``poll`` serve something else too, at most one thing. Raises ClosedError after ``close``."""
        if self._closed:
            raise ClosedError("this CacheEngine is closed")
        self._attachment = attachment

    def reset(self) -> None:
        """Forgets everything in every tier, and shares nothing with other engines from now on: the weights may be others."""
        self.sharing.leave_others()
        self._planner.reset(self._clock())
        self._runner.run()

    def take_events(self) -> list[BlockEvent]:
        """What became readable or stopped being so since the last call."""
        return self._planner.take_events()

    def num_blocks(self) -> dict[str, int]:
        """Readable blocks by tier."""
        return self._planner.num_blocks()

    def leftovers(self) -> dict[str, int]:
        """What has not ended: plans, leases, pins, transfers, records of blocks."""
        return self._planner.leftovers()

    def check(self) -> list[Damage]:
        """Verifies the books of the control plane and the arena. Empty = healthy."""
        return [Damage("control", problem) for problem in self._planner.check()] + self._arena.check()

    def close(self) -> None:
        """Finishes what is being written, closes tiers and arena, or leaves behind what does not end, with its memory. Idempotent."""
        if self._closed:
            return
        self.drain(30.0, also_stuck=False)
        self._closed = True
        if self._attachment is not None:
            self._attachment.close()
        for tier in self._tiers:
            tier.close()
        if self._recorder is not None:
            self._recorder.close()
        self._arena.close()

    def forget_in_child(self) -> None:
        """A forked child counts the engine as closed; its tiers do the same, and host memory is its parent's."""
        self._closed = True

    def _adopt(self) -> None:
        """Has the blocks verified that an earlier process left in the arena; ``poll`` makes them hits one after the other."""
        if self._recorder is None:
            return
        for slot, found in list(self._recorder.left()):
            job_id = self._planner.adopt(found.meta, found.tenant, slot)
            if job_id is None:
                self._recorder.vacated(slot)
            else:
                self._recorder.verify(job_id, slot, found)

    def _grow(self) -> None:
        """Lets the allocator use what the arena has prepared since."""
        if self._space.growing or self._slab.limit_bytes < self._arena.ready_bytes:
            self._slab.set_limit(self._arena.ready_bytes)
        self._space.growing = self._arena.ready_bytes < self._arena.capacity_bytes and self._arena.reserve_error is None


def usable_host_bytes(config: Config, block_bytes: int) -> int:
    """The capacity of host memory, in whole pages. Raises ConfigError where it holds no block."""
    capacity_bytes = config.host.capacity_bytes // PAGE_BYTES * PAGE_BYTES
    if capacity_bytes < round_up_to_page(block_bytes):
        raise ConfigError(
            f"tiers[{config.tiers.index(config.host)}].capacity: {config.host.capacity_bytes} bytes hold no block; "
            f"one block of this model has {block_bytes} bytes. "
            f"Allowed: at least {round_up_to_page(block_bytes)} bytes; some thousand blocks are sensible"
        )
    return capacity_bytes


def _planner(config: Config, lower: Sequence[Tier], space: HostSpace, stats: Stats, *, events: bool) -> Planner:
    host = residency("host", config.policy_of(config.host), config.host.ttl_s, config.host.ttl_mode)
    specs = [spec_of(tier, config) for tier in lower]
    return Planner(space, host, specs, stats, events=events, victim_share=config.host.victim_share)


def _recover(planner: Planner, config: Config, lower: Sequence[Tier], now: float) -> None:
    """What the tiers hold, and what a tenant may keep there."""
    for index, tier_below in enumerate(lower, start=1):
        planner.recover(index, tier_below.entries(), now)
    quotas = {HOST_TIER: config.host.quotas} | ({} if config.disk is None else {HOST_TIER + 1: config.disk.quotas})
    for tier, quotas_of_tier in quotas.items():
        for tenant, num_bytes in quotas_of_tier.items():
            planner.set_quota(tier, tenant, num_bytes, now)


def _own_arena(config: Config) -> Arena:
    """Host memory without a name, that only this process maps."""
    path = f"/dev/shm/kvtier-{os.getuid()}-{os.getpid()}-{time.monotonic_ns()}"
    arena = Arena.open(path, config.host.capacity_bytes, huge_pages=config.host.huge_pages, numa_node=config.host.numa_node)
    arena.unlink()
    return arena
