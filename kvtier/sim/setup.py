"""The tiers of a simulation, and the planner over them: the one that serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvtier.config import Config
from kvtier.control.admission import Admission
from kvtier.control.expiry import ExpiryQueue
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.lower import LowerTierSpec, WriteMode
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.control.victim_buffer import VICTIM_SHARE
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.policies.base import EvictionPolicy
from kvtier.stats import Stats

PolicyFactory = Callable[[str], EvictionPolicy]


@dataclass(frozen=True, slots=True)
class TierSetup:
    """One tier. ``ttl_s`` None: blocks do not expire."""

    capacity_blocks: int
    policy: str = "lru"
    ttl_s: float | None = None
    ttl_mode: str = "sliding"

    def residency(self, name: str, make_policy: PolicyFactory) -> Residency:
        """The tier's books."""
        expiry = None if self.ttl_s is None else ExpiryQueue(self.ttl_s, sliding=self.ttl_mode == "sliding")
        return Residency(name, lambda: make_policy(self.policy), expiry, expires_by_policy=self.ttl_mode == "auto")


@dataclass(frozen=True, slots=True)
class Setup:
    """All tiers, and the settings that decide how requests use them."""

    host: TierSetup
    disk: TierSetup | None = None
    write: str = "through"
    admit: str = "all"
    daily_writes_bytes: int | None = None
    exclusive: bool = False
    max_in_flight_bytes: int = 256 << 20
    victim_share: float = VICTIM_SHARE
    promote_wait_s: float = 2.0
    max_pinned_fraction: float = 0.5
    max_kept_fraction: float = 0.25
    """share of host memory that hints may keep (``control.max_pinned_fraction``)"""
    store_decode_blocks: bool = True

    @classmethod
    def of(cls, config: Config, block_bytes: int) -> Setup:
        """The setup that a configuration means for blocks of a size."""
        host, disk = config.host, config.disk
        slots = SlabAllocator.of_host(host.capacity_bytes, block_bytes).max_slots(block_bytes)
        return cls(
            TierSetup(slots, config.policy_of(host), host.ttl_s, host.ttl_mode),
            None if disk is None else TierSetup(disk.capacity_bytes // block_bytes, config.policy_of(disk), disk.ttl_s, disk.ttl_mode),
            *(("through", "all", None, False) if disk is None else (disk.write.value, disk.admit, disk.daily_writes_bytes, disk.exclusive)),
            256 << 20 if disk is None else disk.max_in_flight_bytes,
            host.victim_share,
            config.connector.promote_wait_s,
            config.connector.max_pinned_fraction,
            config.control.max_pinned_fraction,
            config.connector.store_decode_blocks,
        )

    def with_policy(self, policy: str) -> Setup:
        """The same with another policy in all tiers."""
        disk = None if self.disk is None else replace(self.disk, policy=policy)
        return replace(self, host=replace(self.host, policy=policy), disk=disk)

    def planner(self, block_bytes: int, stats: Stats, *, make_policy: PolicyFactory = create_policy, events: bool = False) -> Planner:
        """A planner with empty tiers. Raises ValueError where a tier holds no block."""
        for name, tier in (("host", self.host), ("disk", self.disk)):
            if tier is not None and tier.capacity_blocks < 1:
                raise ValueError(f"the {name} tier holds {tier.capacity_blocks} blocks of {block_bytes} bytes; allowed: at least 1")
        space = HostSpace(CountedSlots(self.host.capacity_blocks), [0] * self.host.capacity_blocks)
        lower: list[LowerTierSpec] = []
        if self.disk is not None:
            bound = self.disk.capacity_blocks
            residency = self.disk.residency("disk", make_policy)
            admission = Admission.of(self.admit, self.daily_writes_bytes)
            write = WriteMode(self.write)
            lower.append(LowerTierSpec(residency, lambda _: bound, write, self.max_in_flight_bytes, admission, is_exclusive=self.exclusive))
        host = self.host.residency("host", make_policy)
        return Planner(space, host, lower, stats, events=events, victim_share=self.victim_share)


class CountedSlots:
    """An allocator of equal slots that only counts: there are no bytes to place. Slot ``i`` is said to be at page ``i``."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._next = 0
        self._free: list[int] = []

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a free slot; None where there is none."""
        if self._free:
            return self._free.pop()
        if self._next == self._num_slots:
            return None
        self._next += 1
        return (self._next - 1) * PAGE_BYTES

    def adopt(self, offset: int, num_bytes: int) -> None:
        """Raises ValueError: nothing outlives a simulation."""
        raise ValueError(f"no slot at {offset} outlived anything")

    def free(self, offset: int) -> None:
        """Takes a slot back."""
        self._free.append(offset)

    def available(self, num_bytes: int) -> int:
        """How many slots are free."""
        return len(self._free) + self._num_slots - self._next

    def crowded_out(self, num_bytes: int) -> list[int]:
        """Nothing: there are no blocks of another size."""
        return []

    def check(self) -> list[str]:
        """Broken promises in words; empty = healthy."""
        return [] if len(self._free) == len(set(self._free)) else ["a slot is free twice"]
