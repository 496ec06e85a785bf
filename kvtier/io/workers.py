"""A few threads that do I/O, reads before writes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Task(Protocol):
    """One piece of work. ``run`` happens on a worker thread; if it raises, ``fail`` is told, and must not raise."""

    def run(self) -> None:
        """Does the work."""

    def fail(self, error: BaseException) -> None:
        """Reports ``error`` to whoever waits for the work."""


def start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread that has begun. Raises OSError where the system lets none begin."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(f"{error} ({name}): raise the limit on processes of this user or container, or end some") from error
    return thread


class WorkerPool:
    """Runs tasks in the order they came, urgent ones first. No error is lost: each reaches its task's ``fail``.

    The threads are daemons: a process that ends without ``close()`` does not hang (what they write is crash-safe).
    """

    def __init__(self, num_threads: int, name: str) -> None:
        """Raises OSError where the system lets so many threads not begin, ValueError for a number below 1."""
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._urgent: deque[Task] = deque()
        self._normal: deque[Task] = deque()
        self._closing = False
        self._threads: list[threading.Thread] = []
        try:
            for index in range(num_threads):
                self._threads.append(start_thread(self._loop, f"{name}-{index}"))
        except OSError:
            self.close()
            raise

    def submit(self, task: Task, *, urgent: bool = False) -> None:
        """Queues a task. After ``close`` it fails at once, on the caller's thread."""
        with self._lock:
            if not self._closing:
                (self._urgent if urgent else self._normal).append(task)
                self._work.notify()
                return
        task.fail(RuntimeError("the worker pool is closed"))

    def close(self, *, discard: bool = False, timeout_s: float | None = None) -> None:
        """Waits for the queued tasks, or only for the running ones and drops the rest unreported (``discard``). Idempotent.

        Waits ``timeout_s`` for all threads together, where that is given; one that still runs then is left to itself.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            if discard:
                self._urgent.clear()
                self._normal.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not (self._urgent or self._normal):
                    if self._closing:
                        return
                    self._work.wait()
                task = self._urgent.popleft() if self._urgent else self._normal.popleft()
            try:
                task.run()
            except Exception as error:  # thread boundary: whatever went wrong must reach the waiting job
                logger.debug("a task failed", exc_info=True)
                task.fail(error)
            del task  # else its buffers stay exported while the thread waits
