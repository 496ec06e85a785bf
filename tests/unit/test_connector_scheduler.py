"""The scheduler half: what it promises, what it stores, and that it leaves nothing behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvtier.config import Config
from kvtier.connectors.messages import MoveJob, RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.requests import DefaultSettings, Geometry, Matched, RequestIdentity
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.engine import CacheEngine
from kvtier.errors import KVTierError
from kvtier.hashing import Namespace, TokenSpan
from kvtier.memory.arena import Arena
from kvtier.testing.tiers import FaultyTier, SlowTier
from kvtier.tiers.base import Tier
from kvtier.tiers.disk import DiskTier
from kvtier.types import JobKind, Outcome

NAMESPACE = Namespace(model="test")
PAGE = 4096
BLOCK = 4
"""tokens of an engine block"""


class Rig:
    """A scheduler half over a real cache; the workers are reports made by hand."""

    def __init__(
        self,
        directory: Path,
        settings: DefaultSettings | None = None,
        *,
        host_blocks: int = 16,
        num_workers: int = 1,
        blocks_per_slot: int = 1,
        stores_are_async: bool = False,
        tiers: Sequence[Tier] = (),
        strict: bool = True,
    ) -> None:
        self.now = 100.0
        self.num_workers = num_workers
        self.arena = Arena.open(str(directory / "arena"), host_blocks * PAGE, huge_pages=False)
        self.arena.unlink()
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": host_blocks * PAGE, "policy": "lru"}]})
        self.cache = CacheEngine.open(
            config, namespace=NAMESPACE, block_bytes=PAGE, arena=self.arena, tiers=tiers, clock=lambda: self.now, events=True
        )
        self.half = SchedulerHalf(
            self.cache,
            Geometry(NAMESPACE.digest, BLOCK * blocks_per_slot, BLOCK, num_workers, host_blocks),
            settings or DefaultSettings(),
            stores_are_async=stores_are_async,
            clock=lambda: self.now,
            strict=strict,
        )
        self.block_ids: dict[str, list[int]] = {}
        self.last_step = 0

    def add(self, request_id: str, tokens: list[int], **more: object) -> list[int]:
        """Makes a request known. Returns its live tokens."""
        self.half.add_request(request_id, tokens, num_prompt_tokens=len(tokens), **more)  # type: ignore[arg-type]
        return tokens

    def match(self, request_id: str, num_tokens: int, num_computed: int = 0) -> int | None:
        """What is matched, as a number."""
        return self.half.match(request_id, num_tokens, num_computed).num_tokens

    def allocate(self, request_id: str, num_blocks: int, num_external: int = 0) -> list[int]:
        """Gives a request blocks with numbers that nobody else has."""
        first = 1 + sum(len(ids) for ids in self.block_ids.values())
        self.block_ids[request_id] = list(range(first, first + num_blocks))
        self.half.allocated(request_id, self.block_ids[request_id], num_external)
        return self.block_ids[request_id]

    def build(self, **num_computed: int) -> StepMessage:
        """Builds a step in which requests get so far."""
        message = self.half.build_step([ScheduledRequest(name, self.block_ids[name], count) for name, count in num_computed.items()])
        self.last_step = message.step
        return message

    def report(self, jobs: Sequence[MoveJob], *, workers: int | None = None, failed: Sequence[int] = ()) -> WorkerReport:
        """What workers say of jobs."""
        count = self.num_workers if workers is None else workers
        done = {job.job_id: count for job in jobs}
        return WorkerReport(done, {job.job_id: set(failed) for job in jobs} if failed else {}, step=self.last_step)

    def step(self, **num_computed: int) -> StepMessage:
        """A step in which everything succeeds."""
        message = self.build(**num_computed)
        self.half.finish_step(self.report([*message.loads, *message.async_loads, *message.stores]))
        return message

    def put(self, tokens: list[int], name: str = "writer") -> None:
        """Brings a prompt into the cache."""
        self.add(name, tokens)
        self.match(name, len(tokens))
        self.allocate(name, -(-len(tokens) // BLOCK))
        self.step(**{name: len(tokens)})
        self.half.request_finished(name)

    def leftovers(self) -> dict[str, int]:
        """What is still open in the cache."""
        return {what: count for what, count in self.cache.leftovers().items() if count}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    assert [] == rig.cache.check()
    rig.half.close()


def prompt(number: int, length: int) -> list[int]:
    return [number * 1000 + position for position in range(length)]


# ---- matching -----------------------------------------------------------------------------------------------------


def test_nothing_is_matched_in_an_empty_cache(rig: Rig) -> None:
    """A request without a hit gets 0, and an unknown one too."""
    rig.add("a", prompt(1, 20))
    assert Matched(0, is_async=False) == rig.half.match("a", 20, 0)
    assert Matched(0, is_async=False) == rig.half.match("stranger", 20, 0)


@pytest.mark.parametrize(("length", "expected"), [(11, 8), (12, 8), (13, 12), (40, 16), (4, 0), (1, 0)])
def test_one_token_is_left_to_compute(rig: Rig, length: int, expected: int) -> None:
    """A hit ends at a block border and never covers the whole prompt."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, length))
    assert expected == rig.match("a", length)


