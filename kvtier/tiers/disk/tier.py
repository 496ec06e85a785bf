"""The disk tier: blocks in slots of preallocated segment files, LMDB as the durable index, a dict as the one that is asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from kvtier.codecs import Sealer
from kvtier.errors import ClosedError, TierError
from kvtier.io import DirectMode, EngineKind, IoEngine, open_engine
from kvtier.tiers.disk.check import check_names, check_records
from kvtier.tiers.disk.closing import LastWork
from kvtier.tiers.disk.committer import Committer
from kvtier.tiers.disk.disk_health import DiskHealth
from kvtier.tiers.disk.index_file import IndexFile
from kvtier.tiers.disk.ledger import Ledger
from kvtier.tiers.disk.lock import DirectoryLock
from kvtier.tiers.disk.mover import Mover
from kvtier.tiers.disk.pending import PendingRead, PendingStore
from kvtier.tiers.disk.places import metas
from kvtier.tiers.disk.record_io import RecordIO
from kvtier.tiers.disk.recovery import prepare_directory, probe, rebuild_index, records_of, recover, settle_geometry
from kvtier.tiers.disk.runs import into_runs
from kvtier.tiers.disk.sealing import Sealing
from kvtier.tiers.disk.segments import SegmentFiles
from kvtier.tiers.disk.syncs import SegmentSyncer
from kvtier.tiers.forks import leave_to_parent
from kvtier.tiers.opening import opening
from kvtier.types import BlockKey, BlockMeta, Damage, JobKind, JobResult, Outcome, TransferJob

logger = logging.getLogger(__name__)

DEFAULT_SEGMENT_BYTES = 64 << 20
DEFAULT_MAX_IN_FLIGHT_BYTES = 256 << 20
DEFAULT_QUEUE_DEPTH = 8
RESET_WAIT_S = 2.0
"""how long a reset waits until the directory says that it was one"""
CLOSE_S = 30.0
"""how long ``close`` waits for a disk that answers slowly; one that does not answer is noticed before"""


class DiskTier:
    """Keeps blocks in a directory, across processes. Implements :class:`~kvtier.tiers.base.Tier`.

    The sum of the sizes of the directory's files never exceeds ``capacity_bytes``.  A STORE is OK once the block would be
    found again after ``kill -9``; with ``durable`` also after a power cut.  Every block is verified when it is loaded.

    ``offline_count`` counts how often reads or writes were given up for a while after repeated failures, or because one did not
    end (:data:`~kvtier.tiers.disk.disk_health.HANG_S`); ``recovery`` says how the directory was found.

    What the disk was given and does not end cannot be called back. Its job stays open and its memory in use; ``close`` leaves it behind,
    and the directory locked and without the proof of a clean close, until it has ended or the process has.
    """

    def __init__(  # noqa: PLR0913 - every setting of the tier, by keyword
        self,
        path: str | Path,
        capacity_bytes: int,
        *,
        name: str = "disk",
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        direct_io: DirectMode = "auto",
        io_engine: EngineKind = "auto",
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        io_threads: int = 2,
        max_in_flight_bytes: int = DEFAULT_MAX_IN_FLIGHT_BYTES,
        durable: bool = True,
        memory: tuple[int, int] | None = None,
        sealer: Sealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens or makes the directory. ``memory``: address and length of the memory that most buffers lie in. ``sealer``: encrypts.

        Raises TierBusyError where another process holds it, TierFormatError where another version wrote it, TierError
        where it cannot be used (not writable, too little space, a capacity below one segment and the index, no thread to be had).
        """
        self.name = name
        self.capacity_bytes: int | None = capacity_bytes
        self.path = Path(path)
        self._durable = durable
        prepare_directory(self.path)
        self._directory_lock = DirectoryLock(self.path)
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._is_closed = False
        with opening(f"the disk tier at {self.path}") as undo:
            undo.callback(self._directory_lock.release)
            self._geometry = settle_geometry(self.path, capacity_bytes, segment_bytes, durable=durable)
            probe(self.path, direct_io)
            engine = _open_engine(io_engine, queue_depth, max_in_flight_bytes, memory)
            undo.callback(engine.close)
            self._health = DiskHealth(self.path, engine, clock)
            self._sealing = Sealing(sealer)
            self._ledger = Ledger(self._geometry, max_in_flight_bytes=max_in_flight_bytes, sealing=self._sealing, clock=clock)
            self.recovery, index = recover(self.path, self._geometry, self._ledger, durable=durable)
            undo.callback(index.close, leave_proof=False)
            self._files = SegmentFiles(self.path, self._geometry.segment_bytes, direct=direct_io, durable=durable)
            self._records = RecordIO(self._files, self._geometry.pages_per_segment, self._sealing)
            self._mover = Mover(self._records, engine, self._health, io_threads, writes_done=self._writes_done, reads_done=self._reads_done)
            undo.callback(self._mover.close)
            self._syncer = SegmentSyncer(self._files)
            undo.callback(self._syncer.close)
            self._committer = self._start_committer(index)
        leave_to_parent(self)

    @property
    def io_engine(self) -> str:
        """Name of the I/O engine in use."""
        return self._mover.engine.name

    @property
    def online(self) -> bool:
        """False while reads or writes are given up after repeated failures, or do not end.

        One answer for both: an owner that went on storing would evict good blocks to make room for stores that fail.
        """
        return self._health.is_online

    @property
    def offline_count(self) -> int:
        """How often reads or writes were taken offline."""
        return self._health.offline_count

    def max_blocks(self, num_bytes: int) -> int:
        return self._geometry.max_blocks(num_bytes)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        if not self._health.may_try(is_read=True):
            return 0
        index = self._ledger.index
        for position, key in enumerate(keys):
            if key not in index:
                return position
        return len(keys)

    def submit(self, job: TransferJob) -> None:
        is_online = self._health.may_try(is_read=job.kind is JobKind.LOAD)
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"the disk tier at {self.path} is closed")
            self._ledger.begin(job, is_online=is_online and not self._committer.mark.is_due)
            self._committer.nudge()
            writes, reads = self._take_runnable()
        self._launch(writes, reads)

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        ledger = self._ledger
        if not ledger.results and timeout_s <= 0:
            return []
        with self._lock:
            if not ledger.results and timeout_s > 0:
                self._progress.wait_for(lambda: ledger.results or not ledger.num_jobs, timeout_s)
            results = list(ledger.results)
            ledger.results.clear()
        return results

    def remove(self, keys: Collection[BlockKey]) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._ledger.remove(keys)
            self._committer.nudge()

    def reset(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._ledger.remove_all()
            self._committer.leave_mark()
            if not self._committer.mark.wait(RESET_WAIT_S):
                self._sealing.count("unmarked_resets")
                logger.error(
                    "%s cannot be marked as reset yet, nothing is stored there before; if this process ends first, empty it", self.path
                )

    def entries(self) -> Iterator[BlockMeta]:
        with self._lock:
            found = list(metas(self._ledger.index))
        return iter(found)

    def take_events(self) -> dict[str, int]:
        return self._sealing.take_events() | self._health.take_events()

    def check(self) -> list[Damage]:
        with self._lock:
            problems = self._ledger.check()
            index = dict(self._ledger.index)
        found = [Damage("index in memory", problem) for problem in problems]
        found += check_names(self.path, self._geometry.capacity_bytes)
        found += check_records(self._records, records_of(index, self._sealing))
        return found

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if not LastWork(self._finish, "kvtier-disk-closing").finish(CLOSE_S, self._health.look):
            logger.error(
                "%s does not answer: %d jobs are left behind with their memory and the directory locked, until they or this process end",
                self.path,
                self._ledger.num_jobs,
            )

    def abandon(self) -> None:
        """Lets everything go as a crash would: nothing is finished or flushed, running jobs get no result. For tests."""
        with self._lock:
            self._is_closed = True
        self._shut_down(leave_proof=False)

    def _finish(self) -> None:
        """Waits for all jobs, however long, and leaves the directory as it should be. Whatever they use is in use until then."""
        with self._lock:
            self._progress.wait_for(lambda: not self._ledger.num_jobs)
        self._shut_down(leave_proof=True)

    def forget_in_child(self) -> None:
        """A forked child counts the tier as closed. It has no thread that works for it, and nothing of the directory is touched."""
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._is_closed = True
        self._ledger.forget_jobs()

    def _start_committer(self, index: IndexFile) -> Committer:
        return Committer(
            self._ledger,
            self._lock,
            index,
            rebuild=self._rebuild_index,
            sync_segments=self._sync_segments,
            health=self._health.writes,
            progressed=self._progressed,
        )

    def _shut_down(self, *, leave_proof: bool) -> None:
        self._mover.close()
        self._committer.stop(leave_proof=leave_proof)
        self._syncer.close()
        self._files.close()
        self._directory_lock.release()

    # what the threads call

    def _take_runnable(self) -> tuple[list[PendingStore], list[PendingRead]]:
        """With the lock held; what it returns is to be launched without it."""
        ledger, turns = self._ledger, self._ledger.turns
        # Empty lists change hands as well: one that stayed the ledger's might fill up before it is launched, and be launched twice.
        writes, turns.runnable = turns.runnable, []
        reads, ledger.reads = ledger.reads, []
        return writes, reads

    def _launch(self, writes: list[PendingStore], reads: list[PendingRead]) -> None:
        pages = self._geometry.pages_per_segment
        for read_run in into_runs(reads, pages):
            self._mover.read(read_run)
        for write_run in into_runs(writes, pages):
            self._mover.write(write_run)

    def _progressed(self) -> None:
        """After every change a thread made: starts what became runnable, wakes who waits for results."""
        with self._lock:
            writes, reads = self._take_runnable()
            self._committer.nudge()
            if self._ledger.results or not self._ledger.num_jobs:
                self._progress.notify_all()
        self._launch(writes, reads)

    def _writes_done(self, run: Sequence[PendingStore], error: BaseException | None) -> None:
        if error is not None:
            self._health.writes.failed(error)
        with self._lock:
            if error is None:
                self._committer.written(run)
            else:
                for store in run:
                    self._ledger.store_failed(store, Outcome.FAILED, str(error))
        self._progressed()

    def _reads_done(self, outcomes: Sequence[tuple[PendingRead, Outcome, str | None]]) -> None:
        errors = [error for _, outcome, error in outcomes if outcome is Outcome.FAILED]
        if len(errors) == len(outcomes):
            self._health.reads.failed(OSError(errors[0]))
        else:
            self._health.reads.succeeded()
        with self._lock:
            for read, outcome, error in outcomes:
                if outcome in (Outcome.CORRUPT, Outcome.MISS):
                    self._ledger.forget_corrupt(read)
                self._ledger.read_done(read, outcome, error)
        self._progressed()

    def _sync_segments(self, stores: Sequence[PendingStore]) -> dict[PendingStore, str]:
        if not self._durable:
            return {}
        segments = {self._records.segment_of(store.entry.place) for store in stores}
        errors = self._syncer.sync(segments)
        for error in errors.values():
            self._health.writes.failed(error)
        if not errors:
            return {}
        problems = {segment: f"segment {segment} could not be synced: {error}" for segment, error in errors.items()}
        return {store: problems[segment] for store in stores if (segment := self._records.segment_of(store.entry.place)) in problems}

    def _rebuild_index(self) -> IndexFile:
        with self._lock:
            index = dict(self._ledger.index)
            next_sequence = self._ledger.next_sequence
        return rebuild_index(self.path, self._geometry, records_of(index, self._sealing), next_sequence, durable=self._durable)


def _open_engine(kind: EngineKind, queue_depth: int, max_bytes: int, memory: tuple[int, int] | None) -> IoEngine:
    try:
        return open_engine(kind, queue_depth, max_bytes, memory=memory)
    except OSError as error:
        if kind != "io_uring":
            raise
        raise TierError(f"io_engine is io_uring, and this system refuses it ({error}): set auto or threads") from error
