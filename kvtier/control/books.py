"""What the planner's parts share: the index, host memory, the tiers below, pins, and the commands that are to be carried out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvtier.control.commands import Command
from kvtier.control.demotion import Demoter
from kvtier.control.host import HostMemory
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.lower import LowerTier, LowerTierSpec
from kvtier.control.pins import Pin
from kvtier.control.residency import Residency
from kvtier.stats import Stats
from kvtier.types import BlockKey


class Books:
    """One engine's blocks, tiers and counters. Pure, and not thread-safe: it belongs to its planner."""

    def __init__(
        self, space: HostSpace, host: Residency, lower: Sequence[LowerTierSpec], stats: Stats, *, events: bool, victim_share: float
    ) -> None:
        self.space = space
        self.lower = [LowerTier(index, spec) for index, spec in enumerate(lower, start=1)]
        self.visible = HOST | sum(tier.bit for tier in self.lower)
        """the tiers whose blocks are hits: those that are online"""
        self.index = Index()
        self.stats = stats
        self.ids = itertools.count(1)
        self.commands: list[Command] = []
        self.demoter = Demoter(space, self.index, self.lower, self.ids, stats)
        self.host = HostMemory(self.index, space, host, self.demoter, stats, events=events)
        self.demoter.forget = self.host.forget_lower
        if lower:
            host.use_buffer(self.demoter, self.index.__getitem__, victim_share)
            self.demoter.changed = host.written
            self.demoter.index_of = lambda entry, now: host.index_of(entry.key, entry.num_bytes, now)

    def know_tenants(self) -> None:
        """Blocks of tenants are coming: from now on they are counted."""
        if self.host.residency.tenant_of is None:
            for residency in (self.host.residency, *(tier.residency for tier in self.lower)):
                residency.tenant_of = self.index.tenant_of

    def residency(self, tier_index: int) -> Residency:
        """Who is in a tier; 0 is host memory."""
        return self.host.residency if tier_index == 0 else self.lower[tier_index - 1].residency

    def is_pinned(self, tier_index: int, key: BlockKey) -> bool:
        """Whether a block (not only one behind it) is pinned in a tier. Nothing is in device memory, which has no pins."""
        return tier_index >= 0 and self.residency(tier_index).is_pinned(key)

    def last_in_host(self, run: Sequence[Entry]) -> Entry | None:
        """The last block of the part of a run that lies in host memory without a gap."""
        last = None
        for entry in run:
            if not entry.readable & HOST:
                break
            last = entry
        return last

    def anchor(self, entry: Entry | None) -> Pin:
        """Pins a block in host memory for as long as something behind it is on its way."""
        if entry is None or not entry.readable & HOST:
            return Pin((), None)
        self.host.residency.pin(entry.key, entry.num_bytes)
        return Pin(((0, entry.key, entry.num_bytes),), None)

    def anchor_run(self, run: Sequence[Entry]) -> Pin:
        """Pins a run where it lies, down to its last block in each tier, for as long as room is made for a part of it."""
        last = self.last_in_host(run)
        places = [] if last is None else [(0, last)]
        for tier in self.lower:
            end = next((entry for entry in reversed(run) if entry.readable & tier.bit), None)
            places += [] if end is None else [(tier.index, end)]
        for tier_index, entry in places:
            self.residency(tier_index).pin(entry.key, entry.num_bytes)
        return Pin(tuple((tier_index, entry.key, entry.num_bytes) for tier_index, entry in places), None)

    def release(self, pin: Pin, now: float) -> None:
        """Takes a pin's promises back."""
        for tier_index, key, num_bytes in pin.places:
            self.residency(tier_index).unpin(key, num_bytes, now)
