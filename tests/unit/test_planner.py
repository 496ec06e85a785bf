"""The planner: stores, loads, promotion, demotion, eviction, pins, time to live."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from kvtier.control.admission import Admission
from kvtier.control.commands import Demote, Promote, Remove
from kvtier.control.device_pool import DevicePool
from kvtier.control.expiry import ExpiryQueue
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.lower import LowerTierSpec, WriteMode
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.stats import Stats
from kvtier.testing.planner_machine import MAX_BLOCKS, PROMPTS, TIER_BLOCKS, PlannerMachine, chain, counts, prompts, tenant_of
from kvtier.types import BlockKey, BlockMeta, Outcome, StoreOrder


class ThroughMachine(PlannerMachine):
    write = WriteMode.THROUGH


class BackMachine(PlannerMachine):
    write = WriteMode.BACK
    ttl_s = 15.0


class OnEvictMachine(PlannerMachine):
    write = WriteMode.ON_EVICT


class FIFOMachine(PlannerMachine):
    policy = "fifo"
    ttl_s = 7.0


class ExclusiveMachine(PlannerMachine):
    write = WriteMode.ON_EVICT
    is_exclusive = True


class AdmissionMachine(PlannerMachine):
    second_use = True
    daily_blocks = 24 * 3


TestExclusive = ExclusiveMachine.TestCase
TestAdmission = AdmissionMachine.TestCase


class HazardMachine(PlannerMachine):
    """Blocks are turned away in all tiers."""

    policy = "hazard"
    device_slots = 3


class IndexMachine(HazardMachine):
    by_index = True
    write = WriteMode.BACK


class LearnedTTLMachine(HazardMachine):
    ttl_mode = "auto"
    write = WriteMode.ON_EVICT


class LargeBufferMachine(PlannerMachine):
    write = WriteMode.ON_EVICT
    victim_share = 0.5


TestIndex = IndexMachine.TestCase
TestLearnedTTL = LearnedTTLMachine.TestCase
TestLargeBuffer = LargeBufferMachine.TestCase


class ARCMachine(PlannerMachine):
    policy = "arc"
    write = WriteMode.BACK


class DevicePoolMachine(PlannerMachine):
    device_slots = 3


class DevicePoolWithTTLMachine(PlannerMachine):
    device_slots = 5
    ttl_s = 7.0
    write = WriteMode.ON_EVICT


class RestartedMachine(PlannerMachine):
    """The tier holds blocks that nobody is known to own, and their owners come, with quotas and without."""

    @initialize(found=st.lists(st.tuples(prompts, counts), min_size=1, max_size=3))
    def recover(self, found: list[tuple[int, int]]) -> None:
        """What a restart finds, as far as it fits."""
        chains = [chain(prompt, count) for prompt, count in found]
        parents = {key: before for keys in chains for before, key in zip([None, *keys], keys, strict=False)}
        blocks = [BlockMeta(key, parent, PAGE_BYTES) for key, parent in parents.items()][:TIER_BLOCKS]
        self.tier = {meta.key for meta in blocks}
        self.planner.recover(1, blocks[::-1], self.now)

    @rule(prompt=prompts, tiers=st.sets(st.sampled_from([0, 1]), min_size=1))
    def clear(self, prompt: int, tiers: set[int]) -> None:
        """What is known to be a tenant's goes; of what was found nothing is. Nobody else loses anything."""
        before = {other: self.planner.match(chain(other, MAX_BLOCKS)) for other in range(PROMPTS)}
        self.planner.clear(tiers, tenant_of(prompt))
        self.carry_on()
        for other, found in before.items():
            assert tenant_of(other) == tenant_of(prompt) or found == self.planner.match(chain(other, MAX_BLOCKS))


