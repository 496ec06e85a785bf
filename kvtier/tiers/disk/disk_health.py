"""The health of a disk by direction: reads or writes that fail again and again, and such as neither end nor fail."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvtier.io import IoEngine
from kvtier.tiers.health import Health

logger = logging.getLogger(__name__)

HANG_S = 10.0
"""from this age on a transfer or call counts as hanging: a disk answers in milliseconds, one that is being reset may take half a minute"""


class Direction(Health):
    """The health of reads, or of writes, of which it also knows how long they have been under way.

    While one is under way for longer than ``HANG_S`` the direction *hangs*, whatever the others do.
    """

    def __init__(self, what: str, clock: Callable[[], float], oldest_start: Callable[[], float | None]) -> None:
        """``oldest_start``: of the transfers under way, by ``time.monotonic``."""
        super().__init__(what, clock)
        self._oldest_transfer = oldest_start
        self._watching = threading.Lock()
        self._calls: dict[int, float] = {}
        """calls under way -> when they began, oldest first"""
        self._numbers = itertools.count()
        self._hangs = False
        self.hang_count = 0
        """times it began to hang"""

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """For calls that a thread of the tier makes itself: they count as under way."""
        number = next(self._numbers)
        with self._watching:
            self._calls[number] = time.monotonic()
        try:
            yield
        finally:
            with self._watching:
                del self._calls[number]

    def look(self) -> bool:
        """Whether something is under way for too long."""
        with self._watching:
            oldest = (self._oldest_transfer(), next(iter(self._calls.values()), None))
            starts = [start for start in oldest if start is not None]
            age_s = time.monotonic() - min(starts) if starts else 0.0
            hangs = age_s >= HANG_S
            has_changed = hangs is not self._hangs
            self._hangs = hangs
            self.hang_count += hangs and has_changed
        if has_changed and hangs:
            logger.warning("%s hangs: no answer for %.0f s; the tier is offline until there is one", self._what, age_s)
        elif has_changed:
            logger.warning("%s hangs no more", self._what)
        return hangs


class DiskHealth:
    """Both directions of a disk. Thread-safe.

    Where one hangs, neither is tried: the other one may be well, but it would wait behind what hangs.  When all that was under way for
    too long has ended, well or not, they are online again as far as the results say.
    """

    def __init__(self, path: Path, engine: IoEngine, clock: Callable[[], float]) -> None:
        self.reads = Direction(f"reading from {path}", clock, lambda: engine.oldest_start(is_read=True))
        self.writes = Direction(f"writing to {path}", clock, lambda: engine.oldest_start(is_read=False))
        self._engine = engine
        self._told = {"hung_reads": 0, "hung_writes": 0}

    @property
    def is_online(self) -> bool:
        """Whether reads and writes may be tried now."""
        return not self.look() and self.reads.is_online and self.writes.is_online

    def may_try(self, *, is_read: bool) -> bool:
        """Whether a read, or a write, may be tried now."""
        return not self.look() and (self.reads if is_read else self.writes).is_online

    def look(self) -> bool:
        """Whether reads or writes hang. What the disk was not given then fails: it need not keep its memory until the disk is back."""
        hangs = [direction.look() for direction in (self.reads, self.writes)]
        if any(hangs):
            self._engine.give_up_waiting(OSError(errno.ECANCELED, "the disk does not answer"))
        return any(hangs)

    @property
    def offline_count(self) -> int:
        """How often one of them was taken offline."""
        return sum(direction.offline_count + direction.hang_count for direction in (self.reads, self.writes))

    def take_events(self) -> dict[str, int]:
        """What happened since the last call and how often. By one thread."""
        now = {"hung_reads": self.reads.hang_count, "hung_writes": self.writes.hang_count}
        events = {name: count - self._told[name] for name, count in now.items() if count > self._told[name]}
        self._told = now
        return events
