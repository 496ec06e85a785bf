"""Runs: records that lie side by side, moved by one task of an I/O thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.tiers.disk.pending import PendingRead, PendingStore
from kvtier.tiers.disk.record_io import ReadVerdict, RecordBuffer
from kvtier.types import Outcome

_RUN_BYTES = 4 << 20
"""enough for the disk's full speed, few enough for all threads to share a job"""

Item = TypeVar("Item", PendingStore, PendingRead)


def into_runs(items: Sequence[Item], pages_per_segment: int) -> Iterator[list[Item]]:
    """Groups what is to be moved by neighbourhood on disk."""
    run: list[Item] = []
    run_bytes = 0
    next_place = -1
    for item in sorted(items, key=lambda item: item.entry.place):
        record_bytes = record_bytes_for(item.entry.num_bytes)
        is_neighbour = item.entry.place == next_place and next_place % pages_per_segment
        if run and not (is_neighbour and run_bytes + record_bytes <= _RUN_BYTES):
            yield run
            run, run_bytes = [], 0
        run.append(item)
        run_bytes += record_bytes
        next_place = item.entry.place + record_bytes // PAGE_BYTES
    if run:
        yield run


def _buffers(run: Sequence[PendingStore] | Sequence[PendingRead]) -> list[RecordBuffer]:
    return [RecordBuffer(item.entry.fields(item.key), item.ticket.block.buffer.cast("B")) for item in run]


class WriteTask:
    """Writes a run; all of it fails together."""

    __slots__ = ("_done", "_run", "_write")

    def __init__(
        self,
        run: Sequence[PendingStore],
        write: Callable[[Sequence[RecordBuffer]], None],
        done: Callable[[Sequence[PendingStore], BaseException | None], None],
    ) -> None:
        self._run = run
        self._write = write
        self._done = done

    def run(self) -> None:
        """Writes and reports."""
        try:
            self._write(_buffers(self._run))
        except OSError as error:
            self._done(self._run, error)
        else:
            self._done(self._run, None)

    def fail(self, error: BaseException) -> None:
        """Reports an error that nobody expected."""
        self._done(self._run, error)


class ReadTask:
    """Reads and verifies a run. An I/O error costs only the records that have it: they are read again one by one."""

    __slots__ = ("_done", "_read", "_run")

    def __init__(
        self,
        run: Sequence[PendingRead],
        read: Callable[[Sequence[RecordBuffer]], list[ReadVerdict]],
        done: Callable[[Sequence[tuple[PendingRead, Outcome, str | None]]], None],
    ) -> None:
        self._run = run
        self._read = read
        self._done = done

    def run(self) -> None:
        """Reads and reports."""
        try:
            verdicts = self._read(_buffers(self._run))
        except OSError as error:
            outcomes = [self._alone(item, error) for item in self._run]
        else:
            outcomes = [_judged(item, verdict) for item, verdict in zip(self._run, verdicts, strict=True)]
        self._done(outcomes)

    def fail(self, error: BaseException) -> None:
        """Reports an error that nobody expected."""
        self._done([(item, Outcome.FAILED, str(error)) for item in self._run])

    def _alone(self, item: PendingRead, error: OSError) -> tuple[PendingRead, Outcome, str | None]:
        if len(self._run) > 1:
            try:
                return _judged(item, self._read(_buffers([item]))[0])
            except OSError as own_error:
                error = own_error
        if isinstance(error, FileNotFoundError):
            return item, Outcome.MISS, str(error)
        return item, Outcome.FAILED, str(error)


def _judged(item: PendingRead, verdict: ReadVerdict) -> tuple[PendingRead, Outcome, str | None]:
    return (item, Outcome.OK, None) if verdict.problem is None else (item, Outcome.CORRUPT, verdict.problem)
