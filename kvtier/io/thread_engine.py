"""The I/O engine that goes everywhere: a thread for each transfer under way, each in a positional system call."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence

from kvtier.errors import ClosedError
from kvtier.io.transfers import Completion, Transfer, TransferQueue
from kvtier.io.workers import start_thread

logger = logging.getLogger(__name__)


class ThreadEngine:
    """An :class:`~kvtier.io.transfers.IoEngine` of ``queue_depth`` threads.

    They are daemons: a process that ends without ``close()`` does not hang.
    """

    name = "threads"

    def __init__(self, queue_depth: int, max_bytes: int) -> None:
        """Raises OSError where the system lets so many threads not begin, ValueError for a bound below 1."""
        self._queue = TransferQueue(queue_depth, max_bytes)
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._done = threading.Condition(lock)
        self._completions: list[Completion] = []
        self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            for index in range(queue_depth):
                self._threads.append(start_thread(self._loop, f"kvtier-io-{index}"))
        except OSError:
            self.close()
            raise

    def submit(self, transfers: Sequence[Transfer]) -> None:
        with self._work:
            if self._closed:
                raise ClosedError("the I/O engine is closed")
            self._queue.add(transfers)
            self._work.notify(len(transfers))

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        with self._done:
            if not self._completions and not self._closed:
                self._done.wait(timeout_s)
            completions, self._completions = self._completions, []
        return completions

    def oldest_start(self, *, is_read: bool) -> float | None:
        with self._work:
            return self._queue.oldest_start(is_read=is_read)

    def give_up_waiting(self, error: OSError) -> None:
        with self._done:
            self._completions += [Completion(transfer, 0, error) for transfer in self._queue.take_waiting()]
            self._done.notify()

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._work:
                while (transfer := self._queue.take()) is None:
                    if self._closed:
                        return
                    self._work.wait()
            completion = _carried_out(transfer)
            with self._done:
                self._queue.finished(transfer)
                self._completions.append(completion)
                self._done.notify()
                self._work.notify()  # a bound may have held somebody up
            del transfer, completion  # else their buffers stay exported while the thread waits


def _carried_out(transfer: Transfer) -> Completion:
    try:
        if transfer.is_read:
            return Completion(transfer, transfer.file.readv(transfer.buffers, transfer.offset))
        transfer.file.writev(transfer.buffers, transfer.offset)
        return Completion(transfer, transfer.num_bytes)
    except OSError as error:
        return Completion(transfer, 0, error)
    except Exception as error:  # thread boundary: whoever waits for the transfer must hear of it
        logger.exception("unexpected error in a transfer of %s", transfer.file.path)
        return Completion(transfer, 0, OSError(errno.EINVAL, str(error)))
