"""When to stop asking a disk that keeps failing, and when to ask again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0


class Health:
    """Counts consecutive failures of one direction (reads or writes) and closes it for a while after too many.

    After the back-off one try is let through again; if it fails, the next back-off is twice as long.
    Thread-safe.
    """

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what = what
        self._clock = clock
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
        return closed_until is None or self._clock() >= closed_until

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

    def failed(self, error: BaseException) -> None:
        """Notes that an operation failed."""
        with self._lock:
            self._num_failures += 1
            if self._num_failures < MAX_CONSECUTIVE_FAILURES or not self.is_online:
                return
            self.offline_count += 1
            self._closed_until = self._clock() + self._back_off_s
            logger.warning("%s is offline for %.0f s after %d failures: %s", self._what, self._back_off_s, self._num_failures, error)
            self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
