"""What a remote tier has promised to whom, and what is to be asked of the store next. Pure: no thread, no I/O.

For each key the store is asked for one thing at a time, in the order in which the owner asked for it:

- loads of one block that meet share one read (single flight);
- a load of a block on its way out is served from the memory it leaves from, without the store;
- a second store of a block on its way shares the first one's outcome;
- a store or removal waits for the read that came before it, a store also for the removal before it;
- a load behind a removal is a miss, without the store.

Not thread-safe: the tier calls it with its lock held.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvtier.tiers.jobs import JobBook, Ticket, misfit
from kvtier.types import BlockKey, BlockMeta, JobKind, Outcome, TransferJob


class Known(NamedTuple):
    """A block that the store is believed to hold."""

    meta: BlockMeta
    namespace: bytes


class Fetch:
    """A read under way, and the loads that came later and will be served from its buffer."""

    __slots__ = ("followers", "ticket")

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.followers: list[Ticket] = []


class Write:
    """A store on its way."""

    __slots__ = ("error", "num_copies", "outcome", "tickets")

    def __init__(self, ticket: Ticket) -> None:
        self.tickets = [ticket]
        self.num_copies = 0
        """loads that still read from its memory"""
        self.outcome: Outcome | None = None
        self.error: str | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the payload."""
        return self.tickets[0].block.meta.num_bytes


class Erase(NamedTuple):
    """A removal on its way."""

    namespace: bytes
    key: BlockKey


class Copy(NamedTuple):
    """A load served from the memory of a block on its way out."""

    ticket: Ticket
    write: Write


class _Lane:
    """What is under way for one key. The first of ``changes`` is running, unless there is a fetch."""

    __slots__ = ("changes", "fetch", "namespace")

    def __init__(self, namespace: bytes) -> None:
        self.namespace = namespace
        self.fetch: Fetch | None = None
        self.changes: deque[Write | Erase] = deque()


