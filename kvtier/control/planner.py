"""The planner: what to load, store, promote, demote and evict. A pure state machine: events and a time in, plans out.

It has no thread, no clock, no I/O. Whoever drives it carries out :meth:`Planner.take_commands` and reports the outcome; the serving
engine and the simulator drive the same code.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

from kvtier.control.audit import audit
from kvtier.control.commands import BlockEvent, Command, Promote, Remove
from kvtier.control.demotion import OUTCOME_COUNTERS, Demoter
from kvtier.control.device_pool import DevicePool
from kvtier.control.host import HostMemory
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Entry, Index
from kvtier.control.lower import LowerTier, LowerTierSpec
from kvtier.control.pins import Pin, PinTable
from kvtier.control.plans import LoadInFlight, PromotionPlan, StoreInFlight
from kvtier.control.residency import Residency
from kvtier.stats import Stats
from kvtier.types import BlockKey, BlockMeta, LoadPlan, Outcome, PrefixMatch, StorePlan


class Planner:
    """Decides over one host memory and the tiers below it. Not thread-safe: one thread drives it.

    ``now`` is in seconds, from any clock that does not go backwards.
    """

    def __init__(self, space: HostSpace, host: Residency, lower: Sequence[LowerTierSpec], stats: Stats, *, events: bool = False) -> None:
        self._space = space
        self._lower = [LowerTier(index, spec) for index, spec in enumerate(lower, start=1)]
        self._visible = HOST | sum(tier.bit for tier in self._lower)
        self._index = Index()
        self._stats = stats
        self._pins = PinTable()
        self._ids = itertools.count(1)
        self._epoch = 0
        self._stores: dict[int, StoreInFlight] = {}
        self._loads: dict[int, LoadInFlight] = {}
        self._promotions: dict[int, PromotionPlan] = {}
        self._commands: list[Command] = []
        self._demoter = Demoter(space, self._lower, self._ids, stats)
        self._host = HostMemory(self._index, space, host, self._demoter, stats, events=events)

    def use_device_pool(self, pool: DevicePool) -> None:
        """Puts a pool in device memory in front of host memory, before the first block comes."""
        self._host.device = pool

    # ---- asking -------------------------------------------------------------------------------------------------

    def match(self, keys: Iterable[BlockKey]) -> PrefixMatch:
        """The longest leading run of ``keys`` that some tier holds. Changes nothing; ``keys`` may be lazy."""
        return self._index.match(keys, self._visible)

    def take_commands(self) -> list[Command]:
        """What is to be carried out, in this order; empties the list."""
        commands, self._commands = self._commands, []
        commands.extend(self._demoter.take_commands())
        return commands

    def take_events(self) -> list[BlockEvent]:
        """What became readable or stopped being so since the last call (if events are on)."""
        if not self._host.events:
            return []
        events = list(self._host.events)
        self._host.events.clear()
        return events

    @property
    def num_running(self) -> int:
        """Promotions and demotions that have not been reported yet."""
        return len(self._promotions) + self._demoter.num_running

    @property
    def has_work(self) -> bool:
        """Whether something is under way or will start by itself as time goes on."""
        return self.num_running > 0 or any(tier.will_write for tier in self._lower)

    # ---- keeping ------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        """Marks a prompt's blocks as used: in every tier, the tail first."""
        first = self._index.get(keys[0]) if keys else None
        if first is None:
            return
        tail_first = keys[::-1]
        self._host.residency.touch(tail_first, first.num_bytes, now)
        if self._host.device is not None:
            self._host.device.touch(tail_first, now)
        for tier in self._lower:
            tier.residency.touch(tail_first, first.num_bytes, now)

    def pin(self, keys: Sequence[BlockKey], deadline: float | None) -> int:
        """Keeps the leading run of ``keys`` where it is, until ``unpin`` or the deadline. Returns the pin's id."""
        places: list[tuple[int, BlockKey, int]] = []
        run = self._index.run(keys, 0, self._visible)
        last_tip = self._last_in_host(run)
        if last_tip is not None:
            places.append((0, last_tip.key, last_tip.num_bytes))
        if run:
            tip = run[-1]
            places += [(tier.index, tip.key, tip.num_bytes) for tier in self._lower if tip.readable & tier.bit]
        for tier_index, key, num_bytes in places:
            self._residency(tier_index).pin(key, num_bytes)
        return self._pins.add(Pin(tuple(places), deadline))

    def unpin(self, pin_id: int, now: float) -> None:
        """Ends a pin. One that has ended already is fine."""
        pin = self._pins.pop(pin_id)
        if pin is not None:
            self._release_pin(pin, now)

    def tick(self, now: float) -> None:
        """Ends what has expired and starts the writes that are due. Call it once per engine step."""
        for pin in self._pins.expired(now):
            self._stats.add("pin.expired")
            self._release_pin(pin, now)
        self._expire(now)
        if self._host.device is not None:
            self._host.device.expire(now)
        if self._lower:
            self._demoter.pump(self._index, now, self._host.max_dirty(), self._host.forget_lower)

    # ---- storing ------------------------------------------------------------------------------------------------

    def begin_store(self, keys: Sequence[BlockKey], first: int, num_bytes: int, now: float) -> StorePlan:
        """Slots for those of ``keys[first:]`` that are not in host memory; ``keys[:first]`` are the blocks before them."""
        job_id = next(self._ids)
        anchor = self._index.get(keys[first - 1]) if first else None
        if first and anchor is None:
            return StorePlan(job_id, broken=True)
        wanted: list[int] = []
        for position in range(first, len(keys)):
            entry = self._index.get(keys[position])
            if entry is None or not (entry.readable | entry.busy) & HOST:
                wanted.append(position)
            elif not wanted:
                anchor = entry
        if not wanted:
            return StorePlan(job_id)
        anchored = self._anchor(anchor)
        blocks = [BlockMeta(keys[p], keys[p - 1] if p else None, num_bytes) for p in wanted]
        room, num_declined = self._host.make_room(len(blocks), num_bytes, now, blocks)
        entries = self._host.open_slots(blocks[:room])
        num_refused = len(blocks) - len(entries) - num_declined
        self._stats.add("store.refused_blocks", num_refused)
        if not entries:
            self._release_pin(anchored, now)
            return StorePlan(job_id, num_refused=num_refused, num_declined=num_declined)
        self._stores[job_id] = StoreInFlight(tuple(entries), anchored, self._epoch)
        positions = tuple(position - first for position in wanted[: len(entries)])
        pool = self._host.device
        return StorePlan(
            job_id,
            positions,
            tuple(self._space.ref(entry.slot) for entry in entries),
            num_refused,
            num_declined,
            device_slots=() if pool is None else pool.begin_fill(job_id, [entry.meta for entry in entries], now),
        )

    def commit_store(self, job_id: int, failed: Collection[int], now: float) -> None:
        """The copies of a store are done; ``failed`` are indexes into its slots. What lies behind a failed one is given up."""
        plan = self._stores.pop(job_id)
        good = 0 if plan.epoch != self._epoch else min(failed, default=len(plan.entries))
        for entry in plan.entries[good:]:
            self._host.close_slot(entry)
        self._stats.add("store.aborted_blocks", len(plan.entries) - good)
        self._stats.add("host.stored_blocks", good)
        for entry in reversed(plan.entries[:good]):
            self._host.filled(entry, now)
        if self._host.device is not None:
            self._host.device.end_fill(job_id, [entry.key for entry in plan.entries[good:]], now)
        if self._lower:
            for entry in plan.entries[:good]:
                self._demoter.committed(entry, now)
        self._release_pin(plan.anchor, now)

    def abort_store(self, job_id: int, now: float) -> None:
        """None of a store's copies will be used."""
        self.commit_store(job_id, (0,), now)

    # ---- loading ------------------------------------------------------------------------------------------------

    def begin_load(self, keys: Sequence[BlockKey], now: float) -> LoadPlan:
        """Leases the slots of the leading run of ``keys`` in host memory until ``end_load``."""
        job_id = next(self._ids)
        entries = tuple(self._index.run(keys, 0, HOST))
        slots = tuple(entry.slot for entry in entries)
        self._space.lease(slots, job_id)
        device_slots: tuple[int, ...] = ()
        device_ready: tuple[bool, ...] = ()
        if self._host.device is not None:
            device_slots, device_ready = self._host.device.begin_load(job_id, [entry.meta for entry in entries], now)
        self._loads[job_id] = LoadInFlight(entries, slots, device_slots, device_ready)
        return LoadPlan(job_id, tuple(self._space.ref(slot) for slot in slots), device_slots, device_ready)

    def end_load(self, job_id: int, failed: Collection[int], now: float, *, partial: Collection[int] = ()) -> None:
        """The copies of a load are done; blocks at the indexes ``failed`` are forgotten in host memory.

        ``partial``: blocks of which not all was copied; what the device pool got of them is not whole.
        """
        plan = self._loads.pop(job_id)
        for position in failed:
            entry = plan.entries[position]
            if entry.slot == plan.slots[position]:
                self._host.give_up(entry)
        if self._host.device is not None:
            self._end_device_load(job_id, plan, [*failed, *partial], now)
        self._space.release(plan.slots, job_id)
        self._stats.add("load.failed_blocks", len(failed))
        self._stats.add("host.loaded_blocks", len(plan.entries) - len(failed) - sum(plan.device_ready))

    def promote(self, keys: Sequence[BlockKey], now: float) -> int:
        """Starts to bring the leading run into host memory. Returns how many leading blocks are or will be there."""
        run = self._index.run(keys, 0, self._visible)
        missing = [entry for entry in run if not (entry.readable | entry.busy) & HOST]
        if not missing:
            return len(run)
        anchored = self._anchor(self._last_in_host(run))
        # Unconditional: whatever the blocks are worth, the request that waits for them gets them only through host memory.
        room = self._host.make_room(len(missing), missing[0].num_bytes, now).num_blocks
        taken = missing[:room]
        for position, entry in enumerate(taken):
            if not self._space.take(entry):
                taken = taken[:position]
                break
            entry.busy |= HOST
        self._release_pin(anchored, now)
        for tier in self._lower:
            self._start_promotion(tier, [entry for entry in taken if self._source(entry) is tier])
        if len(taken) == len(missing):
            return len(run)
        self._stats.add("promote.refused_blocks", len(missing) - len(taken))
        return run.index(missing[len(taken)])

    def promoted(self, job_id: int, outcomes: Sequence[Outcome], now: float) -> None:
        """A promotion is done. What did not come out OK is forgotten in that tier."""
        plan = self._promotions.pop(job_id)
        tier = self._lower[plan.tier - 1]
        good: list[Entry] = []
        for entry, outcome in zip(plan.entries, outcomes, strict=True):
            if plan.epoch != self._epoch:
                self._host.close_slot(entry)
            elif outcome is Outcome.OK:
                good.append(entry)
            else:
                self._stats.add(f"{tier.residency.name}.{OUTCOME_COUNTERS[outcome]}_blocks")
                if entry.readable & tier.bit:
                    tier.residency.remove(entry.key, entry.num_bytes)
                    entry.readable &= ~tier.bit
                    self._host.tell(False, tier.residency.name, entry)
                    self._commands.append(Remove(tier.index, (entry.key,)))
                self._host.close_slot(entry)
        self._stats.add(f"{tier.residency.name}.loaded_blocks", len(good))
        for entry in reversed(good):
            self._host.filled(entry, now)

    # ---- the tiers below ----------------------------------------------------------------------------------------

    def recover(self, tier_index: int, blocks: Iterable[BlockMeta], now: float) -> None:
        """Takes in what a lower tier holds already, least recently used first."""
        tier = self._lower[tier_index - 1]
        for meta in blocks:
            entry = self._index.ensure(meta.key, meta.parent, meta.num_bytes)
            if not entry.readable & tier.bit:
                entry.readable |= tier.bit
                tier.residency.insert(meta, now)

    def demoted(self, job_id: int, outcomes: Sequence[Outcome], dropped: Collection[BlockKey], now: float) -> None:
        """A demotion is done; ``dropped`` are blocks the tier gave up on its own."""
        tier, stored = self._demoter.finished(job_id, outcomes, self._index, now)
        for entry in stored:
            self._host.tell(True, tier.residency.name, entry)
        for key in dropped:
            self._stats.add(f"{tier.residency.name}.dropped_blocks")
            self._host.forget_lower(tier, key)

    def set_online(self, tier_index: int, online: bool) -> None:
        """A tier went offline (its blocks are misses until it is back) or came back."""
        tier = self._lower[tier_index - 1]
        tier.online = online
        self._visible = self._visible | tier.bit if online else self._visible & ~tier.bit

    def reset(self, now: float) -> None:
        """Forgets everything in every tier. Copies under way end as failures."""
        self._epoch += 1
        self._stats.add("index.reset")
        for tier in self._lower:
            tier.clear_waiting()
            keys = tuple(entry.key for entry in self._index if entry.readable & tier.bit)
            for key in keys:
                self._host.forget_lower(tier, key)
            self._commands.append(Remove(tier.index, keys))
        for entry in [entry for entry in self._index if entry.readable & HOST]:
            self._host.give_up(entry)
        self._demoter.cancel()

    # ---- health -------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Broken promises in words; empty = healthy. Reads every entry."""
        residencies = {HOST: self._host.residency} | {tier.bit: tier.residency for tier in self._lower}
        problems = audit(self._index, self._space, residencies)
        pool = self._host.device
        if pool is not None:
            problems += pool.check()
            strays = [key for key in pool if (entry := self._index.get(key)) is None or not entry.readable & HOST]
            problems += [f"block {key.hex()} is in the device pool but not in host memory" for key in strays]
        return problems

    def leftovers(self) -> dict[str, int]:
        """What is still open: plans, leases and pins. All zero when nothing is under way."""
        return {
            "stores": len(self._stores),
            "loads": len(self._loads),
            "transfers": self.num_running,
            "leases": self._space.num_leases,
            "pins": len(self._pins),
            "device slots": 0 if self._host.device is None else self._host.device.leftovers(),
        }

    def num_blocks(self) -> dict[str, int]:
        """Readable blocks by tier."""
        pool = self._host.device
        device = {} if pool is None else {pool.residency.name: len(pool)}
        return (
            device
            | {self._host.residency.name: len(self._host.residency)}
            | {tier.residency.name: len(tier.residency) for tier in self._lower}
        )

    # ---- inside -------------------------------------------------------------------------------------------------

    def _residency(self, tier_index: int) -> Residency:
        return self._host.residency if tier_index == 0 else self._lower[tier_index - 1].residency

    def _last_in_host(self, run: Sequence[Entry]) -> Entry | None:
        last = None
        for entry in run:
            if not entry.readable & HOST:
                break
            last = entry
        return last

    def _anchor(self, entry: Entry | None) -> Pin:
        """Pins a block in host memory for as long as something behind it is on its way."""
        if entry is None or not entry.readable & HOST:
            return Pin((), None)
        self._host.residency.pin(entry.key, entry.num_bytes)
        return Pin(((0, entry.key, entry.num_bytes),), None)

    def _release_pin(self, pin: Pin, now: float) -> None:
        for tier_index, key, num_bytes in pin.places:
            self._residency(tier_index).unpin(key, num_bytes, now)

    def _source(self, entry: Entry) -> LowerTier:
        return next(tier for tier in self._lower if entry.readable & tier.bit & self._visible)

    def _end_device_load(self, job_id: int, plan: LoadInFlight, failed: Collection[int], now: float) -> None:
        pool = self._host.device
        assert pool is not None, "loads know of a pool only where there is one"
        pool.end_read(job_id, [slot for slot, ready in zip(plan.device_slots, plan.device_ready, strict=True) if ready])
        gone = [entry.key for entry, slot in zip(plan.entries, plan.slots, strict=True) if entry.slot != slot]
        pool.end_fill(job_id, [*gone, *(plan.entries[position].key for position in failed)], now)

    def _start_promotion(self, tier: LowerTier, entries: list[Entry]) -> None:
        if not entries:
            return
        job_id = next(self._ids)
        self._promotions[job_id] = PromotionPlan(tier.index, tuple(entries), self._epoch)
        self._commands.append(Promote(job_id, tier.index, tuple(e.meta for e in entries), tuple(e.slot for e in entries)))

    def _expire(self, now: float) -> None:
        for key in self._host.residency.expire(self._index.prefixes_of, now):
            self._host.give_up(self._index[key])
            self._stats.add(f"{self._host.residency.name}.expired_blocks")
        for tier in self._lower:
            gone = tier.residency.expire(self._index.prefixes_of, now)
            for key in gone:
                self._host.forget_lower(tier, key)
            if gone:
                self._stats.add(f"{tier.residency.name}.expired_blocks", len(gone))
                self._commands.append(Remove(tier.index, tuple(gone)))
