"""A disk that does not answer: it is given up in time, keeps what it was given, and is back when it answers again."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config import Config
from kvtier.control.operations import HOST_TIER
from kvtier.engine import CacheEngine
from kvtier.errors import TierBusyError
from kvtier.hashing import Namespace
from kvtier.io import PAGE_BYTES, AlignedFile, EngineKind
from kvtier.memory.arena import Arena
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.starts import refused_threads
from kvtier.testing.tiers import key_of, load, load_job, meta_of, payload_of, store, store_job, wait_for
from kvtier.tiers.disk import DiskTier, check_path, closing, disk_health, mover
from kvtier.tiers.disk.disk_health import Direction
from kvtier.tiers.disk.index_file import IndexFile
from kvtier.types import JobResult, Outcome
from tests.unit.test_io_engines import needs_ring

NUM_BYTES = 5000
SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 8 * SEGMENT_BYTES
RECORD_BYTES = 3 * PAGE_BYTES
DEPTH = 2
DEADLINE_S = 20.0
PATIENCE_S = 2.0
"""how long a request may wait for the disk (``promote_wait``)"""
ENGINES = ["threads", pytest.param("io_uring", marks=needs_ring)]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stop:
    """What stops calls of some kinds until the disk ``answers``."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.num_stopped = 0
        self._answers = threading.Event()

    def pass_by(self, kind: str) -> None:
        """Waits where calls of this kind are stopped."""
        if kind in self.kinds:
            self.num_stopped += 1
            assert self._answers.wait(60), "nobody lets this go on"

    def answers(self) -> None:
        """All goes on."""
        self.kinds = set()
        self._answers.set()


class StoppedFile(AlignedFile):
    """A file whose calls may stop."""

    __slots__ = ("stop",)

    stop: Stop

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self.stop.pass_by("read")
        return super().readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.stop.pass_by("write")
        super().writev(buffers, offset)

    def sync(self) -> None:
        self.stop.pass_by("sync")
        super().sync()


def stopping_tier(directory: Path, stop: Stop) -> DiskTier:
    """A tier on threads, whose calls may stop."""
    tier = DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_engine="threads", queue_depth=DEPTH)

    def open_file(path: Path) -> AlignedFile:
        stop.pass_by("open")
        file = StoppedFile(path)
        file.stop = stop
        return file

    tier._files.open_file = open_file  # type: ignore[method-assign]
    return tier


class LateReads:
    """A pipe in the place of segment 0: reads do not end before ``answer``, on either engine."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self._file = tier._files.acquire(0)
        self._own = os.dup(self._file.fileno)
        self._reading, self._writing = os.pipe()
        os.dup2(self._reading, self._file.fileno)

    def answer(self, num_records: int) -> None:
        """So many reads of one record each end, with what lies at the beginning of the segment."""
        os.write(self._writing, os.pread(self._own, RECORD_BYTES, 0) * num_records)

    def end(self) -> None:
        """The segment is itself again."""
        os.dup2(self._own, self._file.fileno)
        self._tier._files.give_back(0)
        for fd in (self._own, self._reading, self._writing):
            os.close(fd)


def until(is_reached: Callable[[], object], what: str) -> None:
    """Waits for something. Fails after twenty seconds."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def threads_named(name: str) -> list[threading.Thread]:
    """Those that live."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds become fractions of them; what was left behind has ended after each test."""
    monkeypatch.setattr(disk_health, "HANG_S", 0.3)
    monkeypatch.setattr(mover, "_LOOK_S", 0.05)
    monkeypatch.setattr(closing, "_LOOK_S", 0.01)
    before = set(threads_named("kvtier-disk"))
    yield
    until(lambda: not set(threads_named("kvtier-disk")) - before, "a tier was left behind for good")


def is_online(tier: DiskTier) -> bool:
    """What the tier says now (mypy takes a property for a constant)."""
    return tier.online


def outcomes_of(results: Sequence[JobResult]) -> dict[int, Outcome]:
    """Of jobs of one block each."""
    return {result.job_id: result.outcomes[0] for result in results}


