"""Keys that a shared store was found not to hold, for a short while, so that it is not asked for them again by every request. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvtier.types import BlockKey

ABSENT_S = 2.0
"""how long an answer "not here" counts: another engine may store the block at any moment"""
MAX_ABSENT = 1 << 14


class AbsentKeys:
    """At most ``max_keys`` keys, each for ``ttl_s`` seconds from when it was added last; the oldest is forgotten first."""

    __slots__ = ("_max_keys", "_ttl_s", "_until")

    def __init__(self, ttl_s: float = ABSENT_S, max_keys: int = MAX_ABSENT) -> None:
        self._ttl_s = ttl_s
        self._max_keys = max_keys
        self._until: OrderedDict[BlockKey, float] = OrderedDict()

    def add(self, key: BlockKey, now: float) -> None:
        """The store does not hold a block, or cannot give it."""
        self._until.pop(key, None)
        self._until[key] = now + self._ttl_s
        if len(self._until) > self._max_keys:
            self._until.popitem(last=False)

    def holds(self, key: BlockKey, now: float) -> bool:
        """Whether a key was added not long ago."""
        until = self._until.get(key)
        if until is None:
            return False
        if until <= now:
            del self._until[key]
            return False
        return True

    def discard(self, keys: Iterable[BlockKey]) -> None:
        """The store holds them after all."""
        for key in keys:
            self._until.pop(key, None)

    def clear(self) -> None:
        """Forgets all keys."""
        self._until.clear()

    def __len__(self) -> int:
        return len(self._until)
