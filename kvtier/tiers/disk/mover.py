"""Moves runs of records: checksums on worker threads, bytes by an I/O engine, every outcome to the tier."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence

from kvtier.io import Completion, IoEngine, Transfer, WorkerPool, start_thread
from kvtier.tiers.disk.disk_health import DiskHealth
from kvtier.tiers.disk.pending import PendingRead, PendingStore
from kvtier.tiers.disk.record_io import PreparedRun, ReadVerdict, RecordBuffer, RecordIO
from kvtier.types import Outcome

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""how often somebody looks whether the disk hangs, if nobody asks"""
_PAUSE_S = 0.1
"""after an error of the I/O engine that nobody expected"""

WritesDone = Callable[[Sequence[PendingStore], BaseException | None], None]
ReadsDone = Callable[[Sequence[tuple[PendingRead, Outcome, str | None]]], None]


class Mover:
    """Carries runs to and from the segments. ``writes_done`` and ``reads_done`` hear of each run once, on threads of the mover.

    A run goes through a worker thread (checksums of a write), the I/O engine, and for a read a worker thread again
    (verification).  Reads go before writes everywhere.
    """

    def __init__(
        self,
        records: RecordIO,
        engine: IoEngine,
        health: DiskHealth,
        num_threads: int,
        *,
        writes_done: WritesDone,
        reads_done: ReadsDone,
    ) -> None:
        """Owns ``engine`` from now on. Raises OSError where the system lets no thread begin."""
        self.records = records
        self.engine = engine
        self.health = health
        self.writes_done = writes_done
        self.reads_done = reads_done
        self.pool = WorkerPool(num_threads, "kvtier-disk-sums")
        self._closing = False
        self._logged: set[type[Exception]] = set()
        """kinds of errors of the engine that were logged, each once"""
        try:
            self._thread = start_thread(self._loop, "kvtier-disk-io")
        except OSError:
            self.pool.close()
            raise

    def write(self, run: Sequence[PendingStore]) -> None:
        """Starts to write a run; all of it fails together."""
        self.pool.submit(_Write(self, run))

    def read(self, run: Sequence[PendingRead]) -> None:
        """Starts to read and verify a run. An I/O error costs only the records that have it: they are read again one by one.

        Not so where the run was given up before it began, since the disk does not answer (ECANCELED).
        """
        self.pool.submit(_Read(self, run), urgent=True)

    def buffers(self, run: Sequence[PendingStore] | Sequence[PendingRead]) -> list[RecordBuffer]:
        """The records of a run, with the memory of their payloads."""
        fields = self.records.sealing.fields
        return [RecordBuffer(fields(item.key, item.entry), item.ticket.block.buffer.cast("B")) for item in run]

    def close(self) -> None:
        """Drops what has not started, unreported, waits for the rest, however long, and ends the threads. Idempotent."""
        self._closing = True
        self.engine.close()
        self._thread.join()
        self.pool.close(discard=True)

    def _loop(self) -> None:
        while not self._closing:
            for completion in self._poll():
                self._report(completion)
            completion = None  # type: ignore[assignment]  # else its buffers stay exported while the thread waits
            self.health.look()  # nobody else may

    def _poll(self) -> list[Completion]:
        try:
            return self.engine.poll(_LOOK_S)
        except Exception as error:  # thread boundary: without this thread every job would hang
            # A transfer whose end was lost with this counts as one that hangs: its direction goes offline, and ``close`` leaves it behind.
            if type(error) not in self._logged:
                self._logged.add(type(error))
                logger.exception("unexpected error in the I/O engine")
            time.sleep(_PAUSE_S)
            return []

    @staticmethod
    def _report(completion: Completion) -> None:
        try:
            completion.transfer.owner.arrived(completion)
        except Exception as error:  # thread boundary: without this thread every job would hang
            logger.exception("unexpected error after a transfer")
            completion.transfer.owner.fail(error)


class _Write:
    """A run on its way to its segment."""

    __slots__ = ("_mover", "_prepared", "_run")

    def __init__(self, mover: Mover, run: Sequence[PendingStore]) -> None:
        self._mover = mover
        self._run = run
        self._prepared: PreparedRun | None = None

    def run(self) -> None:
        """Makes the bytes and hands them to the engine."""
        try:
            with self._mover.health.writes.watch():  # a new segment is made by calls of this thread
                self._prepared = self._mover.records.prepare_write(self._mover.buffers(self._run))
        except OSError as error:
            self._mover.writes_done(self._run, error)
        else:
            _launch(self._mover, self._prepared, self, is_read=False)

    def arrived(self, completion: Completion) -> None:
        """The bytes are in their segment, or not."""
        self._release()
        self._mover.writes_done(self._run, completion.error)

    def fail(self, error: BaseException) -> None:
        """Reports an error that nobody expected."""
        self._release()
        self._mover.writes_done(self._run, error)

    def _release(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._mover.records.release(prepared)


class _Read:
    """A run on its way from its segment. A worker thread runs it twice: before the transfer, and after it."""

    __slots__ = ("_completion", "_mover", "_prepared", "_run")

    def __init__(self, mover: Mover, run: Sequence[PendingRead]) -> None:
        self._mover = mover
        self._run = run
        self._prepared: PreparedRun | None = None
        self._completion: Completion | None = None

    def run(self) -> None:
        """Hands the buffers to the engine; verifies what came."""
        if self._completion is not None:
            completion, self._completion = self._completion, None  # it names this object: a cycle would keep the buffers
            self._finish(completion)
            return
        try:
            with self._mover.health.reads.watch():
                self._prepared = self._mover.records.prepare_read(self._mover.buffers(self._run))
        except OSError as error:
            self._mover.reads_done([self._alone(item, error) for item in self._run])
        else:
            _launch(self._mover, self._prepared, self, is_read=True)

    def arrived(self, completion: Completion) -> None:
        """The bytes are in the buffers, or not."""
        self._completion = completion
        self._mover.pool.submit(self, urgent=True)

    def fail(self, error: BaseException) -> None:
        """Reports an error that nobody expected."""
        self._release()
        self._mover.reads_done([(item, Outcome.FAILED, str(error)) for item in self._run])

    def _finish(self, completion: Completion) -> None:
        assert self._prepared is not None
        if completion.error is not None:
            self._release()
            outcomes = [self._alone(item, completion.error) for item in self._run]
        else:
            verdicts = self._mover.records.verify(self._prepared, completion.num_bytes)
            self._release()
            outcomes = [_judged(item, verdict) for item, verdict in zip(self._run, verdicts, strict=True)]
        self._mover.reads_done(outcomes)

    def _alone(self, item: PendingRead, error: OSError) -> tuple[PendingRead, Outcome, str | None]:
        if len(self._run) > 1 and error.errno != errno.ECANCELED:
            try:
                with self._mover.health.reads.watch():
                    return _judged(item, self._mover.records.read(self._mover.buffers([item]))[0])
            except OSError as own_error:
                error = own_error
        if isinstance(error, FileNotFoundError):
            return item, Outcome.MISS, str(error)
        return item, Outcome.FAILED, str(error)

    def _release(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._mover.records.release(prepared)


def _launch(mover: Mover, prepared: PreparedRun, owner: _Write | _Read, *, is_read: bool) -> None:
    mover.engine.submit([Transfer(prepared.file, is_read, prepared.offset, prepared.buffers, owner)])


def _judged(item: PendingRead, verdict: ReadVerdict) -> tuple[PendingRead, Outcome, str | None]:
    return item, verdict.outcome, verdict.problem
