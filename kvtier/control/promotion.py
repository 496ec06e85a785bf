"""Promotions: copies from a lower tier into slots of host memory, from the plan to the verified bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from kvtier.control.books import Books
from kvtier.control.commands import Promote
from kvtier.control.demotion import OUTCOME_COUNTERS
from kvtier.control.index import HOST, Entry
from kvtier.control.lower import LowerTier
from kvtier.control.plans import PromotionPlan
from kvtier.types import BlockKey, Outcome


class Promoter:
    """Starts and ends promotions for the planner, whose methods document them."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._running: dict[int, PromotionPlan] = {}

    def promote(self, keys: Sequence[BlockKey], now: float) -> int:
        """See :meth:`Planner.promote`."""
        books = self._books
        run = books.index.run(keys, 0, books.visible)
        missing = [entry for entry in run if not (entry.readable | entry.busy) & HOST]
        if not missing:
            return len(run)
        # What makes room may be written down, and must not crowd out down there what is about to come up.
        anchored = books.anchor_run(run)
        # Unconditional: whatever the blocks are worth, the request that waits for them gets them only through host memory.
        room = books.host.make_room(len(missing), missing[0].num_bytes, now, missing[0].tenant).num_blocks
        taken = missing[:room]
        for position, entry in enumerate(taken):
            if self._source_of(entry) is None or not books.space.take(entry):
                taken = taken[:position]
                break
            entry.busy |= HOST
        books.release(anchored, now)
        for tier in books.lower:
            self._start(tier, [entry for entry in taken if self._source_of(entry) is tier])
        if len(taken) == len(missing):
            return len(run)
        books.stats.add("promote.refused_blocks", len(missing) - len(taken))
        return run.index(missing[len(taken)])

    def finished(self, job_id: int, outcomes: Sequence[Outcome], now: float) -> None:
        """See :meth:`Planner.promoted`."""
        books = self._books
        plan = self._running.pop(job_id)
        tier = books.lower[plan.tier - 1]
        good: list[Entry] = []
        for entry, outcome in zip(plan.entries, outcomes, strict=True):
            if plan.is_cancelled:
                books.host.close_slot(entry)
            elif outcome is Outcome.OK:
                good.append(entry)
            else:
                books.stats.add(f"{tier.residency.name}.{OUTCOME_COUNTERS[outcome]}_blocks")
                if entry.readable & tier.bit:
                    tier.residency.remove(entry.key, entry.num_bytes)
                    entry.readable &= ~tier.bit
                    books.host.tell(False, tier.residency.name, entry)
                    books.commands.append(tier.dropped([entry.key]))
                if tier.spec.is_shared:
                    tier.absent.add(entry.key, now)  # or the next request would find it and fail the same way
                books.host.close_slot(entry)
        books.stats.add(f"{tier.residency.name}.loaded_blocks", len(good))
        tail_first = good[::-1]
        # the request that waits for them uses them when it starts, if it does
        books.host.filled(tail_first, [entry.meta for entry in tail_first], now, is_use=False)
        if tier.spec.is_exclusive:
            self._leave(tier, [entry for entry in good if entry.readable & tier.bit], now)

    def _leave(self, tier: LowerTier, entries: list[Entry], now: float) -> None:
        """What host memory has now leaves a tier that keeps no second copies; it is written there again when it leaves host memory."""
        books = self._books
        for entry in entries:
            books.host.forget_lower(tier, entry.key)
            tier.came_back(entry, now)
        if entries:
            books.commands.append(tier.dropped([entry.key for entry in entries]))

    def cancel(self, is_unwanted: Callable[[Entry], bool]) -> None:
        """What is under way of these blocks will come to nothing."""
        for job_id, plan in self._running.items():
            if any(is_unwanted(entry) for entry in plan.entries):
                self._running[job_id] = dataclasses.replace(plan, is_cancelled=True)

    def sources(self, keys: Sequence[BlockKey]) -> list[tuple[str, int]]:
        """See :meth:`Planner.sources`."""
        books = self._books
        found: list[tuple[str, int]] = []
        for entry in books.index.run(keys, 0, books.visible):
            source = books.host if entry.readable & HOST else self._source_of(entry)
            if source is None:
                break
            name = source.residency.name
            count = found.pop()[1] if found and found[-1][0] == name else 0
            found.append((name, count + 1))
        return found

    def _source_of(self, entry: Entry) -> LowerTier | None:
        """The fastest tier that has a block; None: it has left them all meanwhile."""
        return next((tier for tier in self._books.lower if entry.readable & tier.bit & self._books.visible), None)

    def _start(self, tier: LowerTier, entries: list[Entry]) -> None:
        if not entries:
            return
        books = self._books
        job_id = next(books.ids)
        self._running[job_id] = PromotionPlan(tier.index, tuple(entries))
        books.commands.append(Promote(job_id, tier.index, tuple(e.meta for e in entries), tuple(e.slot for e in entries)))

    def __len__(self) -> int:
        return len(self._running)
