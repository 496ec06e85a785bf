"""How many calls move blocks at once: over TCP more than one only take the processors from each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvtier.tiers.remote import Deadline


class Lane:
    """Lets so many in at once; reads go before writes. Thread-safe."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._num_waiting_reads = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @contextmanager
    def place(self, deadline: Deadline, *, is_read: bool) -> Iterator[bool]:
        """A place for as long as the context lasts. False where there was none by the deadline, or the lane was closed."""
        with self._changed:
            self._num_waiting_reads += is_read
            self._changed.wait_for(lambda: self._is_closed or self._may_enter(is_read), deadline.remaining_s())
            is_in = not self._is_closed and self._may_enter(is_read)
            self._num_waiting_reads -= is_read
            self._num_free -= is_in
            self._changed.notify_all()
        try:
            yield is_in
        finally:
            with self._changed:
                self._num_free += is_in
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody gets in any more; who is in may stay. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _may_enter(self, is_read: bool) -> bool:
        return self._num_free > 0 and (is_read or not self._num_waiting_reads)