def test_reads_that_do_not_end(tmp_path: Path) -> None:
    """Nothing is promised any more, nothing is tried, what the disk was not given fails; the rest ends when the disk answers."""
    stop = Stop()
    tier = stopping_tier(tmp_path, stop)
    metas = [meta_of(number, NUM_BYTES) for number in range(8)]
    assert {Outcome.OK} == set(store(tier, metas))
    stop.kinds = {"read"}
    for number, meta in enumerate(metas[:5]):
        tier.submit(load_job(number, [meta]))
    assert 8 == tier.lookup([meta.key for meta in metas])
    given_up = outcomes_of(wait_for(tier, 5 - DEPTH))
    assert {Outcome.FAILED} == set(given_up.values())
    assert (False, 0) == (is_online(tier), tier.lookup([meta.key for meta in metas]))
    assert tier.offline_count >= 1
    assert (Outcome.FAILED,) == load(tier, metas[7:], job_id=9)
    assert (Outcome.FAILED,) == store(tier, [meta_of(20, NUM_BYTES)], job_id=10)
    assert DEPTH == stop.num_stopped, "what is offline is not tried"
    assert {"hung_reads": 1} == tier.take_events()
    assert [] == tier.poll(0.1)
    stop.answers()
    late = outcomes_of(wait_for(tier, DEPTH))
    assert set(range(5)) == given_up.keys() | late.keys()
    assert {Outcome.OK} == set(late.values())
    assert (True, 8) == (is_online(tier), tier.lookup([meta.key for meta in metas]))
    assert {Outcome.OK} == set(load(tier, metas))
    assert {} == tier.take_events()
    assert [] == tier.check()
    tier.close()
    again = stopping_tier(tmp_path, Stop())
    assert "clean" == again.recovery.source
    again.close()


def test_a_run_that_was_given_up_is_not_read_again(tmp_path: Path) -> None:
    """Neighbours are read one by one after an error of the disk, not where the disk has never heard of them."""
    stop = Stop()
    tier = stopping_tier(tmp_path, stop)
    metas = [meta_of(number, NUM_BYTES) for number in range(8)]
    assert {Outcome.OK} == set(store(tier, metas))
    stop.kinds = {"read"}
    for number in range(4):
        tier.submit(load_job(number, metas[2 * number : 2 * number + 2]))
    results = wait_for(tier, 2)
    assert {(Outcome.FAILED,) * 2} == {result.outcomes for result in results}
    assert DEPTH == stop.num_stopped
    stop.answers()
    wait_for(tier, 2)
    tier.close()


@pytest.mark.parametrize("kind", ["open", "write", "sync", "commit"])
def test_writes_that_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Wherever they stop, nothing more is tried, and all is well when the disk answers."""
    stop = Stop()
    commit = IndexFile.commit

    def stopping_commit(*arguments: Any) -> None:
        stop.pass_by("commit")
        commit(*arguments)

    monkeypatch.setattr(IndexFile, "commit", stopping_commit)
    tier = stopping_tier(tmp_path, stop)
    metas = [meta_of(number, NUM_BYTES) for number in range(SEGMENT_BYTES // RECORD_BYTES + 2)]
    kept, late, refused = metas[:-2], metas[-2:-1], metas[-1:]  # those that are kept fill a segment
    assert {Outcome.OK} == set(store(tier, kept))
    until(lambda: is_online(tier), "it did not come back")  # a busy machine's disk may have hung by itself
    tier.take_events()
    stop.kinds = {kind}
    tier.submit(store_job(1, late))
    until(lambda: not is_online(tier), "nobody noticed")
    assert (Outcome.FAILED,) == store(tier, refused, job_id=2)
    assert {Outcome.FAILED} == set(load(tier, kept, job_id=3))
    assert (1, {"hung_writes": 1}) == (stop.num_stopped, tier.take_events())
    stop.answers()
    assert {1: Outcome.OK} == outcomes_of(wait_for(tier))
    assert is_online(tier)
    assert (Outcome.OK,) == store(tier, refused, job_id=4)
    assert {Outcome.OK} == set(load(tier, metas, job_id=5))
    tier.close()


def test_writes_that_end_badly_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is back with errors stays offline as any that fails does."""
    stop = Stop()
    tier = stopping_tier(tmp_path, stop)
    assert (Outcome.OK,) == store(tier, [meta_of(1, NUM_BYTES)])

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "dead")

    monkeypatch.setattr(os, "pwritev", fail)
    stop.kinds = {"write"}
    for number in range(2, 5):
        tier.submit(store_job(number, [meta_of(number, NUM_BYTES)]))
    until(lambda: not is_online(tier), "nobody noticed")
    stop.answers()
    assert {Outcome.FAILED} == set(outcomes_of(wait_for(tier, 3)).values())
    for number in range(5, 8):
        if is_online(tier):
            assert (Outcome.FAILED,) == store(tier, [meta_of(number, NUM_BYTES)])
    assert not is_online(tier)
    assert not tier._health.look()
    monkeypatch.undo()
    until(lambda: is_online(tier), "it did not come back")
    assert (Outcome.OK,) == store(tier, [meta_of(9, NUM_BYTES)])
    tier.close()


