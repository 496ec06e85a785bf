"""Ending what may never end: work that waits for a disk is left behind when the disk does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvtier.io import WorkerPool

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""how often somebody who waits looks whether there is any hope"""


class LastWork:
    """Work on a thread of its own that others wait for only so long. The thread is a daemon: it does not keep the process from ending."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._name = name
        self._error: BaseException | None = None
        self._is_over = threading.Event()
        self._is_left_behind = False

    def finish(self, timeout_s: float, is_hopeless: Callable[[], bool]) -> bool:
        """Does the work. Returns whether it is done; raises what it raised.

        Where it is not, after ``timeout_s`` or as soon as it is hopeless, it goes on by itself.
        """
        try:
            pool = WorkerPool(1, self._name)
        except OSError:  # the interpreter is ending, or there can be no more threads
            if is_hopeless():
                return False
            self._work()
            return True
        pool.submit(self)
        pool.close(timeout_s=0.0)  # the thread ends when the work has
        deadline = time.monotonic() + timeout_s
        while not self._is_over.wait(_LOOK_S) and time.monotonic() < deadline and not is_hopeless():
            pass
        self._is_left_behind = not self._is_over.is_set()
        if self._error is not None:
            raise self._error
        return not self._is_left_behind

    def run(self) -> None:
        """On the thread."""
        self._work()
        self._is_over.set()

    def fail(self, error: BaseException) -> None:
        """The work has raised something."""
        if self._is_left_behind:
            logger.error("unexpected error on %s, which nobody waits for any more", self._name, exc_info=error)
        self._error = error
        self._is_over.set()
