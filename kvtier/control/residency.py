"""What the planner keeps of one tier: who is in it, in which order they leave, until when, and who may not.

Blocks of different sizes have an order each, because room freed by one size is of no use to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvtier.control.expiry import ExpiryQueue
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta


class Victims(NamedTuple):
    """Who leaves a tier, and how many of those that want the room are turned away because they are worth less."""

    keys: list[BlockKey]
    num_declined: int


class Residency:
    """The committed blocks of one tier. Pure; ``now`` in seconds."""

    __slots__ = ("_expiry", "_make_policy", "_pins", "_policies", "name", "num_bytes")

    def __init__(self, name: str, make_policy: Callable[[], EvictionPolicy], expiry: ExpiryQueue | None) -> None:
        self.name = name
        self.num_bytes = 0
        self._make_policy = make_policy
        self._policies: dict[int, EvictionPolicy] = {}
        self._expiry = expiry
        self._pins: dict[BlockKey, int] = {}

    def insert(self, block: BlockMeta, now: float) -> None:
        """Takes a block in as just used."""
        policy = self._policies.get(block.num_bytes)
        if policy is None:
            policy = self._policies[block.num_bytes] = self._make_policy()
        policy.insert(block, now)
        self.num_bytes += block.num_bytes
        if self._expiry is not None:
            self._expiry.insert(block.key, now)
        if self._pins and block.key in self._pins:
            policy.pin(block.key)

    def touch(self, keys: Sequence[BlockKey], num_bytes: int, now: float) -> None:
        """Marks blocks of one size as used, in the given order."""
        policy = self._policies.get(num_bytes)
        if policy is None:
            return
        policy.touch(keys, now)
        if self._expiry is not None:
            for key in keys:
                self._expiry.touch(key, now)

    def remove(self, key: BlockKey, num_bytes: int) -> None:
        """Forgets a block; an absent one is fine. Pins on it stay and hold again when it comes back."""
        policy = self._policies.get(num_bytes)
        if policy is None or key not in policy:
            return
        policy.remove(key)
        self.num_bytes -= num_bytes
        if self._expiry is not None:
            self._expiry.remove(key)

    def victims(self, count: int, num_bytes: int, now: float, incoming: Sequence[BlockMeta] = ()) -> Victims:
        """Chooses and forgets up to ``count`` blocks of one size, leaves first; fewer where ``incoming`` are worth less than they."""
        policy = self._policies.get(num_bytes)
        if policy is None:
            return Victims([], 0)
        declined_before = policy.num_declined
        chosen = policy.victims(count, now, incoming)
        self.num_bytes -= num_bytes * len(chosen)
        if self._expiry is not None:
            for key in chosen:
                self._expiry.remove(key)
        return Victims(chosen, policy.num_declined - declined_before)

    def pin(self, key: BlockKey, num_bytes: int) -> None:
        """Keeps a block (and so its whole prefix in this tier) until as many ``unpin`` calls."""
        self._pins[key] = self._pins.get(key, 0) + 1
        if self._pins[key] == 1:
            policy = self._policies.get(num_bytes)
            if policy is not None:
                policy.pin(key)

    def unpin(self, key: BlockKey, num_bytes: int, now: float) -> None:
        """Takes one pin back."""
        left = self._pins[key] - 1
        if left:
            self._pins[key] = left
            return
        del self._pins[key]
        policy = self._policies.get(num_bytes)
        if policy is not None:
            policy.unpin(key, now)

    def expire(self, prefixes_of: Callable[[Iterable[BlockKey]], set[BlockKey]], now: float) -> list[BlockKey]:
        """The blocks whose time is over; they stay known until ``remove``. Pinned prefixes get a new time to live instead."""
        over = [] if self._expiry is None else self._expiry.expired(now)
        if not over or self._expiry is None or not self._pins:
            return over
        kept = prefixes_of(self._pins)
        for key in over:
            if key in kept:
                self._expiry.insert(key, now)
        return [key for key in over if key not in kept]

    def count(self, num_bytes: int) -> int:
        """How many blocks of this size there are."""
        policy = self._policies.get(num_bytes)
        return 0 if policy is None else len(policy)

    def __len__(self) -> int:
        return sum(len(policy) for policy in self._policies.values())
