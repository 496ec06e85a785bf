"""The scheduler half of a connector, without any engine: decides what is loaded and stored, step by step.

Call order within one engine step, as vLLM has it::

    match()* -> allocated()* -> build_step() -> [workers] -> request_finished()* -> finish_step()
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence

from kvtier.cache import Cache
from kvtier.connectors.blending import Blending, BlendParts
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.copying import Copying
from kvtier.connectors.matching import Matcher
from kvtier.connectors.messages import MoveJob, RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.request_hints import hint_end
from kvtier.connectors.requests import ConnectorSettings, Geometry, Matched, Request, RequestIdentity, make_request
from kvtier.connectors.step_meter import StepMeter, StepTokens
from kvtier.control.commands import BlockEvent
from kvtier.hashing import TokenSpan

IDLE_WAIT_S = 0.005
"""how long an engine step waits for promotions where there is nothing to compute, in it or in one before it that is not answered"""
_NO_IDENTITY = RequestIdentity()
_NO_OPTIONS = RequestOptions()
_NOTHING = Matched(0)


class SchedulerHalf:
    """Drives a cache, a :class:`~kvtier.engine.CacheEngine` or a daemon's, for one engine's scheduler. One thread.

    Never raises into the engine: an unexpected error becomes the safe answer of the method (no hit, nothing to store, a
    load that failed, no hold), is counted as ``connector.errors`` and logged once per kind.

    Args:
        engine: the cache; closed by ``close()``
        geometry: see :class:`~kvtier.connectors.requests.Geometry`
        settings: see :class:`~kvtier.connectors.requests.ConnectorSettings`
        stores_are_async: the workers' copiers are asynchronous, so that blocks of finished requests must be held
        blend: how chunks are reused; None: requests that ask for it are served as any other
        idle_wait_s: how long a step with nothing to compute may wait; 0 where others wait for this engine's steps
        clock: seconds that do not go backwards
        strict: re-raise unexpected errors (tests only)
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        engine: Cache,
        geometry: Geometry,
        settings: ConnectorSettings,
        *,
        stores_are_async: bool = False,
        blend: BlendParts | None = None,
        idle_wait_s: float = IDLE_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        strict: bool = False,
    ) -> None:
        self._engine = engine
        self._geometry = geometry
        self._block_tokens = geometry.block_tokens
        self._settings = settings
        self._stores_are_async = stores_are_async
        self._idle_wait_s = idle_wait_s
        self._matcher = Matcher(engine, geometry, settings, clock=clock)
        self._boundary = Boundary(on_error=self._count_error, strict=strict)
        self._requests: dict[str, Request] = {}
        self._meter = StepMeter(engine.estimates, clock)
        self._copying = Copying(engine, geometry, self._requests, self._boundary, async_load=bool(settings.async_load))
        self._blending = Blending(
            engine, geometry, settings, blend or BlendParts(), clock=clock, boundary=self._boundary, lose=self._lose_promise
        )
        self._held: list[str] = []
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
            self._engine.stats.add("hint.bad", options.num_problems)
            allowed = dataclasses.replace(options, load=options.load and self._settings.load, store=options.store and self._settings.store)
            request = make_request(request_id, token_ids, identity, allowed, geometry=self._geometry)
            if not self._settings.store_decode_blocks:
                request.num_store_tokens = min(request.num_store_tokens, num_prompt_tokens)
            self._requests[request_id] = request
            self._blending.begin(request, identity, num_prompt_tokens)

    def note_spans(self, request_id: str, spans: Sequence[TokenSpan]) -> None:
        """All multimodal items of a request whose tokens come in parts: those it had, and those that lie in a further part."""
        request = self._requests.get(request_id)
        if request is not None:
            with self._boundary.at("note_spans"):
                request.chain.note_spans(spans)

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
            exact = self._matcher.match(request, num_tokens, num_computed_tokens)
            return exact if request.blend is None else self._blending.improve(request, exact, num_tokens)
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
        request.num_done_tokens = request.num_computed_tokens + num_external_tokens
        with self._boundary.at("allocated"):
            num_exact = self._blending.num_exact_tokens(request, num_external_tokens)
            if num_exact:
                found_tokens = max(0, request.num_found_ready * self._block_tokens - request.num_computed_tokens)
                host_tokens = min(found_tokens, num_exact)
                request.hit_tokens = (host_tokens, num_exact - host_tokens)
                self._copying.plan_load(request, block_ids, num_exact, before_blend=num_exact < num_external_tokens)
            self._blending.allocated(request, block_ids, num_external_tokens)
            if request.options.priority != "low":
                self._touch(request)
            if request.options.session:
                self._engine.hint_began(request.options.session)
        with self._boundary.at("allocated"):
            self._matcher.release(request)
            request.store_next(self._block_tokens)

    def build_step(self, scheduled: Sequence[ScheduledRequest], preempted: Collection[str] = ()) -> StepMessage:
        """Ends the scheduling of a step: the loads of ``allocated`` and the stores of blocks that this step fills.

        ``preempted`` are requests that lost their blocks since the last step (vLLM: ``preempted_req_ids`` and those in
        ``resumed_req_ids``).  With nothing scheduled, nothing being computed and promotions running it waits some milliseconds for them,
        GIL released.
        """
        held, self._held = self._held, []
        tokens = StepTokens()
        computing: list[tuple[ScheduledRequest, int]] | None = [] if self._blending.has_new_blends else None
        due = self._note_computed(scheduled, tokens, computing)
        stores: list[MoveJob] = []
        if due:
            with self._boundary.at("build_step"):
                stores = self._copying.plan_stores(due)
        with self._boundary.at("poll"):
            if not scheduled and self._is_idle and (self._matcher.num_waiting or self._blending.is_waiting or self._engine.busy):
                self._engine.poll(self._idle_wait_s)
        ordered = self._blending.take_orders(computing or (), tokens)
        loads = self._copying.take_new_loads()  # blends that came to nothing are among them
        is_moving = bool(ordered.blends or ordered.entries or ordered.captures) or any(not job.is_async for job in loads)
        is_moving = is_moving or self._blending.is_spread
        step = self._meter.begin(tokens, is_pure=not is_moving)
        return StepMessage(
            loads=tuple(job.move for job in loads if not job.is_async),
            async_loads=tuple(job.move for job in loads if job.is_async),
            stores=tuple(stores),
            blends=ordered.blends,
            entries=ordered.entries,
            captures=ordered.captures,
            abandoned=ordered.abandoned,
            share_tokens=ordered.share_tokens,
            preempted=tuple(preempted),
            held=tuple(held),
            arena_id=self._engine.arena_id,
            step=step,
            is_busy=self._meter.is_computing,
        )

    @property
    def _is_idle(self) -> bool:
        """Whether the workers have nothing to do, in a step in which nothing is scheduled or in one before it that is not answered."""
        return not self._copying.has_new_loads and not self._meter.is_computing and not self._blending.is_spread

    def _note_computed(
        self, scheduled: Sequence[ScheduledRequest], tokens: StepTokens, computing: list[tuple[ScheduledRequest, int]] | None
    ) -> list[tuple[Request, ScheduledRequest]]:
        """What a step computes goes into ``tokens``, and beside the position that it begins at into ``computing``, where somebody needs
        that.  Gives the requests that have blocks to store."""
        due: list[tuple[Request, ScheduledRequest]] = []
        requests = self._requests
        for item in scheduled:
            request = requests.get(item.request_id)
            if request is None:
                continue
            # With speculative decoding what was done in the step before may have been a guess: it is done again from where that was wrong.
            num_known = len(request.token_ids)
            first = min(request.num_done_tokens, num_known - 1)
            num_new = item.num_computed_tokens - first
            if computing is not None:
                computing.append((item, first if num_new > 0 else 0))
            request.num_done_tokens = item.num_computed_tokens
            if num_new == 1 or first == num_known - 1:
                tokens.num_decode += 1
            else:
                tokens.add(num_new, item.num_computed_tokens)
            if item.num_computed_tokens >= request.store_at:
                due.append((request, item))
            if item.num_computed_tokens >= request.capture_at:
                with self._boundary.at("capture"):
                    self._blending.computed(request, item)
        return due

    # ---- after the step -----------------------------------------------------------------------------------------

    def finish_step(self, report: WorkerReport | None, failed_block_ids: Collection[int] = ()) -> None:
        """Takes what the workers finished: makes stored blocks readable, ends loads, forgets blocks that failed to load.

        ``report`` is merged over all workers that reported; ``failed_block_ids`` are the engine blocks that the engine was
        told to recompute.  Steps without any worker output need no call, but each call also drives the tiers.
        """
        if report is not None:
            self._meter.end(report.step)
        with self._boundary.at("finish_step"):  # first: they void stores that the same report calls done
            bad = set(failed_block_ids) if report is None else self._copying.fail_loads(report).union(failed_block_ids)
            if bad:
                self._copying.void_stores(bad)
                self._blending.void(bad)
        if report is not None:
            with self._boundary.at("finish_step"):
                self._count(report)
            with self._boundary.at("blend"):
                self._blending.report(report)
            for job_id in report.done:
                if job_id in self._copying.loads:
                    with self._boundary.at("end_load"):
                        self._copying.advance_load(job_id, report)
            for job_id in report.done:
                if job_id in self._copying.stores:
                    with self._boundary.at("commit_store"):
                        self._copying.advance_store(job_id, report)
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
                self._blending.abandon(request)
            if request.is_admitted:
                with self._boundary.at("hint"):
                    hint_end(self._engine, request, self._block_tokens)
        if not self._stores_are_async or not self._copying.is_reading(request_id):
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
        self._blending.forget()
        with self._boundary.at("reset"):
            self._engine.reset()  # stores under way will end as failures
            return True
        return False

    def hit_tokens(self, request_id: str) -> tuple[int, int]:
        """Tokens a request has loaded: those found in host memory, and those promoted from slower tiers for it."""
        request = self._requests.get(request_id)
        return (0, 0) if request is None else request.hit_tokens

    def blended(self, request_id: str) -> dict[str, object]:
        """What became of a request's chunks, where it named any: tokens taken from them, or why none."""
        request = self._requests.get(request_id)
        if request is None or request.options.blend is None:
            return {}
        refused = {"refused": request.blend_refusal} if request.blend_refusal else {}
        return {"tokens": 0 if request.blend is None else request.blend.num_tokens, **refused}

    @property
    def has_pending_work(self) -> bool:
        """Whether the engine must keep stepping for kvtier: copies not reported, holds not told, writes to slower tiers."""
        is_copying = bool(self._copying.loads or self._copying.stores or self._held)
        return is_copying or self._blending.has_pending_work or self._engine.busy

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
        for num_bytes, seconds in report.load_times:
            self._engine.estimates.transferred("host", num_bytes, seconds)

    def _lose_promise(self, request: Request, block_ids: Sequence[int], first_token: int, is_async: bool) -> None:
        self._copying.plan_lost(request, block_ids, first_token, is_async)

    def _start_over(self, request: Request) -> None:
        request.start_over()
        self._copying.detach(request.request_id)

    def _touch(self, request: Request) -> None:
        """What the request uses is worth keeping, also what the engine had itself."""
        num_blocks = request.num_computed_tokens // self._block_tokens
        if request.lookup is not None:
            num_blocks += request.lookup.num_ready
        if num_blocks:
            self._engine.touch(request.keys(num_blocks, self._block_tokens))