@pytest.mark.parametrize("kind", ["read", "write", "sync"])
def test_closing_while_it_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """``close`` comes back. The directory stays locked and unproven until the disk has answered; then the rest is done."""
    stop = Stop()
    tier = stopping_tier(tmp_path, stop)
    metas = [meta_of(number, NUM_BYTES) for number in range(2)]
    assert (Outcome.OK,) == store(tier, metas[:1])
    stop.kinds = {kind}
    tier.submit(load_job(1, metas[:1]) if kind == "read" else store_job(1, metas[1:]))
    until(lambda: stop.num_stopped, "nothing was stopped")
    before = time.monotonic()
    tier.close()
    assert time.monotonic() - before < 5.0
    assert f"{tmp_path} does not answer: 1 jobs are left behind" in caplog.text
    tier.close()
    assert not (tmp_path / "clean").exists()
    with pytest.raises(TierBusyError):
        stopping_tier(tmp_path, Stop())
    stop.answers()
    until(lambda: not threads_named("kvtier-disk"), "what was left behind did not end")
    assert {1: Outcome.OK} == outcomes_of(tier.poll())
    again = stopping_tier(tmp_path, Stop())
    assert "clean" == again.recovery.source
    stored = metas[:1] if kind == "read" else metas
    assert {Outcome.OK} == set(load(again, stored))
    again.close()


@needs_ring
def test_closing_while_a_ring_hangs(tmp_path: Path) -> None:
    """A read that the ring's kernel has not ended keeps its buffer, whoever else lets go of it, and the ring stays until then."""
    tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_engine="io_uring", direct_io="off")
    meta = meta_of(0, NUM_BYTES)
    assert (Outcome.OK,) == store(tier, [meta])
    late = LateReads(tier)
    job = load_job(1, [meta])
    tier.submit(job)
    tier.close()
    assert [] == tier.poll()
    late.answer(1)
    assert {1: Outcome.OK} == outcomes_of(wait_for(tier))
    assert payload_of(meta.key, NUM_BYTES) == bytes(job.blocks[0].buffer)
    late.end()
    until(lambda: not threads_named("kvtier-disk"), "what was left behind did not end")


_CHILD = """
import os, sys, threading
from pathlib import Path
from kvtier.testing.tiers import load_job, meta_of, store
from kvtier.tiers.disk import DiskTier, disk_health
disk_health.HANG_S = 0.3
tier = DiskTier(Path(sys.argv[1]), {capacity}, segment_bytes={segment}, io_engine=sys.argv[2], direct_io="off")
print(store(tier, [meta_of(n, {num_bytes}) for n in range(4)]))
reading, writing = os.pipe()
real = os.preadv
os.preadv = lambda fd, buffers, offset: os.read(reading, 1)
os.dup2(reading, tier._files.acquire(0).fileno)
tier.submit(load_job(1, [meta_of(0, {num_bytes})]))
tier.close()
"""


@pytest.mark.parametrize("io_engine", ENGINES)
def test_a_process_ends_although_its_disk_hangs(tmp_path: Path, io_engine: EngineKind) -> None:
    """Nothing keeps it, and what it had stored is found."""
    code = _CHILD.format(capacity=CAPACITY_BYTES, segment=SEGMENT_BYTES, num_bytes=NUM_BYTES)
    child = subprocess.run([sys.executable, "-c", code, tmp_path, io_engine], timeout=60, capture_output=True, text=True, check=True)
    assert "does not answer" in child.stderr
    tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)
    assert "salvaged" == tier.recovery.source
    assert {Outcome.OK} == set(load(tier, [meta_of(number, NUM_BYTES) for number in range(4)]))
    tier.close()


def prompt(number: int, length: int = 30) -> list[int]:
    """Tokens that no other number's prompt begins with."""
    return [(number * 31 + position) % 89 for position in range(length)]


@contextmanager
def hanging_system(directory: Path, stop: Stop, host_blocks: int = 64) -> Iterator[FakeSystem]:
    """A whole system over a disk that holds six prompts, which host memory does not."""
    for is_first in (True, False):
        tier = stopping_tier(directory / "disk", stop)
        system = FakeSystem(directory, Namespace(model="fake"), FakeSystemOptions(host_blocks=host_blocks), tiers=[tier])
        if is_first:
            for number in range(6):
                system.engine.submit(f"a{number}", prompt(number), 2)
                system.settle()
                assert system.cache.drain(10)
            system.close()
        else:
            try:
                yield system
            finally:
                stop.answers()
                system.close()


def is_noticed(system: FakeSystem) -> bool:
    """Whether the disk is offline."""
    system.cache.poll()
    return system.cache.stats["disk.offline"] > 0


def maps() -> str:
    """What this process has mapped."""
    return Path("/proc/self/maps").read_text(encoding="utf-8")


