"""What every I/O engine understands: transfers between files and memory, and the order in which they go."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvtier.io.aligned_file import AlignedFile


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """Bytes to move between consecutive places of a file and buffers.

    Offset, lengths and, where the file ``is_direct``, addresses are multiples of the page size. File and buffers belong to
    the engine until the transfer's completion was polled.
    """

    file: AlignedFile
    is_read: bool
    offset: int
    buffers: Sequence[memoryview]
    owner: Any = None
    """whatever the submitter wants to find in the completion"""

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(map(len, self.buffers))


@dataclass(frozen=True, slots=True)
class Completion:
    """How a transfer ended."""

    transfer: Transfer
    num_bytes: int
    """bytes moved from the start on; without ``error`` all, or fewer where a read met the end of the file"""
    error: OSError | None = None
    """where it is set, any part may have been moved"""


class IoEngine(Protocol):
    """Carries out transfers, a bounded number of them at once, all reads that wait before all writes that wait.

    ``submit`` may be called from any thread, ``poll`` from one at a time.  Interrupted and short transfers are continued.
    """

    name: str
    """what it is built on, for logs and reports"""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Queues transfers and starts those that may run; does not wait for I/O. Raises ClosedError after ``close``."""

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """What has ended since the last call; each transfer appears exactly once.

        Where there is nothing, waits up to ``timeout_s`` (None: without end) for the first; may come back early with nothing.
        After ``close`` it returns at once.
        """

    def oldest_start(self, *, is_read: bool) -> float | None:
        """When the oldest read or write that still runs was started, by ``time.monotonic``; None where none runs."""

    def give_up_waiting(self, error: OSError) -> None:
        """What has not started ends with an error; what runs goes on."""

    def close(self) -> None:
        """Drops what has not started, waits for what runs, and lets ``poll`` return. Idempotent.

        A transfer that never ends is waited for without end: as long as it may end, nobody else may have its buffers.
        """


class TransferQueue:
    """The transfers of one engine that wait or run. Not thread-safe."""

    def __init__(self, depth: int, max_bytes: int) -> None:
        """At most ``depth`` transfers run at once, and of ``max_bytes`` together (a larger one runs alone).

        Raises ValueError for a bound below 1.
        """
        if depth < 1 or max_bytes < 1:
            raise ValueError(f"a queue of {depth} transfers and {max_bytes} bytes moves nothing; both must be at least 1")
        self._depth = depth
        self._max_bytes = max_bytes
        self._reads: deque[Transfer] = deque()
        self._writes: deque[Transfer] = deque()
        self._started: dict[bool, dict[Transfer, float]] = {True: {}, False: {}}
        """reads and writes that run -> when they were started, oldest first"""
        self.num_running = 0
        self.running_bytes = 0

    def add(self, transfers: Sequence[Transfer]) -> None:
        """They wait from now on."""
        for transfer in transfers:
            (self._reads if transfer.is_read else self._writes).append(transfer)

    def take(self) -> Transfer | None:
        """The transfer to start now; it runs until ``finished``. None where none waits or a bound is reached."""
        waiting = self._reads or self._writes
        if not waiting or self.num_running >= self._depth:
            return None
        num_bytes = waiting[0].num_bytes
        if self.num_running and self.running_bytes + num_bytes > self._max_bytes:
            return None
        self.num_running += 1
        self.running_bytes += num_bytes
        transfer = waiting.popleft()
        self._started[transfer.is_read][transfer] = time.monotonic()
        return transfer

    def finished(self, transfer: Transfer) -> None:
        """A transfer that was taken runs no more."""
        del self._started[transfer.is_read][transfer]
        self.num_running -= 1
        self.running_bytes -= transfer.num_bytes

    def oldest_start(self, *, is_read: bool) -> float | None:
        """When the oldest read or write that runs was taken; None where none runs."""
        return next(iter(self._started[is_read].values()), None)

    def take_waiting(self) -> list[Transfer]:
        """All that waits, which will not run."""
        waiting = [*self._reads, *self._writes]
        self.clear()
        return waiting

    def clear(self) -> None:
        """Drops what waits."""
        self._reads.clear()
        self._writes.clear()