def test_what_the_engine_has_is_not_counted(rig: Rig) -> None:
    """Only tokens beyond the engine's own hit are offered; 0 where it has as much, whatever the request asked before."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert [16, 8, 0, 12] == [rig.match("a", 20, computed) for computed in (0, 8, 16, 4)]


def test_hits_in_the_middle_of_a_block(tmp_path: Path) -> None:
    """With kvtier blocks of two engine blocks an odd start and an odd end are offered and planned."""
    rig = Rig(tmp_path, blocks_per_slot=2)
    rig.put(prompt(1, 24))
    rig.add("a", prompt(1, 24))
    assert 16 == rig.match("a", 24, 4)
    blocks = rig.allocate("a", 6, 16)
    (load,) = rig.build(a=24).loads
    assert (tuple(blocks[1:5]), 1, 3) == (load.block_ids, load.first_index, len(load.slots))
    rig.half.finish_step(rig.report([load]))
    assert {} == rig.leftovers()


def test_asking_often_changes_nothing(rig: Rig) -> None:
    """Hundreds of questions leave one pin, and count as one lookup."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    before = rig.cache.stats.snapshot()
    assert {12} == {rig.match("a", 16) for _ in range(400)}
    assert 8 == rig.match("a", 16, 4)
    assert {"lookup.blocks": 3, "lookup.hit_blocks": 3} == rig.cache.stats.since(before)
    assert {"pins": 1} == rig.leftovers()


def test_a_hit_may_grow_while_a_request_waits(rig: Rig) -> None:
    """Blocks that others store meanwhile are offered at the next question."""
    rig.put(prompt(1, 8), "first")
    rig.add("a", prompt(1, 20))
    assert 8 == rig.match("a", 20)
    rig.put(prompt(1, 16), "second")
    assert 16 == rig.match("a", 20)


def test_what_waits_is_not_evicted(tmp_path: Path) -> None:
    """A promised hit stays while others fill host memory many times over, and ends with the request."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=1.0), host_blocks=6)
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    for number in range(2, 8):
        rig.put(prompt(number, 16), f"w{number}")
    assert 16 == rig.match("a", 20)
    assert 4 == rig.half.num_pinned_blocks
    rig.half.request_finished("a")
    assert ({}, 0) == (rig.leftovers(), rig.half.num_pinned_blocks)


def test_pins_are_bounded(tmp_path: Path) -> None:
    """All waiting requests together pin no more than their share; a hit beyond it is still offered while it is there."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=0.5), host_blocks=16)
    for number in range(3):
        rig.put(prompt(number, 20), f"w{number}")
        rig.add(f"r{number}", prompt(number, 24))
        assert 20 == rig.match(f"r{number}", 24)
    assert 8 == rig.half.num_pinned_blocks
    for number in range(3, 9):
        rig.put(prompt(number, 20), f"w{number}")
    assert [20, 12, 0] == [rig.match(f"r{number}", 24) for number in range(3)]


def press(rig: Rig, first: int) -> None:
    """Fills host memory with other prompts."""
    for number in range(first, first + 4):
        rig.put(prompt(number, 16), f"press{number}.{rig.now}")


def test_asking_keeps_a_pin(tmp_path: Path) -> None:
    """Time and eviction do nothing to the hit of a request that the engine keeps asking for."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=0.25), host_blocks=16)
    rig.put(prompt(1, 16), "w1")
    rig.add("a", prompt(1, 20))
    for _ in range(10):
        assert 16 == rig.match("a", 20)
        rig.now += 14.0
        rig.half.finish_step(WorkerReport())
        press(rig, 10)
        assert {"pins": 1} == rig.leftovers()


def test_forgotten_pins_end(tmp_path: Path) -> None:
    """A pin whose request nobody asks for ends by its deadline and makes room for others; then it promises nothing."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=0.25), host_blocks=16)
    rig.put(prompt(1, 16), "w1")
    rig.add("forgotten", prompt(1, 20))
    assert 16 == rig.match("forgotten", 20)
    rig.now += 1000.0
    rig.half.finish_step(WorkerReport())
    assert {} == rig.leftovers()
    rig.put(prompt(2, 16), "w2")
    rig.add("other", prompt(2, 20))
    assert 16 == rig.match("other", 20)
    press(rig, 10)
    assert [16, 0] == [rig.match(name, 20) for name in ("other", "forgotten")]
    assert 4 == rig.half.num_pinned_blocks
    rig.half.request_finished("forgotten")
    rig.half.request_finished("other")
    assert ({}, 0) == (rig.leftovers(), rig.half.num_pinned_blocks)


