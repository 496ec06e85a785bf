"""The planner against a model: whatever happens in whatever order, bytes are never mixed up and nothing is left behind.

Host memory is a dict slot -> key of what was written there; the tier below is a set of keys. A block's "bytes" are its key, so reading
a slot or a tier shows at once whether it holds what the planner says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvtier.control.admission import Admission
from kvtier.control.commands import Command, Demote, Promote, Remove
from kvtier.control.device_pool import DevicePool
from kvtier.control.expiry import ExpiryQueue
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.lower import LowerTierSpec, WriteMode
from kvtier.control.moves import Move
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.control.victim_buffer import VICTIM_SHARE
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.stats import Stats
from kvtier.types import BlockKey, LoadPlan, Outcome, StoreOrder, StorePlan

HOST_BLOCKS = 6
TIER_BLOCKS = 4
PROMPTS, MAX_BLOCKS = 4, 4
_OUTCOMES = st.sampled_from([Outcome.OK] * 6 + [Outcome.MISS, Outcome.CORRUPT, Outcome.REJECTED, Outcome.FAILED])
prompts, counts = st.integers(0, PROMPTS - 1), st.integers(1, MAX_BLOCKS)


def chain(prompt: int, num_blocks: int) -> list[BlockKey]:
    """Keys of a prompt's first blocks. Even prompts share their first two blocks."""
    heads = [prompt if position >= 2 or prompt % 2 else 0 for position in range(num_blocks)]
    return [BlockKey(bytes([head, position]) + bytes(14)) for position, head in enumerate(heads)]


def tenant_of(prompt: int) -> str:
    """Prompts that share blocks are one tenant's."""
    return f"tenant {prompt if prompt % 2 else 0}"


