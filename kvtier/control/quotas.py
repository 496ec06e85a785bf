"""Bytes that tenants may have in one tier, and who makes room for whom.

A tenant with a quota can always have so many bytes. What it leaves unused, others borrow, and give back when it comes: room for a tenant
within its quota is made by those who are over theirs, the one that is over by most first. A tenant over its quota makes room for itself.
Tenants without a quota, and blocks that are nobody's, share what the quotas leave, in one common order.
"""

from __future__ import annotations

from collections.abc import Sequence

POOL = ""
"""the owner that stands for all tenants without a quota"""


class Quotas:
    """Quotas and exact bytes by tenant of one tier. Pure."""

    __slots__ = ("limits", "used")

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        """tenant -> bytes that it may always have"""
        self.used: dict[str, int] = {}
        """tenant -> bytes of its blocks; tenants without blocks are left out, and so is what is nobody's in particular"""

    def owner(self, tenant: str) -> str:
        """Under which name a tenant's blocks are kept in order: its own where it has a quota, else the pool's."""
        return tenant if tenant in self.limits else POOL

    def set(self, tenant: str, num_bytes: int | None) -> None:
        """Gives a quota, or (None) takes it away."""
        if num_bytes is None:
            self.limits.pop(tenant, None)
        else:
            self.limits[tenant] = num_bytes

    def count(self, tenant: str, num_bytes: int) -> None:
        """Bytes came (or, below 0, left). Those of nobody in particular are not counted."""
        if not tenant:
            return
        left = self.used.get(tenant, 0) + num_bytes
        if left:
            self.used[tenant] = left
        else:
            del self.used[tenant]

    def source(
        self, owners: Sequence[str], tenant: str, num_bytes: int, count: int, num_freed: int, held_bytes: int
    ) -> tuple[str, int] | None:
        """Who gives up blocks next for ``count`` blocks of a tenant, of which ``num_freed`` have found room, and how many at most.

        ``owners``: those who may have blocks that can leave. ``held_bytes``: of all blocks before the first of them left; a tier that
        must evict is full, so that is what it holds. None: nobody should.
        """
        wanting = self.owner(tenant)
        excess = {owner: self._excess(owner, held_bytes, num_freed * num_bytes) for owner in {*owners, wanting}}
        excess[wanting] += count * num_bytes
        over = [owner for owner in owners if excess[owner] > 0]
        if wanting in over:
            source = wanting
        elif over:
            source = max(over, key=lambda owner: (excess[owner], owner))
        elif excess[wanting] <= 0 and owners:
            # Nobody over a quota has blocks that can leave, but the tenant may have its share.
            return max(owners, key=lambda owner: (excess[owner], owner)), count - num_freed
        else:
            return None
        return source, min(count - num_freed, -(-excess[source] // num_bytes))

    def _excess(self, owner: str, held_bytes: int, freed_bytes: int) -> int:
        """Bytes above what an owner may always have; below 0 where it may have more."""
        if owner != POOL:
            return self.used.get(owner, 0) - self.limits[owner]
        pool_bytes = held_bytes - freed_bytes - sum(self.used.get(tenant, 0) for tenant in self.limits)
        return pool_bytes - max(0, held_bytes - sum(self.limits.values()))
