"""The victim buffer: what was let go is readable until it is written, leaves in order, and is lost only where too much waits."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvtier.control.admission import Admission
from kvtier.control.index import Entry
from kvtier.control.victim_buffer import VictimBuffer, WriteState
from kvtier.policies import HazardPolicy, LRUPolicy
from kvtier.policies.base import EvictionPolicy
from kvtier.stats import Stats
from kvtier.testing.policies import PolicyMachine, key_of, meta_of
from kvtier.testing.policy_models import NaiveLRU, NaivePolicy, parent_of
from kvtier.testing.policy_models_hazard import NaiveHazard
from kvtier.types import BlockKey, Outcome
from tests.unit.test_planner import keys_of, make_planner, store, write_down

SHARE = 0.25
_STATES = st.sampled_from(list(WriteState))


class FakeWrites:
    """What the tiers below want is what a test says."""

    def __init__(self) -> None:
        self.states: dict[int, WriteState] = {}
        self.hurried: list[int] = []

    def state_of(self, entry: Entry) -> WriteState:
        return self.states.get(int.from_bytes(entry.key, "little"), WriteState.NOTHING)

    def hurry(self, entries: Sequence[Entry], now: float) -> None:
        self.hurried += [int.from_bytes(entry.key, "little") for entry in entries]

    def entry_of(self, key: BlockKey) -> Entry:
        meta = meta_of(int.from_bytes(key, "little"))
        return Entry(meta.key, meta.parent, meta.num_bytes, "")


class NaiveBuffer(NaivePolicy):
    """Lists that are searched: what was let go, and of it what waits and what may leave, by when it came to be so."""

    def __init__(self, order: NaivePolicy, writes: FakeWrites) -> None:
        super().__init__()
        self.order = order
        self.writes = writes
        self.gone: list[int] = []
        self.waiting: list[int] = []
        self.clean: list[int] = []

    def insert(self, block: int, now: float) -> None:
        self.restore([parent_of(block)], now)
        self.order.insert(block, now)

    def put_back(self, blocks: Sequence[int], now: float) -> None:
        self.restore([parent_of(blocks[0])], now)
        self.order.put_back(blocks, now)

    def touch(self, blocks: Sequence[int], now: float) -> None:
        self.restore(blocks, now)
        self.order.touch(blocks, now)

    def expect(self, blocks: Sequence[int], seconds: float, now: float) -> None:
        self.restore(blocks, now)
        self.order.expect(blocks, seconds, now)

    def expired(self, now: float) -> list[int]:
        over = self.order.expired(now)
        behind: list[int] = []
        while more := [block for block in self.gone if block not in behind and parent_of(block) in [*over, *behind]]:
            behind += more
        behind = [block for block in self.gone if block in behind]
        self.gone = [block for block in self.gone if block not in behind]
        self.sort()
        return behind + over

    def remove(self, block: int) -> None:
        if block in self.gone:
            self.gone.remove(block)
            self.sort()
        else:
            self.order.remove(block)

    def pin(self, block: int) -> None:
        self.restore([block], self.now)
        self.order.pin(block)

    def unpin(self, block: int, now: float) -> None:
        self.order.unpin(block, now)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < count:
            if not self.clean and self.let_go(min(count - len(chosen), self.bound() - len(self.waiting)), now):
                continue
            leaves = [*self.clean, *(block for block in self.waiting if not self.has_child_behind(block))]
            if not leaves:
                break
            chosen.append(leaves[0])
            self.gone.remove(leaves[0])
            self.sort()
        return chosen

    def fill(self, num_free: int, now: float) -> None:
        """Half of the share, less what is free."""
        self.let_go(self.bound() // 2 - num_free - len(self.gone), now)

    def written(self, block: int) -> None:
        """It is the last of those that wait, if it does."""
        if block in self.waiting:
            self.waiting.remove(block)
        self.sort()

    def bound(self) -> int:
        """How many may wait."""
        return max(1, int((len(self.order.home) + len(getattr(self.order, "fresh", ())) + len(self.gone)) * SHARE))

    def let_go(self, count: int, now: float) -> int:
        """How many were."""
        if count <= 0:
            return 0
        self.now = now
        victims = self.order.victims(count, now)
        self.gone += victims
        self.sort()
        return len(victims)

    def restore(self, blocks: Sequence[int | None], now: float) -> None:
        """They and what is before them are in order again."""
        for tip in blocks:
            path: list[int] = []
            block = tip
            while block is not None and block in self.gone:
                path.append(block)
                self.gone.remove(block)
                block = parent_of(block)
            if path:
                self.sort()
                self.order.put_back(path[::-1], now)

    def sort(self) -> None:
        """What has come to wait is the last of those; what may leave is in the order in which it was let go."""
        states = self.writes.states
        self.waiting = [block for block in self.waiting if block in self.gone and self.waits(block)]
        self.waiting += [block for block in self.gone if block not in self.waiting and self.waits(block)]
        self.clean = [block for block in self.gone if self.may_leave(block)]
        assert not any(states.get(block) is WriteState.WRITING for block in (*self.waiting, *self.clean))

    def waits(self, block: int) -> bool:
        """Whether it is to be written."""
        return self.writes.states.get(block) is WriteState.WAITING

    def may_leave(self, block: int) -> bool:
        """Whether nothing stands between it and its room."""
        return self.writes.states.get(block, WriteState.NOTHING) is WriteState.NOTHING and not self.has_child_behind(block)

    def has_child_behind(self, block: int) -> bool:
        """Whether a block behind it was let go and is here."""
        return any(parent_of(other) == block for other in self.gone)


class BufferMachine(PolicyMachine):
    """The contract of policies, but that a block that is being written cannot leave."""

    make: type[EvictionPolicy] = LRUPolicy
    make_naive: type[NaivePolicy] = NaiveLRU

    def __init__(self) -> None:
        super().__init__()
        self.writes = FakeWrites()
        self.buffer = VictimBuffer(self.policy, self.writes, self.writes.entry_of, SHARE)
        self.policy = self.buffer
        self.naive = self.naive_buffer = NaiveBuffer(type(self).make_naive(), self.writes)

    @rule(positions=st.lists(st.integers(0, 31), max_size=4), state=_STATES)
    def write(self, positions: list[int], state: WriteState) -> None:
        """The tiers below come to want blocks, write them, or are done with them."""
        for position in positions:
            if position in self.present:
                self.writes.states[position] = state
                self.buffer.written(self.writes.entry_of(key_of(position)))
                self.naive_buffer.written(position)

    @rule(num_free=st.integers(0, 4))
    def fill(self, num_free: int) -> None:
        self.writes.hurried.clear()
        self.buffer.fill(num_free, self.now)
        self.naive_buffer.fill(num_free, self.now)
        assert self.writes.hurried == self.naive_buffer.gone[len(self.naive_buffer.gone) - len(self.writes.hurried) :][::-1]

    @rule(count=st.integers(0, 6), tip=st.none())
    def evict(self, count: int, tip: int | None) -> None:
        """Fewer leave than asked for only where all that could are being written."""
        victims = [int.from_bytes(key, "little") for key in self.buffer.victims(count, self.now)]
        assert self.naive_buffer.victims(count, self.now) == victims
        for victim in victims:
            assert victim in self.present - self.pinned
            assert self.children(victim) == set()
            assert self.writes.states.get(victim) is not WriteState.WRITING
            self.present.discard(victim)
        leaves = [position for position in self.present - self.pinned if not self.children(position)]
        assert len(victims) == count or all(self.writes.states.get(leaf) is WriteState.WRITING for leaf in leaves)

    @rule()
    def evict_everything(self) -> None:
        """What was let go comes first, being written or not; then the order of the policy."""
        drained = [int.from_bytes(key, "little") for key in copy.deepcopy(self.buffer).drain(self.now)]
        model = copy.deepcopy(self.naive_buffer)
        assert [*model.gone, *model.order.victims(1000, self.now)] == drained

    @invariant()
    def order_is_that_of_the_model(self) -> None:
        model = self.naive_buffer
        writing = [block for block in model.gone if self.writes.states.get(block) is WriteState.WRITING]
        assert (len(model.waiting), len(writing)) == (self.buffer.num_waiting, self.buffer.num_writing)
        expected = copy.deepcopy(model).victims(1000, self.now)
        assert [key_of(block) for block in expected] == copy.deepcopy(self.buffer).victims(1000, self.now)


class HazardBufferMachine(BufferMachine):
    """Without copies, which cost too much: the order is compared as blocks leave."""

    make = HazardPolicy
    make_naive = NaiveHazard

    @rule()
    def evict_everything(self) -> None:
        """Up to what is pinned or being written."""
        self.evict(1000, None)

    @invariant()
    def order_is_that_of_the_model(self) -> None:
        assert len(self.naive_buffer.waiting) == self.buffer.num_waiting


TestBuffer = BufferMachine.TestCase
TestHazardBuffer = HazardBufferMachine.TestCase


def test_a_full_buffer_gives_up_ends_of_prompts_first() -> None:
    """Also where the beginning has waited for longer than what is behind it."""
    parent, child = next((parent_of(block), block) for block in range(32) if parent_of(block) is not None)
    assert parent is not None
    writes = FakeWrites()
    writes.states = {parent: WriteState.WAITING, child: WriteState.WRITING}
    buffer = VictimBuffer(LRUPolicy(), writes, writes.entry_of, 1.0)
    for block in (parent, child):
        buffer.insert(meta_of(block), 0.0)
    assert [] == buffer.victims(2, 1.0), "the one is being written, the other is before it"
    writes.states[child] = WriteState.WAITING
    buffer.written(writes.entry_of(key_of(child)))
    assert 2 == buffer.num_waiting
    assert [key_of(child), key_of(parent)] == buffer.victims(2, 2.0)


def test_what_was_let_go_is_a_hit_until_its_room_is_needed() -> None:
    """Being written, it is read; written, its room is given away; used before that, it stays."""
    stats = Stats()
    planner = make_planner(16, extent_blocks=16, stats=stats)
    for prompt in range(8):
        store(planner, keys_of(prompt, 2), now=float(prompt))
    planner.tick(10.0)
    commands = planner.take_commands()
    assert 0 == store(planner, keys_of(20, 2), now=11.0), "everything is being written"
    assert [2] * 8 == [planner.match(keys_of(prompt, 2)).ready_blocks for prompt in range(8)]
    planner.touch(keys_of(0, 2), 12.0)
    for command in commands:
        planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), 13.0)  # type: ignore[union-attr]
    assert 2 == store(planner, keys_of(20, 2), now=14.0)
    assert [2, 0, 2] == [planner.match(keys_of(prompt, 2)).ready_blocks for prompt in (0, 1, 2)]
    assert 2 == planner.match(keys_of(1, 2)).hit_blocks
    assert (2, 0) == (stats["host.evicted_blocks"], stats["disk.skipped_blocks"])
    assert [] == planner.check()


def test_a_failed_write_gives_the_room_free() -> None:
    """A block that cannot be written waits for nothing any more."""
    stats = Stats()
    planner = make_planner(16, extent_blocks=16, stats=stats)
    store(planner, keys_of(1, 16))
    planner.tick(1.0)
    assert 0 == store(planner, keys_of(2, 4), now=1.0)
    for command in planner.take_commands():
        planner.demoted(command.job_id, [Outcome.FAILED] * len(command.blocks), (), 2.0)  # type: ignore[union-attr]
    assert 4 == store(planner, keys_of(2, 4), now=3.0)
    assert (16, 0) == (stats["disk.failed_blocks"], planner.num_blocks()["disk"])
    assert [] == planner.check()


def test_a_block_that_no_tier_wants_is_not_waited_for() -> None:
    """What admission keeps off the disk leaves at once."""
    planner = make_planner(16, extent_blocks=16, admission=Admission(second_use=True))
    store(planner, keys_of(1, 16))
    write_down(planner, 1.0)
    assert 8 == store(planner, keys_of(2, 8), now=2.0)
    assert [] == planner.check()
