"""The work of a remote tier's threads: one call of the client for a few blocks, tried again where that may help."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from kvtier.errors import RemoteError
from kvtier.tiers.health import Health
from kvtier.tiers.remote.client import Answer, Get, Put, RemoteClient, Reply
from kvtier.tiers.remote.deadline import Deadline, retry_pauses
from kvtier.tiers.remote.ledger import Erase, Fetch, Write
from kvtier.tiers.remote.records import HEADER_BYTES, Records, Verdict, name_of
from kvtier.types import BlockKey, Outcome

FIRST_RETRY_PAUSE_S = 0.05
_OFFLINE = "the store is offline"
_SMALL_BATCH_BYTES = 1 << 20
_MAX_ERASES = 1000
"""by one call; as many as an object store deletes by one request"""
_Item = TypeVar("_Item")


class Reporter(Protocol):
    """Where outcomes go. Thread-safe."""

    def fetched(self, fetch: Fetch, verdict: Verdict) -> None:
        """A read ended."""

    def written(self, write: Write, outcome: Outcome, error: str | None) -> None:
        """A store ended."""

    def erased(self, erases: Sequence[Erase], error: BaseException | None) -> None:
        """Removals ended."""

    def count(self, event: str, amount: int = 1) -> None:
        """Something happened."""


class Caller:
    """Calls the client within deadlines, again where that may help, and keeps the health. Thread-safe.

    All calls may be repeated: values are immutable, so doing one twice is doing it once.
    """

    def __init__(
        self,
        client: RemoteClient,
        health: Health,
        reporter: Reporter,
        *,
        total_timeout_s: float,
        retries: int,
        sleep: Callable[[float], object],
    ) -> None:
        self.client = client
        self.health = health
        self._reporter = reporter
        self._total_timeout_s = total_timeout_s
        self._retries = retries
        self.sleep = sleep
        self._random = random.Random()

    def each(self, count: int, call: Callable[[int, Deadline], Iterator[Reply]]) -> Iterator[Reply | RemoteError]:
        """One reply for each of ``count`` items. ``call(first, deadline)`` yields the replies of the items from ``first`` on.

        Where an attempt breaks off, the next one goes on behind the last reply; the items without reply get the error.
        """
        deadline = Deadline(self._total_timeout_s)
        pauses = retry_pauses(self._retries, FIRST_RETRY_PAUSE_S, self._random.uniform)
        done = 0
        while done < count:
            error: RemoteError | None = None
            if not self.health.is_online:
                error = RemoteError("offline", _OFFLINE, may_pass=False)
            else:
                try:
                    for reply in call(done, deadline):
                        done += 1
                        yield reply
                    self.health.succeeded()
                except RemoteError as caught:
                    error = caught
                    self._reporter.count(error.event)
                    if error.is_failure:
                        self.health.failed(error)
            if error is None:
                continue
            pause = next(pauses, None) if error.may_pass else None
            if pause is None or pause >= deadline.remaining_s():
                yield from [error] * (count - done)
                return
            self._reporter.count("retries")
            self.sleep(pause)

    def once(self, call: Callable[[Deadline], None]) -> RemoteError | None:
        """Makes one call for all items together; the error that remained, if any."""

        def as_items(_: int, deadline: Deadline) -> Iterator[Reply]:
            call(deadline)
            yield Reply(Answer.DONE)

        (reply,) = self.each(1, as_items)
        return reply if isinstance(reply, RemoteError) else None


class FetchTask:
    """Reads a few blocks."""

    def __init__(self, fetches: Sequence[Fetch], prefix: str, records: Records, caller: Caller, reporter: Reporter) -> None:
        self._fetches = fetches
        self._records = records
        self._caller = caller
        self._reporter = reporter
        self._headers = memoryview(bytearray(HEADER_BYTES * len(fetches)))
        self._num_done = 0
        self._gets = [
            Get(
                name_of(prefix, fetch.ticket.running.job.namespace, fetch.ticket.block.meta.key),
                self._headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES],
                records.room_for(fetch.ticket.block.buffer),
            )
            for index, fetch in enumerate(fetches)
        ]

    def run(self) -> None:
        """Each block is verified as soon as it is there."""
        client = self._caller.client
        replies = self._caller.each(len(self._gets), lambda first, deadline: client.get_into(self._gets[first:], deadline))
        for fetch, get, reply in zip(self._fetches, self._gets, replies, strict=True):
            verdict = _judge(fetch, get, reply, self._records)
            if verdict.event is not None:
                self._reporter.count(verdict.event)
            self._num_done += 1
            self._reporter.fetched(fetch, verdict)

    def fail(self, error: BaseException) -> None:
        """A bug: no block may be left waiting for it."""
        for fetch in self._fetches[self._num_done :]:
            self._reporter.fetched(fetch, Verdict(Outcome.FAILED, repr(error)))


class WriteTask:
    """Writes a few blocks."""

    def __init__(self, writes: Sequence[Write], prefix: str, records: Records, caller: Caller, reporter: Reporter) -> None:
        self._writes = writes
        self._records = records
        self._prefix = prefix
        self._caller = caller
        self._reporter = reporter
        self._num_done = 0

    def run(self) -> None:
        """Checksums and encryption first, so that the server is not kept waiting for them."""
        client = self._caller.client
        puts = [self._put(write) for write in self._writes]
        replies = self._caller.each(len(puts), lambda first, deadline: client.put(puts[first:], deadline))
        for write, reply in zip(self._writes, replies, strict=True):
            self._num_done += 1
            self._reporter.written(write, *_outcome_of(reply))

    def fail(self, error: BaseException) -> None:
        """A bug: no block may be left waiting for it."""
        for write in self._writes[self._num_done :]:
            self._reporter.written(write, Outcome.FAILED, repr(error))

    def _put(self, write: Write) -> Put:
        ticket = write.tickets[0]
        meta, buffer = ticket.block
        namespace = ticket.running.job.namespace
        return Put(name_of(self._prefix, namespace, meta.key), *self._records.pack(meta, namespace, buffer))


class EraseTask:
    """Deletes any number of values, some by each call: each has a deadline of its own, and what has come meanwhile goes before the next."""

    def __init__(
        self, erases: Sequence[Erase], prefix: str, caller: Caller, reporter: Reporter, *, again: Callable[[EraseTask], object]
    ) -> None:
        """``again`` has the task run once more."""
        self._erases = erases
        self._prefix = prefix
        self._caller = caller
        self._reporter = reporter
        self._again = again
        self._num_done = 0

    def run(self) -> None:
        """Deletes the next ones."""
        client = self._caller.client
        erases = self._erases[self._num_done : self._num_done + _MAX_ERASES]
        names = [name_of(self._prefix, erase.namespace, erase.key) for erase in erases]
        error = self._caller.once(lambda deadline: client.delete(names, deadline))
        self._num_done += len(erases)
        self._reporter.erased(erases, error)
        if self._num_done < len(self._erases):
            self._again(self)

    def fail(self, error: BaseException) -> None:
        """The threads are gone, or a bug: nothing may be left waiting for it."""
        erases = self._erases[self._num_done :]
        self._num_done = len(self._erases)
        self._reporter.erased(erases, error)


class CallTask:
    """One call, and what is to be done when it cannot even be tried."""

    def __init__(self, call: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self._call = call
        self._failed = failed

    def run(self) -> None:
        """Makes the call."""
        self._call()

    def fail(self, error: BaseException) -> None:
        """The call raised, or the threads are gone."""
        self._failed(error)


def probe_chunks(keys: Sequence[BlockKey]) -> Iterator[Sequence[BlockKey]]:
    """The keys of a probe in the groups in which to ask: small ones first, because most prompts are short or unknown."""
    start, size = 0, 16
    while start < len(keys):
        yield keys[start : start + size]
        start += size
        size = min(4 * size, 1024)


def batches(items: Sequence[_Item], sizes: Sequence[int], batch_bytes: int, num_threads: int) -> Iterator[Sequence[_Item]]:
    """Items in groups that follow each other: each at most ``batch_bytes`` (or one item), small enough for all threads to have some."""
    limit = min(batch_bytes, max(_SMALL_BATCH_BYTES, -(-sum(sizes) // num_threads)))
    start = num_bytes = 0
    for index, size in enumerate(sizes):
        if index > start and num_bytes + size > limit:
            yield items[start:index]
            start, num_bytes = index, 0
        num_bytes += size
    if start < len(items):
        yield items[start:]


def _judge(fetch: Fetch, get: Get, reply: Reply | RemoteError, records: Records) -> Verdict:
    if isinstance(reply, RemoteError):
        return Verdict(Outcome.FAILED, str(reply))
    if reply.answer is Answer.ABSENT:
        return Verdict(Outcome.MISS)
    if reply.answer is Answer.OTHER_SIZE:
        return Verdict(Outcome.MISS, "the block is there with another length", "foreign_records")
    ticket = fetch.ticket
    return records.verify(get, ticket.block.buffer, ticket.block.meta, ticket.running.job.namespace, reply.checksum)


def _outcome_of(reply: Reply | RemoteError) -> tuple[Outcome, str | None]:
    if isinstance(reply, RemoteError):
        return Outcome.FAILED, str(reply)
    if reply.answer is Answer.REFUSED:
        return Outcome.REJECTED, reply.detail
    return Outcome.OK, None
