"""Blocks that one engine could not load, while others can: for this engine they are not there for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtier.types import BlockKey

FIRST_WAIT_S = 10.0
MAX_WAIT_S = 3600.0
MAX_KEYS = 16_384
"""more are not known; the one that failed longest ago is forgotten first"""


class FailedLoads:
    """Of one session. What fails again is kept back twice as long as before, until it was loaded once.

    >>> failed = FailedLoads(clock=lambda: 0.0)
    >>> failed.add([BlockKey(b"b")])
    >>> failed.loadable([BlockKey(b"a"), BlockKey(b"b"), BlockKey(b"c")])
    [b'a']
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[BlockKey, tuple[float, float]] = {}
        """until when each is kept back, and for how long; in the order of their last failures"""

    def add(self, keys: Iterable[BlockKey]) -> None:
        """These blocks could not be loaded."""
        now = self._clock()
        for key in keys:
            _, wait_s = self._known.pop(key, (0.0, FIRST_WAIT_S / 2))
            wait_s = min(2 * wait_s, MAX_WAIT_S)
            self._known[key] = now + wait_s, wait_s
        while len(self._known) > MAX_KEYS:
            del self._known[next(iter(self._known))]

    def discard(self, keys: Iterable[BlockKey]) -> None:
        """These blocks were loaded."""
        if self._known:
            for key in keys:
                self._known.pop(key, None)

    def loadable(self, keys: list[BlockKey]) -> Sequence[BlockKey]:
        """The leading run of ``keys`` without one that is kept back."""
        if self._known:
            now = self._clock()
            for position, key in enumerate(keys):
                if key in self._known and self._known[key][0] > now:
                    return keys[:position]
        return keys