class Ledger(JobBook):
    """The state of a remote tier. What is to be done collects in ``fetches``, ``writes``, ``erases`` and ``copies``."""

    def __init__(self, *, max_in_flight_bytes: int, max_known_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._max_in_flight_bytes = max_in_flight_bytes
        self._max_known_blocks = max_known_blocks
        self.known: dict[BlockKey, Known] = {}
        """oldest first"""
        self.in_flight_bytes = 0
        """of stores without an outcome"""
        self.num_shared_loads = 0
        """loads that needed no read of their own"""
        self.fetches: list[Fetch] = []
        self.writes: list[Write] = []
        self.erases: list[Erase] = []
        self.copies: list[Copy] = []
        self._lanes: dict[BlockKey, _Lane] = {}

    # asked by the owner

    def begin(self, job: TransferJob, *, is_online: bool, refusal: str | None = None) -> None:
        """Starts a job. ``refusal``: why new blocks are not written for the time being."""
        running = self.open_job(job)
        for index in range(len(job.blocks)):
            ticket = Ticket(running, index)
            outcome = self._begin_store(ticket, is_online, refusal) if job.kind is JobKind.STORE else self._begin_load(ticket, is_online)
            if outcome is not None:
                self.settle(ticket, outcome)

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """Forgets keys, here at once and in the store as soon as it may be."""
        for key in keys:
            known = self.known.pop(key, None)
            lane = self._lanes.get(key)
            if lane is None:
                if known is None:
                    continue
                lane = self._lane(key, known.namespace)
            if not (lane.changes and isinstance(lane.changes[-1], Erase)):
                self._enqueue(lane, Erase(lane.namespace if known is None else known.namespace, key))

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Forgets keys here and leaves them in the store."""
        for key in keys:
            self.known.pop(key, None)

    def learn(self, meta: BlockMeta, namespace: bytes) -> None:
        """Notes that the store holds a block, unless that is to change, or there is no room to note it."""
        lane = self._lanes.get(meta.key)
        if (lane is None or not lane.changes) and len(self.known) < self._max_known_blocks:
            self.known.setdefault(meta.key, Known(meta, namespace))

    def _begin_store(self, ticket: Ticket, is_online: bool, refusal: str | None) -> Outcome | None:
        running = ticket.running
        (key, _, num_bytes), buffer = ticket.block
        namespace = running.job.namespace
        lane = self._lanes.get(key)
        if lane is not None and lane.namespace != namespace:
            return running.refuse(Outcome.REJECTED, "the block is under way in another namespace")
        last = lane.changes[-1] if lane is not None and lane.changes else None
        if isinstance(last, Write):
            last.tickets.append(ticket)
            return None
        known = self.known.get(key)
        if known is not None and known.namespace == namespace:
            return Outcome.OK
        if not is_online:
            return running.refuse(Outcome.FAILED, "the store is offline")
        if refusal is not None:
            return running.refuse(Outcome.REJECTED, refusal)
        problem = misfit(buffer, num_bytes, is_load=False)
        if problem is not None or not num_bytes:
            return running.refuse(Outcome.FAILED, problem or "a block without bytes")
        if self.in_flight_bytes and self.in_flight_bytes + num_bytes > self._max_in_flight_bytes:
            return Outcome.REJECTED
        self.in_flight_bytes += num_bytes
        self._enqueue(lane or self._lane(key, namespace), Write(ticket))
        return None

    def _begin_load(self, ticket: Ticket, is_online: bool) -> Outcome | None:
        running = ticket.running
        (key, _, num_bytes), buffer = ticket.block
        lane = self._lanes.get(key)
        problem = misfit(buffer, num_bytes, is_load=True)
        if problem is not None or not num_bytes:
            return running.refuse(Outcome.FAILED, problem or "a block without bytes")
        if lane is not None and lane.namespace != running.job.namespace:
            return running.refuse(Outcome.MISS, "the block is under way in another namespace")
        if lane is not None and lane.changes:
            return self._load_behind(lane.changes[-1], ticket)
        if not is_online:
            return running.refuse(Outcome.FAILED, "the store is offline")
        if lane is not None and lane.fetch is not None:
            if lane.fetch.ticket.block.meta.num_bytes != num_bytes:
                return running.refuse(Outcome.MISS, "the block is being read with another length")
            self.num_shared_loads += 1
            lane.fetch.followers.append(ticket)
            return None
        lane = lane or self._lane(key, running.job.namespace)
        lane.fetch = Fetch(ticket)
        self.fetches.append(lane.fetch)
        return None

    def _load_behind(self, change: Write | Erase, ticket: Ticket) -> Outcome | None:
        if isinstance(change, Erase):
            return Outcome.MISS
        if change.num_bytes != ticket.block.meta.num_bytes:
            return ticket.running.refuse(Outcome.MISS, "the block on its way has another length")
        change.num_copies += 1
        self.num_shared_loads += 1
        self.copies.append(Copy(ticket, change))
        return None

    # reported by the tier's threads

    def take_followers(self, fetch: Fetch) -> list[Ticket]:
        """The loads that wait for a read; the caller copies to their buffers and settles them before it reports the read."""
        followers, fetch.followers = fetch.followers, []
        return followers

    def fetched(self, fetch: Fetch, outcome: Outcome, error: str | None = None) -> None:
        """A read ended. Whoever still follows it shares its outcome; after OK nobody does."""
        meta = fetch.ticket.block.meta
        namespace = fetch.ticket.running.job.namespace
        lane = self._lanes[meta.key]
        lane.fetch = None
        if outcome is Outcome.OK:
            assert not fetch.followers, "a load was left waiting"
            self.learn(meta, namespace)
        elif outcome is not Outcome.FAILED:
            known = self.known.get(meta.key)
            if known is not None and known.namespace == namespace:
                del self.known[meta.key]
            if outcome is Outcome.CORRUPT and not lane.changes:
                lane.changes.append(Erase(namespace, meta.key))
        for ticket in (fetch.ticket, *fetch.followers):
            self.settle(ticket, outcome, error)
        self._advance(meta.key, lane)

    def written(self, write: Write, outcome: Outcome, error: str | None = None) -> None:
        """A store ended."""
        first = write.tickets[0]
        meta = first.block.meta
        lane = self._lanes[meta.key]
        assert lane.changes.popleft() is write, "a store ended that was not running"
        self.in_flight_bytes -= meta.num_bytes
        if outcome is Outcome.OK and not lane.changes:
            if len(self.known) >= self._max_known_blocks:
                forgotten = next(iter(self.known))
                del self.known[forgotten]
                first.running.dropped.append(forgotten)
            self.known[meta.key] = Known(meta, lane.namespace)
        write.outcome, write.error = outcome, error
        self._settle_written(write)
        self._advance(meta.key, lane)

    def copied(self, copy: Copy, outcome: Outcome, error: str | None = None) -> None:
        """A load was served from the memory of a block on its way out, or was to be."""
        copy.write.num_copies -= 1
        self.settle(copy.ticket, outcome, error)
        self._settle_written(copy.write)

    def erased(self, erase: Erase) -> None:
        """A removal ended, well or not."""
        lane = self._lanes[erase.key]
        assert lane.changes.popleft() is erase, "a removal ended that was not running"
        self._advance(erase.key, lane)

    def check(self) -> list[str]:
        """Broken promises in words; no job may be running."""
        problems = []
        if not self.num_jobs and self.in_flight_bytes:
            problems.append(f"no job is running, yet {self.in_flight_bytes} bytes are on their way")
        if not self.num_jobs and any(lane.fetch or any(isinstance(it, Write) for it in lane.changes) for lane in self._lanes.values()):
            problems.append("no job is running, yet blocks are on their way")
        return problems

    def _settle_written(self, write: Write) -> None:
        if write.outcome is None or write.num_copies:
            return  # the memory may go back to its owner only when nobody reads there any more
        for ticket in write.tickets:
            self.settle(ticket, write.outcome, write.error)

    def _lane(self, key: BlockKey, namespace: bytes) -> _Lane:
        lane = self._lanes[key] = _Lane(namespace)
        return lane

    def _enqueue(self, lane: _Lane, change: Write | Erase) -> None:
        lane.changes.append(change)
        if len(lane.changes) == 1 and lane.fetch is None:
            self._start(change)

    def _advance(self, key: BlockKey, lane: _Lane) -> None:
        if lane.fetch is not None:
            return
        if lane.changes:
            self._start(lane.changes[0])
        else:
            del self._lanes[key]

    def _start(self, change: Write | Erase) -> None:
        if isinstance(change, Write):
            self.writes.append(change)
        else:
            self.erases.append(change)
