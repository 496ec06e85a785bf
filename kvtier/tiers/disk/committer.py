"""The thread that changes the index file: it makes written blocks readable and removed places reusable, in groups."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from kvtier.io import start_thread
from kvtier.tiers.disk.disk_health import Direction
from kvtier.tiers.disk.format import pack_entry
from kvtier.tiers.disk.index_file import IndexFile
from kvtier.tiers.disk.ledger import Ledger
from kvtier.tiers.disk.pending import PendingStore
from kvtier.tiers.disk.recovery import SEQUENCE_SLACK
from kvtier.tiers.disk.resets import ResetMark
from kvtier.types import Outcome

logger = logging.getLogger(__name__)

_MAX_CHANGES = 256
"""of each kind in one transaction; the index file's size reckons with it"""
_LINGER_S = 0.05
"""how long removals that nobody waits for are collected"""
_GATHER_S = 0.05
"""how long written blocks wait for others that are being written: a sync holds up the writes beside it, so few are best"""


class Committer:
    """Owns the index file while it is open. One thread; every store handed to it gets an outcome in the ledger.

    Everything written or removed since the last round goes into one transaction: the more there is to do, the fewer
    synchronous writes each block costs.
    """

    def __init__(
        self,
        ledger: Ledger,
        lock: threading.Lock,
        index: IndexFile,
        *,
        rebuild: Callable[[], IndexFile],
        sync_segments: Callable[[Sequence[PendingStore]], dict[PendingStore, str]],
        health: Direction,
        progressed: Callable[[], None],
    ) -> None:
        """``rebuild`` makes a new index file from the ledger's index; ``sync_segments`` returns the stores it failed for.

        Raises OSError where the system lets no thread begin; the index file is the caller's then.
        """
        self._ledger = ledger
        self._lock = lock
        self._index: IndexFile | None = index
        self.mark = ResetMark(index.directory, lock, durable=index.is_durable)
        """of the directory; to be asked for by ``leave_mark``"""
        self._rebuild = rebuild
        self._sync_segments = sync_segments
        self._health = health
        self._progressed = progressed
        self._work = threading.Condition(lock)
        self._written: deque[PendingStore] = deque()
        self._stopping = False
        self._discarding = False
        self._linger_until: float | None = None
        self._gather_until: float | None = None
        self._written_bytes = 0
        self._thread = start_thread(self._loop, "kvtier-disk-index")

    def written(self, stores: Sequence[PendingStore]) -> None:
        """Hands over stores whose bytes are in their segment. With the lock held."""
        written = [store for store in stores if not self._ledger.needs_no_entry(store)]
        self._written += written
        self._written_bytes += sum(store.entry.num_bytes for store in written)
        if self._gather_until is None or self._is_gathered():
            self._work.notify()

    def nudge(self) -> None:
        """Says that places were removed or that stores wait for them. With the lock held."""
        turns = self._ledger.turns
        if turns.undeleted and (turns.num_waiting or self._linger_until is None or len(turns.undeleted) >= _MAX_CHANGES):
            self._work.notify()

    def leave_mark(self) -> None:
        """Has the directory's mark written before anything else. With the lock held."""
        self.mark.ask()
        self._linger_until = None
        self._work.notify()

    def stop(self, *, leave_proof: bool) -> None:
        """Commits what is left, if asked, and closes the index file. No store may be on its way then. Idempotent."""
        with self._lock:
            self._stopping = True
            self._discarding = not leave_proof
            self._work.notify()
        self._thread.join()
        index, self._index = self._index, None
        if index is None:
            return
        try:
            index.close(leave_proof=leave_proof and not self._ledger.turns.undeleted)
        except OSError as error:
            logger.warning("the index was not closed cleanly, the next opening will salvage it: %s", error)

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._is_due():
                    if self._stopping:
                        return
                    self._work.wait(self._patience_s())
                if self._discarding:
                    return
                self._linger_until = None
                stores = self._take_written()
                places = list(islice(self._ledger.turns.undeleted, _MAX_CHANGES))
                next_sequence = self._ledger.next_sequence + SEQUENCE_SLACK
            try:
                with self._health.watch():
                    has_worked = self._write_mark(stores) and self._round(stores, places, next_sequence)
            except Exception as error:  # thread boundary: without this thread every job would hang
                logger.exception("unexpected error in the disk index")
                self._failed(stores, error)
                has_worked = False
            self._progressed()
            if self._stopping and not has_worked:
                return  # what was not deleted stays in the index file, and the next opening finds it again

    def _is_due(self) -> bool:
        undeleted = self._ledger.turns.undeleted
        if self._discarding or (self._written and self._is_gathered()):
            return True
        if not undeleted and not self.mark.is_due:
            return False
        if self._stopping or self._ledger.turns.num_waiting or (self.mark.is_due and self._linger_until is None):
            return True
        if self._linger_until is not None and time.monotonic() >= self._linger_until and not self._health.is_online:
            self._linger_until = None
        if self._linger_until is None:
            self._linger_until = time.monotonic() + _LINGER_S
        return time.monotonic() >= self._linger_until or (len(undeleted) >= _MAX_CHANGES and self._health.is_online)

    def _is_gathered(self) -> bool:
        """Whether it is time to make what was written readable: nothing else is on its way, it is much, or it has waited."""
        ledger = self._ledger
        if self._stopping or ledger.turns.num_waiting or len(self._written) >= _MAX_CHANGES:
            return True
        if self._written_bytes >= min(ledger.in_flight_bytes, ledger.max_in_flight_bytes // 4):
            return True
        if self._gather_until is None:
            self._gather_until = time.monotonic() + _GATHER_S
        return time.monotonic() >= self._gather_until

    def _take_written(self) -> list[PendingStore]:
        stores = [self._written.popleft() for _ in range(min(len(self._written), _MAX_CHANGES))]
        self._written_bytes -= sum(store.entry.num_bytes for store in stores)
        self._gather_until = None
        return stores

    def _patience_s(self) -> float | None:
        deadlines = [until for until in (self._linger_until, self._gather_until) if until is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _write_mark(self, stores: list[PendingStore]) -> bool:
        """Writes the mark where one is due; whether the index may be changed now."""
        if not self.mark.is_due:
            return True
        try:
            self.mark.write()
        except OSError as error:
            self._failed(stores, error)
            return False
        with self._lock:
            self.mark.written()
        return True

    def _round(self, stores: list[PendingStore], places: list[int], next_sequence: int) -> bool:
        """One transaction; whether the index file took it. Takes out of ``stores`` what has an outcome: an error befalls the rest."""
        unsynced = self._sync_segments(stores)
        if unsynced:
            with self._lock:
                for store, problem in unsynced.items():
                    self._ledger.store_failed(store, Outcome.FAILED, problem)
            stores[:] = [store for store in stores if store not in unsynced]
        entries = [(store.entry.place, pack_entry(self._ledger.sealing.fields(store.key, store.entry))) for store in stores]
        try:
            if self._index is None:
                self._renew()
                places = []
            assert self._index is not None
            self._index.commit(places, entries, next_sequence)
        except OSError as error:
            self._abandon_index()
            self._failed(stores, error)
            return False
        if not unsynced:
            self._health.succeeded()
        with self._lock:
            self._ledger.committed(stores, places)
        stores.clear()
        return True

    def _renew(self) -> None:
        """A new index file in place of one that failed. What was removed is not in it."""
        with self._lock:
            places = list(self._ledger.turns.undeleted)
        self._index = self._rebuild()
        with self._lock:
            self._ledger.committed([], places)

    def _abandon_index(self) -> None:
        # LMDB may refuse all work after an error; the index in RAM knows everything that was in the file.
        index, self._index = self._index, None
        if index is not None:
            index.close(leave_proof=False)

    def _failed(self, stores: Sequence[PendingStore], error: Exception) -> None:
        self._health.failed(error)
        with self._lock:
            for store in stores:
                self._ledger.store_failed(store, Outcome.FAILED, f"the index could not be written: {error}")
            self._ledger.undelete_failed(f"the index could not be written: {error}")
            self._linger_until = time.monotonic() + _LINGER_S
