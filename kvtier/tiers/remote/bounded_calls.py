"""Calls that end by their deadline though what they call may not: libraries that connect, resolve names, or ask server after server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvtier.io import WorkerPool
from kvtier.tiers.remote.deadline import Deadline

T = TypeVar("T")


class CallsAbortedError(Exception):
    """The caller need not wait any more: everything is being closed."""


class _Call(Generic[T]):
    """One call, on a thread of the pool. Its result goes to whoever waits, or is disposed of where nobody does any more."""

    def __init__(self, work: Callable[[], T], dispose: Callable[[T], object]) -> None:
        self._work = work
        self._dispose = dispose
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._is_given_up = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """On a thread of the pool."""
        with self._lock:
            if self._is_given_up:
                return
        result = self._work()
        with self._lock:
            is_wanted = not self._is_given_up
            self._result = result
            self._is_over.set()
        if not is_wanted:
            self._dispose(result)

    def fail(self, error: BaseException) -> None:
        """The work raised, or there are no threads any more."""
        self._error = error
        self._is_over.set()

    def give_up(self, error: BaseException) -> None:
        """Whoever waits gets an error, unless it is over."""
        with self._lock:
            if not self._is_over.is_set():
                self._is_given_up = True
                self._error = error
                self._is_over.set()

    def wait(self, deadline: Deadline) -> T:
        """The result. Raises what the work raised, or TimeoutError."""
        if not self._is_over.wait(deadline.remaining_s()):
            self.give_up(TimeoutError("not done by the deadline"))
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # it is over and has no error


class BoundedCalls:
    """Runs calls on a few threads, begun by the first one. Thread-safe.

    A call that is given up goes on by itself; while as many do as there are threads, further calls wait for one, and no longer than until
    their own deadlines.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._pool: WorkerPool | None = None
        self._calls: set[_Call[Any]] = set()
        self._is_aborted = False

    def call(self, work: Callable[[], T], deadline: Deadline, *, dispose: Callable[[T], object] = lambda _: None) -> T:
        """What ``work`` returns. ``dispose`` gets what it returns too late.

        Raises what it raises, TimeoutError after the deadline, CallsAbortedError after ``abort``, OSError where no thread can be had.
        """
        call = _Call(work, dispose)
        with self._lock:
            if self._is_aborted:
                raise CallsAbortedError
            if self._pool is None:
                self._pool = WorkerPool(self._num_threads, self._name)
            self._calls.add(call)
        try:
            self._pool.submit(call)
            return call.wait(deadline)
        finally:
            with self._lock:
                self._calls.discard(call)

    def abort(self) -> None:
        """Ends the waiting of all calls, also of those to come."""
        with self._lock:
            self._is_aborted = True
            calls = list(self._calls)
        for call in calls:
            call.give_up(CallsAbortedError())

    def close(self) -> None:
        """Aborts, and ends the threads that have nothing to do; the others end when their calls do. Idempotent."""
        self.abort()
        if self._pool is not None:
            self._pool.close(discard=True, timeout_s=0.1)
