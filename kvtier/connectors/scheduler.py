"""The scheduler half of a connector, without any engine: decides what is loaded and stored, step by step.

Call order within one engine step, as vLLM has it::

    match()* -> allocated()* -> build_step() -> [workers] -> request_finished()* -> finish_step()
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence

from kvtier.connectors.boundary import Boundary
from kvtier.connectors.jobs import LoadJob, StoreJob, void_stores
from kvtier.connectors.matching import Matcher
from kvtier.connectors.messages import MoveJob, RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.requests import NEVER, ConnectorSettings, Geometry, Matched, Request, RequestIdentity, make_request
from kvtier.control.commands import BlockEvent
from kvtier.engine import CacheEngine
from kvtier.types import SlotRef

IDLE_WAIT_S = 0.005
"""how long an engine step with nothing to compute waits for promotions"""
_NO_IDENTITY = RequestIdentity()
_NO_OPTIONS = RequestOptions()
_NOTHING = Matched(0)


class SchedulerHalf:
    """Drives a :class:`~kvtier.engine.CacheEngine` for one engine's scheduler. One thread.

    Never raises into the engine: an unexpected error becomes the safe answer of the method (no hit, nothing to store, a
    load that failed, no hold), is counted as ``connector.errors`` and logged once per kind.

    Args:
        engine: the cache; closed by ``close()``
        geometry: see :class:`~kvtier.connectors.requests.Geometry`
        settings: see :class:`~kvtier.connectors.requests.ConnectorSettings`
        stores_are_async: the workers' copiers are asynchronous, so that blocks of finished requests must be held
        clock: seconds that do not go backwards
        strict: re-raise unexpected errors (tests only)
    """

    def __init__(
        self,
        engine: CacheEngine,
        geometry: Geometry,
        settings: ConnectorSettings,
        *,
        stores_are_async: bool = False,
        clock: Callable[[], float] = time.monotonic,
        strict: bool = False,
    ) -> None:
        self._engine = engine
        self._geometry = geometry
        self._block_tokens = geometry.block_tokens
        self._blocks_per_slot = geometry.blocks_per_slot
        self._num_workers = geometry.num_workers
        self._settings = settings
        self._stores_are_async = stores_are_async
        self._matcher = Matcher(engine, geometry, settings, clock=clock)
        self._boundary = Boundary(on_error=self._count_error, strict=strict)
        self._requests: dict[str, Request] = {}
        self._loads: dict[int, LoadJob] = {}
        self._stores: dict[int, StoreJob] = {}
        self._new_loads: list[LoadJob] = []
        self._held: list[str] = []
        self._lost_ids = itertools.count(-1, -1)
        """for loads that could not be planned: no plan of the engine has a negative id"""
        self._num_attached_workers = 0
        self._stats_seen = engine.stats.snapshot()
        self._is_closed = False

    # ---- while the engine schedules -----------------------------------------------------------------------------

    def knows(self, request_id: str) -> bool:
        """Whether ``add_request`` has seen the request (and it has not finished): spares building its identity."""
        return request_id in self._requests

    def add_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        identity: RequestIdentity = _NO_IDENTITY,
        options: RequestOptions = _NO_OPTIONS,
    ) -> None:
        """Makes a request known. Idempotent: later calls change nothing. Hashes nothing.

        ``token_ids`` must be the engine's live sequence of all tokens of the request (vLLM: ``request.all_token_ids``): it
        is kept and read again as it grows.
        """
        if request_id in self._requests:
            return
        with self._boundary.at("add_request"):
            allowed = RequestOptions(options.load and self._settings.load, options.store and self._settings.store)
            request = make_request(request_id, token_ids, identity, allowed, geometry=self._geometry)
            if not self._settings.store_decode_blocks:
                request.num_store_tokens = num_prompt_tokens
            self._requests[request_id] = request

    def match(self, request_id: str, num_tokens: int, num_computed_tokens: int) -> Matched:
        """How many tokens beyond ``num_computed_tokens`` can be loaded for the first ``num_tokens`` of the request.

        Leaves at least one token to compute. May be called any number of times and is cheap when repeated.  The hit is kept
        from eviction (within ``max_pinned_fraction``) while the engine keeps asking.  ``num_tokens=None`` while blocks are on
        their way from a slower tier.  A call for a request that had blocks already means that it starts over (preemption).
        ``num_computed_tokens`` must be a multiple of ``engine_block_tokens``; so is the result.
        """
        request = self._requests.get(request_id)
        if request is None:
            return _NOTHING
        with self._boundary.at("match"):
            if request.is_admitted:
                self._start_over(request)
            return self._matcher.match(request, num_tokens, num_computed_tokens)
        return _NOTHING

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The engine has blocks for the request and takes ``num_external_tokens`` of the last match (0: it loads nothing).

        ``block_ids`` are all blocks of the request, in order. Plans the load; blocks that have vanished since ``match`` will
        be reported as failed loads by the workers, so the engine computes them.
        """
        request = self._requests.get(request_id)
        if request is None or (request.is_admitted and not num_external_tokens):
            return
        request.is_admitted = True
        with self._boundary.at("allocated"):
            if num_external_tokens:
                found_tokens = max(0, request.num_found_ready * self._block_tokens - request.num_computed_tokens)
                host_tokens = min(found_tokens, num_external_tokens)
                request.hit_tokens = (host_tokens, num_external_tokens - host_tokens)
                self._plan_load(request, block_ids, num_external_tokens)
            self._touch(request)
        with self._boundary.at("allocated"):
            self._matcher.release(request)
            request.store_next(self._block_tokens)

    def build_step(self, scheduled: Sequence[ScheduledRequest], preempted: Collection[str] = ()) -> StepMessage:
        """Ends the scheduling of a step: the loads of ``allocated`` and the stores of blocks that this step fills.

        ``preempted`` are requests that lost their blocks since the last step (vLLM: ``preempted_req_ids`` and those in
        ``resumed_req_ids``).  With nothing scheduled and promotions running it waits some milliseconds for them, GIL released.
        """
        loads, self._new_loads = self._new_loads, []
        held, self._held = self._held, []
        stores: list[MoveJob] = []
        requests = self._requests
        for item in scheduled:
            request = requests.get(item.request_id)
            if request is not None and item.num_computed_tokens >= request.store_at:
                with self._boundary.at("build_step"):
                    self._plan_store(request, item, stores)
        if not scheduled and not loads and (self._matcher.num_waiting or self._engine.busy):
            with self._boundary.at("poll"):
                self._engine.poll(IDLE_WAIT_S)
        return StepMessage(
            loads=tuple(job.move for job in loads if not job.is_async),
            async_loads=tuple(job.move for job in loads if job.is_async),
            stores=tuple(stores),
            preempted=tuple(preempted),
            held=tuple(held),
        )

    # ---- after the step -----------------------------------------------------------------------------------------

    def finish_step(self, report: WorkerReport | None, failed_block_ids: Collection[int] = ()) -> None:
        """Takes what the workers finished: makes stored blocks readable, ends loads, forgets blocks that failed to load.

        ``report`` is merged over all workers that reported; ``failed_block_ids`` are the engine blocks that the engine was
        told to recompute.  Steps without any worker output need no call, but each call also drives the tiers.
        """
        if report is not None:
            with self._boundary.at("finish_step"):
                self._count(report)
            # Failed loads first: they void stores that the same report calls done.
            if failed_block_ids:
                with self._boundary.at("finish_step"):
                    self._void_stores(set(failed_block_ids))
            for job_id in report.done:
                if job_id in self._loads:
                    with self._boundary.at("end_load"):
                        self._advance_load(job_id, report)
            for job_id in report.done:
                if job_id in self._stores:
                    with self._boundary.at("commit_store"):
                        self._advance_store(job_id, report)
        with self._boundary.at("poll"):
            self._engine.poll()

    def request_finished(self, request_id: str) -> bool:
        """Forgets a request, finished or aborted in any state. Unknown ids are fine.

        Returns True where asynchronous stores still read its blocks: the engine must hold them until every worker has
        reported the request as sent.  Copies that run keep their leases until they are reported.
        """
        request = self._requests.pop(request_id, None)
        if request is not None:
            with self._boundary.at("request_finished"):
                self._matcher.release(request)
        stores = self._stores.values()
        if not self._stores_are_async or not any(job.move.request_id == request_id and not job.is_detached for job in stores):
            return False
        self._held.append(request_id)
        return True

    # ---- beside the steps ---------------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Forgets the whole cache; KV computed or copied from before is not stored afterwards. True: done."""
        for request in self._requests.values():
            with self._boundary.at("reset"):
                self._matcher.release(request)
            request.stop_storing()
        with self._boundary.at("reset"):
            self._engine.reset()  # stores under way will end as failures
            return True
        return False

    def hit_tokens(self, request_id: str) -> tuple[int, int]:
        """Tokens a request has loaded: those found in host memory, and those promoted from slower tiers for it."""
        request = self._requests.get(request_id)
        return (0, 0) if request is None else request.hit_tokens

    @property
    def has_pending_work(self) -> bool:
        """Whether the engine must keep stepping for kvtier: copies not reported, holds not told, writes to slower tiers."""
        return bool(self._loads or self._stores or self._held) or self._engine.busy

    @property
    def num_attached_workers(self) -> int:
        """Workers that have reported that they mapped the arena."""
        return self._num_attached_workers

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that waiting requests keep from eviction; shared ones count for each request."""
        return self._matcher.num_pinned_blocks

    def take_stats(self) -> dict[str, int]:
        """Growth of the counters (``kvtier.stats.COUNTERS``) since the last call; empty where nothing happened."""
        stats = self._engine.stats
        growth = stats.since(self._stats_seen)
        if growth:
            self._stats_seen = stats.snapshot()
        return growth

    def take_events(self) -> list[BlockEvent]:
        """Blocks that became available or went away since the last call."""
        with self._boundary.at("take_events"):
            return self._engine.take_events()
        return []

    def close(self) -> None:
        """Ends everything, closes the engine. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for request_id in list(self._requests):
            self.request_finished(request_id)
        with self._boundary.at("close"):
            self._engine.close()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _count_error(self) -> None:
        self._engine.stats.add("connector.errors")

    def _count(self, report: WorkerReport) -> None:
        self._num_attached_workers += report.attached
        self._engine.stats.add("load.stale_slots", report.num_stale)
        self._engine.stats.add("connector.errors", report.num_errors)

    def _start_over(self, request: Request) -> None:
        request.start_over()
        for job in self._stores.values():
            if job.move.request_id == request.request_id:
                job.is_detached = True

    def _touch(self, request: Request) -> None:
        """What the request uses is worth keeping, also what the engine had itself."""
        num_blocks = request.num_computed_tokens // self._block_tokens
        if request.lookup is not None:
            num_blocks += request.lookup.num_ready
        if num_blocks:
            self._engine.touch(request.keys(num_blocks, self._block_tokens))

    def _plan_load(self, request: Request, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Leases slots for what was promised; what has no slot any more is handed on as missing."""
        size = self._geometry.engine_block_tokens
        start = request.num_computed_tokens // size
        end = -(-(request.num_computed_tokens + num_external_tokens) // size)
        promised = tuple(block_ids[start:end])
        first_block = start // self._blocks_per_slot
        request.store_from = end // self._blocks_per_slot
        job_id = next(self._lost_ids)
        slots: tuple[SlotRef, ...] = ()
        device_slots: tuple[int, ...] = ()
        device_ready: tuple[bool, ...] = ()
        with self._boundary.at("begin_load"):
            limit = -(-end // self._blocks_per_slot)
            plan = self._engine.begin_load(request.keys(limit, self._block_tokens)[first_block:])
            job_id, slots = plan.job_id, plan.slots
            device_slots, device_ready = plan.device_slots, plan.device_ready
        first_index = start % self._blocks_per_slot
        num_present = min(len(promised), max(0, len(slots) * self._blocks_per_slot - first_index))
        move = MoveJob(
            job_id,
            request.request_id,
            promised[:num_present],
            tuple(ref.slot for ref in slots),
            tuple(ref.generation for ref in slots),
            first_index,
            promised[num_present:],
            device_slots,
            device_ready,
        )
        job = LoadJob(move, self._settings.async_load, first_block, self._num_workers)
        if move.missing:
            request.load_failed(job.first_failed_block(self._blocks_per_slot), self._block_tokens)
        self._new_loads.append(job)
        self._loads[job_id] = job

    def _plan_store(self, request: Request, item: ScheduledRequest, moves: list[MoveJob]) -> None:
        """Slots for the blocks that are full after this step."""
        block_tokens, per_slot = self._block_tokens, self._blocks_per_slot
        end = min(request.num_full_blocks(item.num_computed_tokens, block_tokens), len(item.block_ids) // per_slot)
        first = request.store_from
        if end <= first:
            return
        keys = request.keys(end, block_tokens)
        plan = self._engine.begin_store(keys, first)
        if plan.broken:
            # The blocks before have been evicted while the request ran; all of them are still in the engine.
            first = self._engine.match(keys).hit_blocks
            plan = self._engine.begin_store(keys, first)
        request.store_from = end - plan.num_refused - plan.num_declined
        request.store_next(block_tokens)
        if (plan.num_refused or plan.num_declined) and request.store_at < NEVER:
            # What was not worth its room is offered again when it is twice as long: all of it is offered anew each time.
            request.store_at = item.num_computed_tokens + max(1, plan.num_declined) * block_tokens
        if not plan.slots:
            return
        block_ids = [
            block_id
            for position in plan.positions
            for block_id in item.block_ids[(first + position) * per_slot : (first + position + 1) * per_slot]
        ]
        move = MoveJob(
            plan.job_id,
            request.request_id,
            tuple(block_ids),
            tuple(ref.slot for ref in plan.slots),
            tuple(ref.generation for ref in plan.slots),
            device_slots=plan.device_slots,
        )
        self._stores[plan.job_id] = StoreJob(move, first + plan.positions[0], item.block_ids[: end * per_slot], self._num_workers)
        moves.append(move)

    def _advance_load(self, job_id: int, report: WorkerReport) -> None:
        job = self._loads[job_id]
        job.remaining -= report.done[job_id]
        job.failed |= report.failed.get(job_id, set())
        if job.failed or job.move.missing:
            self._load_failed(job)
        if job.remaining <= 0:
            del self._loads[job_id]
            if job_id > 0:
                per_slot = self._blocks_per_slot
                self._engine.end_load(job_id, job.failed_slots(per_slot), partial=job.partial_slots(per_slot))

    def _load_failed(self, job: LoadJob) -> None:
        """The engine computes the failed blocks itself; nothing computed on top of them may be stored."""
        request = self._requests.get(job.move.request_id)
        if request is not None:
            request.load_failed(job.first_failed_block(self._blocks_per_slot), self._block_tokens)
        self._void_stores(job.failed_block_ids())

    def _void_stores(self, block_ids: set[int]) -> None:
        for store in void_stores(self._stores.values(), block_ids):
            request = self._requests.get(store.move.request_id)
            if request is not None:
                request.store_again(store.first_block, self._block_tokens)

    def _advance_store(self, job_id: int, report: WorkerReport) -> None:
        job = self._stores[job_id]
        job.remaining -= report.done[job_id]
        job.failed |= report.failed.get(job_id, set())
        if job.remaining > 0:
            return
        del self._stores[job_id]
        if job.is_void:
            self._engine.abort_store(job_id)
        else:
            self._engine.commit_store(job_id, job.failed_slots(self._blocks_per_slot))