TestRestarted = RestartedMachine.TestCase
TestDevicePool = DevicePoolMachine.TestCase
TestDevicePoolWithTTL = DevicePoolWithTTLMachine.TestCase
TestWriteThrough = ThroughMachine.TestCase
TestWriteBack = BackMachine.TestCase
TestWriteOnEvict = OnEvictMachine.TestCase
TestFIFOWithTTL = FIFOMachine.TestCase
TestHazard = HazardMachine.TestCase
TestARC = ARCMachine.TestCase


def make_planner(
    host_blocks: int,
    *,
    ttl_s: float | None = None,
    extent_blocks: int = 4,
    policy: str = "lru",
    disk_blocks: int = 100,
    has_disk: bool = True,
    stats: Stats | None = None,
    admission: Admission | None = None,
    write: WriteMode = WriteMode.THROUGH,
) -> Planner:
    slab = SlabAllocator(host_blocks * PAGE_BYTES, extent_blocks * PAGE_BYTES)
    expiry = None if ttl_s is None else ExpiryQueue(ttl_s, sliding=True)
    host = Residency("host", lambda: create_policy(policy), expiry)
    residency = Residency("disk", lambda: create_policy(policy), None)
    disk = LowerTierSpec(residency, lambda num_bytes: disk_blocks, write, 1 << 30, admission)
    return Planner(HostSpace(slab, [0] * host_blocks), host, [disk] if has_disk else [], stats or Stats())


def keys_of(prompt: int, num_blocks: int) -> list[BlockKey]:
    return [BlockKey(bytes([prompt, position]) + bytes(14)) for position in range(num_blocks)]


def store(planner: Planner, keys: list[BlockKey], first: int = 0, num_bytes: int = PAGE_BYTES, now: float = 0.0) -> int:
    """Stores what finds room; returns how many blocks did."""
    plan = planner.begin_store(StoreOrder(keys, first), num_bytes, now)
    if plan.slots:
        planner.commit_store(plan.job_id, (), now)
    return len(plan.slots)


def test_a_store_that_only_partly_fits_keeps_its_leading_part() -> None:
    """What found no slot is refused, counted, and it is the tail."""
    planner = make_planner(4)
    assert 4 == store(planner, keys_of(1, 6))
    assert 4 == planner.match(keys_of(1, 6)).ready_blocks


def test_what_a_load_is_counted_as() -> None:
    """What came from host memory: not what failed, and not what lay in the device pool, nor both of one block."""
    stats = Stats()
    planner = make_planner(4, stats=stats)
    planner.use_device_pool(DevicePool(3, PAGE_BYTES, Residency("gpu", lambda: create_policy("lru"), None), stats))
    keys = keys_of(1, 3)
    store(planner, keys)
    for pooled, failed, num_loaded in ((True, (0, 2), 0), (True, (), 0), (False, (1,), 2)):
        plan = planner.begin_load(keys, 1.0, pooled=pooled)
        planner.end_load(plan.job_id, failed, 1.0, forgets=False)
        assert num_loaded == stats["host.loaded_blocks"]


def test_a_store_never_evicts_the_prefix_it_continues() -> None:
    """With host memory full of one prompt, its continuation finds no room rather than stranding itself."""
    planner = make_planner(4)
    store(planner, keys_of(1, 4))
    assert 0 == store(planner, keys_of(1, 6), first=4)
    assert 4 == planner.match(keys_of(1, 6)).ready_blocks


def test_a_store_behind_a_hole_is_broken() -> None:
    """Blocks whose predecessor is nowhere could never be found; the caller is told to start earlier."""
    planner = make_planner(4)
    assert planner.begin_store(StoreOrder(keys_of(1, 3), 2), PAGE_BYTES, 0.0).broken


def test_eviction_takes_exactly_what_is_missing() -> None:
    """Three blocks into four slots that are full evict three, the oldest prompt's tail first."""
    planner = make_planner(4)
    store(planner, keys_of(1, 2), now=0.0)
    store(planner, keys_of(2, 2), now=1.0)
    assert 1 == store(planner, keys_of(3, 1), now=2.0)
    assert [1, 2, 1] == [planner.match(keys_of(prompt, 2)).ready_blocks for prompt in (1, 2, 3)]


