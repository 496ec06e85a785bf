"""What the disk tier has promised to whom: jobs, stores on their way, places that must not be written yet.

The rules kept here (the tier's threads only carry them out):

- a block is readable once its index entry is committed, not before;
- the new tenant of a place is written only after the entries of all old tenants of its pages were deleted from the
  index file and nobody reads or writes there any more (``turns``);
- a load of a block that is being stored waits for the store; a second store of it shares the first one's outcome;
- a block removed while it is being stored is *doomed*: the store ends as if it had happened before the removal.

Not thread-safe: the tier calls it with its lock held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from kvtier.tiers.disk.geometry import Geometry
from kvtier.tiers.disk.pending import PendingRead, PendingStore
from kvtier.tiers.disk.places import Entry, Places
from kvtier.tiers.disk.sealing import Sealing
from kvtier.tiers.disk.turns import Turns
from kvtier.tiers.jobs import JobBook, RunningJob, Ticket, misfit
from kvtier.types import BlockKey, JobKind, Outcome, TransferJob


class Ledger(JobBook):
    """The state of a disk tier. What has become runnable collects in ``turns.runnable`` and ``reads``, results in ``results``."""

    def __init__(
        self, geometry: Geometry, *, max_in_flight_bytes: int, sealing: Sealing | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.sealing = sealing or Sealing()
        self.max_in_flight_bytes = max_in_flight_bytes
        self.index: dict[BlockKey, Entry] = {}
        """readable blocks, oldest store first"""
        self.places = Places(geometry)
        self.turns = Turns(geometry.pages_per_segment)
        self.next_sequence = 1
        self.reads: list[PendingRead] = []
        self._pending: dict[BlockKey, PendingStore] = {}
        self.in_flight_bytes = 0
        """of stores that have a place and no outcome yet"""
        self._namespaces: dict[bytes, bytes] = {}

    # jobs in

    def begin(self, job: TransferJob, *, is_online: bool) -> None:
        """Starts a job: settles what can be settled at once and makes the rest runnable, or waits for what must come first."""
        running = self.open_job(job)
        for index in range(len(job.blocks)):
            ticket = Ticket(running, index)
            outcome = self._begin_store(ticket, is_online) if job.kind is JobKind.STORE else self._begin_load(ticket, is_online)
            if outcome is not None:
                self.settle(ticket, outcome)

    def _begin_store(self, ticket: Ticket, is_online: bool) -> Outcome | None:
        running = ticket.running
        meta, buffer = ticket.block
        key, parent, num_bytes = meta
        if key in self.index:
            return Outcome.OK
        pending = self._pending.get(key)
        if pending is not None:
            pending.followers.append(ticket)
            return None
        if not is_online:
            return running.refuse(Outcome.FAILED, "the disk tier is offline")
        problem = misfit(buffer, num_bytes, is_load=False)
        if problem is not None:
            return running.refuse(Outcome.FAILED, problem)
        if self.in_flight_bytes and self.in_flight_bytes + num_bytes > self.max_in_flight_bytes:
            return Outcome.REJECTED
        place = self.places.take(key, num_bytes) if num_bytes > 0 else None
        if place is None:
            place = self._crowd_out(running, key, num_bytes)
        if place is None:
            return Outcome.REJECTED
        self.in_flight_bytes += num_bytes
        namespace = self.shared_namespace(running.job.namespace)
        store = PendingStore(ticket, key, Entry(place, num_bytes, self.next_sequence, parent, namespace))
        self.next_sequence += 1
        self._pending[key] = store
        self.turns.enqueue(store)
        return None

    def _crowd_out(self, running: RunningJob, key: BlockKey, num_bytes: int) -> int | None:
        if num_bytes <= 0:
            return None
        victims = self.places.crowded_out(num_bytes)
        if not {block.meta.key for block in running.job.blocks}.isdisjoint(victims):
            return None  # one result could not say in which order a block was stored and dropped
        for victim in victims:
            if self._forget(victim, doomed=Outcome.REJECTED):
                running.dropped.append(victim)
        return self.places.take(key, num_bytes)

    def _begin_load(self, ticket: Ticket, is_online: bool) -> Outcome | None:
        block, running = ticket.block, ticket.running
        pending = self._pending.get(block.meta.key)
        entry = self.index.get(block.meta.key) if pending is None else pending.entry
        if entry is None:
            return Outcome.MISS
        if not is_online:
            return running.refuse(Outcome.FAILED, "the disk tier is offline")
        if entry.num_bytes != block.meta.num_bytes or entry.namespace != running.job.namespace:
            return running.refuse(Outcome.MISS, f"the block is there with {entry.num_bytes} bytes, or in another namespace")
        problem = misfit(block.buffer, entry.num_bytes, is_load=True)
        if problem is not None:
            return running.refuse(Outcome.FAILED, problem)
        if pending is not None:
            pending.readers.append(ticket)
        else:
            self._start_read(ticket, entry)
        return None

    def shared_namespace(self, namespace: bytes) -> bytes:
        """One object for equal namespaces: every entry names one."""
        return self._namespaces.setdefault(namespace, namespace)

    # removals

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """Forgets keys; their room is free at once for stores that come later."""
        for key in keys:
            self._forget(key, doomed=Outcome.OK)

    def remove_all(self) -> None:
        """Forgets every key, those on their way too."""
        self.remove([*self.index, *self._pending])

    def _forget(self, key: BlockKey, *, doomed: Outcome) -> bool:
        """Forgets a key; whether it was readable."""
        entry = self.index.pop(key, None)
        if entry is not None:
            self.turns.delete_later(entry.place)
            self.places.give_back(entry.place)
            return True
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.doomed = doomed
            self.places.give_back(pending.entry.place)
        return False

    def forget_corrupt(self, read: PendingRead) -> None:
        """Forgets a block whose record proved bad, unless it was replaced meanwhile."""
        if self.index.get(read.key) is read.entry:
            self._forget(read.key, doomed=Outcome.OK)

    # progress, reported by the tier's threads

    def read_done(self, read: PendingRead, outcome: Outcome, error: str | None) -> None:
        """A read ended; its place is one reader poorer."""
        self.turns.let_go(read.entry.place)
        self.settle(read.ticket, outcome, error)

    def needs_no_entry(self, store: PendingStore) -> bool:
        """Whether a written store was doomed before its entry was made; if so it is settled here."""
        if store.doomed is None:
            return False
        self._settle_store(store, store.doomed, None)
        return True

    def committed(self, stores: Collection[PendingStore], deleted_places: Collection[int]) -> None:
        """The index file holds the entries of these stores and those of these places no more."""
        self.turns.deleted(deleted_places)
        for store in stores:
            if store.doomed is None:
                del self._pending[store.key]
                self.index[store.key] = store.entry
            else:
                self.turns.delete_later(store.entry.place)
            self._settle_store(store, store.doomed or Outcome.OK, None)

    def store_failed(self, store: PendingStore, outcome: Outcome, error: str) -> None:
        """A store came to nothing: its place is free again."""
        if store.doomed is None:
            del self._pending[store.key]
            self.places.give_back(store.entry.place)
        self._settle_store(store, outcome, error)

    def undelete_failed(self, error: str) -> None:
        """The index file could not be changed: whoever waits for a deletion fails. The deletions are tried again later."""
        for store in self.turns.take_those_waiting_for_deletions():
            self.store_failed(store, Outcome.FAILED, error)

    def check(self) -> list[str]:
        """Broken promises in words; no job may be running."""
        problems = self.places.check() + self.turns.check(is_idle=not self.num_jobs)
        if len(self.places) != len(self.index) + len(self._pending):
            problems.append(f"{len(self.places)} places are taken for {len(self.index)} blocks and {len(self._pending)} stores")
        if not self.num_jobs and (self._pending or self.in_flight_bytes):
            problems.append("no job is running, yet stores are on their way")
        return problems

    def _settle_store(self, store: PendingStore, outcome: Outcome, error: str | None) -> None:
        was_written = outcome is Outcome.OK or (store.doomed is not None and error is None)
        self.in_flight_bytes -= store.entry.num_bytes
        for ticket in store.readers:
            if was_written:
                self._start_read(ticket, store.entry)
            else:
                self.settle(ticket, Outcome.MISS)
        self.turns.let_go(store.entry.place)
        for ticket in (store.ticket, *store.followers):
            self.settle(ticket, outcome, error)

    def _start_read(self, ticket: Ticket, entry: Entry) -> None:
        self.turns.keep(entry.place)
        self.reads.append(PendingRead(ticket, entry))
