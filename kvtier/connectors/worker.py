"""The worker half of a connector, without any engine: copies engine blocks to and from slots, and reports.

Call order around one forward pass, as vLLM has it::

    before_overwrite() -> begin_step() -> start_loads() -> wait_for_loads() -> [forward] -> start_stores()
        -> finish() -> failed_block_ids() -> report()

Without sync loads in a step ``start_loads`` may come after the forward pass.

With a layer loader the sync loads may overlap the forward pass: ``start_loads(by_layer=True)``, no ``wait_for_loads``, and
``wait_for_layer(index)`` before each layer reads its KV. With a layer storer stores may overlap it too: ``layer_computed(index)`` after
each layer has written its KV.

An engine that drafts with layers of its own may write their KV after ``report()``; with ``stores_at_end`` its stores start when it calls
``start_stores`` behind that, and are in the report of the next step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvtier.connectors.blend_steps import Blender, BlendSteps
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.layer_pipeline import LayerPipeline
from kvtier.connectors.layer_stores import LayerStores
from kvtier.connectors.messages import MoveJob, StepMessage, WorkerReport
from kvtier.connectors.running import RunningCopy
from kvtier.connectors.slot_part import SlotPart
from kvtier.connectors.tenancy import Tenancy
from kvtier.copy.base import BlockCopy, CopyEvent, Movers
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES

_NO_ORDERS = StepMessage()


@dataclass(frozen=True, slots=True)
class Transferred:
    """Requests whose asynchronous copies are over on this worker: ``sent`` may lose its blocks, ``received`` may run."""

    sent: set[str]
    received: set[str]


class WorkerHalf:
    """One rank's data mover. One thread.

    Never raises into the engine's step: what cannot be copied is reported as failed, loads through
    ``failed_block_ids`` and ``report``, stores through ``report``.

    Args:
        arena: the shared arena, mapped by this process; not closed by ``close()``. None: there is none before ``attach``
        movers: bound to this rank's KV memory and to the arena. A layer loader is for engines that can wait for each layer, and is
            closed by ``close()``; a layer storer for engines that tell of each layer
        part: where this rank's bytes lie in a slot
        blender: puts prompts together from chunks, where this worker can
        stores_at_end: ``finish`` starts no stores: what they copy may not be computed before ``start_stores`` is called
        strict: re-raise unexpected errors, except those of the copier (tests only)
    """

    def __init__(
        self,
        arena: Arena | None,
        movers: Movers,
        part: SlotPart,
        *,
        blender: Blender | None = None,
        stores_at_end: bool = False,
        strict: bool = False,
    ) -> None:
        self._blends = BlendSteps(blender, self._count_error)
        self.attach(arena, movers)
        self._stores_by_layer: list[RunningCopy] = []
        self._part = part
        self._stores_at_end = stores_at_end
        self._boundary = Boundary(on_error=self._count_error, strict=strict)
        self._copying = Boundary(on_error=self._count_error)
        """around calls to the copier, which may fail in any way"""
        self._orders = _NO_ORDERS
        self._loads_started = self._stores_started = True
        self._sync_loads: list[RunningCopy] = []
        self._async_loads: list[RunningCopy] = []
        self._stores: list[RunningCopy] = []
        self._held: set[str] = set()
        self._received: set[str] = set()
        self._failed_block_ids: set[int] = set()
        self._report = WorkerReport(attached=1, blenders=int(blender is not None))

    # ---- an arena that may be replaced --------------------------------------------------------------------------

    def attach(self, arena: Arena | None, movers: Movers, arena_id: str = "") -> None:
        """Copies to and from this arena from now on, which orders call ``arena_id``; None: every copy fails. Between two steps."""
        self._tenancy = Tenancy(None if arena is None else arena.generations, arena_id)
        self._blends.attach(arena, arena_id, movers.rows)
        self._copier = movers.copier
        self._layers = LayerPipeline(movers.loader)
        self._layer_stores = LayerStores(movers.storer)

    def detach(self) -> None:
        """Lets go of the arena; copies that run have failed. Between two steps."""
        for copy in [*self._async_loads, *self._stores]:
            self._wait(copy)
            copy.event = None
            copy.failed.update(copy.positions)
        self._received.update(copy.job.request_id for copy in self._async_loads)
        loads, self._async_loads = self._async_loads, []
        for load in loads:
            self._end_load(load)
        self.close()
        self.attach(None, Movers())

    # ---- one step -----------------------------------------------------------------------------------------------

    def before_overwrite(self, message: StepMessage) -> None:
        """Waits for stores that still read blocks of ``message.preempted``. First call of a step; cheap without preemptions."""
        if not message.preempted:
            return
        with self._boundary.at("before_overwrite"):
            for copy in list(self._stores):
                if copy.job.request_id in message.preempted:
                    self._stores.remove(copy)
                    self._end(copy)

    def begin_step(self, message: StepMessage) -> None:
        """Takes the step's orders. Nothing is copied yet."""
        if self.has_stores_to_start:  # the engine did not come to the end of the step before
            for job in self._orders.stores:
                self._end(RunningCopy(job, [], None, set(range(len(job.block_ids)))))
        self._orders = message
        self._loads_started = self._stores_started = False
        self._held.update(message.held)
        self._failed_block_ids.update(message.unfilled)
        if message.is_busy:
            for copy in self._async_loads:
                copy.started = None

    def start_loads(self, *, by_layer: bool = False) -> None:
        """Starts all loads of the step, sync ones first. Slots with a new tenant fail without a copy. Idempotent in a step.

        ``by_layer``: the engine will call ``wait_for_layer`` for every layer. Without a layer loader this waits for the sync loads.
        """
        if self._loads_started:
            return
        self._loads_started = True
        by_layer = by_layer and not self._orders.blends
        # What passes through the device pool is not divided by layers.
        layered = [job for job in self._orders.loads if by_layer and self._layers.is_usable and not job.device_slots]
        self._sync_loads += [self._start(job, is_load=True) for job in self._orders.loads if job not in layered]
        if by_layer:
            self.wait_for_loads()
        if layered:
            self._start_by_layer([self._prepare(job) for job in layered])
        for job in self._orders.async_loads:
            self._async_loads.append(self._start(job, is_load=True))
            if self._orders.is_busy:  # a device copies behind what the engine computes, which costs nobody any time
                self._async_loads[-1].started = None
        if self._orders.blends:
            self.wait_for_loads()
        if self._orders.blends or self._blends.has_blends:
            orders, failed = self._orders, self._failed_block_ids
            failed |= self._blends.blend(orders.blends, failed, self._report, orders.arena_id, orders.abandoned, orders.share_tokens)
            self._received |= self._blends.take_received()

    def wait_for_loads(self) -> None:
        """Returns when the sync loads of the step are in the engine's blocks or have failed. Idempotent."""
        copies, self._sync_loads = self._sync_loads, []
        for copy in copies:
            self._end_load(copy)

    def wait_for_layer(self, layer: int | None) -> None:
        """What the engine computes from now on sees this layer's loads of the step. None: all layers'. Cheap without loads."""
        if self._layers.is_loading:
            with self._copying.at("layer"):
                self._layers.wait(layer)

    def forward_ended(self) -> None:
        """The forward pass of the step was submitted. Loads by layer that it did not wait for count as failed."""
        if not self._layers.forward_ended():
            for copy in self._sync_loads:
                self._wait(copy)
                copy.event = None
                copy.failed.update(copy.positions)
            self._count_error()

    def layer_computed(self, layer: int) -> None:
        """The engine has submitted what computes this layer's KV in the step. Cheap without stores, or without a layer storer."""
        if not self._orders.stores or self._stores_started or not (self._layer_stores.is_usable or self._stores_by_layer):
            return
        if not self._stores_by_layer:
            # What passes through the device pool is not divided by layers.
            self._stores_by_layer = [self._prepare(job) for job in self._orders.stores if not job.device_slots]
            copies = [block for copy in self._stores_by_layer for block in self._block_copies(copy)]
            with self._copying.at("gather by layer"):
                if copies:
                    self._layer_stores.start(copies)
        with self._copying.at("gather by layer"):
            self._layer_stores.computed(layer)

    @property
    def has_stores_to_start(self) -> bool:
        """Whether the step has stores that wait for ``start_stores``."""
        return bool(self._orders.stores) and not self._stores_started

    def start_stores(self) -> None:
        """Starts the stores of the step; the forward pass must have been submitted. Idempotent in a step.

        With a synchronous copier they are over on return.
        """
        if self._stores_started:
            return
        self._stores_started = True
        by_layer, self._stores_by_layer = self._stores_by_layer, []
        if by_layer:
            self._finish_by_layer(by_layer)
        for job in self._orders.stores:
            if any(copy.job is job for copy in by_layer):
                continue
            copy = self._start(job, is_load=False)
            if self._copier is not None and self._copier.is_async:
                self._stores.append(copy)
            else:
                self._end(copy)

    def finish(self) -> Transferred:
        """Ends the step: which asynchronous transfers are over since the last call. Never waits for those.

        Does what was left out of ``start_loads``, ``forward_ended``, ``wait_for_loads`` and ``start_stores``, which may wait with
        ``stores_at_end``.
        """
        self.start_loads()
        self.forward_ended()
        self.wait_for_loads()
        self._layers.reset()
        if not self._stores_at_end:
            self.start_stores()
        orders = self._orders
        self._blends.store(orders.captures, orders.entries, self._report, orders.arena_id, orders.share_tokens)
        self._report.step = self._orders.step or self._report.step
        if not self.has_stores_to_start:
            self._orders = _NO_ORDERS
        loads, self._async_loads = self._async_loads, []
        for copy in loads:
            if self._is_over(copy):
                self._end_load(copy)
                self._received.add(copy.job.request_id)
            else:
                self._async_loads.append(copy)
        stores, self._stores = self._stores, []
        for copy in stores:
            if self._is_over(copy):
                self._end(copy)
            else:
                self._stores.append(copy)
        sent = self._held - {copy.job.request_id for copy in self._stores if not self._is_released(copy)} if self._held else set()
        self._held -= sent
        received, self._received = self._received, set()
        return Transferred(sent, received)

    def failed_block_ids(self) -> set[int]:
        """Engine blocks whose load failed since the last call; the engine must compute them. Call after ``finish``."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def report(self) -> WorkerReport:
        """Jobs that ended since the last call, for the scheduler half. Call after ``finish``."""
        report, self._report = self._report, WorkerReport()
        return report

    def close(self) -> None:
        """Waits for running copies. Idempotent."""
        for copy in [*self._sync_loads, *self._async_loads, *self._stores]:
            self._end(copy)
        self._sync_loads, self._async_loads, self._stores = [], [], []
        self._layers.close()

    # ---- one job ------------------------------------------------------------------------------------------------

    def _start(self, job: MoveJob, *, is_load: bool) -> RunningCopy:
        """Starts the copies of a job whose slots still have the tenant they were planned for."""
        copy = self._prepare(job)
        if is_load:
            copy.started = time.monotonic()
        if copy.positions and self._copier is not None:
            with self._copying.at("scatter" if is_load else "gather"):
                copies = self._block_copies(copy)
                copy.event = self._copier.scatter(copies) if is_load else self._copier.gather(copies)
        if copy.event is None:
            copy.failed.update(copy.positions)
        return copy

    def _start_by_layer(self, loads: list[RunningCopy]) -> None:
        """Starts the loads as one, layer after layer."""
        event: CopyEvent | None = None
        with self._copying.at("scatter by layer"):
            copies = [block for copy in loads for block in self._block_copies(copy)]
            if copies:
                event = self._layers.start(copies)
        self._sync_loads += loads
        for copy in loads:
            copy.event = event if copy.positions else None
            if copy.event is None:
                copy.failed.update(copy.positions)

    def _finish_by_layer(self, stores: list[RunningCopy]) -> None:
        """Ends the step's stores by layer, which run as one. Where any layer could not be copied all have failed."""
        event: CopyEvent | None = None
        with self._copying.at("gather by layer"):
            if self._layer_stores.is_storing:
                event = self._layer_stores.finish()
        for copy in stores:
            copy.event = event if copy.positions else None
            if copy.event is None:
                copy.failed.update(copy.positions)
        self._stores += stores

    def _prepare(self, job: MoveJob) -> RunningCopy:
        """Finds out which of a job's slots still have the tenant they were planned for; the others have failed."""
        copy = RunningCopy(job, [], None, set(range(len(job.block_ids))), self._orders.arena_id)
        with self._boundary.at("start copy"):
            stale = self._tenancy.stale_positions(job, self._orders.arena_id, self._part.blocks_per_slot)
            self._count_stale(job, stale)
            copy.positions = sorted(copy.failed - stale)
            copy.failed = stale
        return copy

    def _block_copies(self, copy: RunningCopy) -> list[BlockCopy]:
        return [self._block_copy(copy.job, position) for position in copy.positions]

    def _is_over(self, copy: RunningCopy) -> bool:
        """Whether nothing of a copy runs any more. One that cannot be asked has failed."""
        if copy.event is None:
            return True
        is_over = None
        with self._copying.at("copy"):
            is_over = copy.event.done()
        if is_over is None:
            copy.event = None
            copy.failed.update(copy.positions)
        return is_over is not False

    def _is_released(self, copy: RunningCopy) -> bool:
        """Whether a store that still runs no longer reads the engine's blocks. One that cannot be asked does."""
        is_released = False
        if copy.event is not None:
            with self._copying.at("copy"):
                is_released = copy.event.released()
        return is_released

    def _end_load(self, copy: RunningCopy) -> None:
        """Ends a load; a slot that got a new tenant during the copy may have given anything."""
        self._wait(copy)
        if copy.event is not None:
            stale = set(copy.positions)
            with self._boundary.at("verify"):
                stale = self._tenancy.stale_positions(copy.job, copy.arena_id, self._part.blocks_per_slot) - copy.failed
                self._count_stale(copy.job, stale)
            copy.failed |= stale
        if copy.started is not None and not copy.failed:
            num_bytes = len(copy.positions) * self._part.engine_block_bytes * self._part.num_workers
            self._report.load_times.append((num_bytes, time.monotonic() - copy.started))
        self._failed_block_ids.update(copy.job.missing)
        self._failed_block_ids.update(copy.job.block_ids[position] for position in copy.failed)
        self._end(copy)

    def _wait(self, copy: RunningCopy) -> None:
        if copy.event is None:
            return
        is_done = False
        with self._copying.at("copy"):
            copy.event.wait()
            is_done = True
        if not is_done:
            copy.event = None
            copy.failed.update(copy.positions)

    def _end(self, copy: RunningCopy) -> None:
        """Waits for a copy and puts its outcome into the report."""
        self._wait(copy)
        self._report.done[copy.job.job_id] = 1
        if copy.failed:
            self._report.failed[copy.job.job_id] = copy.failed

    def _block_copy(self, job: MoveJob, position: int) -> BlockCopy:
        slot, index = divmod(job.first_index + position, self._part.blocks_per_slot)
        arena_offset = job.slots[slot] * PAGE_BYTES + self._part.offset_of(index)
        if not job.device_slots or job.device_slots[slot] < 0:
            return BlockCopy(job.block_ids[position], arena_offset)
        pool_offset = (job.device_slots[slot] * self._part.blocks_per_slot + index) * self._part.engine_block_bytes
        return BlockCopy(job.block_ids[position], arena_offset, pool_offset, bool(job.device_ready) and job.device_ready[slot])

    def _count_stale(self, job: MoveJob, positions: set[int]) -> None:
        self._report.num_stale += len({(job.first_index + position) // self._part.blocks_per_slot for position in positions})

    def _count_error(self) -> None:
        self._report.num_errors += 1
