"""What the planner keeps of one tier: who is in it, in which order they leave, until when, and who may not.

Blocks of different sizes have an order each, because room freed by one size is of no use to another; and so have the blocks of each
tenant with a quota, so that a tenant's blocks can leave without others'. A tenant's blocks continue its own, or what a restart has found
of them, which counts as nobody's; so victims are leaves in each order, but for those, which may leave before what continues them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvtier.control.expiry import ExpiryQueue
from kvtier.control.index import Entry
from kvtier.control.quotas import POOL, Quotas
from kvtier.control.runs import runs_of
from kvtier.control.victim_buffer import VictimBuffer, Writes
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta

JUDGE_EVERY_S = 1.0
"""how often policies are asked what is past its time to live"""


class Victims(NamedTuple):
    """Who leaves a tier, and how many of those that want the room are turned away because they are worth less."""

    keys: list[BlockKey]
    num_declined: int


class Residency:
    """The committed blocks of one tier. Pure; ``now`` in seconds."""

    __slots__ = (
        "_buffer",
        "_expires_by_policy",
        "_expiry",
        "_judged_at",
        "_make_policy",
        "_pins",
        "_policies",
        "_quotas",
        "name",
        "num_bytes",
        "tenant_of",
    )

    def __init__(
        self, name: str, make_policy: Callable[[], EvictionPolicy], expiry: ExpiryQueue | None, *, expires_by_policy: bool = False
    ) -> None:
        """``expiry``: a time to live for all blocks; ``expires_by_policy``: each has the one that its policy has learned. Not both."""
        self.name = name
        self.num_bytes = 0
        self.tenant_of: Callable[[BlockKey], str] | None = None
        """whose a block is; it must know each block as long as it is here. None: all blocks so far are nobody's"""
        self._make_policy = make_policy
        self._buffer: Callable[[EvictionPolicy], VictimBuffer] | None = None
        self._policies: dict[tuple[int, str], EvictionPolicy] = {}
        """(bytes of a block, tenant with a quota or the pool of the others) -> their order"""
        self._quotas = Quotas()
        self._expiry = expiry
        self._expires_by_policy = expires_by_policy
        self._judged_at = -math.inf
        self._pins: dict[BlockKey, int] = {}

    def use_buffer(self, writes: Writes, entry_of: Callable[[BlockKey], Entry], share: float) -> None:
        """Puts a victim buffer behind each order; before the first block comes."""
        self._buffer = lambda policy: VictimBuffer(policy, writes, entry_of, share)

    def let_go(self, num_bytes: int, num_free: int, now: float) -> None:
        """Fills the victim buffers of blocks of a size, as far as the free room is less than they hold."""
        for (size, _), policy in self._policies.items():
            if size == num_bytes and isinstance(policy, VictimBuffer):
                policy.fill(num_free, now)

    def written(self, entry: Entry) -> None:
        """A write of a block has begun or ended, or will not be: it may leave, or no longer."""
        policy = self._policy_of(entry.key, entry.num_bytes)
        if isinstance(policy, VictimBuffer):
            policy.written(entry)

    def num_leaving(self, num_bytes: int) -> tuple[int, int]:
        """How many blocks of a size have been let go and wait to be written, and how many are being written."""
        buffers = [policy for (size, _), policy in self._policies.items() if size == num_bytes and isinstance(policy, VictimBuffer)]
        return sum(buffer.num_waiting for buffer in buffers), sum(buffer.num_writing for buffer in buffers)

    def insert(self, blocks: Sequence[BlockMeta], now: float, *, is_use: bool = True) -> None:
        """Takes blocks of one size in as just used, in the given order. There must be one at least.

        ``is_use`` False: they are only brought here; ``touch`` follows if they are used.
        """
        tenant_of = self.tenant_of
        if tenant_of is None:
            self._insert(blocks, POOL, now, is_use)
            return
        # One tenant's, but for what a restart has found, which is nobody's, between them.
        for tenant, group in itertools.groupby(blocks, key=lambda block: tenant_of(block.key)):
            members = list(group)
            self._quotas.count(tenant, members[0].num_bytes * len(members))
            self._insert(members, self._quotas.owner(tenant), now, is_use)

    def _insert(self, blocks: Sequence[BlockMeta], owner: str, now: float, is_use: bool) -> None:
        block_bytes = blocks[0].num_bytes
        policy = self._ensure_policy(block_bytes, owner)
        if is_use:
            insert = policy.insert
            for block in blocks:
                insert(block, now)
        else:
            for run in runs_of(blocks[::-1]):
                policy.put_back(run, now)
        self.num_bytes += block_bytes * len(blocks)
        if self._expiry is not None:
            for block in blocks:
                self._expiry.insert(block.key, now)
        if self._pins:
            for block in blocks:
                if block.key in self._pins:
                    policy.pin(block.key)

    def touch(self, keys: Sequence[BlockKey], num_bytes: int, now: float) -> None:
        """Marks blocks of one size and one tenant as used, in the given order."""
        policies = self._policies_of(keys, num_bytes)
        for policy in policies:
            policy.touch(keys, now)
        if policies and self._expiry is not None:
            for key in keys:
                self._expiry.touch(key, now)

    def expect(self, keys: Sequence[BlockKey], num_bytes: int, seconds: float, now: float) -> None:
        """Somebody expects blocks of one size and one tenant, the tail of their prompt first, to be used in so many seconds."""
        for policy in self._policies_of(keys, num_bytes):
            policy.expect(keys, seconds, now)

    def index_of(self, key: BlockKey, num_bytes: int, now: float) -> float | None:
        """What the place of a block yields, in uses per second; None where its policy does not know."""
        policy = self._policy_of(key, num_bytes)
        return None if policy is None else policy.index_of(key, now)

    def least_index(self, tenant: str, num_bytes: int, now: float) -> float | None:
        """The same of the block that would leave first for one of a tenant's, in its own order."""
        policy = self._policies.get((num_bytes, self._quotas.owner(tenant)))
        return None if policy is None else policy.index_of(None, now)

    def remove(self, key: BlockKey, num_bytes: int) -> None:
        """Forgets a block; an absent one is fine. Pins on it stay and hold again when it comes back."""
        policy = self._policy_of(key, num_bytes)
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
            policy = self._policy_of(key, num_bytes)
            if policy is not None:
                policy.pin(key)

    def unpin(self, key: BlockKey, num_bytes: int, now: float) -> None:
        """Takes one pin back."""
        left = self._pins[key] - 1
        if left:
            self._pins[key] = left
            return
        del self._pins[key]
        policy = self._policy_of(key, num_bytes)
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
        """The blocks whose time is over; ``remove`` them. Pinned prefixes get a new time to live instead."""
        if self._expires_by_policy:
            return self._judged(now)
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
            policy = self._make_policy()
            policy = self._policies[num_bytes, owner] = policy if self._buffer is None else self._buffer(policy)
        return policy

    def _policy_of(self, key: BlockKey, num_bytes: int) -> EvictionPolicy | None:
        """The order in which a block would be; it need not be there."""
        owner = self._owner_of(key) if self._quotas.limits else POOL
        return self._policies.get((num_bytes, owner))

    def _policies_of(self, keys: Sequence[BlockKey], num_bytes: int) -> list[EvictionPolicy]:
        """The orders in which blocks of one tenant are: its own, and that of nobody in particular. Neither may hold all of them."""
        owners = {POOL}
        if self._quotas.limits and self.tenant_of is not None:
            owners.add(self._quotas.owner(next((tenant for key in keys if (tenant := self.tenant_of(key))), POOL)))
        return [policy for owner in owners if (policy := self._policies.get((num_bytes, owner))) is not None]

    def _owner_of(self, key: BlockKey) -> str:
        return POOL if self.tenant_of is None else self._quotas.owner(self.tenant_of(key))

    def _judged(self, now: float) -> list[BlockKey]:
        """What the policies say is past its time to live; they are asked once in a while."""
        if now - self._judged_at < JUDGE_EVERY_S:
            return []
        self._judged_at = now
        over: list[BlockKey] = []
        for (num_bytes, _), policy in self._policies.items():
            gone = policy.expired(now)
            self._left(gone, num_bytes)
            over += gone
        return over

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
            for key in list(old.drain(now) if isinstance(old, VictimBuffer) else old.victims(len(old), now)):
                self._ensure_policy(num_bytes, self._owner_of(key)).insert(meta_of(key), now)
            for key in pinned:
                self._ensure_policy(num_bytes, self._owner_of(key)).pin(key)
