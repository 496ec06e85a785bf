"""What a CacheEngine can do beside serving requests: the verbs of the control API, on the thread that drives the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from kvtier.control.moves import Move
from kvtier.control.operations import HOST_TIER, Holding
from kvtier.control.planner import Planner
from kvtier.controlled import Snapshot
from kvtier.errors import QuotaError
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.tiers.base import Tier
from kvtier.transfer import TransferRunner
from kvtier.types import BlockKey


class Verbs:
    """Belongs to a :class:`~kvtier.CacheEngine` (``engine.verbs``) and, like it, to the thread that drives it.

    Tiers by number: see ``tiers``. :class:`~kvtier.Controller` offers these to all threads.
    """

    def __init__(
        self,
        planner: Planner,
        runner: TransferRunner,
        tiers: Sequence[Tier],
        slab: SlabAllocator,
        *,
        block_bytes: int,
        max_reserved_blocks: int,
        clock: Callable[[], float],
    ) -> None:
        self.tiers = planner.tiers
        """name of each tier -> its number, fastest first"""
        self.capacity_blocks = slab.max_slots(block_bytes)
        """how many blocks host memory holds once it is prepared"""
        self.max_reserved_blocks = max_reserved_blocks
        """share of all pins of users and hints"""
        self._planner = planner
        self._runner = runner
        self._lower = tiers
        self._block_bytes = block_bytes
        self._clock = clock

    @property
    def reserved_blocks(self) -> int:
        """Blocks that ``reserve`` keeps; shared ones count for each pin."""
        return self._planner.reserved_blocks

    def holdings(self, keys: Sequence[BlockKey]) -> dict[int, Holding]:
        """What each tier holds of the leading run of ``keys`` that some tier holds."""
        return self._planner.holdings(keys)

    def reserve(self, keys: Sequence[BlockKey], ttl_s: float | None) -> tuple[int | None, int]:
        """A pin that counts towards a share. Returns its id, None where it is refused, and its blocks in host memory."""
        return self._planner.reserve(keys, None if ttl_s is None else self._clock() + ttl_s, self.max_reserved_blocks)

    def sources(self, keys: Sequence[BlockKey]) -> list[tuple[str, int]]:
        """Where the leading run of ``keys`` would be taken from: names of tiers and how many blocks behind each other each would give."""
        return self._planner.sources(keys)

    def evict(self, keys: Sequence[BlockKey], tiers: Collection[int], *, everywhere: bool = False) -> int:
        """Drops a prefix from tiers, tail first, up to what must stay. Returns how many blocks left. ``everywhere``: for all engines."""
        gone = self._planner.evict(keys, tiers, everywhere=everywhere)
        self._runner.run()
        return gone

    def move(self, keys: Sequence[BlockKey], source: int, target: int) -> Move:
        """Starts a move between host memory and a lower tier; the engine's ``poll`` carries it on."""
        move = self._planner.move(keys, source, target, self._clock())
        self._runner.run()
        return move

    def cancel_move(self, move: Move) -> None:
        """Ends a move where it is. One that is done is fine."""
        self._planner.cancel_move(move)

    def clear(self, tiers: Collection[int], tenant: str | None, *, everywhere: bool = False) -> int:
        """Forgets everything, or all of a tenant's, in tiers. Returns how many blocks that were. ``everywhere``: for all engines."""
        gone = self._planner.clear(tiers, tenant, everywhere=everywhere)
        self._runner.run()
        return gone

    def set_policy(self, tier: int, name: str) -> None:
        """Gives a tier another policy, seeded with the order of the old one."""
        self._planner.set_policy(tier, lambda: create_policy(name), self._clock())

    def set_quota(self, tier: int, tenant: str, num_bytes: int | None) -> Mapping[str, int]:
        """Says how many bytes a tenant may always have in a tier (None: as all others). Returns all quotas of the tier.

        Raises:
            QuotaError: quotas together would exceed the tier.
        """
        quotas = {name: quota for name, quota in self._planner.quotas(tier).items() if name != tenant}
        capacity_bytes = self._capacity_bytes(tier)
        if num_bytes is not None and capacity_bytes is not None and num_bytes + sum(quotas.values()) > capacity_bytes:
            raise QuotaError(
                f"quota of {tenant!r}: {num_bytes} bytes beside {sum(quotas.values())} of other tenants; "
                f"allowed: {capacity_bytes} in all, what the tier holds"
            )
        self._planner.set_quota(tier, tenant, num_bytes, self._clock())
        return dict(self._planner.quotas(tier))

    def _capacity_bytes(self, tier: int) -> int | None:
        num_blocks = self.capacity_blocks if tier == HOST_TIER else self._lower[tier - 1].max_blocks(self._block_bytes)
        return None if num_blocks is None else num_blocks * self._block_bytes

    def snapshot(self, counters: Mapping[str, int], figures: Mapping[str, float]) -> Snapshot:
        """All figures at once, beside the engine's counters and estimates."""
        capacity = {"host": self.capacity_blocks} | {tier.name: tier.max_blocks(self._block_bytes) for tier in self._lower}
        planner = self._planner
        tenants = planner.bytes_by_tenant()
        return Snapshot(counters, planner.num_blocks(), planner.num_bytes(), tenants, capacity, planner.leftovers(), figures)

    def online(self) -> dict[str, bool]:
        """Which tiers are online; memory always is."""
        return {name: number <= HOST_TIER or self._lower[number - 1].online for name, number in self.tiers.items()}
