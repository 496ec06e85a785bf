"""Writing blocks down: what is queued, what is under way, and what must leave the lower tier first. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from kvtier.control.commands import Command, Demote
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.lower import MAX_JOB_BYTES, LowerTier
from kvtier.control.plans import DemotionPlan
from kvtier.stats import Stats
from kvtier.types import BlockKey, Outcome

Forget = Callable[[LowerTier, BlockKey], None]
"""how the planner forgets a block in a lower tier"""

OUTCOME_COUNTERS = {Outcome.MISS: "missing", Outcome.CORRUPT: "corrupt", Outcome.REJECTED: "rejected", Outcome.FAILED: "failed"}
"""what did not come out OK -> the last part of its counter's name"""


class Demoter:
    """Starts and ends demotions for the planner. Bytes in flight per tier are bounded."""

    def __init__(self, space: HostSpace, lower: Sequence[LowerTier], ids: Iterator[int], stats: Stats) -> None:
        self._space = space
        self._lower = lower
        self._ids = ids
        self._stats = stats
        self._running: dict[int, DemotionPlan] = {}
        self._commands: list[Command] = []

    @property
    def num_running(self) -> int:
        """Demotions that have not been reported yet."""
        return len(self._running)

    def take_commands(self) -> list[Command]:
        """What is to be carried out, in this order; empties the list."""
        commands, self._commands = self._commands, []
        return commands

    def committed(self, entry: Entry, now: float) -> None:
        """A block came to host memory: queue it for the tiers that want it."""
        for tier in self._lower:
            if not tier.committed(entry, now):
                self._stats.add(f"{tier.residency.name}.used_once_blocks")

    def forget_waiting(self, entries: Sequence[Entry]) -> None:
        """Blocks are no longer in host memory: they cannot be written down any more."""
        for tier in self._lower:
            num_skipped = sum(tier.forget_waiting(entry.key) for entry in entries)
            self._stats.add(f"{tier.residency.name}.skipped_blocks", num_skipped)

    def pump(self, index: Index, now: float, max_dirty: float, forget: Forget) -> None:
        """Starts the writes that are due, as far as the bound on bytes in flight allows.

        ``max_dirty``: no more blocks than this may wait, due or not, so that eviction finds blocks it need not write first.
        """
        for tier in self._lower:
            while tier.has_budget() and tier.has_due(now, max_dirty):
                batch: list[Entry] = []
                for key in tier.due(now, max_dirty):
                    entry = index.get(key)
                    if entry is None or not entry.readable & HOST or (entry.readable | entry.busy) & tier.bit:
                        continue
                    batch.append(entry)
                    if len(batch) * entry.num_bytes >= MAX_JOB_BYTES:
                        break
                self._start_alike(tier, batch, now, forget)

    def on_evict(self, entries: Sequence[Entry], now: float, forget: Forget) -> None:
        """Blocks are about to leave host memory: those that a tier still wants are written down from their leased slots."""
        for tier in self._lower:
            wanted = [entry for entry in entries if tier.wants_on_evict(entry)]
            if not wanted:
                continue
            for entry in wanted:
                tier.forget_waiting(entry.key)
            if tier.has_budget():
                self._start_alike(tier, wanted, now, forget)
            else:
                self._stats.add(f"{tier.residency.name}.skipped_blocks", len(wanted))

    def finished(self, job_id: int, outcomes: Sequence[Outcome], index: Index, now: float) -> tuple[LowerTier, list[Entry]]:
        """A demotion is done. Returns the tier and the blocks that are readable there now."""
        plan = self._running.pop(job_id)
        tier = self._lower[plan.tier - 1]
        tier.finished(len(plan.entries), plan.entries[0].num_bytes)
        self._space.release(plan.slots, job_id)
        stored: list[Entry] = []
        for entry, outcome in zip(plan.entries, outcomes, strict=True):
            entry.busy &= ~tier.bit
            if outcome is Outcome.OK and entry.key not in plan.unwanted:
                stored.append(entry)
            elif outcome is not Outcome.OK:
                self._stats.add(f"{tier.residency.name}.{OUTCOME_COUNTERS[outcome]}_blocks")
        for entry in stored:
            entry.readable |= tier.bit
        if stored:
            tier.residency.insert([entry.meta for entry in reversed(stored)], now)
        if tier.spec.is_shared:
            tier.absent.discard(entry.key for entry in stored)
        for entry in plan.entries:
            index.drop_if_gone(entry)
        if plan.unwanted:
            unwanted = [entry.key for entry in plan.entries if entry.key in plan.unwanted]
            self._commands.append(tier.dropped(unwanted, everywhere=plan.is_unwanted_everywhere))
        self._stats.add(f"{tier.residency.name}.stored_blocks", len(stored))
        return tier, stored

    def cancel(self, is_unwanted: Callable[[Entry, int], bool], *, everywhere: bool) -> None:
        """These blocks are forgotten in a tier (its number): what is under way there is to be removed again when it arrives.

        ``everywhere``: also from a tier that others share.
        """
        for job_id, plan in self._running.items():
            keys = {entry.key for entry in plan.entries if is_unwanted(entry, plan.tier)}
            if keys:
                is_everywhere = plan.is_unwanted_everywhere or everywhere
                self._running[job_id] = dataclasses.replace(plan, unwanted=plan.unwanted | keys, is_unwanted_everywhere=is_everywhere)

    def _start_alike(self, tier: LowerTier, entries: Sequence[Entry], now: float, forget: Forget) -> None:
        groups: dict[tuple[int, str], list[Entry]] = {}
        for entry in entries:
            groups.setdefault((entry.num_bytes, entry.tenant), []).append(entry)
        for group in groups.values():
            self._start(tier, group, now, forget)

    def _start(self, tier: LowerTier, entries: list[Entry], now: float, forget: Forget) -> None:
        num_bytes = entries[0].num_bytes
        if tier.spec.admission is not None:
            granted = tier.spec.admission.grant(len(entries), num_bytes, now)
            self._stats.add(f"{tier.residency.name}.over_budget_blocks", len(entries) - granted)
            entries = entries[:granted]
            if not entries:
                return
        entries = self._make_room(tier, entries, forget, now)
        if not entries:
            return
        job_id = next(self._ids)
        slots = tuple(entry.slot for entry in entries)
        self._space.lease(slots, job_id)
        for entry in entries:
            entry.busy |= tier.bit
        tier.started(len(entries), num_bytes)
        self._running[job_id] = DemotionPlan(tier.index, tuple(entries), slots)
        self._commands.append(Demote(job_id, tier.index, tuple(entry.meta for entry in entries), slots))

    def _make_room(self, tier: LowerTier, entries: Sequence[Entry], forget: Forget, now: float) -> list[Entry]:
        """Evicts what is missing. Returns the blocks that fit and are worth it: of each run of blocks of one prompt the leading part."""
        residency, num_bytes = tier.residency, entries[0].num_bytes
        # The blocks before the new ones must not make room for them.
        new = {entry.key for entry in entries}
        anchors = [key for key in dict.fromkeys(entry.parent for entry in entries) if key is not None and key not in new]
        for key in anchors:
            residency.pin(key, num_bytes)
        taken: list[Entry] = []
        for run in _runs(entries):
            short = min(len(run), tier.shortage(len(taken) + len(run), num_bytes))
            if short > 0:
                incoming = [entry.meta for entry in run[-short:]]
                victims, num_declined = residency.victims(short, num_bytes, now, run[0].tenant, incoming)
                self._evict(tier, victims, forget)
                self._stats.add(f"{residency.name}.not_admitted_blocks", num_declined)
                self._stats.add(f"{residency.name}.rejected_blocks", short - len(victims) - num_declined)
                taken += run[: len(run) - short + len(victims)]
            else:
                taken += run
        for key in anchors:
            residency.unpin(key, num_bytes, now)
        return taken

    def _evict(self, tier: LowerTier, victims: list[BlockKey], forget: Forget) -> None:
        if not victims:
            return
        for key in victims:
            forget(tier, key)
        self._stats.add(f"{tier.residency.name}.evicted_blocks", len(victims))
        self._commands.append(tier.dropped(victims))


def _runs(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The blocks in runs, each block of a run being the parent of the next."""
    runs: list[list[Entry]] = []
    for entry in entries:
        if runs and runs[-1][-1].key == entry.parent:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
