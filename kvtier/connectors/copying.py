"""Copies between the engine and host memory, as the scheduler half plans and follows them: what goes where, and what became of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvtier.cache import Cache
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.jobs import LoadJob, StoreJob, void_stores
from kvtier.connectors.messages import MoveJob, ScheduledRequest, WorkerReport
from kvtier.connectors.requests import NEVER, Geometry, Request
from kvtier.types import SlotRef, StoreOrder, StorePlan


class DueStore(NamedTuple):
    """A request that has full blocks to store, and what the cache is asked for it."""

    request: Request
    item: ScheduledRequest
    order: StoreOrder


class Copying:
    """Plans loads and stores and takes in what the workers report. One thread, the scheduler half's.

    ``requests`` are those that the scheduler half knows, by id; a job may outlive its request.
    """

    def __init__(self, engine: Cache, geometry: Geometry, requests: Mapping[str, Request], boundary: Boundary, *, async_load: bool) -> None:
        self._engine = engine
        self._geometry = geometry
        self._block_tokens = geometry.block_tokens
        self._blocks_per_slot = geometry.blocks_per_slot
        self._requests = requests
        self._boundary = boundary
        self._async_load = async_load
        self.loads: dict[int, LoadJob] = {}
        """not reported by all workers"""
        self.stores: dict[int, StoreJob] = {}
        self._new_loads: list[LoadJob] = []
        self._lost_ids = itertools.count(-1, -1)
        """for loads that could not be planned: no plan of the engine has a negative id"""

    @property
    def has_new_loads(self) -> bool:
        """Whether some were planned since the last ``take_new_loads``."""
        return bool(self._new_loads)

    def take_new_loads(self) -> list[LoadJob]:
        """The loads planned since the last call."""
        loads, self._new_loads = self._new_loads, []
        return loads

    def detach(self, request_id: str) -> None:
        """A request has lost its blocks; stores that read them go on without it."""
        for job in self.stores.values():
            if job.move.request_id == request_id:
                job.is_detached = True

    def is_reading(self, request_id: str) -> bool:
        """Whether stores that are not reported read blocks that the request still has."""
        return any(job.move.request_id == request_id and not job.is_detached for job in self.stores.values())

    def plan_load(self, request: Request, block_ids: Sequence[int], num_external_tokens: int, *, before_blend: bool = False) -> None:
        """Leases slots for what was promised; what has no slot any more is handed on as missing.

        ``before_blend``: a blend of the same step goes on from there, and says when the request may start.
        """
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
        self._order_load(request, LoadJob(move, self._async_load and not before_blend, first_block, self._geometry.num_workers))

    def plan_lost(self, request: Request, block_ids: Sequence[int], first_token: int, is_async: bool) -> None:
        """What was promised in these blocks, which begin at ``first_token``, comes from nowhere: a load of which all is missing."""
        move = MoveJob(next(self._lost_ids), request.request_id, (), (), (), missing=tuple(block_ids))
        self._order_load(request, LoadJob(move, is_async, first_token // self._block_tokens, self._geometry.num_workers))

    def _order_load(self, request: Request, job: LoadJob) -> None:
        if job.move.missing:
            request.load_failed(job.first_failed_block(self._blocks_per_slot), self._block_tokens)
        self._new_loads.append(job)
        self.loads[job.move.job_id] = job

    def plan_stores(self, scheduled: Sequence[tuple[Request, ScheduledRequest]]) -> list[MoveJob]:
        """Slots for the blocks that are full after this step: the cache is asked once for all requests."""
        due: list[DueStore] = []
        for request, item in scheduled:
            end = min(request.num_full_blocks(item.num_computed_tokens, self._block_tokens), len(item.block_ids) // self._blocks_per_slot)
            if end > request.store_from:
                keys, may_evict = request.keys(end, self._block_tokens), request.options.priority != "low"
                due.append(DueStore(request, item, StoreOrder(keys, request.store_from, request.tenant, may_evict)))
        moves: list[MoveJob] = []
        while due:
            plans = self._engine.begin_stores([each.order for each in due])
            for each, plan in zip(due, plans, strict=False):
                with self._boundary.at("build_step"):
                    move = self._take_plan(each, plan)
                    if move is not None:
                        moves.append(move)
            due = due[len(plans) :] if plans else []
        return moves

    def _take_plan(self, due: DueStore, plan: StorePlan) -> MoveJob | None:
        """What the workers are to do for one request, where it got slots."""
        request, item, order = due
        block_tokens, per_slot = self._block_tokens, self._blocks_per_slot
        first, end = order.first, len(order.keys)
        if plan.broken:
            # The blocks before have been evicted while the request ran; all of them are still in the engine.
            first = self._engine.match(order.keys).hit_blocks
            (plan,) = self._engine.begin_stores([replace(order, first=first)])
        request.store_from = end - plan.num_refused - plan.num_declined
        request.store_next(block_tokens)
        if (plan.num_refused or plan.num_declined) and request.store_at < NEVER:
            # What was not worth its room is offered again when it is twice as long: all of it is offered anew each time.
            request.store_at = item.num_computed_tokens + max(1, plan.num_declined) * block_tokens
        if not plan.slots:
            return None
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
        self.stores[plan.job_id] = StoreJob(move, first + plan.positions[0], item.block_ids[: end * per_slot], self._geometry.num_workers)
        return move

    def fail_loads(self, report: WorkerReport) -> set[int]:
        """Notes what reported loads did not fill, and returns the engine blocks of it: the engine computes them itself."""
        block_ids: set[int] = set()
        for job_id in report.done.keys() & self.loads.keys():
            job = self.loads[job_id]
            job.failed |= report.failed.get(job_id, set())
            if not (job.failed or job.move.missing):
                continue
            block_ids |= job.failed_block_ids()
            request = self._requests.get(job.move.request_id)
            if request is not None:
                request.load_failed(job.first_failed_block(self._blocks_per_slot), self._block_tokens)
        return block_ids

    def advance_load(self, job_id: int, report: WorkerReport) -> None:
        """Workers have reported a load; what it did not fill is noted before."""
        job = self.loads[job_id]
        job.remaining -= report.done[job_id]
        if job.remaining <= 0:
            del self.loads[job_id]
            if job_id > 0:
                per_slot = self._blocks_per_slot
                self._engine.end_load(job_id, job.failed_slots(per_slot), partial=job.partial_slots(per_slot))

    def void_stores(self, block_ids: set[int]) -> None:
        """What was computed from these engine blocks is wrong: stores that may hold it come to nothing."""
        for store in void_stores(self.stores.values(), block_ids):
            request = self._requests.get(store.move.request_id)
            if request is not None:
                request.store_again(store.first_block, self._block_tokens)

    def advance_store(self, job_id: int, report: WorkerReport) -> None:
        """Workers have reported a store."""
        job = self.stores[job_id]
        job.remaining -= report.done[job_id]
        job.failed |= report.failed.get(job_id, set())
        if job.remaining > 0:
            return
        del self.stores[job_id]
        if job.is_void:
            self._engine.abort_store(job_id)
        else:
            self._engine.commit_store(job_id, job.failed_slots(self._blocks_per_slot))