def test_an_expired_pin_promises_nothing(tmp_path: Path) -> None:
    """After the deadline the answer is what is there, not what was there."""
    rig = Rig(tmp_path, host_blocks=16)
    rig.put(prompt(1, 16), "w1")
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    rig.now += 1000.0
    rig.half.finish_step(WorkerReport())
    press(rig, 10)
    assert 0 == rig.match("a", 20)


def test_what_is_used_stays(tmp_path: Path) -> None:
    """A prompt that the engine finds in its own prefix cache counts as used in kvtier too."""
    rig = Rig(tmp_path, host_blocks=8)
    rig.put(prompt(1, 16), "w1")
    rig.put(prompt(2, 16), "w2")
    rig.add("a", prompt(1, 20))
    assert 0 == rig.match("a", 20, 16)
    rig.allocate("a", 5)
    rig.put(prompt(3, 16), "w3")
    rig.add("b", prompt(1, 20))
    rig.add("c", prompt(2, 20))
    assert [16, 0] == [rig.match(name, 20) for name in "bc"]


def test_requests_of_other_adapters_and_media_do_not_meet(rig: Rig) -> None:
    """Extras and spans are part of the keys."""
    rig.put(prompt(1, 16))
    rig.add("lora", prompt(1, 20), identity=RequestIdentity(extras=(b"lora",)))
    rig.add("image", prompt(1, 20), identity=RequestIdentity(spans=(TokenSpan(9, 2, b"cat"),)))
    assert [0, 8] == [rig.match("lora", 20), rig.match("image", 20)]


def test_options_and_settings_switch_off(tmp_path: Path) -> None:
    """Neither a request nor a configuration that forbids loading gets a hit; one that forbids storing stores nothing."""
    rig = Rig(tmp_path)
    rig.put(prompt(1, 16))
    rig.add("no load", prompt(1, 20), options=RequestOptions(load=False))
    assert 0 == rig.match("no load", 20)
    rig.add("nostore", prompt(2, 20), options=RequestOptions(store=False))
    rig.match("nostore", 20)
    rig.allocate("nostore", 5)
    assert () == rig.step(nostore=20).stores
    (tmp_path / "off").mkdir()
    rig = Rig(tmp_path / "off", DefaultSettings(store=False))
    rig.add("a", prompt(1, 20))
    rig.match("a", 20)
    rig.allocate("a", 5)
    assert () == rig.step(a=20).stores


# ---- slower tiers -------------------------------------------------------------------------------------------------


class DiskRig(Rig):
    """With a disk tier that fails or takes 0.5 s (of the rig's clock) when told to."""

    def __init__(self, directory: Path, settings: DefaultSettings | None = None, *, host_blocks: int = 8) -> None:
        self.faulty = FaultyTier(DiskTier(directory / "disk", 4 << 20, segment_bytes=1 << 20, durable=False))
        self.disk = SlowTier(self.faulty, 0.0, lambda: self.now)
        super().__init__(directory, settings or DefaultSettings(max_pinned_fraction=1.0), host_blocks=host_blocks, tiers=[self.disk])

    def put_on_disk(self, number: int, length: int) -> None:
        """A prompt that is on disk and no more in host memory."""
        self.put(prompt(number, length), f"d{number}")
        self._drain()
        for other in range(50, 53):
            self.put(prompt(other, 4 * 8), f"o{number}.{other}")
            self._drain()
        self.disk.delay_s = 0.5

    def _drain(self) -> None:
        assert self.cache.drain(10.0)

    def wait_for_disk(self) -> None:
        """Lets its delay pass."""
        self.now += 0.6
        assert self.cache.drain(10.0)


@pytest.fixture
def disk_rig(tmp_path: Path) -> Iterator[DiskRig]:
    rig = DiskRig(tmp_path)
    yield rig
    assert [] == rig.cache.check()
    rig.disk.delay_s = 0.0
    rig.now += 10.0
    rig.half.close()


def test_blocks_on_disk_are_waited_for(disk_rig: DiskRig) -> None:
    """The answer is "later" until the promotion has arrived, then the whole hit; it is asked for only once."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.add("a", prompt(1, 20))
    assert [None] * 50 == [disk_rig.match("a", 20) for _ in range(50)]
    disk_rig.wait_for_disk()
    assert 16 == disk_rig.match("a", 20)
    assert 4 == disk_rig.cache.stats["disk.loaded_blocks"]
    assert 0 == disk_rig.cache.stats["promote.timeouts"]
    disk_rig.half.request_finished("a")


def test_room_that_comes_soon_is_waited_for(disk_rig: DiskRig) -> None:
    """Where host memory must be written down before it can take a promotion, the request waits for that too."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.put(prompt(3, 32), "being written")
    disk_rig.add("a", prompt(1, 20))
    assert [None, None] == [disk_rig.match("a", 20) for _ in range(2)]
    assert 8 == disk_rig.cache.num_blocks()["host"], "what is being written is still there"
    assert 4 <= disk_rig.cache.draining_blocks
    disk_rig.wait_for_disk()
    assert disk_rig.match("a", 20) is None
    disk_rig.wait_for_disk()
    assert 16 == disk_rig.match("a", 20)
    disk_rig.half.request_finished("a")


