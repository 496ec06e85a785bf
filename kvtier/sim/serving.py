"""The order in which serving calls the planner for a request: what ``connectors.scheduler`` and ``.matching`` do, without an engine.

Call order of a request: ``look`` (again while it waits for promotions) -> ``admit`` -> ``store`` once per step -> ``end_step`` per step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kvtier.control.planner import Planner
from kvtier.types import BlockKey, LoadPlan, StoreOrder, StorePlan

PIN_TTL_S = 30.0


@dataclass(slots=True)
class Served:
    """A request on its way through the cache. Blocks count from the beginning of its prompt."""

    index: int
    """its place in the trace"""
    keys: Sequence[BlockKey]
    """of all full blocks"""
    limit_block: int
    """no block from here on can be a hit: the last token is always computed"""
    first_block: int = 0
    """blocks before it are in the engine already"""
    deadline: float | None = None
    num_found_ready: int = 0
    """leading blocks that were in host memory when it came"""
    num_ready: int = 0
    """blocks from ``first_block`` on that are in host memory"""
    num_wanted: int = 0
    num_promised: int = 0
    num_draining: int = 0
    is_waiting: bool = False
    num_pinned: int = 0
    pin_id: int = 0
    pinned_until: float = 0.0
    store_from: int = 0
    is_admitted: bool = False


@dataclass(slots=True)
class _Step:
    """What is to be reported at the end of a step."""

    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)


class Serving:
    """Drives a planner for requests. ``run_commands`` is called where serving hands the planner's commands to the tiers."""

    def __init__(
        self,
        planner: Planner,
        draining_blocks: Callable[[], int],
        run_commands: Callable[[], None],
        *,
        max_pinned_blocks: int,
        promote_wait_s: float,
        block_bytes: int,
    ) -> None:
        self._planner = planner
        self._draining_blocks = draining_blocks
        self._run_commands = run_commands
        self._max_pinned_blocks = max_pinned_blocks
        self._promote_wait_s = promote_wait_s
        self._block_bytes = block_bytes
        self._num_pinned_blocks = 0
        self._step = _Step()
        self.waiting: dict[int, Served] = {}
        """requests that wait for promotions"""

    def look(self, request: Served, now: float) -> None:
        """A request comes: what is ready is pinned, what is on a slower tier is promoted while it waits."""
        first = request.first_block
        found = self._planner.match(request.keys[first : request.limit_block])
        request.num_ready = request.num_promised = found.ready_blocks
        request.num_found_ready = first + found.ready_blocks
        if found.hit_blocks > found.ready_blocks:
            self._promote(request, found.hit_blocks, now)
        self._pin(request, now)

    def look_again(self, request: Served, now: float) -> None:
        """Are the promotions here, will they ever be, or is it too late?"""
        end = request.first_block + request.num_wanted
        found = self._planner.match(request.keys[request.first_block : end])
        has_grown = found.ready_blocks > request.num_ready
        request.num_ready = found.ready_blocks
        is_coming = found.pending and found.ready_blocks < request.num_promised
        is_refused = found.hit_blocks > found.ready_blocks and request.num_promised < request.num_wanted
        if has_grown:
            self._pin(request, now)
        if (not is_coming and not is_refused) or (request.deadline is not None and now >= request.deadline):
            self._stop_waiting(request)
        elif not is_coming and (has_grown or self._draining_blocks() != request.num_draining):
            self._promote(request, found.hit_blocks, now)
        if not request.is_waiting:
            self._pin(request, now)

    def look_once_more(self, request: Served, now: float) -> None:
        """A request that waits for other things than promotions is asked for again: what is pinned is certain, the rest is looked up."""
        if request.num_pinned and now >= request.pinned_until:
            self.release(request, now)
        known = request.num_pinned
        first = request.first_block + known
        if first < request.limit_block:
            request.num_ready = request.num_promised = known + self._planner.match(request.keys[first : request.limit_block]).ready_blocks
        if request.num_ready > known or now >= request.pinned_until - PIN_TTL_S / 2:
            self._pin(request, now)

    def admit(self, request: Served, now: float, *, loads: bool = True) -> LoadPlan | None:
        """The engine takes what is ready (``loads``: and wants it). Returns the load."""
        first, ready = request.first_block, request.num_ready
        plan = None
        request.is_admitted = True
        if ready and loads:
            plan = self._planner.begin_load(request.keys[first : first + ready], now)
            self._step.loads.append(plan.job_id)
        if first + ready:
            self._planner.touch(request.keys[: first + ready], now)
        self.release(request, now)
        request.store_from = first + ready
        return plan

    def store(self, request: Served, end: int, now: float) -> StorePlan:
        """The blocks before ``end`` are full after this step."""
        first = request.store_from
        keys = request.keys[:end]
        plan = self._planner.begin_store(StoreOrder(keys, first), self._block_bytes, now)
        self._run_commands()
        if plan.broken:
            first = self._planner.match(keys).hit_blocks
            plan = self._planner.begin_store(StoreOrder(keys, first), self._block_bytes, now)
            self._run_commands()
        request.store_from = end - plan.num_refused - plan.num_declined
        if plan.slots:
            self._step.stores.append(plan.job_id)
        return plan

    def end_step(self, now: float) -> None:
        """All copies of the step are done."""
        step = self._step
        for job_id in [*step.loads, *step.stores]:
            self.end_job(job_id, (), now)
        self.tick(now)

    def end_job(self, job_id: int, failed: Collection[int], now: float) -> None:
        """One load or store is done; ``failed`` are positions in it."""
        if job_id in self._step.loads:
            self._step.loads.remove(job_id)
            self._planner.end_load(job_id, failed, now)
        else:
            self._step.stores.remove(job_id)
            self._planner.commit_store(job_id, failed, now)

    def tick(self, now: float) -> None:
        """As once per engine step."""
        self._planner.tick(now)
        self._run_commands()

    def _promote(self, request: Served, num_blocks: int, now: float) -> None:
        if request.deadline is None:
            request.deadline = now + self._promote_wait_s
        request.num_wanted = min(num_blocks, self._room(request))
        if now >= request.deadline or request.num_wanted <= request.num_ready:
            self._stop_waiting(request)
            return
        first = request.first_block
        promised = self._planner.promote(request.keys[first : first + request.num_wanted], now)
        self._run_commands()
        request.num_promised = max(request.num_ready, promised)
        request.num_draining = self._draining_blocks() if request.num_promised < request.num_wanted else 0
        if request.num_promised > request.num_ready or request.num_draining:
            request.is_waiting = True
            self.waiting[request.index] = request
        else:
            self._stop_waiting(request)

    def _stop_waiting(self, request: Served) -> None:
        request.is_waiting = False
        self.waiting.pop(request.index, None)

    def _room(self, request: Served) -> int:
        promised = sum(max(0, other.num_promised - other.num_pinned) for other in self.waiting.values() if other is not request)
        return self._max_pinned_blocks - (self._num_pinned_blocks - request.num_pinned) - promised

    def _pin(self, request: Served, now: float) -> None:
        num_blocks = min(request.num_ready, self._room(request))
        old = request.pin_id if request.num_pinned else 0
        self._num_pinned_blocks -= request.num_pinned
        request.num_pinned = 0
        if num_blocks > 0:
            first = request.first_block
            request.pin_id = self._planner.pin(request.keys[first : first + num_blocks], now + PIN_TTL_S)
            request.num_pinned = num_blocks
            request.pinned_until = now + PIN_TTL_S
            self._num_pinned_blocks += num_blocks
        if old:
            self._planner.unpin(old, now)

    def release(self, request: Served, now: float) -> None:
        """Ends what ``look`` keeps for a request: it starts, or is gone."""
        self.waiting.pop(request.index, None)
        if request.num_pinned:
            self._num_pinned_blocks -= request.num_pinned
            request.num_pinned = 0
            self._planner.unpin(request.pin_id, now)
