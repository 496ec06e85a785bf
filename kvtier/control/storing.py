"""Stores: copies from the engine into slots of host memory, from the plan to the commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from kvtier.control.books import Books
from kvtier.control.index import HOST, Entry
from kvtier.control.pins import Pin
from kvtier.control.plans import StoreInFlight
from kvtier.types import BlockMeta, StoreOrder, StorePlan


class Storing:
    """Starts and ends stores for the planner, whose methods document them."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._running: dict[int, StoreInFlight] = {}

    def begin(self, order: StoreOrder, num_bytes: int, now: float) -> StorePlan:
        """See :meth:`Planner.begin_store`."""
        books = self._books
        keys, first, tenant = order.keys, order.first, order.tenant
        job_id = next(books.ids)
        if tenant:
            books.know_tenants()
        anchor = books.index.get(keys[first - 1]) if first else None
        if first and anchor is None:
            return StorePlan(job_id, broken=True)
        wanted: list[int] = []
        for position in range(first, len(keys)):
            entry = books.index.get(keys[position])
            if entry is None or not (entry.readable | entry.busy) & HOST:
                wanted.append(position)
            elif not wanted:
                anchor = entry
        if not wanted:
            return StorePlan(job_id)
        anchored = books.anchor(anchor)
        blocks = BlockMeta.many([keys[p] for p in wanted], [keys[p - 1] if p else None for p in wanted], num_bytes)
        if order.may_evict:
            # Where there are tiers below nothing is turned away: the way there leads through host memory.
            room, num_declined = books.host.make_room(len(blocks), num_bytes, now, tenant, () if books.lower else blocks)
        else:
            room, num_declined = len(blocks), 0  # slots are opened as long as there are free ones
        entries = books.host.open_slots(blocks[:room], tenant)
        num_refused = len(blocks) - len(entries) - num_declined
        books.stats.add("store.refused_blocks", num_refused)
        if not entries:
            books.release(anchored, now)
            return StorePlan(job_id, num_refused=num_refused, num_declined=num_declined)
        del blocks[len(entries) :]
        self._running[job_id] = StoreInFlight(tuple(entries), tuple(blocks), anchored)
        positions = tuple(position - first for position in wanted[: len(entries)])
        pool = books.host.device if order.pooled else None
        return StorePlan(
            job_id,
            positions,
            books.space.refs([entry.slot for entry in entries]),
            num_refused,
            num_declined,
            device_slots=() if pool is None else pool.begin_fill(job_id, blocks, now),
        )

    def adopt(self, meta: BlockMeta, tenant: str, slot: int) -> int | None:
        """See :meth:`Planner.adopt`."""
        books = self._books
        known = books.index.get(meta.key)
        if known is not None and (known.readable | known.busy) & HOST:
            return None
        if tenant:
            books.know_tenants()
        entry = books.index.ensure(meta.key, meta.parent, meta.num_bytes, tenant)
        if not books.space.adopt(entry, slot):
            books.index.drop_if_gone(entry)
            return None
        entry.busy |= HOST
        job_id = next(books.ids)
        self._running[job_id] = StoreInFlight((entry,), (meta,), Pin((), None))
        return job_id

    def commit(self, job_id: int, failed: Collection[int], now: float) -> None:
        """See :meth:`Planner.commit_store`."""
        books = self._books
        plan = self._running.pop(job_id)
        good = 0 if plan.is_cancelled else min(failed, default=len(plan.entries))
        for entry in plan.entries[good:]:
            books.host.close_slot(entry)
        books.stats.add("store.aborted_blocks", len(plan.entries) - good)
        books.stats.add("host.stored_blocks", good)
        books.host.filled(plan.entries[:good][::-1], plan.blocks[:good][::-1], now)
        if books.host.device is not None:
            books.host.device.end_fill(job_id, [entry.key for entry in plan.entries[good:]], now)
        if books.lower:
            for entry in plan.entries[:good]:
                books.demoter.committed(entry, now)
        books.release(plan.anchor, now)

    def cancel(self, is_unwanted: Callable[[Entry], bool]) -> None:
        """What is under way of these blocks will come to nothing."""
        for job_id, plan in self._running.items():
            if any(is_unwanted(entry) for entry in plan.entries):
                self._running[job_id] = dataclasses.replace(plan, is_cancelled=True)

    def __len__(self) -> int:
        return len(self._running)