def test_the_newest_prompts_hit_when_many_are_stored_back_to_back() -> None:
    """24 prompts of an eighth of host memory each: the newest eight are there whole."""
    planner = make_planner(64, extent_blocks=16)
    for prompt in range(24):
        assert 8 == store(planner, keys_of(prompt, 8), now=float(prompt))
    assert [0] * 16 + [8] * 8 == [planner.match(keys_of(prompt, 8)).ready_blocks for prompt in range(24)]


def test_pinned_prefixes_outlive_pressure_until_their_deadline() -> None:
    """A pin with a deadline keeps a prefix; afterwards it is as good as any other block."""
    planner = make_planner(4)
    store(planner, keys_of(1, 2))
    planner.pin(keys_of(1, 2), deadline=10.0)
    store(planner, keys_of(2, 4), now=1.0)
    assert [2, 2] == [planner.match(keys_of(prompt, 4)).ready_blocks for prompt in (1, 2)]
    write_down(planner, 10.0)
    store(planner, keys_of(3, 4), now=11.0)
    assert 0 == planner.match(keys_of(1, 2)).ready_blocks


def test_a_sliding_time_to_live_counts_from_the_last_use() -> None:
    """Used blocks stay, unused ones are gone once their time is over."""
    planner = make_planner(4, ttl_s=10.0)
    store(planner, keys_of(1, 1), now=0.0)
    store(planner, keys_of(2, 1), now=0.0)
    planner.touch(keys_of(1, 1), 8.0)
    planner.tick(12.0)
    assert [1, 0] == [planner.match(keys_of(prompt, 1)).ready_blocks for prompt in (1, 2)]


def test_another_block_size_gets_an_extent_when_all_are_taken() -> None:
    """A size that has no slot at all takes the emptiest extent of another size."""
    planner = make_planner(8)
    for prompt in range(8):
        store(planner, keys_of(prompt, 1), now=float(prompt))
    assert 2 == store(planner, keys_of(9, 3), num_bytes=2 * PAGE_BYTES, now=9.0)
    assert 4 == planner.num_blocks()["host"] - 2


def test_a_promotion_overtaken_by_a_reset_comes_to_nothing() -> None:
    """What arrives after everything was forgotten is not found again."""
    planner = make_planner(4)
    planner.recover(1, [BlockMeta(keys_of(1, 1)[0], None, PAGE_BYTES)], 0.0)
    assert 1 == planner.promote(keys_of(1, 1), 0.0)
    (promotion,) = planner.take_commands()
    assert isinstance(promotion, Promote)
    planner.reset(1.0)
    planner.promoted(promotion.job_id, [Outcome.OK], 1.0)
    assert 0 == planner.match(keys_of(1, 1)).hit_blocks
    assert [] == planner.check()


def test_another_policy_begins_with_the_old_order() -> None:
    """What lru would let leave first leaves first under fifo as well; pins go on, and what is pinned is the last to leave."""
    planner = make_planner(8)
    for prompt in range(4):
        store(planner, keys_of(prompt, 2), now=float(prompt))
    planner.touch(keys_of(0, 2), 5.0)
    pin = planner.pin(keys_of(1, 2), None)
    planner.set_policy(0, lambda: create_policy("fifo"), 6.0)
    store(planner, keys_of(4, 2), now=7.0)
    assert [2, 2, 0, 2, 2] == [planner.match(keys_of(prompt, 2)).ready_blocks for prompt in range(5)]
    store(planner, keys_of(5, 4), now=8.0)
    assert [0, 2, 0, 0, 2, 4] == [planner.match(keys_of(prompt, 4)).ready_blocks for prompt in range(6)]
    planner.unpin(pin, 9.0)
    assert [] == planner.check()


