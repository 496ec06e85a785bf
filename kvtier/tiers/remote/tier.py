"""A tier in a remote store: one implementation for all, over a :class:`~kvtier.tiers.remote.client.RemoteClient`."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from kvtier.codecs import Sealer
from kvtier.errors import ClosedError, RemoteError, TierFormatError
from kvtier.io import WorkerPool
from kvtier.tiers.forks import leave_to_parent
from kvtier.tiers.health import Health
from kvtier.tiers.jobs import Ticket
from kvtier.tiers.opening import opening
from kvtier.tiers.record import FORMAT_VERSION, pack_text, parse_text
from kvtier.tiers.remote.check import check_values
from kvtier.tiers.remote.client import Answer, Get, Put, RemoteClient
from kvtier.tiers.remote.deadline import Deadline
from kvtier.tiers.remote.ledger import Copy, Erase, Fetch, Ledger, Write
from kvtier.tiers.remote.records import FORMAT_NAME, FORMAT_TITLE, Records, Verdict, name_of
from kvtier.tiers.remote.tasks import Caller, CallTask, EraseTask, FetchTask, WriteTask, batches, probe_chunks
from kvtier.types import BlockKey, BlockMeta, Damage, JobKind, JobResult, Outcome, ProbeJob, ProbeResult, TransferJob

logger = logging.getLogger(__name__)

_MAX_FORMAT_BYTES = 1 << 12
"""more than a store's own note of its version has"""
_LAST_CALLS_S = 5.0
"""how long ``close`` waits for calls that were told to end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """How a remote tier treats its store."""

    prefix: str = "kvtier/"
    """what all names begin with"""
    threads: int = 4
    """calls under way at once"""
    batch_bytes: int = 8 << 20
    """most payload of one call; a larger block is a call of its own"""
    max_in_flight_bytes: int = 256 << 20
    """most payload of stores without an outcome; more is rejected"""
    total_timeout_s: float = 5.0
    """most time for one call, attempts and pauses together"""
    retries: int = 1
    close_timeout_s: float = 30.0
    """how long ``close`` waits for running jobs before it gives them up"""
    max_known_blocks: int = 1 << 20
    """most keys that are remembered to be in the store"""
    must_answer: bool = True
    """whether the tier refuses to open while the store does not answer; else it opens offline and comes in later"""


class RemoteTier:
    """Blocks in a store that others read and write too. Implements :class:`~kvtier.tiers.base.SharedTier`.

    The store decides what it keeps: ``capacity_bytes`` is None, and a block that was stored may be a MISS later.  A STORE is OK once the
    store has acknowledged the block, or one of the same name before it.  Every block is verified when it is loaded; one that fails is
    deleted in the store.  A removal that the store does not take in is given up and counted: keys name content, so a
    block that stays is right as long as it stays.
    """

    def __init__(
        self,
        client: RemoteClient,
        *,
        name: str,
        settings: RemoteSettings | None = None,
        sealer: Sealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes the client over. ``sealer``: encrypts every payload.

        Raises RemoteError where the store does not answer, TierFormatError where it is of another version, TierError where no thread is to
        be had.
        """
        self.name = name
        self.capacity_bytes: int | None = None
        self.settings = settings or RemoteSettings()
        self._client = client
        self._records = Records(sealer)
        self._clock = clock
        self._ledger = Ledger(
            max_in_flight_bytes=self.settings.max_in_flight_bytes, max_known_blocks=self.settings.max_known_blocks, clock=clock
        )
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._events: Counter[str] = Counter()
        self._probes: list[ProbeResult] = []
        self._num_probes = 0
        self._num_erasing = 0
        self._is_closed = False
        self._closing = threading.Event()
        self._health = Health(f"the store at {client.address}", clock, by_trial=True)
        self._write_health = Health(f"writing to the store at {client.address}", clock)
        self._caller = Caller(
            client,
            self._health,
            self,
            total_timeout_s=self.settings.total_timeout_s,
            retries=self.settings.retries,
            sleep=self._closing.wait,
        )
        with opening(f"the tier at {client.address}") as undo:
            undo.callback(client.close)
            self._open()
            self._pool = WorkerPool(self.settings.threads, f"kvtier-{name}")
        leave_to_parent(self)

    @property
    def online(self) -> bool:
        """False while the store is given up after repeated failures, until it answers a trial again."""
        self._try_again()
        return self._health.is_online

    @property
    def offline_count(self) -> int:
        """How often the store was given up."""
        return self._health.offline_count

    def max_blocks(self, num_bytes: int) -> None:
        return None

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        if not self.online:
            return 0
        known = self._ledger.known
        return next((position for position, key in enumerate(keys) if key not in known), len(keys))

    def submit(self, job: TransferJob) -> None:
        is_online = self.online
        refusal = None if self._write_health.is_online else "the store refuses new blocks for the time being"
        if job.kind is JobKind.STORE and self._client.max_value_bytes is not None:
            largest = max((block.meta.num_bytes for block in job.blocks), default=0) + self._records.overhead_bytes
            if largest > self._client.max_value_bytes:
                refusal = f"the store takes values up to {self._client.max_value_bytes} bytes, one here has {largest}"
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"the tier at {self._client.address} is closed")
            self._ledger.begin(job, is_online=is_online, refusal=refusal)
        self._launch()

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        ledger = self._ledger
        if not ledger.results and timeout_s <= 0:
            return []
        with self._lock:
            if not ledger.results and timeout_s > 0:
                self._progress.wait_for(lambda: ledger.results or self._probes or not (ledger.num_jobs or self._num_probes), timeout_s)
            results = list(ledger.results)
            ledger.results.clear()
        return results

    def remove(self, keys: Collection[BlockKey]) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._ledger.remove(keys)
        self._launch()

    def forget(self, keys: Collection[BlockKey]) -> None:
        with self._lock:
            self._ledger.forget(keys)

    def entries(self) -> Iterator[BlockMeta]:
        with self._lock:
            found = [known.meta for known in self._ledger.known.values()]
        return iter(found)

    def check(self) -> list[Damage]:
        with self._lock:
            problems = self._ledger.check()
            known = list(self._ledger.known.values())
        found = [Damage("index in memory", problem) for problem in problems]
        return found + check_values(self._client, self._records, self.settings.prefix, known, self.settings.total_timeout_s)

    def probe(self, job: ProbeJob) -> None:
        is_online = self.online
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"the tier at {self._client.address} is closed")
            self._num_probes += 1
            self._events["probes"] += 1
        start = self._clock()
        if not is_online:
            self._probed(job, start, [], "the store is offline")
            return
        self._pool.submit(CallTask(lambda: self._ask(job, start), lambda error: self._probed(job, start, [], repr(error))), urgent=True)

    def take_probes(self) -> list[ProbeResult]:
        with self._lock:
            results, self._probes = self._probes, []
        return results

    def take_events(self) -> dict[str, int]:
        with self._lock:
            events = self._events + Counter(self._client.take_events())
            events["shared_loads"] += self._ledger.num_shared_loads
            self._events = Counter()
            self._ledger.num_shared_loads = 0
        return {name: count for name, count in events.items() if count}

    def close(self) -> None:
        """Finishes running jobs within ``close_timeout_s``; those that take longer fail. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._progress.wait_for(self._is_idle, self.settings.close_timeout_s)
            is_idle = self._is_idle()
        self._closing.set()
        if not is_idle:
            self._client.abort()
            with self._lock:
                self._progress.wait_for(self._is_idle, _LAST_CALLS_S)
        self._pool.close(timeout_s=_LAST_CALLS_S)
        self._client.close()

    def forget_in_child(self) -> None:
        """A forked child counts the tier as closed. It has no thread that works for it, and the connections are its parent's."""
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._is_closed = True
        self._ledger.forget_jobs()
        self._probes.clear()
        self._num_probes = 0

    # opening, and coming back

    def _open(self) -> None:
        try:
            self._greet()
        except RemoteError as error:
            if self.settings.must_answer:
                raise
            self._health.trial_failed(error)

    def _greet(self) -> None:
        """Asks the store whether it is there and of this format version."""
        deadline = Deadline(self.settings.total_timeout_s)
        self._client.ping(deadline)
        name = self.settings.prefix + FORMAT_NAME
        content = pack_text(FORMAT_TITLE, {"format": str(FORMAT_VERSION)})
        (reply,) = self._client.put([Put(name, content, memoryview(b""))], deadline)
        (size,) = self._client.sizes([name], deadline)
        if size is None:
            logger.warning("the store at %s does not take %s: %s", self._client.address, name, reply.detail or "no reason given")
            return
        if 0 < size <= _MAX_FORMAT_BYTES:
            found = bytearray(size)
            (reply,) = self._client.get_into([Get(name, memoryview(found), memoryview(bytearray()))], deadline)
            if reply.answer is not Answer.DONE or parse_text(FORMAT_TITLE, bytes(found), f"store at {self._client.address}") is not None:
                return
        raise TierFormatError(f"{name} in the store at {self._client.address} is not kvtier's: choose another prefix, or delete it")

    def _try_again(self) -> None:
        if not self._is_closed and self._health.take_trial():
            self._pool.submit(CallTask(self._trial, self._health.trial_failed), urgent=True)

    def _trial(self) -> None:
        try:
            self._greet()
        except (RemoteError, TierFormatError) as error:
            self._health.trial_failed(error)
            return
        self._health.succeeded()

    # what the threads call

    def fetched(self, fetch: Fetch, verdict: Verdict) -> None:
        """A read ended: whoever follows it gets a copy first."""
        copied: list[tuple[Ticket, str | None]] = []
        while True:
            with self._lock:
                for ticket, error in copied:
                    self._ledger.settle(ticket, Outcome.OK if error is None else Outcome.FAILED, error)
                followers = self._ledger.take_followers(fetch) if verdict.outcome is Outcome.OK else []
                if not followers:
                    self._ledger.fetched(fetch, verdict.outcome, verdict.error)
                    break
            copied = [(ticket, _copy_error(fetch.ticket, ticket)) for ticket in followers]
        self._progressed()

    def written(self, write: Write, outcome: Outcome, error: str | None) -> None:
        """A store ended; one that was refused has others be refused for a while without asking."""
        if outcome is Outcome.REJECTED:
            self.count("refusals")
            self._write_health.failed(OSError(error))
        elif outcome is Outcome.OK:
            self._write_health.succeeded()
        with self._lock:
            self._ledger.written(write, outcome, error)
        self._progressed()

    def count(self, event: str, amount: int = 1) -> None:
        """Something happened; see :meth:`take_events`."""
        with self._lock:
            self._events[event] += amount

    def _progressed(self) -> None:
        self._launch()
        with self._lock:
            if self._ledger.results or self._probes or self._is_idle():
                self._progress.notify_all()

    def _is_idle(self) -> bool:
        return not (self._ledger.num_jobs or self._num_probes or self._num_erasing)

    def _launch(self) -> None:
        """Hands out what became runnable."""
        ledger = self._ledger
        with self._lock:
            fetches, ledger.fetches = ledger.fetches, []
            writes, ledger.writes = ledger.writes, []
            erases, ledger.erases = ledger.erases, []
            copies, ledger.copies = ledger.copies, []
            self._num_erasing += len(erases)
        settings = self.settings
        for copy in copies:
            self._pool.submit(CallTask(partial(self._copy, copy), partial(self._not_copied, copy)), urgent=True)
        for fetch_run in batches(fetches, [fetch.ticket.block.meta.num_bytes for fetch in fetches], settings.batch_bytes, settings.threads):
            self._pool.submit(FetchTask(fetch_run, settings.prefix, self._records, self._caller, self), urgent=True)
        for write_run in batches(writes, [write.num_bytes for write in writes], settings.batch_bytes, settings.threads):
            self._pool.submit(WriteTask(write_run, settings.prefix, self._records, self._caller, self))
        if erases:
            self._pool.submit(EraseTask(erases, settings.prefix, self._caller, self, again=self._pool.submit))

    def _copy(self, copy: Copy) -> None:
        copy.ticket.block.buffer[:] = copy.write.tickets[0].block.buffer
        with self._lock:
            self._ledger.copied(copy, Outcome.OK)
        self._progressed()

    def _not_copied(self, copy: Copy, error: BaseException) -> None:
        with self._lock:
            self._ledger.copied(copy, Outcome.FAILED, repr(error))
        self._progressed()

    def erased(self, erases: Sequence[Erase], error: BaseException | None) -> None:
        """Removals ended."""
        if error is not None:
            self.count("failed_removals", len(erases))
            logger.debug("%d blocks were not deleted at %s: %s", len(erases), self._client.address, error)
        with self._lock:
            self._num_erasing -= len(erases)
            for erase in erases:
                self._ledger.erased(erase)
        self._progressed()

    def _ask(self, job: ProbeJob, start: float) -> None:
        found: list[int] = []
        overhead = self._records.overhead_bytes
        for keys in probe_chunks(job.keys):
            names = [name_of(self.settings.prefix, job.namespace, key) for key in keys]
            sizes: list[int | None] = []
            error = self._caller.once(lambda deadline, names=names, sizes=sizes: sizes.extend(self._client.sizes(names, deadline)))  # type: ignore[misc]
            if error is not None:
                self._probed(job, start, found, str(error))
                return
            run = [size for size in takewhile(lambda size: size is not None and size > overhead, sizes) if size is not None]
            found += [size - overhead for size in run]
            if len(run) < len(keys):
                break
        self._probed(job, start, found, None)

    def _probed(self, job: ProbeJob, start: float, found: Sequence[int], error: str | None) -> None:
        result = ProbeResult(job.job_id, tuple(found), error is None, self._clock() - start, error)
        parents = (None, *job.keys)
        with self._lock:
            self._events["probed_blocks"] += len(found)
            for key, parent, num_bytes in zip(job.keys, parents, found, strict=False):
                self._ledger.learn(BlockMeta(key, parent, num_bytes), job.namespace)
            self._num_probes -= 1
            self._probes.append(result)
        self._progressed()


def _copy_error(source: Ticket, target: Ticket) -> str | None:
    """Copies the bytes of one block to another's buffer; why that cannot be done, or None where it was."""
    try:
        target.block.buffer[:] = source.block.buffer
    except ValueError as error:  # a buffer was released meanwhile
        return str(error)
    return None