def seconds_of(system: FakeSystem, name: str, tokens: list[int]) -> float:
    """How long a request takes, which must be answered rightly."""
    before = time.monotonic()
    request = system.engine.submit(name, tokens, 2)
    while name not in system.engine.finished:
        assert time.monotonic() - before < DEADLINE_S
        system.engine.step()
        time.sleep(0.001)
    assert request.expected_output() == request.output
    return time.monotonic() - before


def test_an_engine_over_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for the disk until it is found to hang, and no longer. Closing comes back, and leaves the memory to what may come."""
    monkeypatch.setattr(disk_health, "HANG_S", 1.0)
    stop = Stop()
    with hanging_system(tmp_path, stop) as system:
        stop.kinds = {"read"}
        assert seconds_of(system, "first", prompt(0)) < PATIENCE_S
        until(lambda: is_noticed(system), "nobody noticed")
        for number in range(6):
            assert seconds_of(system, f"b{number}", prompt(number)) < PATIENCE_S / 4
        assert 1 == system.cache.stats["disk.hung_reads"]
        before = time.monotonic()
        system.cache.close()
        assert time.monotonic() - before < 5.0


def test_memory_stays_until_the_disk_lets_go(tmp_path: Path) -> None:
    """An engine that is closed leaves the arena mapped as long as a late answer may be written there, and no longer."""
    stop = Stop()
    tier = stopping_tier(tmp_path / "disk", stop)
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": 8 * RECORD_BYTES}]})
    arena = Arena.open(str(tmp_path / "arena"), config.host.capacity_bytes)
    cache = CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=NUM_BYTES, arena=arena, tiers=[tier])
    keys = [key_of(number) for number in range(2)]
    plan = cache.begin_store(keys, 0)
    cache.commit_store(plan.job_id)
    assert cache.drain(10)
    cache.verbs.clear([HOST_TIER], None)
    cache.poll()
    stop.kinds = {"read"}
    assert 2 == cache.promote(keys)
    until(lambda: stop.num_stopped, "nothing was stopped")
    before = time.monotonic()
    cache.close()
    assert time.monotonic() - before < 5.0
    del cache
    gc.collect()
    assert arena.path in maps(), "the disk may still write there"
    stop.answers()
    until(lambda: not threads_named("kvtier-disk"), "what was left behind did not end")
    until(lambda: arena.path not in maps(), "somebody keeps the memory")


def test_an_engine_over_a_disk_that_answers_again(tmp_path: Path) -> None:
    """The tier comes back by itself, and with it the hits."""
    stop = Stop()
    with hanging_system(tmp_path, stop) as system:
        stop.kinds = {"read"}
        seconds_of(system, "first", prompt(0))
        until(lambda: is_noticed(system), "nobody noticed")
        stop.answers()
        system.settle()
        loaded = system.cache.stats["disk.loaded_blocks"]
        seconds_of(system, "again", prompt(5))
        assert system.cache.stats["disk.loaded_blocks"] > loaded
        system.settle()
        assert [] == system.problems()


calls = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "transfer", "transferred"]), st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0])), max_size=40
)


@given(calls)
@settings(deadline=None)
def test_what_hangs_is_what_is_old(calls: list[tuple[str, float]]) -> None:
    """A direction hangs exactly while the oldest of all that is under way is too old; each time it begins is counted once."""
    clock = Clock()
    transfers: list[float] = []
    open_calls: list[tuple[float, Any]] = []
    direction = Direction("reading", clock, lambda: transfers[0] if transfers else None)
    num_hangs, did_hang = 0, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        for what, seconds in calls:
            if what == "begin":
                watch = direction.watch()
                watch.__enter__()
                open_calls.append((clock.now, watch))
            elif what == "end" and open_calls:
                open_calls.pop(num_hangs % len(open_calls))[1].__exit__(None, None, None)
            elif what == "transfer":
                transfers.append(clock.now)
            elif what == "transferred" and transfers:
                transfers.pop(0)
            clock.now += seconds
            starts = transfers + [start for start, _ in open_calls]
            does_hang = bool(starts) and clock.now - min(starts) >= disk_health.HANG_S
            num_hangs += does_hang and not did_hang
            did_hang = does_hang
            assert (does_hang, num_hangs) == (direction.look(), direction.hang_count)


def test_closing_where_no_thread_can_be_had(tmp_path: Path) -> None:
    """A disk that answers is closed by the caller's own thread, in order."""
    tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)
    assert (Outcome.OK,) == store(tier, [meta_of(1, 5000)])
    with refused_threads("kvtier-disk-closing-0"):
        tier.close()
    assert [] == check_path(tmp_path)
    tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)
    assert "clean" == tier.recovery.source
    tier.close()