def test_waiting_for_disk_is_bounded(disk_rig: DiskRig) -> None:
    """After ``promote_wait_s`` the request starts with what is there; that is counted; it does not wait again."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.disk.delay_s = 1000.0
    disk_rig.add("a", prompt(1, 20))
    assert disk_rig.match("a", 20) is None
    disk_rig.now += 1.59
    assert disk_rig.match("a", 20) is None
    disk_rig.now += 0.011  # the next question would come too late
    assert [0, 0] == [disk_rig.match("a", 20) for _ in range(2)]
    assert 1 == disk_rig.cache.stats["promote.timeouts"]
    disk_rig.now += 1000.0
    disk_rig.half.finish_step(WorkerReport())


def test_a_new_start_may_wait_again(disk_rig: DiskRig) -> None:
    """The bound on waiting is per start: a preempted request may wait for its blocks once more."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.disk.delay_s = 1000.0
    disk_rig.add("a", prompt(1, 20))
    assert disk_rig.match("a", 20) is None
    disk_rig.now += 3.0
    assert 0 == disk_rig.match("a", 20)
    disk_rig.allocate("a", 5)
    disk_rig.half.build_step([], ["a"])
    assert disk_rig.match("a", 20) is None
    disk_rig.now += 1000.0
    disk_rig.half.request_finished("a")
    disk_rig.half.finish_step(WorkerReport())


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CORRUPT, Outcome.MISS])
def test_failed_promotions_end_the_wait(disk_rig: DiskRig, outcome: Outcome) -> None:
    """What does not come from disk is a miss as soon as that is known."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.faulty.fail_next(JobKind.LOAD, outcome)
    disk_rig.add("a", prompt(1, 20))
    assert disk_rig.match("a", 20) is None
    disk_rig.half.finish_step(WorkerReport())
    disk_rig.wait_for_disk()
    assert 0 == disk_rig.match("a", 20)
    disk_rig.half.request_finished("a")
    assert {} == disk_rig.leftovers()


def test_an_aborted_wait_leaves_nothing(disk_rig: DiskRig) -> None:
    """A request that ends while its promotion runs leaves no pin; what arrives is simply in the cache."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.add("a", prompt(1, 20))
    assert disk_rig.match("a", 20) is None
    assert not disk_rig.half.request_finished("a")
    disk_rig.wait_for_disk()
    assert {} == disk_rig.leftovers()
    disk_rig.add("b", prompt(1, 20))
    assert 16 == disk_rig.match("b", 20)
    disk_rig.half.request_finished("b")


def test_no_room_to_promote_is_no_wait(tmp_path: Path) -> None:
    """Where waiting requests may not pin anything, nothing is promoted and the request starts at once."""
    rig = DiskRig(tmp_path, DefaultSettings(max_pinned_fraction=0.0))
    rig.put_on_disk(1, 16)
    rig.add("a", prompt(1, 20))
    assert 0 == rig.match("a", 20)
    rig.disk.delay_s = 0.0
    rig.half.close()


def test_an_idle_engine_does_not_spin(disk_rig: DiskRig) -> None:
    """With nothing to compute and a promotion running, a step takes some milliseconds; with work it does not wait."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.add("a", prompt(1, 20))
    assert disk_rig.match("a", 20) is None
    start = time.perf_counter()
    disk_rig.half.build_step([])
    assert time.perf_counter() - start > 0.002
    disk_rig.put(prompt(2, 4), "busy")
    times = []
    for _ in range(10):
        start = time.perf_counter()
        disk_rig.half.build_step([ScheduledRequest("busy", [1], 4)])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.004
    disk_rig.half.request_finished("a")


def test_a_load_that_always_fails_is_not_tried_again(disk_rig: DiskRig) -> None:
    """After one failed load a request computes, though disk still has its blocks: otherwise it would go round for ever."""
    disk_rig.put_on_disk(1, 16)
    disk_rig.disk.delay_s = 0.0
    disk_rig.add("a", prompt(1, 20))
    while disk_rig.match("a", 20) is None:
        disk_rig.cache.poll(0.01)
    blocks = disk_rig.allocate("a", 5, 16)
    (load,) = disk_rig.build(a=20).loads
    disk_rig.half.finish_step(disk_rig.report([load], failed=range(4)), set(blocks[:4]))
    assert 0 == disk_rig.match("a", 20)
    disk_rig.add("b", prompt(1, 20))
    assert disk_rig.match("b", 20) is None
    disk_rig.half.request_finished("a")
    disk_rig.half.request_finished("b")


# ---- loading ------------------------------------------------------------------------------------------------------


def test_a_load_moves_every_promised_block(rig: Rig) -> None:
    """A synchronous load is in the message of the step it was allocated in; its lease ends when it was reported."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    blocks = rig.allocate("a", 5, 16)
    assert 0 == rig.half.num_pinned_blocks
    message = rig.build(a=20)
    (load,) = message.loads
    assert (tuple(blocks[:4]), ()) == (load.block_ids, load.missing)
    assert 4 == rig.leftovers()["leases"]
    rig.half.request_finished("a")
    assert 4 == rig.leftovers()["leases"]
    rig.half.finish_step(rig.report([*message.loads, *message.stores]))
    assert {} == rig.leftovers()
    assert () == rig.half.build_step([]).loads


