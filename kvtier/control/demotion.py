"""Writing blocks down: what is queued, what is under way, and what must leave the lower tier first. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from kvtier.control.admission import Admission
from kvtier.control.commands import Command, Demote
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.lower import MAX_JOB_BYTES, LowerTier, WriteMode
from kvtier.control.plans import DemotionPlan
from kvtier.control.runs import runs_of
from kvtier.control.victim_buffer import WriteState
from kvtier.stats import Stats
from kvtier.types import BlockKey, Outcome

Forget = Callable[[LowerTier, BlockKey], None]
"""how the planner forgets a block in a lower tier"""

OUTCOME_COUNTERS = {Outcome.MISS: "missing", Outcome.CORRUPT: "corrupt", Outcome.REJECTED: "rejected", Outcome.FAILED: "failed"}
"""what did not come out OK -> the last part of its counter's name"""


class Demoter:
    """Starts and ends demotions for the planner. Bytes in flight per tier are bounded.

    Implements :class:`~kvtier.control.victim_buffer.Writes`. ``changed`` is told of each block whose write began, ended, or will not be.
    ``forget``: how a block that leaves a lower tier is forgotten. ``index_of``: what a block is worth to host memory
    (:meth:`EvictionPolicy.index_of`).
    """

    def __init__(self, space: HostSpace, index: Index, lower: Sequence[LowerTier], ids: Iterator[int], stats: Stats) -> None:
        self.changed: Callable[[Entry], None] = lambda _entry: None
        self.forget: Forget = lambda _tier, _key: None
        self.index_of: Callable[[Entry, float], float | None] = lambda _entry, _now: None
        self._space = space
        self._index = index
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

    def pump(self, now: float) -> None:
        """Starts the writes that are due, as far as the bound on bytes in flight allows."""
        for tier in self._lower:
            self._pump(tier, now)

    def state_of(self, entry: Entry) -> WriteState:
        """Whether a block is being written or still wanted by a tier that is online."""
        if entry.busy & ~HOST:
            return WriteState.WRITING
        return WriteState.WAITING if any(tier.wants(entry.key) for tier in self._lower) else WriteState.NOTHING

    def hurry(self, entries: Sequence[Entry], now: float) -> None:
        """Host memory's policy has let blocks go: those that a tier wants are written before others, in this order.

        With write-through they would be written by now if the tier could keep up, so nobody waits for them who needs their room now.
        """
        for tier in self._lower:
            for entry in entries:
                tier.hurry(entry.key)
            if tier.spec.write is not WriteMode.THROUGH:
                self._pump(tier, now)

    def finished(self, job_id: int, outcomes: Sequence[Outcome], now: float) -> tuple[LowerTier, list[Entry]]:
        """A demotion is done. Returns the tier and the blocks that are readable there now."""
        plan = self._running.pop(job_id)
        tier = self._lower[plan.tier - 1]
        tier.finished(len(plan.entries), plan.entries[0].num_bytes)
        self._space.release(plan.slots, job_id)
        if self._space.stuck:
            self.find_stuck()
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
            self.changed(entry)
            self._index.drop_if_gone(entry)
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

    def find_stuck(self) -> None:
        """Has host memory count no more on slots that are being written to tiers which are offline: nobody knows how long that takes."""
        offline = {tier.index for tier in self._lower if not tier.online}
        self._space.stuck = frozenset(slot for plan in self._running.values() if plan.tier in offline for slot in plan.slots)

    def _pump(self, tier: LowerTier, now: float) -> None:
        while tier.has_budget() and tier.has_due(now):
            batch: list[Entry] = []
            for key in tier.due(now):
                entry = self._index.get(key)
                if entry is None or not entry.readable & HOST or (entry.readable | entry.busy) & tier.bit:
                    continue
                batch.append(entry)
                if len(batch) * entry.num_bytes >= MAX_JOB_BYTES:
                    break
            self._start_alike(tier, batch, now)
            for entry in batch:
                self.changed(entry)

    def _start_alike(self, tier: LowerTier, entries: Sequence[Entry], now: float) -> None:
        groups: dict[tuple[int, str], list[Entry]] = {}
        for entry in entries:
            groups.setdefault((entry.num_bytes, entry.tenant), []).append(entry)
        for group in groups.values():
            self._start(tier, group, now)

    def _start(self, tier: LowerTier, entries: list[Entry], now: float) -> None:
        num_bytes = entries[0].num_bytes
        if tier.spec.admission is not None:
            entries = self._worth(tier, tier.spec.admission, entries, now)
            granted = tier.spec.admission.grant(len(entries), num_bytes, now)
            self._stats.add(f"{tier.residency.name}.over_budget_blocks", len(entries) - granted)
            entries = entries[:granted]
            if not entries:
                return
        entries = self._make_room(tier, entries, now)
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

    def _worth(self, tier: LowerTier, admission: Admission, entries: list[Entry], now: float) -> list[Entry]:
        """Without those that are worth less than what would leave a full tier for them."""
        num_bytes = entries[0].num_bytes
        if not admission.by_index or tier.shortage(len(entries), num_bytes) <= 0:
            return entries
        least = tier.residency.least_index(entries[0].tenant, num_bytes, now)
        worth: list[Entry] = []
        for run in runs_of(entries):
            worth += run[: admission.num_worth([self.index_of(entry, now) for entry in run], least)]
        self._stats.add(f"{tier.residency.name}.not_admitted_blocks", len(entries) - len(worth))
        return worth

    def _make_room(self, tier: LowerTier, entries: Sequence[Entry], now: float) -> list[Entry]:
        """Evicts what is missing. Returns the blocks that fit and are worth it: of each run of blocks of one prompt the leading part."""
        residency, num_bytes = tier.residency, entries[0].num_bytes
        # The blocks before the new ones must not make room for them.
        new = {entry.key for entry in entries}
        anchors = [key for key in dict.fromkeys(entry.parent for entry in entries) if key is not None and key not in new]
        for key in anchors:
            residency.pin(key, num_bytes)
        taken: list[Entry] = []
        for run in runs_of(entries):
            short = min(len(run), tier.shortage(len(taken) + len(run), num_bytes))
            if short > 0:
                # what was weighed already is not turned away
                is_weighed = tier.spec.admission is not None and tier.spec.admission.by_index
                incoming = [] if is_weighed else [entry.meta for entry in run[-short:]]
                victims, num_declined = residency.victims(short, num_bytes, now, run[0].tenant, incoming)
                self._evict(tier, victims)
                self._stats.add(f"{residency.name}.not_admitted_blocks", num_declined)
                self._stats.add(f"{residency.name}.rejected_blocks", short - len(victims) - num_declined)
                taken += run[: len(run) - short + len(victims)]
            else:
                taken += run
        for key in anchors:
            residency.unpin(key, num_bytes, now)
        return taken

    def _evict(self, tier: LowerTier, victims: list[BlockKey]) -> None:
        if not victims:
            return
        for key in victims:
            self.forget(tier, key)
        self._stats.add(f"{tier.residency.name}.evicted_blocks", len(victims))
        self._commands.append(tier.dropped(victims))
