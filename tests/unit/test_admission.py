"""What is written to a lower tier: on the second use, within a day's bytes, and without second copies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.control.admission import BURST, DAY_S, MAX_SEEN, Admission
from kvtier.control.commands import Command, Demote, Promote, Remove
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.lower import LowerTierSpec, WriteMode
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.stats import Stats
from kvtier.types import BlockKey, Outcome
from tests.unit.test_planner import keys_of, store


class Disk:
    """A planner for eight blocks over a tier that does at once what it is told."""

    def __init__(self, admission: Admission | None = None, *, write: WriteMode = WriteMode.THROUGH, is_exclusive: bool = False) -> None:
        residency = [Residency(name, lambda: create_policy("lru"), None) for name in ("host", "disk")]
        spec = LowerTierSpec(residency[1], lambda _: 100, write, 1 << 30, admission, is_exclusive)
        self.stats = Stats()
        space = HostSpace(SlabAllocator(8 * PAGE_BYTES, 8 * PAGE_BYTES), [0] * 8)
        self.planner = Planner(space, residency[0], [spec], self.stats)
        self.now = 0.0

    def settle(self) -> list[Command]:
        done: list[Command] = []
        for _ in range(5):
            self.planner.tick(self.now)
            for command in self.planner.take_commands():
                done.append(command)
                if isinstance(command, Demote):
                    self.planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), self.now)
                elif isinstance(command, Promote):
                    self.planner.promoted(command.job_id, [Outcome.OK] * len(command.blocks), self.now)
        assert [] == self.planner.check()
        return done

    def store(self, prompt: int, num_blocks: int = 2) -> None:
        for _ in range(3):  # its last blocks may have to wait for a write
            if self.planner.match(keys_of(prompt, num_blocks)).ready_blocks < num_blocks:
                store(self.planner, keys_of(prompt, num_blocks), now=self.now)
                self.settle()

    def on(self, tier: str) -> int:
        return self.planner.num_blocks()[tier]


def test_blocks_are_written_on_their_second_use() -> None:
    """One that is used in host memory, or that comes again after it has left; never one that was used once."""
    disk = Disk(Admission(second_use=True))
    disk.store(1)
    disk.store(2)
    assert (0, 4) == (disk.on("disk"), disk.stats["disk.used_once_blocks"])
    disk.planner.touch(keys_of(1, 2), disk.now)
    disk.settle()
    assert 2 == disk.on("disk")
    for prompt in range(10, 14):
        disk.store(prompt)
    assert (2, 0) == (disk.on("disk"), disk.planner.match(keys_of(2, 2)).hit_blocks)
    disk.planner.touch(keys_of(2, 2), disk.now)
    disk.settle()
    assert 2 == disk.on("disk"), "what has left host memory cannot be written"
    disk.store(2)
    assert (4, 2) == (disk.on("disk"), disk.planner.match(keys_of(2, 2)).hit_blocks)


def test_a_days_bytes_are_kept() -> None:
    """48 blocks a day: two at once, and two more an hour; what is over is not written, and counted."""
    disk = Disk(Admission(daily_bytes=48 * PAGE_BYTES))
    disk.store(1, 4)
    assert (2, 2) == (disk.on("disk"), disk.stats["disk.over_budget_blocks"])
    disk.now = DAY_S / 48
    disk.store(2, 4)
    assert 3 == disk.on("disk")
    disk.now += DAY_S
    disk.store(3, 4)
    assert 5 == disk.on("disk"), "what was not used up is not saved for longer"


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.0, DAY_S / 4)), max_size=30), st.integers(0, 500))
def test_no_day_has_more(steps: list[tuple[int, float]], daily_blocks: int) -> None:
    """In any stretch of time: no more than its part of a day, and the burst."""
    admission = Admission(daily_bytes=daily_blocks * 100)
    granted: list[tuple[float, int]] = []
    now = 0.0
    for wanted, seconds in steps:
        now += seconds
        granted.append((now, admission.grant(wanted, 100, now)))
        assert 0 <= granted[-1][1] <= wanted
    for first, (start, _) in enumerate(granted):
        for end, _ in granted[first:]:
            total = sum(num for at, num in granted if start <= at <= end)
            assert total <= daily_blocks * ((end - start) / DAY_S + 1 / BURST) + 1e-6


def test_what_is_remembered_is_bounded() -> None:
    """The first of a million and one blocks is forgotten."""
    admission = Admission(second_use=True)
    keys = [BlockKey(number.to_bytes(16, "little")) for number in range(MAX_SEEN + 1)]
    assert not any(admission.wants(key) for key in keys)
    assert [False, True] == [admission.wants(keys[0]), admission.wants(keys[-1])]


def test_an_exclusive_tier_has_no_second_copies() -> None:
    """What is promoted leaves it, and comes back when it leaves host memory: nothing is lost on the way."""
    disk = Disk(write=WriteMode.ON_EVICT, is_exclusive=True)
    for prompt in range(8):
        disk.store(prompt)
    total = disk.on("host") + disk.on("disk")
    assert 16 <= total
    assert 0 == disk.planner.match(keys_of(0, 2)).ready_blocks
    assert 2 == disk.planner.match(keys_of(0, 2)).hit_blocks
    before = disk.on("disk")
    done: list[Command] = []
    while disk.planner.match(keys_of(0, 2)).ready_blocks < 2:  # room must be written down first
        disk.planner.promote(keys_of(0, 2), disk.now)
        done += disk.settle()
    removed = {key for command in done if isinstance(command, Remove) for key in command.keys}
    assert set(keys_of(0, 2)) <= removed
    assert disk.planner.holdings(keys_of(0, 2))[1].num_blocks == 0
    assert disk.planner.holdings(keys_of(0, 2))[0].num_blocks == 2
    assert before - 2 <= disk.on("disk")
    assert [2] * 8 == [disk.planner.match(keys_of(prompt, 2)).hit_blocks for prompt in range(8)]
    for prompt in range(10, 14):
        disk.store(prompt)
    assert (0, 2) == (disk.planner.match(keys_of(0, 2)).ready_blocks, disk.planner.match(keys_of(0, 2)).hit_blocks)


WORTHS = st.lists(st.none() | st.floats(0.0, 1.0), max_size=8)


@given(WORTHS, st.none() | st.floats(0.0, 1.0))
def test_what_is_worth_less_than_what_would_leave_is_not_written(worths: list[float | None], least: float | None) -> None:
    """Of a prompt only up to the first such block, because what is behind it would be of no use."""
    expected = 0
    for worth in worths:
        if worth is not None and least is not None and worth < least:
            break
        expected += 1
    assert expected == Admission(by_index=True).num_worth(worths, least)


class TestByIndex:
    """Both policies are ``hazard``, and the disk holds four blocks that are used every second."""

    def planner(self, stats: Stats) -> Planner:
        """Room for eight blocks in host memory."""
        residency = [Residency(name, lambda: create_policy("hazard"), None) for name in ("host", "disk")]
        spec = LowerTierSpec(residency[1], lambda _: 4, WriteMode.THROUGH, 1 << 30, Admission(by_index=True))
        planner = Planner(HostSpace(SlabAllocator(8 * PAGE_BYTES, 8 * PAGE_BYTES), [0] * 8), residency[0], [spec], stats)
        for second in range(100):
            store(planner, keys_of(1, 4), now=float(second))
            self.settle(planner, float(second))
            planner.touch(keys_of(1, 4), float(second))
        return planner

    def settle(self, planner: Planner, now: float) -> None:
        """The disk does what it is told."""
        for _ in range(3):
            planner.tick(now)
            for command in planner.take_commands():
                if isinstance(command, Demote):
                    planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), now)

    def test_a_full_disk_takes_what_is_worth_more_only(self) -> None:
        """A prompt that was never used again is turned away and counted; once it is used all the time, it is written."""
        stats = Stats()
        planner = self.planner(stats)
        store(planner, keys_of(2, 4), now=100.5)
        self.settle(planner, 100.5)
        assert (4, 0) == (stats["disk.not_admitted_blocks"], planner.holdings(keys_of(2, 4))[1].num_blocks)
        for tenth in range(1010, 1400):
            planner.touch(keys_of(2, 4), tenth / 10)
            self.settle(planner, tenth / 10)
        assert 4 == planner.holdings(keys_of(2, 4))[1].num_blocks
        assert [] == planner.check()

    def test_a_disk_with_room_takes_everything(self) -> None:
        """Nobody has to leave."""
        stats = Stats()
        planner = self.planner(stats)
        planner.evict(keys_of(1, 4), {1})
        store(planner, keys_of(2, 4), now=100.5)
        self.settle(planner, 100.5)
        assert (0, 4) == (stats["disk.not_admitted_blocks"], planner.holdings(keys_of(2, 4))[1].num_blocks)