def test_async_loads(tmp_path: Path) -> None:
    """With ``async_load`` the answer says so, the load travels apart, and the second allocation plans nothing."""
    rig = Rig(tmp_path, DefaultSettings(async_load=True))
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert Matched(16, is_async=True) == rig.half.match("a", 20, 0)
    rig.allocate("a", 4, 16)
    message = rig.half.build_step([])
    assert (0, 1) == (len(message.loads), len(message.async_loads))
    rig.half.finish_step(rig.report(message.async_loads))
    rig.half.allocated("a", [*rig.block_ids["a"], 99], 0)
    rig.block_ids["a"].append(99)
    message = rig.step(a=20)
    assert ((), 1) == (message.async_loads, len(message.stores))


def test_a_load_ends_when_all_workers_have_copied(tmp_path: Path) -> None:
    """Slots stay leased until the last rank has reported."""
    rig = Rig(tmp_path, num_workers=2)
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    rig.match("a", 20)
    rig.allocate("a", 5, 16)
    message = rig.build(a=16)
    rig.half.finish_step(rig.report(message.loads, workers=1))
    assert {"loads": 1, "leases": 4} == rig.leftovers()
    rig.half.finish_step(rig.report(message.loads, workers=1))
    assert {} == rig.leftovers()


def test_blocks_that_vanish_before_the_load_are_missing(tmp_path: Path) -> None:
    """A promise that cannot be kept becomes a failed load, so the engine computes; the rest is loaded."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=0.25), host_blocks=8)
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    rig.put(prompt(2, 24), "w2")
    blocks = rig.allocate("a", 5, 16)
    message = rig.build(a=20)
    (load,) = message.loads
    assert (tuple(blocks[:2]), tuple(blocks[2:4])) == (load.block_ids, load.missing)
    rig.half.finish_step(rig.report([*message.loads, *message.stores]), set(load.missing))
    assert {} == rig.leftovers()
    assert 0 == rig.match("a", 20)


def test_a_failed_key_stops_being_a_hit(rig: Rig) -> None:
    """A block that could not be loaded, and what lies behind it, is a miss for everybody until it is stored again."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    rig.match("a", 20)
    blocks = rig.allocate("a", 5, 16)
    message = rig.build(a=20)
    rig.half.finish_step(
        WorkerReport({job.job_id: 1 for job in (*message.loads, *message.stores)}, {message.loads[0].job_id: {2}}), {blocks[2]}
    )
    rig.add("b", prompt(1, 20))
    assert 8 == rig.match("b", 20)
    assert 1 == rig.cache.stats["load.failed_blocks"]
    rig.step(a=20)
    assert 16 == rig.match("b", 20)


# ---- storing ------------------------------------------------------------------------------------------------------


def test_full_blocks_are_stored_once(rig: Rig) -> None:
    """Every block is stored in the step that fills it: chunk by chunk, then while decoding."""
    tokens = rig.add("a", prompt(1, 10))
    rig.match("a", 10)
    blocks = rig.allocate("a", 6)
    assert [(blocks[0],), (blocks[1],)] == [rig.step(a=count).stores[0].block_ids for count in (6, 10)]
    stored = []
    for count in range(11, 24):
        tokens.append(count)
        stored += [job.block_ids for job in rig.step(a=count).stores]
    assert [(blocks[2],), (blocks[3],), (blocks[4],)] == stored


def test_decode_blocks_are_a_setting(tmp_path: Path) -> None:
    """Without ``store_decode_blocks`` only blocks inside the prompt are stored."""
    rig = Rig(tmp_path, DefaultSettings(store_decode_blocks=False))
    tokens = rig.add("a", prompt(1, 10))
    rig.match("a", 10)
    blocks = rig.allocate("a", 6)
    assert (tuple(blocks[:2]),) == tuple(job.block_ids for job in rig.step(a=10).stores)
    for count in range(11, 24):
        tokens.append(count)
        assert () == rig.step(a=count).stores


