"""The planner: what to load, store, promote, demote and evict. A pure state machine: events and a time in, plans out.

It has no thread, no clock, no I/O. Whoever drives it carries out :meth:`Planner.take_commands` and reports the outcome; the serving
engine and the simulator drive the same code.  Stores, loads, promotions and demotions have a module each; they share the books.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from kvtier.control.audit import audit
from kvtier.control.books import Books
from kvtier.control.commands import BlockEvent, Command
from kvtier.control.device_pool import DevicePool
from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST
from kvtier.control.loading import Loading
from kvtier.control.lower import LowerTierSpec
from kvtier.control.moves import Move, Mover
from kvtier.control.operations import DEVICE_TIER, HOST_TIER, Holding, Operations
from kvtier.control.pins import Pin, PinTable
from kvtier.control.probing import Prober
from kvtier.control.promotion import Promoter
from kvtier.control.residency import Residency
from kvtier.control.storing import Storing
from kvtier.control.victim_buffer import VICTIM_SHARE
from kvtier.policies.base import EvictionPolicy
from kvtier.stats import Stats
from kvtier.types import BlockKey, BlockMeta, LoadPlan, Outcome, PrefixMatch, StoreOrder, StorePlan


class Planner:
    """Decides over one host memory and the tiers below it. Not thread-safe: one thread drives it.

    ``now`` is in seconds, from any clock that does not go backwards. ``victim_share``: of host memory's blocks so many may wait to be
    written after its policy has let them go, where there are tiers below.
    """

    def __init__(
        self,
        space: HostSpace,
        host: Residency,
        lower: Sequence[LowerTierSpec],
        stats: Stats,
        *,
        events: bool = False,
        victim_share: float = VICTIM_SHARE,
    ) -> None:
        self._books = Books(space, host, lower, stats, events=events, victim_share=victim_share)
        self._pins = PinTable()
        self._storing = Storing(self._books)
        self._loading = Loading(self._books)
        self._promoter = Promoter(self._books)
        self._prober = Prober(self._books)
        self._operations = Operations(self._books, self._storing, self._promoter, self._prober)
        self._mover = Mover(self._books, self._operations, self._promoter)

    def use_device_pool(self, pool: DevicePool) -> None:
        """Puts a pool in device memory in front of host memory, before the first block comes."""
        self._books.host.device = pool

    # ---- asking -------------------------------------------------------------------------------------------------

    def match(self, keys: Iterable[BlockKey]) -> PrefixMatch:
        """The longest leading run of ``keys`` that some tier holds. Changes nothing; ``keys`` may be lazy."""
        return self._books.index.match(keys, self._books.visible)

    def take_commands(self) -> list[Command]:
        """What is to be carried out, in this order; empties the list."""
        commands, self._books.commands = self._books.commands, []
        commands.extend(self._books.demoter.take_commands())
        return commands

    def take_events(self) -> list[BlockEvent]:
        """What became readable or stopped being so since the last call (if events are on)."""
        if not self._books.host.events:
            return []
        events = list(self._books.host.events)
        self._books.host.events.clear()
        return events

    @property
    def num_running(self) -> int:
        """Promotions, demotions and probes that have not been reported yet."""
        return len(self._promoter) + self._books.demoter.num_running + len(self._prober)

    def draining_blocks(self, num_bytes: int) -> int:
        """Blocks of a size whose room will be free as soon as the copies that still read it are done."""
        draining = self._books.space.draining(num_bytes)
        return draining if self._books.space.stuck else draining + self._books.host.residency.num_leaving(num_bytes)[1]

    @property
    def has_work(self) -> bool:
        """Whether something is under way or will start by itself as time goes on."""
        return self.num_running > 0 or len(self._mover) > 0 or self.will_write

    @property
    def will_write(self) -> bool:
        """Whether a write will start by itself as time goes on."""
        return any(tier.will_write for tier in self._books.lower)

    # ---- keeping ------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        """Marks a prompt's blocks as used: in every tier, the tail first."""
        first = self._books.index.get(keys[0]) if keys else None
        if first is None:
            return
        tail_first = keys[::-1]
        self._books.host.residency.touch(tail_first, first.num_bytes, now)
        if self._books.host.device is not None:
            self._books.host.device.touch(tail_first, now)
        for tier in self._books.lower:
            tier.residency.touch(tail_first, first.num_bytes, now)
            tier.touched(keys, self._books.index, now)

    def expect(self, keys: Sequence[BlockKey], seconds: float, now: float) -> None:
        """Tells the policies of host memory and the tiers below that somebody expects a prompt to be used in so many seconds."""
        first = self._books.index.get(keys[0]) if keys else None
        if first is not None:
            tail_first = keys[::-1]
            for residency in (self._books.host.residency, *(tier.residency for tier in self._books.lower)):
                residency.expect(tail_first, first.num_bytes, seconds, now)

    def pin(self, keys: Sequence[BlockKey], deadline: float | None) -> int:
        """Keeps the leading run of ``keys`` where it is, until ``unpin`` or the deadline. Returns the pin's id."""
        return self._pins.add(Pin(self._hold(keys), deadline))

    def reserve(self, keys: Sequence[BlockKey], deadline: float | None, max_blocks: int) -> tuple[int | None, int]:
        """Like ``pin``, on behalf of a user: refused where all such pins together would keep more than ``max_blocks`` in host memory.

        Returns the pin's id (None: refused) and its blocks in host memory. Blocks that several pins keep count for each.
        """
        num_blocks = len(self._books.index.run(keys, 0, HOST))
        if num_blocks + self._pins.num_reserved > max_blocks:
            return None, num_blocks
        return self._pins.add(Pin(self._hold(keys), deadline, num_blocks)), num_blocks

    @property
    def reserved_blocks(self) -> int:
        """Blocks that pins of ``reserve`` keep."""
        return self._pins.num_reserved

    def unpin(self, pin_id: int, now: float) -> None:
        """Ends a pin. One that has ended already is fine."""
        pin = self._pins.pop(pin_id)
        if pin is not None:
            self._books.release(pin, now)

    def tick(self, now: float) -> None:
        """Ends what has expired and starts the writes that are due. Call it once per engine step."""
        for pin in self._pins.expired(now):
            self._books.stats.add("pin.expired")
            self._books.release(pin, now)
        self._expire(now)
        if self._books.host.device is not None:
            self._books.host.device.expire(now)
        if self._books.lower:
            self._books.host.let_go_ahead(now)
            self._books.demoter.pump(now)
        if len(self._mover):  # behind the writes: what they turned away is waited for no more
            self._mover.step(now)

    # ---- storing ------------------------------------------------------------------------------------------------

    def begin_store(self, order: StoreOrder, num_bytes: int, now: float) -> StorePlan:
        """Slots for what is not in host memory yet; blocks of ``num_bytes``."""
        return self._storing.begin(order, num_bytes, now)

    def commit_store(self, job_id: int, failed: Collection[int], now: float) -> None:
        """The copies of a store are done; ``failed`` are indexes into its slots. What lies behind a failed one is given up."""
        self._storing.commit(job_id, failed, now)

    def abort_store(self, job_id: int, now: float) -> None:
        """None of a store's copies will be used."""
        self.commit_store(job_id, (0,), now)

    def adopt(self, meta: BlockMeta, tenant: str, slot: int) -> int | None:
        """Begins to take over a block whose bytes are believed to lie in a free slot already; ends like a store, once they are verified.

        Returns the job; None where the block is known from elsewhere in host memory, or no such slot is free.
        """
        return self._storing.adopt(meta, tenant, slot)

    # ---- loading ------------------------------------------------------------------------------------------------

    def begin_load(self, keys: Sequence[BlockKey], now: float, *, pooled: bool = True) -> LoadPlan:
        """Leases the slots of the leading run of ``keys`` in host memory until ``end_load``.

        ``pooled``: the blocks may come out of the device pool, or be put there on their way.
        """
        return self._loading.begin(keys, now, pooled=pooled)

    def end_load(self, job_id: int, failed: Collection[int], now: float, *, partial: Collection[int] = (), forgets: bool = True) -> None:
        """The copies of a load are done; blocks at the indexes ``failed`` are forgotten in host memory.

        ``partial``: blocks of which not all was copied; what the device pool got of them is not whole. ``forgets``: False where
        others load the same blocks, and whoever failed is going to ask for others.
        """
        self._loading.end(job_id, failed, partial, now, forgets=forgets)

    def promote(self, keys: Sequence[BlockKey], now: float) -> int:
        """Starts to bring the leading run into host memory. Returns how many leading blocks are or will be there."""
        return self._promoter.promote(keys, now)

    def promoted(self, job_id: int, outcomes: Sequence[Outcome], now: float) -> None:
        """A promotion is done. What did not come out OK is forgotten in that tier."""
        self._promoter.finished(job_id, outcomes, now)

    def sources(self, keys: Sequence[BlockKey]) -> list[tuple[str, int]]:
        """Where the leading run of ``keys`` would be taken from: names of tiers and how many blocks behind each other each would give."""
        return self._promoter.sources(keys)

    # ---- the tiers below ----------------------------------------------------------------------------------------

    def recover(self, tier_index: int, blocks: Iterable[BlockMeta], now: float) -> None:
        """Takes in what a lower tier holds already, least recently used first."""
        tier = self._books.lower[tier_index - 1]
        for meta in blocks:
            entry = self._books.index.ensure(meta.key, meta.parent, meta.num_bytes)
            if not entry.readable & tier.bit:
                entry.readable |= tier.bit
                tier.residency.insert((meta,), now)

    def demoted(self, job_id: int, outcomes: Sequence[Outcome], dropped: Collection[BlockKey], now: float) -> None:
        """A demotion is done; ``dropped`` are blocks the tier gave up on its own."""
        tier, stored = self._books.demoter.finished(job_id, outcomes, now)
        for entry in stored:
            self._books.host.tell(True, tier.residency.name, entry)
        for key in dropped:
            self._books.stats.add(f"{tier.residency.name}.dropped_blocks")
            self._books.host.forget_lower(tier, key)

    @property
    def shared_tiers(self) -> list[str]:
        """Names of the tiers that others write to as well."""
        return self._prober.tiers

    def probe(
        self, keys: Sequence[BlockKey], first: int, num_bytes: int, now: float, tenant: str = "", *, tiers: Sequence[str] | None = None
    ) -> bool:
        """Asks the shared tiers for ``keys[first:]``; ``keys[:first]`` are the blocks before them. Whether an answer is under way.

        What is being asked already, or was found absent not long ago, is not asked again, so call it as often as you like. ``num_bytes``:
        of each block. ``tenant``: whose the blocks are. ``tiers``: names of those to ask; None: all.
        """
        return self._prober.ask(keys, first, num_bytes, tenant, now, tiers)

    def probed(self, job_id: int, num_bytes: Sequence[int], now: float) -> None:
        """A probe is done: the lengths of the leading blocks that the tier holds. They are hits from now on."""
        self._prober.finished(job_id, num_bytes, now)

    def set_online(self, tier_index: int, online: bool) -> None:
        """A tier went offline (its blocks are misses until it is back) or came back."""
        tier = self._books.lower[tier_index - 1]
        tier.online = online
        self._books.visible = self._books.visible | tier.bit if online else self._books.visible & ~tier.bit
        self._books.demoter.find_stuck()

    # ---- control ------------------------------------------------------------------------------------------------
    # Tiers by number: the pool in device memory -1, host memory 0, the tiers below from 1 on.

    def holdings(self, keys: Sequence[BlockKey]) -> dict[int, Holding]:
        """What each tier holds of the leading run of ``keys`` that some tier holds. Changes nothing."""
        return self._operations.holdings(keys)

    def evict(self, keys: Sequence[BlockKey], tiers: Collection[int], *, everywhere: bool = False) -> int:
        """Drops a prefix and all that continues it from tiers, from the ends. Returns how many blocks left at least one of them.

        A pinned block stays with everything before it, and so does what other prefixes continue. Nothing is written down on the way.
        ``everywhere``: blocks leave also tiers that others share; else they are only forgotten here.
        """
        return self._operations.evict(keys, tiers, everywhere=everywhere)

    def move(self, keys: Sequence[BlockKey], source: int, target: int, now: float) -> Move:
        """Copies what ``source`` holds of a prefix and of what continues it to ``target`` and drops it from ``source``, as ``evict`` would.

        One of the two is host memory. A block that does not arrive (no room, a failure) stays where it is. The copies are
        done by the commands; look at the result after ``tick``.
        """
        return self._mover.start(keys, source, target, now)

    def cancel_move(self, move: Move) -> None:
        """Ends a move where it is: what was copied stays in both tiers. One that is done is fine."""
        self._mover.cancel(move)

    def clear(self, tiers: Collection[int], tenant: str | None, *, everywhere: bool = False) -> int:
        """Forgets everything in some tiers, or only what is a tenant's; pinned or not. Returns how many blocks that were.

        What is being copied there comes to nothing. Pins stay and hold again when their blocks come back. Reads every entry.
        ``everywhere``: what is known of tiers that others share leaves them too.
        """
        return self._operations.clear(tiers, tenant, everywhere=everywhere)

    def set_policy(self, tier_index: int, make_policy: Callable[[], EvictionPolicy], now: float) -> None:
        """Gives a tier another policy, which starts with the order of the old one. Touches every block of the tier.

        Pinned blocks and those before them come last in the order, as if just used.
        """
        self._operations.set_policy(tier_index, make_policy, now)

    def set_quota(self, tier_index: int, tenant: str, num_bytes: int | None, now: float) -> None:
        """Says how many bytes a tenant may always have in a tier; None: as all others without a quota. Nobody leaves because of it.

        Touches every block of the tier. The caller sees to it that quotas together do not exceed the tier.
        """
        self._operations.set_quota(tier_index, tenant, num_bytes, now)

    def quotas(self, tier_index: int) -> Mapping[str, int]:
        """Tenant -> bytes that it may always have in a tier."""
        return self._books.residency(tier_index).quotas

    def bytes_by_tenant(self) -> dict[str, dict[str, int]]:
        """Bytes of each tenant's blocks, by tier; those of nobody in particular under the empty name."""
        return {residency.name: residency.bytes_by_tenant() for number, residency in self._residencies().items() if number >= HOST_TIER}

    def reset(self, now: float) -> None:
        """Forgets everything in every tier. Copies under way end as failures. What others share stays there."""
        self._books.stats.add("index.reset")
        self._operations.clear(range(len(self._books.lower) + 1), None, everywhere=False)

    # ---- health -------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Broken promises in words; empty = healthy. Reads every entry."""
        residencies = {HOST: self._books.host.residency} | {tier.bit: tier.residency for tier in self._books.lower}
        problems = audit(self._books.index, self._books.space, residencies)
        pool = self._books.host.device
        if pool is not None:
            problems += pool.check()
            strays = [key for key in pool if (entry := self._books.index.get(key)) is None or not entry.readable & HOST]
            problems += [f"block {key.hex()} is in the device pool but not in host memory" for key in strays]
        return problems

    def leftovers(self) -> dict[str, int]:
        """What is still open: plans, leases, pins and blocks that are not recorded yet. All zero when nothing is under way."""
        registry = self._books.space.registry
        return {
            "stores": len(self._storing),
            "loads": len(self._loading),
            "transfers": self.num_running,
            "moves": len(self._mover),
            "leases": self._books.space.num_leases,
            "pins": len(self._pins),
            "records": 0 if registry is None else registry.num_waiting,
            "device slots": 0 if self._books.host.device is None else self._books.host.device.leftovers(),
        }

    @property
    def tiers(self) -> dict[str, int]:
        """Name of each tier -> its number, fastest first."""
        return {residency.name: number for number, residency in self._residencies().items()}

    def num_bytes(self) -> dict[str, int]:
        """Bytes of the readable blocks by tier."""
        return {residency.name: residency.num_bytes for residency in self._residencies().values()}

    def num_blocks(self) -> dict[str, int]:
        """Readable blocks by tier."""
        return {residency.name: len(residency) for residency in self._residencies().values()}

    def _residencies(self) -> dict[int, Residency]:
        pool = self._books.host.device
        device = {} if pool is None else {DEVICE_TIER: pool.residency}
        return device | {HOST_TIER: self._books.host.residency} | {tier.index: tier.residency for tier in self._books.lower}

    # ---- inside -------------------------------------------------------------------------------------------------

    def _hold(self, keys: Sequence[BlockKey]) -> tuple[tuple[int, BlockKey, int], ...]:
        """Applies a pin to the tiers; returns its places."""
        places: list[tuple[int, BlockKey, int]] = []
        run = self._books.index.run(keys, 0, self._books.visible)
        last_tip = self._books.last_in_host(run)
        if last_tip is not None:
            places.append((0, last_tip.key, last_tip.num_bytes))
        if run:
            tip = run[-1]
            places += [(tier.index, tip.key, tip.num_bytes) for tier in self._books.lower if tip.readable & tier.bit]
        for tier_index, key, num_bytes in places:
            self._books.residency(tier_index).pin(key, num_bytes)
        return tuple(places)

    def _expire(self, now: float) -> None:
        for key in self._books.host.residency.expire(self._books.index.prefixes_of, now):
            self._books.host.give_up(self._books.index[key])
            self._books.stats.add(f"{self._books.host.residency.name}.expired_blocks")
        for tier in self._books.lower:
            gone = tier.residency.expire(self._books.index.prefixes_of, now)
            for key in gone:
                self._books.host.forget_lower(tier, key)
            if gone:
                self._books.stats.add(f"{tier.residency.name}.expired_blocks", len(gone))
                self._books.commands.append(tier.dropped(gone))
