"""What the planner keeps of one tier: who is in it, in which order they leave, until when, and who may not.

Blocks of different sizes have an order each, because room freed by one size is of no use to another; and so have the blocks of each
tenant with a quota, so that a tenant's blocks can leave without others'. A tenant's blocks continue only its own, so victims are leaves
in each order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvtier.control.expiry import ExpiryQueue
from kvtier.control.quotas import POOL, Quotas
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta


class Victims(NamedTuple):
    """Who leaves a tier, and how many of those that want the room are turned away because they are worth less."""

    keys: list[BlockKey]
    num_declined: int


class Residency:
    """The committed blocks of one tier. Pure; ``now`` in seconds."""

    __slots__ = ("_expiry", "_make_policy", "_pins", "_policies", "_quotas", "name", "num_bytes", "tenant_of")

    def __init__(self, name: str, make_policy: Callable[[], EvictionPolicy], expiry: ExpiryQueue | None) -> None:
        self.name = name
        self.num_bytes = 0
        self.tenant_of: Callable[[BlockKey], str] | None = None
        """whose a block is; it must know each block as long as it is here. None: all blocks so far are nobody's"""
        self._make_policy = make_policy
        self._policies: dict[tuple[int, str], EvictionPolicy] = {}
        """(bytes of a block, tenant with a quota or the pool of the others) -> their order"""
        self._quotas = Quotas()
        self._expiry = expiry
        self._pins: dict[BlockKey, int] = {}

    def insert(self, blocks: Sequence[BlockMeta], now: float) -> None:
        """Takes blocks of one size and one tenant in as just used, in the given order. There must be one at least."""
        block_bytes = blocks[0].num_bytes
        num_bytes = block_bytes * len(blocks)
        owner = POOL
        if self.tenant_of is not None:
            tenant = self.tenant_of(blocks[0].key)
            owner = self._quotas.owner(tenant)
            self._quotas.count(tenant, num_bytes)
        policy = self._ensure_policy(block_bytes, owner)
        insert = policy.insert
        for block in blocks:
            insert(block, now)
        self.num_bytes += num_bytes
        if self._expiry is not None:
            for block in blocks:
                self._expiry.insert(block.key, now)
        if self._pins:
            for block in blocks:
                if block.key in self._pins:
                    policy.pin(block.key)

    def touch(self, keys: Sequence[BlockKey], num_bytes: int, now: float) -> None:
        """Marks blocks of one size and one tenant as used, in the given order."""
        policy = self._policy_of(keys, num_bytes)
        if policy is None:
            return
        policy.touch(keys, now)
        if self._expiry is not None:
            for key in keys:
                self._expiry.touch(key, now)

    def expect(self, keys: Sequence[BlockKey], num_bytes: int, seconds: float, now: float) -> None:
        """Somebody expects blocks of one size and one tenant, the tail of their prompt first, to be used in so many seconds."""
        policy = self._policy_of(keys, num_bytes)
        if policy is not None:
            policy.expect(keys, seconds, now)

    def remove(self, key: BlockKey, num_bytes: int) -> None:
        """Forgets a block; an absent one is fine. Pins on it stay and hold again when it comes back."""
        policy = self._policy_of((key,), num_bytes)
        if policy is None or key not in policy:
            return
        policy.remove(key)
        self._left([key], num_bytes)

    def victims(self, count: int, num_bytes: int, now: float, tenant: str = POOL, incoming: Sequence[BlockMeta] = ()) -> Victims:
        """Chooses and forgets up to ``count`` blocks of one size, leaves first. ``tenant``: whose blocks want the room.

        Over its quota a tenant makes room itself; else those do who have borrowed what it may have. ``incoming``: the blocks that want
        the room; those that are worth less than what would leave for them in the tenant's own order are turned away, and all behind them.
        """
        if not self._quotas.limits:
            return self._victims_of(POOL, count, num_bytes, now, incoming)
        chosen: list[BlockKey] = []
        exhausted: set[str] = set()
        held_bytes = self.num_bytes
        while len(chosen) < count:
            owners = [owner for size, owner in self._policies if size == num_bytes and owner not in exhausted]
            source = self._quotas.source(owners, tenant, num_bytes, count, len(chosen), held_bytes)
            if source is None:
                break
            owner, share = source
            offered = incoming[len(chosen) : len(chosen) + share] if owner == self._quotas.owner(tenant) else ()
            leaving, num_declined = self._victims_of(owner, share, num_bytes, now, offered)
            chosen += leaving
            if num_declined:
                return Victims(chosen, count - len(chosen))
            if len(leaving) < share:
                exhausted.add(owner)
        return Victims(chosen, 0)

    def _victims_of(self, owner: str, count: int, num_bytes: int, now: float, incoming: Sequence[BlockMeta]) -> Victims:
        policy = self._policies.get((num_bytes, owner))
        if policy is None:
            return Victims([], 0)
        declined_before = policy.num_declined
        chosen = policy.victims(count, now, incoming)
        self._left(chosen, num_bytes)
        return Victims(chosen, policy.num_declined - declined_before)

    def pin(self, key: BlockKey, num_bytes: int) -> None:
        """Keeps a block (and so its whole prefix in this tier) until as many ``unpin`` calls."""
        self._pins[key] = self._pins.get(key, 0) + 1
        if self._pins[key] == 1:
            policy = self._policy_of((key,), num_bytes)
            if policy is not None:
                policy.pin(key)

    def unpin(self, key: BlockKey, num_bytes: int, now: float) -> None:
        """Takes one pin back."""
        left = self._pins[key] - 1
        if left:
            self._pins[key] = left
            return
        del self._pins[key]
        policy = self._policy_of((key,), num_bytes)
        if policy is not None:
            policy.unpin(key, now)

    def is_pinned(self, key: BlockKey) -> bool:
        """Whether a pin names this block."""
        return key in self._pins

    def set_policy(self, make_policy: Callable[[], EvictionPolicy], meta_of: Callable[[BlockKey], BlockMeta], now: float) -> None:
        """Takes another policy, seeded in the order in which the old one would let the blocks leave. Times to live go on."""
        self._make_policy = make_policy
        self._sort_anew(meta_of, now)

    def set_quota(self, tenant: str, num_bytes: int | None, meta_of: Callable[[BlockKey], BlockMeta], now: float) -> None:
        """Gives a tenant a quota, another one, or (None) takes it away. Nobody leaves because of it. Touches every block."""
        self._quotas.set(tenant, num_bytes)
        self._sort_anew(meta_of, now)

    @property
    def quotas(self) -> Mapping[str, int]:
        """Tenant -> bytes that it may always have."""
        return self._quotas.limits

    def bytes_by_tenant(self) -> dict[str, int]:
        """Bytes of each tenant's blocks here; those of blocks that are nobody's under the empty name."""
        others = self.num_bytes - sum(self._quotas.used.values())
        return self._quotas.used | ({POOL: others} if others else {})

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
        return sum(len(policy) for (size, _), policy in self._policies.items() if size == num_bytes)

    def __len__(self) -> int:
        return sum(len(policy) for policy in self._policies.values())

    def _ensure_policy(self, num_bytes: int, owner: str) -> EvictionPolicy:
        policy = self._policies.get((num_bytes, owner))
        if policy is None:
            policy = self._policies[num_bytes, owner] = self._make_policy()
        return policy

    def _policy_of(self, keys: Sequence[BlockKey], num_bytes: int) -> EvictionPolicy | None:
        """The order in which blocks of one tenant are; it may not hold all of them."""
        owner = POOL
        if self._quotas.limits and self.tenant_of is not None:
            tenant = next((tenant for key in keys if (tenant := self.tenant_of(key))), POOL)
            owner = self._quotas.owner(tenant)
        return self._policies.get((num_bytes, owner))

    def _owner_of(self, key: BlockKey) -> str:
        return POOL if self.tenant_of is None else self._quotas.owner(self.tenant_of(key))

    def _left(self, keys: Sequence[BlockKey], num_bytes: int) -> None:
        self.num_bytes -= num_bytes * len(keys)
        if self.tenant_of is not None:
            for key in keys:
                self._quotas.count(self.tenant_of(key), -num_bytes)
        if self._expiry is not None:
            for key in keys:
                self._expiry.remove(key)

    def _sort_anew(self, meta_of: Callable[[BlockKey], BlockMeta], now: float) -> None:
        """Puts every block into a new order, one for each owner. Pinned ones and those before them come last."""
        olds, self._policies = self._policies, {}
        for (num_bytes, _), old in olds.items():
            pinned = [key for key in self._pins if key in old]
            for key in pinned:
                old.unpin(key, now)
            for key in old.victims(len(old), now):
                self._ensure_policy(num_bytes, self._owner_of(key)).insert(meta_of(key), now)
            for key in pinned:
                self._ensure_policy(num_bytes, self._owner_of(key)).pin(key)