class PlannerMachine(RuleBasedStateMachine):
    """Subclass and set ``write``, ``policy``, ``ttl_s`` and so on for a configuration."""

    write = WriteMode.THROUGH
    policy = "lru"
    ttl_s: float | None = None
    device_slots = 0
    """slots of the pool in device memory; 0: no pool"""
    ttl_mode = "sliding"
    victim_share = VICTIM_SHARE
    second_use = False
    by_index = False
    daily_blocks: int | None = None
    is_exclusive = False

    stores = Bundle("stores")
    loads = Bundle("loads")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.memory: dict[int, BlockKey] = {}
        self.tier: set[BlockKey] = set()
        self.queue: list[Command] = []
        self.open_stores: dict[int, tuple[StorePlan, list[BlockKey]]] = {}
        self.open_loads: dict[int, tuple[LoadPlan, list[BlockKey]]] = {}
        self.void: set[int] = set()
        """stores whose blocks were cleared while they were copied"""
        self.moves: list[Move] = []
        extents = SlabAllocator(HOST_BLOCKS * PAGE_BYTES, 4 * PAGE_BYTES)
        self.generations = [0] * HOST_BLOCKS
        daily_bytes = self.daily_blocks and self.daily_blocks * PAGE_BYTES
        admission = Admission(second_use=self.second_use, by_index=self.by_index, daily_bytes=daily_bytes)
        spec = LowerTierSpec(self.residency("disk"), lambda _: TIER_BLOCKS, self.write, 4 * PAGE_BYTES, admission, self.is_exclusive)
        space, tiers = HostSpace(extents, self.generations), [spec, *self.more_tiers()]
        self.planner = Planner(space, self.residency("host"), tiers, Stats(), victim_share=self.victim_share)
        self.device: dict[int, BlockKey | None] = {}
        """slot of the pool -> whose bytes are there; None: nobody's"""
        if self.device_slots:
            self.planner.use_device_pool(DevicePool(self.device_slots, PAGE_BYTES, self.residency("gpu"), Stats()))

    def residency(self, name: str) -> Residency:
        make: Callable[[], ExpiryQueue | None] = lambda: None if self.ttl_s is None else ExpiryQueue(self.ttl_s, sliding=True)  # noqa: E731
        return Residency(name, lambda: create_policy(self.policy), make(), expires_by_policy=self.ttl_mode == "auto")

    def more_tiers(self) -> list[LowerTierSpec]:
        """Tiers below the disk."""
        return []

    def carry_on(self) -> None:
        self.queue.extend(self.planner.take_commands())

    # ---- the engine's side ----

    @rule(target=stores, prompt=prompts, first=st.integers(0, MAX_BLOCKS - 1), count=counts, pooled=st.booleans())
    def begin_store(self, prompt: int, first: int, count: int, pooled: bool) -> object:
        keys = chain(prompt, min(first + count, MAX_BLOCKS))
        plan = self.planner.begin_store(StoreOrder(keys, first, tenant_of(prompt), pooled=pooled), PAGE_BYTES, self.now)
        self.carry_on()
        assert pooled or not plan.device_slots
        assert len(plan.positions) == len(plan.slots)
        assert sorted(plan.positions) == list(plan.positions)
        if not plan.slots:
            return multiple()
        wanted = [keys[first + position] for position in plan.positions]
        for key, ref in zip(wanted, plan.slots, strict=True):
            assert self.generations[ref.slot] == ref.generation
            self.memory[ref.slot] = key
        self.fill(plan, wanted)
        self.open_stores[plan.job_id] = (plan, wanted)
        return plan.job_id

    @rule(prompt=prompts)
    def store_at_once(self, prompt: int) -> None:
        """A whole prompt comes, is committed and written down as far as there is room."""
        job_id = self.begin_store(prompt, 0, MAX_BLOCKS, pooled=True)
        if isinstance(job_id, int):
            self.commit(job_id, set())
        self.settle()

    @rule(job_id=consumes(stores), failed=st.sets(st.integers(0, MAX_BLOCKS), max_size=2))
    def commit(self, job_id: int, failed: set[int]) -> None:
        before = self.planner.num_blocks()["host"]
        self.end_store(job_id, failed)
        if job_id in self.void:
            assert before == self.planner.num_blocks()["host"], "what was cleared while it was copied came back"

    def end_store(self, job_id: int, failed: set[int]) -> None:
        plan, _ = self.open_stores.pop(job_id)
        for position in failed:
            self.spoil(plan.device_slots[position : position + 1])
        self.planner.commit_store(job_id, {position for position in failed if position < len(plan.slots)}, self.now)

    @rule(job_id=consumes(stores))
    def abort(self, job_id: int) -> None:
        plan, _ = self.open_stores.pop(job_id)
        self.spoil(plan.device_slots)
        self.planner.abort_store(job_id, self.now)

    @rule(target=loads, prompt=prompts, count=counts, pooled=st.booleans())
    def begin_load(self, prompt: int, count: int, pooled: bool) -> int:
        keys = chain(prompt, count)
        ready = self.planner.match(keys).ready_blocks
        plan = self.planner.begin_load(keys, self.now, pooled=pooled)
        assert ready == len(plan.slots)
        assert pooled or not plan.device_slots
        for key, slot, is_ready in zip(keys, plan.device_slots, plan.device_ready, strict=False):
            assert not is_ready or self.device[slot] == key
        self.fill(plan, keys)
        self.open_loads[plan.job_id] = (plan, keys)
        return plan.job_id

    @rule(job_id=consumes(loads), failed=st.sets(st.integers(0, MAX_BLOCKS), max_size=2))
    def end_load(self, job_id: int, failed: set[int]) -> None:
        plan, keys = self.open_loads.pop(job_id)
        gone = {position for position in failed if position < len(plan.slots)}
        filled = set(self.filled(plan))
        for position in gone:
            self.spoil([slot for slot in plan.device_slots[position : position + 1] if slot in filled])
        self.planner.end_load(job_id, gone, self.now)
        again = self.planner.begin_load(keys, self.now)
        assert not {plan.slots[position] for position in gone} & set(again.slots), "what failed is there, and was not stored anew"
        self.fill(again, keys)
        self.planner.end_load(again.job_id, (), self.now)

    @rule(prompt=prompts, count=counts)
    def promote(self, prompt: int, count: int) -> None:
        keys = chain(prompt, count)
        before = self.planner.match(keys)
        promised = self.planner.promote(keys, self.now)
        self.carry_on()
        assert before.ready_blocks <= promised <= before.hit_blocks

    @rule(target=pins, prompt=prompts, count=counts, ttl_s=st.none() | st.floats(0.1, 20.0))
    def pin(self, prompt: int, count: int, ttl_s: float | None) -> int:
        return self.planner.pin(chain(prompt, count), None if ttl_s is None else self.now + ttl_s)

    @rule(pin_id=pins)
    def unpin(self, pin_id: int) -> None:
        self.planner.unpin(pin_id, self.now)

    @rule(prompt=prompts, count=counts)
    def touch(self, prompt: int, count: int) -> None:
        self.planner.touch(chain(prompt, count), self.now)

    @rule(hours=st.integers(1, 12))
    def wait(self, hours: int) -> None:
        """Long enough for blocks to be past what their policy takes to be worth keeping."""
        self.tick(hours * 3600.0)

    @rule(seconds=st.floats(0.0, 10.0))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.planner.tick(self.now)
        self.carry_on()

    @rule(really=st.integers(0, 5))
    def reset(self, really: int) -> None:
        if really:
            return
        self.planner.reset(self.now)
        self.void |= set(self.open_stores)
        self.carry_on()
        assert all(self.planner.match(chain(prompt, 1)).hit_blocks == 0 for prompt in range(PROMPTS))

    @rule(offline=st.integers(0, 5))
    def health(self, offline: int) -> None:
        self.planner.set_online(1, offline != 0)

    # ---- control ----

    @rule(prompt=prompts, count=counts, tiers=st.sets(st.sampled_from([-1, 0, 1]), min_size=1))
    def evict(self, prompt: int, count: int, tiers: set[int]) -> None:
        """Others that part from the prefix before its end and go on lose nothing; what continues it goes with it."""
        named = chain(prompt, count)
        before = [self.planner.match(chain(other, MAX_BLOCKS)) for other in range(PROMPTS)]
        self.planner.evict(named, tiers)
        self.carry_on()
        for other, found in enumerate(before):
            num_shared = sum(key in named for key in chain(other, MAX_BLOCKS))
            if num_shared < min(count, found.hit_blocks):
                assert found == self.planner.match(chain(other, MAX_BLOCKS))
            elif num_shared == count and not self.open_stores and not self.planner.leftovers()["pins"]:
                after = self.planner.holdings(chain(other, MAX_BLOCKS))
                assert not any(holding.num_blocks > count for holding in (after[tier] for tier in tiers if tier in after))

    @rule(prompt=prompts, count=counts)
    def evict_what_is_pinned(self, prompt: int, count: int) -> None:
        keys = chain(prompt, count)
        pin_id = self.planner.pin(keys, None)
        before = self.planner.match(keys)
        self.planner.evict(chain(prompt, MAX_BLOCKS), {0, 1})
        self.carry_on()
        assert before.ready_blocks == self.planner.match(keys).ready_blocks
        self.planner.unpin(pin_id, self.now)

    @rule(prompt=prompts, count=counts, down=st.booleans())
    def move(self, prompt: int, count: int, down: bool) -> None:
        source, target = (0, 1) if down else (1, 0)
        before = self.planner.match(chain(prompt, count))
        move = self.planner.move(chain(prompt, count), source, target, self.now)
        self.carry_on()
        assert not down or len(move.keys) >= before.ready_blocks
        assert move.copied_blocks <= len(move.keys)
        self.moves.append(move)

    @rule()
    def cancel_moves(self) -> None:
        for move in self.moves:
            self.planner.cancel_move(move)
            assert move.is_done
        self.moves.clear()

    @rule(really=st.integers(0, 2), prompt=st.none() | prompts, tiers=st.sets(st.sampled_from([-1, 0, 1]), min_size=1))
    def clear(self, really: int, prompt: int | None, tiers: set[int]) -> None:
        """The scope is empty afterwards, also of what was on its way there; nobody else loses anything."""
        if really:
            return
        tenant = None if prompt is None else tenant_of(prompt)
        before = [self.planner.match(chain(other, MAX_BLOCKS)) for other in range(PROMPTS)]
        self.planner.clear(tiers, tenant)
        self.carry_on()
        for other, found in enumerate(before):
            if tenant is None or tenant_of(other) == tenant:
                holdings = self.planner.holdings(chain(other, MAX_BLOCKS))
                assert not any(holdings[tier].num_blocks for tier in tiers if tier in holdings)
            else:
                assert found == self.planner.match(chain(other, MAX_BLOCKS))
        if 0 in tiers:
            theirs = {key for other in range(PROMPTS) if tenant in (None, tenant_of(other)) for key in chain(other, MAX_BLOCKS)}
            self.void |= {job_id for job_id, (_, keys) in self.open_stores.items() if theirs & set(keys)}

    @rule(tier=st.sampled_from([-1, 0, 1]), policy=st.sampled_from(["lru", "fifo"]))
    def set_policy(self, tier: int, policy: str) -> None:
        """No block comes or goes."""
        if tier == -1 and not self.device_slots:
            return
        before = [self.planner.holdings(chain(prompt, MAX_BLOCKS)) for prompt in range(PROMPTS)]
        self.planner.set_policy(tier, lambda: create_policy(policy), self.now)
        assert before == [self.planner.holdings(chain(prompt, MAX_BLOCKS)) for prompt in range(PROMPTS)]

    @rule(tier=st.sampled_from([0, 1]), prompt=prompts, num_blocks=st.none() | st.integers(0, 3))
    def set_quota(self, tier: int, prompt: int, num_blocks: int | None) -> None:
        """No block comes or goes. Two tenants' quotas fit into the tier below."""
        tenant = tenant_of(prompt)
        quotas = dict(self.planner.quotas(tier))
        if num_blocks is not None and sum({**quotas, tenant: num_blocks * PAGE_BYTES}.values()) > TIER_BLOCKS * PAGE_BYTES:
            return
        before = [self.planner.holdings(chain(prompt, MAX_BLOCKS)) for prompt in range(PROMPTS)]
        self.planner.set_quota(tier, tenant, None if num_blocks is None else num_blocks * PAGE_BYTES, self.now)
        assert before == [self.planner.holdings(chain(prompt, MAX_BLOCKS)) for prompt in range(PROMPTS)]

    # ---- the tier's side ----

    @rule()
    def settle(self) -> None:
        """Everything the planner wants is done, without any failure."""
        for _ in range(1000):
            self.planner.tick(self.now)
            self.carry_on()
            if not self.queue:
                break
            self.do(self.queue.pop(0), lambda count: [Outcome.OK] * count)
        assert self.planner.draining_blocks(PAGE_BYTES) <= self.planner.leftovers()["leases"], "a block waits for no write"

    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        """The tier does the oldest command; its result may be anything."""
        if not self.queue:
            return
        self.do(self.queue.pop(0), lambda count: [data.draw(_OUTCOMES) for _ in range(count)])
        self.carry_on()

    def do(self, command: Command, outcomes: Callable[[int], list[Outcome]]) -> None:
        """The tier does a command; ``outcomes`` says what becomes of so many blocks."""
        if isinstance(command, Remove):
            self.tier -= set(command.keys)
        elif isinstance(command, Demote):
            self.store_down(command, outcomes(len(command.blocks)))
        else:
            assert isinstance(command, Promote), "nothing is shared here"
            self.load_up(command, outcomes(len(command.blocks)))

    def store_down(self, command: Demote, outcomes: list[Outcome]) -> None:
        for position, (meta, slot) in enumerate(zip(command.blocks, command.slots, strict=True)):
            assert meta.key == self.memory[slot]
            if outcomes[position] is Outcome.OK:
                self.tier.add(meta.key)
        assert len(self.tier) <= TIER_BLOCKS
        self.planner.demoted(command.job_id, outcomes, (), self.now)

    def load_up(self, command: Promote, outcomes: list[Outcome]) -> None:
        for position, (meta, slot) in enumerate(zip(command.blocks, command.slots, strict=True)):
            if meta.key not in self.tier:
                outcomes[position] = Outcome.MISS
            elif outcomes[position] is Outcome.OK:
                self.memory[slot] = meta.key
            elif outcomes[position] in (Outcome.MISS, Outcome.CORRUPT):
                self.tier.discard(meta.key)
        self.planner.promoted(command.job_id, outcomes, self.now)

    # ---- what must always hold ----

    @invariant()
    def books_are_right(self) -> None:
        assert self.planner.check() == []

    @invariant()
    def copies_under_way_are_undisturbed(self) -> None:
        """No slot that somebody reads or fills has got a new tenant."""
        copies = [(plan.slots, keys) for plan, keys in self.open_stores.values()]
        copies += [(plan.slots, keys) for plan, keys in self.open_loads.values()]
        for slots, keys in copies:
            for ref, key in zip(slots, keys, strict=False):
                assert self.generations[ref.slot] == ref.generation
                assert self.memory[ref.slot] == key
        for plan, keys in self.open_loads.values():
            for key, slot in zip(keys, plan.device_slots, strict=False):
                assert slot < 0 or self.device[slot] == key
        plans: list[StorePlan | LoadPlan] = [plan for plan, _ in self.open_stores.values()]
        plans += [plan for plan, _ in self.open_loads.values()]
        used = [slot for plan in plans for slot in self.filled(plan)]
        assert len(used) == len(set(used)), "two jobs fill one slot of the device pool"

    def filled(self, plan: StorePlan | LoadPlan) -> list[int]:
        """The slots of the pool that a job writes."""
        ready = plan.device_ready if isinstance(plan, LoadPlan) else (False,) * len(plan.device_slots)
        return [slot for slot, is_ready in zip(plan.device_slots, ready, strict=True) if slot >= 0 and not is_ready]

    def fill(self, plan: StorePlan | LoadPlan, keys: Sequence[BlockKey]) -> None:
        """A job writes its blocks into slots of the pool."""
        written = self.filled(plan)
        self.device.update((slot, key) for key, slot in zip(keys, plan.device_slots, strict=False) if slot in written)

    def spoil(self, slots: Sequence[int]) -> None:
        """Copies into slots of the pool failed."""
        for slot in slots:
            if slot >= 0:
                self.device[slot] = None

    def teardown(self) -> None:
        """When everything has ended, nothing is left and everything can leave."""
        for job_id in list(self.open_stores):
            self.planner.abort_store(job_id, self.now)
        for job_id in list(self.open_loads):
            self.planner.end_load(job_id, (), self.now)
        self.now += 1000.0
        self.settle()
        left = self.planner.leftovers()
        assert all(move.is_done for move in self.moves)
        assert {name: 0 for name in left if name != "pins"} | {"pins": left["pins"]} == left
        assert self.planner.check() == []