def test_unknown_tokens_are_not_stored(rig: Rig) -> None:
    """Where the engine runs ahead of its token ids (asynchronous scheduling), a block waits for its last id."""
    tokens = rig.add("a", prompt(1, 7))
    rig.match("a", 7)
    rig.allocate("a", 3)
    assert 1 == len(rig.step(a=8).stores[0].block_ids)
    tokens.append(7)
    assert 1 == len(rig.step(a=9).stores[0].block_ids)


def test_loaded_blocks_are_not_stored_again(rig: Rig) -> None:
    """A load is followed by stores of what was computed only."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 24))
    rig.match("a", 24)
    blocks = rig.allocate("a", 6, 16)
    assert (tuple(blocks[4:6]),) == tuple(job.block_ids for job in rig.step(a=24).stores)


def test_a_block_is_readable_when_all_workers_have_stored_it(tmp_path: Path) -> None:
    """One rank's part is not enough."""
    rig = Rig(tmp_path, num_workers=2)
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    rig.allocate("a", 4)
    message = rig.build(a=16)
    rig.add("b", prompt(1, 20))
    rig.half.finish_step(rig.report(message.stores, workers=1))
    assert 0 == rig.match("b", 20)
    rig.half.finish_step(rig.report(message.stores, workers=1))
    assert 16 == rig.match("b", 20)


def test_a_failed_store_keeps_its_leading_part(tmp_path: Path) -> None:
    """What any rank could not copy is not readable, nor what lies behind it, even if that rank reported first."""
    rig = Rig(tmp_path, num_workers=2, blocks_per_slot=2)
    rig.add("a", prompt(1, 32))
    rig.match("a", 32)
    rig.allocate("a", 8)
    message = rig.build(a=32)
    rig.half.finish_step(rig.report(message.stores, workers=1, failed=[5]))
    rig.half.finish_step(rig.report(message.stores, workers=1))
    rig.add("b", prompt(1, 40))
    assert 16 == rig.match("b", 40)
    assert 2 == rig.cache.stats["store.aborted_blocks"]


def test_nothing_computed_on_a_failed_load_is_stored(rig: Rig) -> None:
    """A load and a store in one step, the load fails: the store is void though its copies succeeded, and is repeated later."""
    rig.put(prompt(1, 8))
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    blocks = rig.allocate("a", 4, 8)
    message = rig.build(a=16)
    report = rig.report([*message.loads, *message.stores])
    report.failed[message.loads[0].job_id] = {1}
    rig.half.finish_step(report, {blocks[1]})
    rig.add("b", prompt(1, 20))
    assert 4 == rig.match("b", 20)
    (again,) = rig.step(a=16).stores
    assert tuple(blocks[1:]) == again.block_ids
    assert 16 == rig.match("b", 20)


def test_nothing_computed_on_a_shared_failed_block_is_stored(rig: Rig) -> None:
    """A request that reads another's failed block through the engine's own prefix cache stores nothing of that step."""
    rig.put(prompt(1, 8))
    rig.add("a", prompt(1, 8) + prompt(2, 8))
    rig.match("a", 16)
    blocks = rig.allocate("a", 4, 4)
    rig.add("b", prompt(1, 8) + prompt(3, 8))
    rig.match("b", 16, 8)
    rig.block_ids["b"] = [blocks[0], blocks[1], 50, 51]
    rig.half.allocated("b", rig.block_ids["b"], 0)
    message = rig.build(a=16, b=16)
    report = rig.report([*message.loads, *message.stores])
    report.failed[message.loads[0].job_id] = {0}
    rig.half.finish_step(report, {blocks[0]})
    rig.add("c", prompt(1, 8) + prompt(3, 12))
    assert 0 == rig.match("c", 20)
    assert {"a", "b"} == {job.request_id for job in rig.step(a=16, b=16).stores}
    assert 16 == rig.match("c", 20)


@pytest.mark.parametrize("is_late", [False, True])
def test_what_the_engine_recomputes_voids_stores(rig: Rig, is_late: bool) -> None:
    """The engine's own list of blocks to compute anew is enough: a store that read one of them is void, and done in that step or later."""
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    blocks = rig.allocate("a", 4)
    message = rig.build(a=16)
    if is_late:
        rig.half.finish_step(None, {blocks[1]})
        rig.half.finish_step(rig.report(message.stores))
    else:
        rig.half.finish_step(rig.report(message.stores), {blocks[1]})
    rig.add("b", prompt(1, 20))
    assert 0 == rig.match("b", 20)