def test_evicting_drops_the_tail_first_up_to_what_must_stay() -> None:
    """A pinned block stays with what is before it; so does what another prompt continues."""
    planner = make_planner(8)
    store(planner, keys_of(1, 4))
    pin = planner.pin(keys_of(1, 2), None)
    assert 2 == planner.evict(keys_of(1, 4), {0})
    assert 2 == planner.match(keys_of(1, 4)).ready_blocks
    planner.unpin(pin, 0.0)
    store(planner, keys_of(1, 1) + keys_of(2, 2)[1:], now=1.0)
    assert 1 == planner.evict(keys_of(1, 4), {0})
    assert 1 == planner.evict(keys_of(2, 2)[1:], {0})
    assert 1 == planner.evict(keys_of(1, 4), {0})
    assert {"host": 0, "disk": 0} == planner.num_blocks()


def test_a_move_waits_for_its_copies_and_drops_only_what_arrived() -> None:
    """Of two blocks one fails: it and the one before it stay where they are."""
    for outcomes, expected in (((Outcome.OK, Outcome.OK), 2), ((Outcome.OK, Outcome.FAILED), 0), ((Outcome.FAILED, Outcome.OK), 1)):
        planner = make_planner(4)
        store(planner, keys_of(1, 2))
        move = planner.move(keys_of(1, 2), 0, 1, 0.0)
        planner.tick(0.0)
        (demotion,) = planner.take_commands()
        assert (False, 2) == (move.is_done, planner.match(keys_of(1, 2)).ready_blocks)
        planner.demoted(demotion.job_id, outcomes, (), 1.0)  # type: ignore[union-attr]
        planner.tick(1.0)
        assert (True, expected) == (move.is_done, move.moved_blocks)
        assert 2 == planner.match(keys_of(1, 2)).hit_blocks
        assert [] == planner.check()


def test_a_tenants_copies_under_way_come_to_nothing_when_it_is_cleared() -> None:
    """A store and a demotion that were running: neither leaves anything behind, and the other tenant's go on."""
    planner = make_planner(8)
    plans = [planner.begin_store(StoreOrder(keys_of(prompt, 2), 0, tenant), PAGE_BYTES, 0.0) for prompt, tenant in enumerate("ab")]
    stored = planner.begin_store(StoreOrder(keys_of(2, 2), 0, "a"), PAGE_BYTES, 0.0)
    planner.commit_store(stored.job_id, (), 0.0)
    planner.tick(0.0)
    (demotion,) = planner.take_commands()
    assert 2 == planner.clear({0, 1}, "a")
    for plan in plans:
        planner.commit_store(plan.job_id, (), 1.0)
    planner.demoted(demotion.job_id, (Outcome.OK, Outcome.OK), (), 1.0)  # type: ignore[union-attr]
    assert [0, 2, 0] == [planner.match(keys_of(prompt, 2)).hit_blocks for prompt in range(3)]
    assert tuple(keys_of(2, 2)) in [command.keys for command in planner.take_commands() if isinstance(command, Remove)]
    assert [] == planner.check()


def test_a_block_that_fails_verification_stops_being_a_hit() -> None:
    """A corrupt block is forgotten in its tier, and what was behind it is not found any more."""
    planner = make_planner(4)
    metas = [BlockMeta(key, parent, PAGE_BYTES) for key, parent in zip(keys_of(1, 2), [None, keys_of(1, 1)[0]], strict=True)]
    planner.recover(1, metas, 0.0)
    assert 2 == planner.promote(keys_of(1, 2), 0.0)
    (promotion,) = planner.take_commands()
    assert isinstance(promotion, Promote)
    planner.promoted(promotion.job_id, [Outcome.CORRUPT, Outcome.OK], 0.0)
    assert 0 == planner.match(keys_of(1, 2)).hit_blocks


def write_down(planner: Planner, now: float) -> None:
    """Everything that is to be written to the disk is."""
    planner.tick(now)
    for command in planner.take_commands():
        if isinstance(command, Demote):
            planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), now)


