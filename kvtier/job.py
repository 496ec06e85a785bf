"""Jobs: what the control API gives back for a verb that another thread carries out."""

from __future__ import annotations

import enum
import math
import threading
import time
from collections.abc import Callable, Generator
from typing import Generic, NamedTuple, TypeVar

from kvtier.errors import JobCancelledError, JobTimeoutError, KVTierError

T_co = TypeVar("T_co", covariant=True)
_DRIVE_S = 0.02
"""how long one turn of driving the engine may wait for copies"""


class JobState(enum.Enum):
    """How far a job is."""

    QUEUED = "queued"
    """the thread that drives the engine has not come to it yet"""
    RUNNING = "running"
    """it waits for copies"""
    DONE = "done"
    FAILED = "failed"
    """``result`` raises why"""
    CANCELLED = "cancelled"


class Progress(NamedTuple):
    """``done`` of ``total`` blocks; both 0 where a verb does not count blocks."""

    done: int
    total: int


class Job(Generic[T_co]):
    """One verb on its way. Thread-safe: ask and cancel it from any thread; the thread that drives the engine runs it.

    ``work`` is a generator: it yields its progress whenever it has to wait, and returns the result. ``drive`` drives the engine once
    (waiting up to so many seconds) where the caller is the driving thread and returns False elsewhere.
    """

    def __init__(self, verb: str, work: Generator[Progress, None, T_co], drive: Callable[[float], bool]) -> None:
        self.verb = verb
        """the method of the Controller"""
        self._work = work
        self._drive = drive
        self._changed = threading.Condition()
        self._state = JobState.QUEUED
        self._progress = Progress(0, 0)
        self._is_cancel_asked = False
        self._result: list[T_co] = []
        self._error: BaseException | None = None

    @property
    def state(self) -> JobState:
        """How far it is."""
        return self._state

    @property
    def progress(self) -> Progress:
        """Blocks done and to do, as far as known."""
        return self._progress

    @property
    def is_over(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self._state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)

    def cancel(self) -> bool:
        """Asks the job to stop where it is; what was copied stays. False where it is over already.

        It is cancelled when the driving thread comes to it, at once where that has not begun it.
        """
        with self._changed:
            if self.is_over:
                return False
            self._is_cancel_asked = True
            if self._state is JobState.QUEUED:
                self._end(JobState.CANCELLED)
            return True

    def result(self, timeout_s: float | None = None) -> T_co:
        """Waits for the end and returns the result. On the thread that drives the engine it drives it meanwhile.

        Raises:
            JobTimeoutError: it is not over after ``timeout_s`` seconds; it goes on.
            JobCancelledError: it was cancelled.
            ControlError: the verb was refused.
            ClosedError: the engine was closed before.
        """
        if not self._wait(timeout_s):
            raise JobTimeoutError(
                f"{self.verb} is {self._state.value} after {timeout_s} s: verbs are carried out by the thread that drives the engine, "
                "when the engine steps; an engine without requests does not step. The job goes on"
            )
        if self._state is JobState.CANCELLED:
            raise JobCancelledError(f"{self.verb} was cancelled")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def advance(self) -> None:
        """Goes on until the job waits or is over. For the thread that drives the engine."""
        with self._changed:
            if self.is_over:
                return
            self._state = JobState.RUNNING
        if self._is_cancel_asked:
            self.abandon(None)
            return
        try:
            self._progress = next(self._work)
        except StopIteration as stop:
            self._result.append(stop.value)
            self._finish(JobState.DONE)
        except KVTierError as error:
            self._error = error
            self._finish(JobState.FAILED)
        except BaseException as error:
            self._error = error
            self._finish(JobState.FAILED)
            raise

    def abandon(self, error: KVTierError | None) -> None:
        """Ends a job that will not be carried on: cancelled, or failed by ``error``. For the thread that drives the engine."""
        self._work.close()
        if not self.is_over:
            self._error = error
            self._finish(JobState.CANCELLED if error is None else JobState.FAILED)

    def _finish(self, state: JobState) -> None:
        with self._changed:
            self._end(state)

    def _end(self, state: JobState) -> None:
        self._state = state
        self._changed.notify_all()

    def _wait(self, timeout_s: float | None) -> bool:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_over and (left_s := deadline - time.monotonic()) > 0:
            if not self._drive(min(left_s, _DRIVE_S)):
                with self._changed:
                    self._changed.wait_for(lambda: self.is_over, None if timeout_s is None else left_s)
        return self.is_over