def test_a_preempted_request_starts_over(rig: Rig) -> None:
    """Asked again after it had blocks, a request finds its own blocks in the cache, and stores only what is not there."""
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    rig.allocate("a", 4)
    rig.step(a=8)
    assert 8 == rig.match("a", 16)
    message = rig.half.build_step([], ["a"])
    assert ("a",) == message.preempted
    blocks = rig.allocate("a", 4, 8)
    assert (tuple(blocks[2:]),) == tuple(job.block_ids for job in rig.step(a=16).stores)


def test_evicted_blocks_of_a_running_request_are_stored_again(tmp_path: Path) -> None:
    """Where a request's first blocks have left every tier, its next ones would be lost: it stores from the gap on."""
    rig = Rig(tmp_path, host_blocks=4)
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    blocks = rig.allocate("a", 4)
    rig.step(a=8)
    rig.put(prompt(2, 16), "w")
    rig.half.request_finished("w")
    assert tuple(blocks[:3]) == rig.step(a=12).stores[0].block_ids
    rig.add("b", prompt(1, 16))
    assert 12 == rig.match("b", 16)


def test_a_refused_store_is_tried_again(tmp_path: Path) -> None:
    """What found no slot because others were in use is stored later: when another block is full, not in every step."""
    rig = Rig(tmp_path, DefaultSettings(max_pinned_fraction=1.0), host_blocks=4)
    rig.put(prompt(1, 16))
    rig.add("pinner", prompt(1, 20))
    rig.match("pinner", 20)
    rig.add("a", prompt(2, 24))
    rig.match("a", 24)
    blocks = rig.allocate("a", 6)
    assert () == rig.step(a=8).stores
    rig.half.request_finished("pinner")
    assert () == rig.step(a=9).stores
    assert tuple(blocks[:3]) == rig.step(a=12).stores[0].block_ids


# ---- the end ------------------------------------------------------------------------------------------------------


def test_only_running_async_stores_hold_blocks(tmp_path: Path) -> None:
    """``request_finished`` is true exactly while an asynchronous store of the request was not reported; the next message says so."""
    rig = Rig(tmp_path, stores_are_async=True)
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    rig.allocate("a", 4)
    message = rig.build(a=16)
    rig.add("b", prompt(1, 16))
    assert (True, False, False) == tuple(rig.half.request_finished(name) for name in ("a", "b", "stranger"))
    assert rig.half.has_pending_work
    assert [("a",), ()] == [rig.half.build_step([]).held for _ in range(2)]
    rig.half.finish_step(rig.report(message.stores))
    assert [False] == [rig.half.has_pending_work]  # a list: mypy believes that the property cannot change
    rig.put(prompt(2, 16), "c")
    assert not rig.half.request_finished("c")


def test_stores_from_before_a_preemption_hold_nothing(tmp_path: Path) -> None:
    """They read blocks that the request has no more; holding the new ones could free them twice."""
    rig = Rig(tmp_path, DefaultSettings(async_load=True), stores_are_async=True)
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    rig.allocate("a", 4)
    message = rig.build(a=8)
    rig.match("a", 16)
    assert not rig.half.request_finished("a")
    rig.half.finish_step(rig.report(message.stores))
    assert {} == rig.leftovers()


def test_synchronous_stores_hold_nothing(rig: Rig) -> None:
    """vLLM ends a request before it hands over the report of its last step: with synchronous copies that is fine."""
    rig.add("a", prompt(1, 16))
    rig.match("a", 16)
    rig.allocate("a", 4)
    message = rig.build(a=16)
    assert not rig.half.request_finished("a")
    rig.half.finish_step(rig.report(message.stores))
    rig.add("b", prompt(1, 20))
    assert 16 == rig.match("b", 20)


def test_reset_forgets_everything_and_what_comes_from_before(rig: Rig) -> None:
    """After ``reset`` nothing is hit; neither copies under way nor requests that were running bring old KV back."""
    rig.put(prompt(1, 16))
    rig.add("waiting", prompt(1, 20))
    assert 16 == rig.match("waiting", 20)
    rig.add("a", prompt(2, 24))
    rig.match("a", 24)
    rig.allocate("a", 6)
    message = rig.build(a=16)
    assert rig.half.reset()
    rig.half.finish_step(rig.report(message.stores))
    assert () == rig.step(a=24).stores
    rig.add("b", prompt(2, 24))
    assert [0, 0] == [rig.match("waiting", 20), rig.match("b", 24)]
    rig.match("a", 24)
    rig.allocate("a", 6)
    assert 1 == len(rig.step(a=8).stores)
    rig.half.request_finished("waiting")
    assert {} == rig.leftovers()


def test_a_load_that_fails_after_a_reset_brings_nothing_back(rig: Rig) -> None:
    """What a request has computed before the reset is not stored, though its failed load makes it compute anew."""
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 24))
    rig.match("a", 24)
    blocks = rig.allocate("a", 6, 16)
    message = rig.build(a=16)
    rig.half.reset()
    rig.half.finish_step(rig.report(message.loads, failed=[3]), {blocks[3]})
    assert () == rig.step(a=24).stores


