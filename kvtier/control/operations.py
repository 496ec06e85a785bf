"""What an operator or a program asks of the planner beside serving: who holds a prefix, dropping it, clearing a scope, another policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvtier.control.books import Books
from kvtier.control.index import HOST, Entry, children_of
from kvtier.control.probing import Prober
from kvtier.control.promotion import Promoter
from kvtier.control.residency import Residency
from kvtier.control.storing import Storing
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey

DEVICE_TIER = -1
"""number of the pool in device memory"""
HOST_TIER = 0
"""number of host memory; the tiers below follow"""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one tier holds of a prefix."""

    leading_blocks: int
    """from the first block on, without a gap"""
    num_blocks: int
    """of the prefix's blocks that some tier holds, gaps or not"""


class Operations:
    """Carries out the planner's verbs, whose methods document them. Tiers by number: see ``HOST_TIER``."""

    def __init__(self, books: Books, storing: Storing, promoter: Promoter, prober: Prober) -> None:
        self._books = books
        self._prober = prober
        self._storing = storing
        self._promoter = promoter

    def holdings(self, keys: Sequence[BlockKey]) -> dict[int, Holding]:
        """See :meth:`Planner.holdings`."""
        books = self._books
        run = books.index.run(keys, 0, books.visible)
        pool = books.host.device
        found: dict[int, list[bool]] = {}
        if pool is not None:
            found[DEVICE_TIER] = [entry.key in pool for entry in run]
        found[HOST_TIER] = [bool(entry.readable & HOST) for entry in run]
        for tier in books.lower:
            found[tier.index] = [bool(entry.readable & tier.bit & books.visible) for entry in run]
        return {
            tier: Holding(next((p for p, is_here in enumerate(here) if not is_here), len(here)), sum(here)) for tier, here in found.items()
        }

    def evict(self, keys: Sequence[BlockKey], tiers: Collection[int], *, everywhere: bool) -> int:
        """See :meth:`Planner.evict`."""
        gone = {key for tier_index in sorted(tiers, reverse=True) for key in self.drop(keys, tier_index, everywhere=everywhere)}
        self._books.stats.add("control.evicted_blocks", len(gone))
        return len(gone)

    def drop(self, keys: Sequence[BlockKey], tier_index: int, only_if: int = 0, *, everywhere: bool = False) -> list[BlockKey]:
        """Drops a prefix and what continues it in a tier, from the ends, up to the blocks that must stay. Returns those that left.

        Must stay: what is pinned there, what another prefix continues, and everything before these. ``only_if`` (a mask): blocks must be
        readable in one of these other tiers to leave; 0: no matter.
        """
        index = self._books.index
        named = [entry for key in keys if (entry := index.get(key)) is not None]
        if not named:
            return []
        behind = index.subtree(named[-1])[:-1] if named[-1].key == keys[-1] else []
        meant = behind + named[::-1]
        gone = set(meant)
        leaving: list[Entry] = []
        for entry in meant:
            if gone.issuperset(children_of(entry)) and self._may_leave(entry, tier_index, only_if):
                if self._is_in(entry, tier_index):
                    leaving.append(entry)
            else:
                gone.discard(entry)
        self._leave(leaving, tier_index, everywhere=everywhere)
        return [entry.key for entry in leaving]

    def clear(self, tiers: Collection[int], tenant: str | None, *, everywhere: bool) -> int:
        """See :meth:`Planner.clear`."""
        books = self._books
        is_meant: Callable[[Entry], bool] = (lambda _entry: True) if tenant is None else (lambda entry: entry.tenant == tenant)
        if HOST_TIER in tiers:
            self._storing.cancel(is_meant)
            self._promoter.cancel(is_meant)
        books.demoter.cancel(lambda entry, tier: tier in tiers and is_meant(entry), everywhere=everywhere)
        meant = [entry for entry in books.index if is_meant(entry)]
        gone: set[BlockKey] = set()
        for tier_index in sorted(tiers, reverse=True):
            leaving = [entry for entry in meant if self._is_in(entry, tier_index)]
            gone.update(entry.key for entry in leaving)
            self._leave(leaving, tier_index, everywhere=everywhere)
            if tier_index > HOST_TIER:
                self._prober.cancel(tier_index)
                for entry in meant:
                    books.lower[tier_index - 1].forget_waiting(entry.key)
        return len(gone)

    def set_policy(self, tier_index: int, make_policy: Callable[[], EvictionPolicy], now: float) -> None:
        """See :meth:`Planner.set_policy`."""
        self.residency(tier_index).set_policy(make_policy, lambda key: self._books.index[key].meta, now)

    def set_quota(self, tier_index: int, tenant: str, num_bytes: int | None, now: float) -> None:
        """See :meth:`Planner.set_quota`."""
        self._books.residency(tier_index).set_quota(tenant, num_bytes, lambda key: self._books.index[key].meta, now)

    def residency(self, tier_index: int) -> Residency:
        """Who is in a tier."""
        pool = self._books.host.device
        if tier_index == DEVICE_TIER and pool is not None:
            return pool.residency
        return self._books.residency(tier_index)

    def _may_leave(self, entry: Entry, tier_index: int, only_if: int) -> bool:
        if not self._is_in(entry, tier_index):
            return True
        return not self._books.is_pinned(tier_index, entry.key) and (not only_if or bool(entry.readable & only_if))

    def _is_in(self, entry: Entry, tier_index: int) -> bool:
        pool = self._books.host.device
        if tier_index == DEVICE_TIER:
            return pool is not None and entry.key in pool
        return bool(entry.readable & 1 << tier_index)

    def _leave(self, entries: Sequence[Entry], tier_index: int, *, everywhere: bool) -> None:
        books = self._books
        for entry in reversed(entries):  # the last of a prompt first: policies keep prompts in one piece, which costs nothing to shorten
            if tier_index == HOST_TIER:
                books.host.give_up(entry)
            elif tier_index > HOST_TIER:
                books.host.forget_lower(books.lower[tier_index - 1], entry.key)
            elif books.host.device is not None:
                books.host.device.drop(entry.key)
        if tier_index > HOST_TIER and entries:
            books.commands.append(books.lower[tier_index - 1].dropped([entry.key for entry in entries], everywhere=everywhere))