def test_what_is_worth_less_is_not_admitted_and_is_no_refusal() -> None:
    """A prompt used every second keeps host memory; another one is turned away, counted by name, and nothing is broken."""
    stats = Stats()
    planner = make_planner(4, policy="hazard", has_disk=False, stats=stats)
    hot = keys_of(1, 4)
    for second in range(100):
        store(planner, hot, now=float(second))
        planner.touch(hot, float(second))
    plan = planner.begin_store(StoreOrder(keys_of(2, 3), 0), PAGE_BYTES, 100.5)

    assert (plan.slots, plan.num_refused, plan.num_declined, plan.broken) == ((), 0, 3, False)
    assert stats["host.not_admitted_blocks"] == 3
    assert stats["store.refused_blocks"] == stats["host.evicted_blocks"] == 0
    assert planner.match(hot).ready_blocks == 4
    assert planner.check() == []
    assert planner.leftovers()["pins"] == 0


def test_host_memory_turns_nothing_away_that_a_tier_below_might_take() -> None:
    """The way down leads through host memory: a full one makes room, and the disk decides for itself."""
    stats = Stats()
    planner = make_planner(4, policy="hazard", disk_blocks=4, stats=stats)
    hot = keys_of(1, 4)
    for second in range(100):
        store(planner, hot, now=float(second))
        write_down(planner, float(second))
        planner.touch(hot, float(second))
    store(planner, keys_of(2, 3), now=100.5)
    write_down(planner, 101.0)

    assert (stats["host.not_admitted_blocks"], stats["disk.not_admitted_blocks"]) == (0, 3)
    assert 3 == planner.match(keys_of(2, 3)).ready_blocks
    assert 4 == planner.match(hot).hit_blocks
    assert planner.check() == []


def test_what_comes_up_is_not_crowded_out_by_what_goes_down_for_it() -> None:
    """The disk is full and the prompt that is wanted is the first that would leave it: another one leaves."""
    planner = make_planner(8, extent_blocks=8, disk_blocks=8, write=WriteMode.ON_EVICT)
    for second, prompt in enumerate((1, 2, 3, 4)):
        store(planner, keys_of(prompt, 4), now=float(second))
        write_down(planner, float(second))
        store(planner, keys_of(prompt, 4), now=float(second))
    planner.take_commands()
    assert [4, 4] == [planner.match(keys_of(prompt, 4)).hit_blocks for prompt in (1, 2)]
    assert 4 == planner.promote(keys_of(1, 4), 10.0)
    commands = planner.take_commands()
    (promoted,) = [command for command in commands if isinstance(command, Promote)]
    assert keys_of(1, 4) == [block.key for block in promoted.blocks]
    removed = {key for command in commands if isinstance(command, Remove) for key in command.keys}
    assert removed, "what host memory let go for it was written to a full disk"
    assert removed <= set(keys_of(2, 4))
    assert [] == planner.check()


def test_a_promotion_is_never_turned_away() -> None:
    """A request waits for the blocks, and gets them only through host memory, whatever they are worth."""
    planner = make_planner(4, policy="hazard")
    cold, hot = keys_of(2, 4), keys_of(1, 4)
    store(planner, cold)
    write_down(planner, 0.0)
    planner.promote(hot, 0.0)
    for second in range(1, 100):
        store(planner, hot, now=float(second))
        planner.touch(hot, float(second))
    assert planner.match(hot).ready_blocks == 4
    assert planner.promote(cold, 101.0) == 4


def test_blocks_that_leave_before_they_are_written_are_all_counted() -> None:
    """Host memory makes room for new blocks at once; what was not written down by then is lost to the disk, and counted block by block."""
    stats = Stats()
    planner = make_planner(4, stats=stats)
    store(planner, keys_of(1, 4))
    store(planner, keys_of(2, 4))
    assert (4, 4) == (stats["disk.skipped_blocks"], stats["host.evicted_blocks"])
    write_down(planner, 1.0)
    assert {"host": 4, "disk": 4} == planner.num_blocks()
    assert 0 == planner.match(keys_of(1, 4)).hit_blocks
