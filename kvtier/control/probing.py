"""Probes: asking stores that others write to what they hold of a prompt, and taking what they have into the index."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.control.books import Books
from kvtier.control.commands import Forget, Probe
from kvtier.control.lower import LowerTier
from kvtier.types import BlockKey, BlockMeta

MAX_PROBES = 64
"""under way at once, for each tier; more are not made, and their requests go on with what is known"""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A probe under way: the keys from the first unknown one on, and the one before them."""

    tier: LowerTier
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    num_bytes: int
    tenant: str
    is_cancelled: bool = False


class Prober:
    """Starts and ends probes for the planner, whose methods document them."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._shared = [tier for tier in books.lower if tier.spec.is_shared]
        self._running: dict[int, _Asked] = {}
        self._asked: dict[tuple[int, BlockKey], int] = {}
        """(tier, first key) -> the probe that asks for it"""

    @property
    def tiers(self) -> list[str]:
        """Names of the tiers that can be asked."""
        return [tier.residency.name for tier in self._shared]

    def ask(self, keys: Sequence[BlockKey], first: int, num_bytes: int, tenant: str, now: float, names: Sequence[str] | None) -> bool:
        """See :meth:`Planner.probe`."""
        is_awaited = False
        for tier in self._shared:
            if tier.online and (names is None or tier.residency.name in names):
                is_awaited |= self._ask(tier, keys, first, num_bytes, tenant, now)
        return is_awaited

    def finished(self, job_id: int, num_bytes: Sequence[int], now: float) -> None:
        """See :meth:`Planner.probed`."""
        asked = self._running.pop(job_id)
        tier = asked.tier
        if self._asked.get((tier.index, asked.keys[0])) == job_id:
            del self._asked[tier.index, asked.keys[0]]
        if asked.is_cancelled:
            return
        # A value of another length cannot be one of these blocks, whatever its name says.
        num_found = sum(1 for _ in itertools.takewhile(lambda size: size == asked.num_bytes, num_bytes))
        if num_found < len(asked.keys):
            tier.absent.add(asked.keys[num_found], now)
        parents = (asked.parent, *asked.keys)
        self._enter(tier, [BlockMeta(key, parents[p], asked.num_bytes) for p, key in enumerate(asked.keys[:num_found])], asked.tenant, now)

    def cancel(self, tier_index: int) -> None:
        """What is under way to a tier was asked before its blocks were forgotten: the answers are not used."""
        for job_id, asked in self._running.items():
            if asked.tier.index == tier_index:
                self._running[job_id] = _Asked(asked.tier, asked.keys, asked.parent, asked.num_bytes, asked.tenant, is_cancelled=True)
                self._asked.pop((tier_index, asked.keys[0]), None)

    def _ask(self, tier: LowerTier, keys: Sequence[BlockKey], first: int, num_bytes: int, tenant: str, now: float) -> bool:
        place = tier.index, keys[first]
        if place in self._asked:
            return True
        entry = self._books.index.get(keys[first])
        if tier.absent.holds(keys[first], now) or (entry is not None and entry.readable & tier.bit):
            return False
        if len(self._running) >= MAX_PROBES * len(self._shared):
            self._books.stats.add("probe.refused")
            return False
        job_id = self._asked[place] = next(self._books.ids)
        asked = _Asked(tier, tuple(keys[first:]), keys[first - 1] if first else None, num_bytes, tenant)
        self._running[job_id] = asked
        self._books.commands.append(Probe(job_id, tier.index, asked.keys))
        return True

    def _enter(self, tier: LowerTier, found: list[BlockMeta], tenant: str, now: float) -> None:
        """The blocks are in the tier: they are hits from now on, as far as so many may be known of."""
        books = self._books
        index, residency = books.index, tier.residency
        new = [meta for meta in found if (entry := index.get(meta.key)) is None or not (entry.readable | entry.busy) & tier.bit]
        if not new:
            return
        if tenant:
            books.know_tenants()
        short = min(len(new), tier.shortage(len(new), new[0].num_bytes))
        if short > 0:
            victims = residency.victims(short, new[0].num_bytes, now, tenant).keys
            for key in victims:
                books.host.forget_lower(tier, key)
            books.commands.append(Forget(tier.index, tuple(victims)))
            new = new[: len(new) - short + len(victims)]
        new.reverse()
        entries = [index.ensure(meta.key, meta.parent, meta.num_bytes, tenant) for meta in new]
        for entry in entries:
            entry.readable |= tier.bit
            books.host.tell(True, residency.name, entry)
        if entries:
            residency.insert([entry.meta for entry in entries], now)

    def __len__(self) -> int:
        return len(self._running)
