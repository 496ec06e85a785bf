"""Loads: copies from slots of host memory to the engine, from the leases to their end."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvtier.control.books import Books
from kvtier.control.index import HOST
from kvtier.control.plans import LoadInFlight
from kvtier.types import BlockKey, LoadPlan


class Loading:
    """Starts and ends loads for the planner, whose methods document them."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._running: dict[int, LoadInFlight] = {}

    def begin(self, keys: Sequence[BlockKey], now: float, *, pooled: bool) -> LoadPlan:
        """See :meth:`Planner.begin_load`."""
        books = self._books
        job_id = next(books.ids)
        entries = tuple(books.index.run(keys, 0, HOST))
        slots = tuple(entry.slot for entry in entries)
        books.space.lease(slots, job_id)
        device_slots: tuple[int, ...] = ()
        device_ready: tuple[bool, ...] = ()
        if books.host.device is not None and pooled:
            device_slots, device_ready = books.host.device.begin_load(job_id, [entry.meta for entry in entries], now)
        self._running[job_id] = LoadInFlight(entries, slots, device_slots, device_ready)
        return LoadPlan(job_id, books.space.refs(slots), device_slots, device_ready)

    def end(self, job_id: int, failed: Collection[int], partial: Collection[int], now: float, *, forgets: bool = True) -> None:
        """See :meth:`Planner.end_load`."""
        books = self._books
        plan = self._running.pop(job_id)
        for position in failed if forgets else ():
            entry = plan.entries[position]
            if entry.slot == plan.slots[position]:
                books.host.give_up(entry)
        if books.host.device is not None:
            self._end_on_device(job_id, plan, [*failed, *partial], now)
        books.space.release(plan.slots, job_id)
        books.stats.add("load.failed_blocks", len(failed))
        books.stats.add("host.loaded_blocks", plan.num_from_host(failed))

    def _end_on_device(self, job_id: int, plan: LoadInFlight, failed: Collection[int], now: float) -> None:
        pool = self._books.host.device
        assert pool is not None, "loads know of a pool only where there is one"
        pool.end_read(job_id, [slot for slot, ready in zip(plan.device_slots, plan.device_ready, strict=True) if ready])
        gone = [entry.key for entry, slot in zip(plan.entries, plan.slots, strict=True) if entry.slot != slot]
        pool.end_fill(job_id, [*gone, *(plan.entries[position].key for position in failed)], now)

    def __len__(self) -> int:
        return len(self._running)