def test_stats_and_events_pass_through(rig: Rig) -> None:
    """Counters come as growth since the last call, events name stored blocks, attached workers are counted."""
    rig.put(prompt(1, 16))
    assert 4 == rig.half.take_stats()["host.stored_blocks"]
    assert {} == rig.half.take_stats()
    assert [(True, "host")] * 4 == [(event.stored, event.tier) for event in rig.half.take_events()]
    rig.half.finish_step(WorkerReport(attached=1, num_stale=2, num_errors=3))
    assert {"load.stale_slots": 2, "connector.errors": 3} == rig.half.take_stats()
    assert 1 == rig.half.num_attached_workers


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    """``close`` ends requests and the cache; again it does nothing."""
    rig = Rig(tmp_path)
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    rig.match("a", 20)
    rig.half.close()
    rig.half.close()


# ---- errors inside kvtier -----------------------------------------------------------------------------------------


class BrokenCacheError(KVTierError):
    """What a bug might raise."""


def broken(*_args: object, **_more: object) -> None:
    raise BrokenCacheError("a bug")


def break_cache(rig: Rig, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(rig.cache, name, broken)


def test_an_error_becomes_the_safe_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the cache raises: no hit, nothing stored, nothing held; counted each time, logged once per kind."""
    rig = Rig(tmp_path, strict=False)
    rig.add("a", prompt(1, 16))
    break_cache(rig, monkeypatch, "match", "touch", "begin_stores", "poll", "reset", "take_events", "unpin", "close")
    assert [0, 0] == [rig.match("a", 16) for _ in range(2)]
    rig.allocate("a", 4)
    assert () == rig.build(a=16).stores
    rig.half.finish_step(WorkerReport())
    assert not rig.half.reset()
    assert [] == rig.half.take_events()
    assert not rig.half.request_finished("a")
    rig.half.close()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert rig.cache.stats["connector.errors"] > len(errors) >= 5
    assert all(record.exc_info for record in errors)


def test_a_promise_is_kept_even_by_a_broken_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that cannot be planned after its tokens were promised is reported as failed, block by block."""
    rig = Rig(tmp_path, strict=False)
    rig.put(prompt(1, 16))
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    with monkeypatch.context() as patch:
        break_cache(rig, patch, "begin_load")
        blocks = rig.allocate("a", 5, 16)
    message = rig.build(a=20)
    (load,) = message.loads
    assert ((), tuple(blocks[:4])) == (load.block_ids, load.missing)
    rig.half.finish_step(rig.report([*message.loads, *message.stores]), set(load.missing))
    assert {} == rig.leftovers()
    assert 1 == rig.cache.stats["connector.errors"]
    rig.add("b", prompt(1, 24))
    assert 16 == rig.match("b", 24)


def test_bad_tokens_are_a_miss(tmp_path: Path) -> None:
    """Token ids that cannot be hashed cost a hit, not the engine."""
    rig = Rig(tmp_path, strict=False)
    rig.add("a", [-1] * 20)
    assert 0 == rig.match("a", 20)
    rig.allocate("a", 5)
    assert () == rig.step(a=20).stores
    assert not rig.half.request_finished("a")
    rig.add("b", prompt(1, 20), identity=RequestIdentity(extras=("not bytes",)))  # type: ignore[arg-type]
    assert 0 == rig.match("b", 20)


def test_block_sizes_must_fit() -> None:
    """A block size that is no multiple of the engine's is refused at start, by number."""
    with pytest.raises(ValueError, match="block_tokens is 24; it must be a multiple of the engine's block size, 16"):
        Geometry(NAMESPACE.digest, 24, 16, 1, 8)


# ---- cost ---------------------------------------------------------------------------------------------------------


def test_a_decode_step_of_64_requests_is_cheap(tmp_path: Path) -> None:
    """Scheduler-side cost of a step in which 64 requests decode, some filling a block: far below a millisecond."""
    rig = Rig(tmp_path, host_blocks=1024)
    tokens = {f"r{number}": rig.add(f"r{number}", prompt(number, 32 + number % 4)) for number in range(64)}
    for name, ids in tokens.items():
        rig.match(name, len(ids))
        rig.allocate(name, 20)
    rig.step(**{name: len(ids) for name, ids in tokens.items()})
    times = []
    for _ in range(40):
        for ids in tokens.values():
            ids.append(7)
        scheduled = [ScheduledRequest(name, rig.block_ids[name], len(ids)) for name, ids in tokens.items()]
        start = time.perf_counter()
        message = rig.half.build_step(scheduled)
        rig.half.finish_step(rig.report(message.stores))
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.002
