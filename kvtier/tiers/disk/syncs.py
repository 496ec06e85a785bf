"""Syncs several segments at once, so that the disk can serve them with one flush."""

from __future__ import annotations

import threading
from collections.abc import Collection

from kvtier.io import WorkerPool
from kvtier.tiers.disk.segments import SegmentFiles

_NUM_THREADS = 4


class SegmentSyncer:
    """Threads that wait for the disk. Used by one thread at a time."""

    def __init__(self, files: SegmentFiles) -> None:
        self._files = files
        self._pool = WorkerPool(_NUM_THREADS, "kvtier-disk-sync")

    def sync(self, segments: Collection[int]) -> dict[int, BaseException]:
        """Returns when all that was written to the segments survives a power cut, but for those it names, with their errors."""
        tasks = [_Sync(self._files, segment) for segment in segments]
        for task in tasks[1:]:
            self._pool.submit(task)
        for task in tasks[:1]:
            task.run()  # one alone needs no other thread
        for task in tasks:
            task.is_over.wait()
        return {task.segment: task.error for task in tasks if task.error is not None}

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        self._pool.close()


class _Sync:
    """One segment."""

    __slots__ = ("_files", "error", "is_over", "segment")

    def __init__(self, files: SegmentFiles, segment: int) -> None:
        self._files = files
        self.segment = segment
        self.error: BaseException | None = None
        self.is_over = threading.Event()

    def run(self) -> None:
        """Syncs."""
        try:
            self._files.sync(self.segment)
        except OSError as error:
            self.error = error
        self.is_over.set()

    def fail(self, error: BaseException) -> None:
        """Notes an error that nobody expected."""
        self.error = error
        self.is_over.set()
