"""When to stop asking a disk or a server that keeps failing, and when to ask again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0


class Health:
    """A circuit breaker: counts consecutive failures of one thing (reads, writes, a server) and closes it for a while after too many.

    After the back-off it is online again; if the next operation fails, the next back-off is twice as long.
    With ``by_trial`` it stays offline after the back-off until a trial made for the purpose works (see :meth:`take_trial`).
    Thread-safe.
    """

    def __init__(self, what: str, clock: Callable[[], float], *, by_trial: bool = False) -> None:
        self._what = what
        self._clock = clock
        self._by_trial = by_trial
        self._in_trial = False
        self._lock = threading.Lock()
        self._num_failures = 0
        self._back_off_s = FIRST_BACK_OFF_S
        self._closed_until: float | None = None
        self.offline_count = 0
        """times this direction was taken offline"""

    @property
    def is_online(self) -> bool:
        """Whether I/O may be tried now."""
        closed_until = self._closed_until
        return closed_until is None or (not self._by_trial and self._clock() >= closed_until)

    def take_trial(self) -> bool:
        """Whether the caller is to try now whether it works again, and to report ``succeeded`` or ``trial_failed``.

        True for one caller after each back-off.
        """
        closed_until = self._closed_until
        if closed_until is None or self._clock() < closed_until:
            return False
        with self._lock:
            if self._in_trial or self._closed_until != closed_until:
                return False
            self._in_trial = True
            return True

    def succeeded(self) -> None:
        """Notes that an operation worked."""
        if not self._num_failures:
            return
        with self._lock:
            if self._closed_until is not None:
                logger.warning("%s works again", self._what)
            self._num_failures = 0
            self._back_off_s = FIRST_BACK_OFF_S
            self._closed_until = None
            self._in_trial = False

    def failed(self, error: BaseException) -> None:
        """Notes that an operation failed."""
        with self._lock:
            self._num_failures += 1
            if self._num_failures >= MAX_CONSECUTIVE_FAILURES and self.is_online:
                self._take_offline(error)

    def trial_failed(self, error: BaseException) -> None:
        """Notes that a trial failed, or that it did not work at the very start: offline until the next trial."""
        with self._lock:
            self._in_trial = False
            self._num_failures = max(self._num_failures + 1, MAX_CONSECUTIVE_FAILURES)
            self._take_offline(error)

    def _take_offline(self, error: BaseException) -> None:
        self.offline_count += 1
        self._closed_until = self._clock() + self._back_off_s
        logger.warning("%s is offline for %.0f s after %d failures: %s", self._what, self._back_off_s, self._num_failures, error)
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
