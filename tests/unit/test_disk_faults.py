"""Failing disks: what goes wrong is an outcome and a counted event, and the tier comes back by itself."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvtier.testing.tiers import NAMESPACE, load, load_job, meta_of, payload_of, store, store_job, wait_for
from kvtier.tiers.disk import DiskTier, check_path, committer
from kvtier.tiers.disk.index_file import IndexFile, IndexFileError
from kvtier.tiers.health import FIRST_BACK_OFF_S, MAX_CONSECUTIVE_FAILURES, Health
from kvtier.types import BlockIO, BlockMeta, JobKind, Outcome, TransferJob

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 4 * SEGMENT_BYTES


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def open_tier(directory: Path, clock: Callable[[], float] = time.monotonic, **settings: Any) -> DiskTier:
    """The tier of these tests: on threads, whose system calls can be made to fail."""
    settings.setdefault("io_engine", "threads")
    return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, clock=clock, **settings)


def is_online(tier: DiskTier) -> bool:
    """What the tier says now (mypy takes a property for a constant)."""
    return tier.online


def failing(error: int) -> Callable[..., int]:
    """A system call that fails."""

    def call(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EINVAL])
def test_failing_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A store that cannot be written is FAILED and leaves no trace; the next one works."""
    tier = open_tier(tmp_path)
    kept, lost = [meta_of(1, 5000)], [meta_of(2, 5000), meta_of(3, 5000)]
    store(tier, kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(error))
        assert (Outcome.FAILED,) * 2 == store(tier, lost)
    assert 0 == tier.lookup([lost[0].key])
    assert (Outcome.OK, Outcome.MISS, Outcome.MISS) == load(tier, kept + lost)
    assert (Outcome.OK,) * 2 == store(tier, lost)
    assert [] == tier.check()
    tier.close()


def test_failing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be synced is not acknowledged."""
    tier = open_tier(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        assert (Outcome.FAILED,) == store(tier, [meta_of(1, 5000)])
    assert (Outcome.MISS,) == load(tier, [meta_of(1, 5000)])
    assert (Outcome.OK,) == store(tier, [meta_of(1, 5000)])
    tier.close()


def test_failing_reads_cost_only_the_blocks_that_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector in a run of neighbours fails one block; the block is not forgotten, the disk may recover."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(4)]
    store(tier, metas)
    real = os.preadv
    bad = 2 * 3 * 4096

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        assert (Outcome.OK, Outcome.OK, Outcome.FAILED, Outcome.OK) == load(tier, metas)
    assert (Outcome.OK,) * 4 == load(tier, metas)
    tier.close()


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may write and read less than asked."""
    tier = open_tier(tmp_path)
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real_write(fd, [buffers[0][:4096]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:4096]], offset))
    metas = [meta_of(number, 13000) for number in range(3)]
    assert (Outcome.OK,) * 3 == store(tier, metas)
    assert (Outcome.OK,) * 3 == load(tier, metas)
    tier.close()


def test_offline_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After several failures stores are refused without touching the disk, for longer each time; then the tier is back."""
    clock = Clock()
    tier = open_tier(tmp_path, clock)
    calls = []

    def pwritev(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(errno.EIO, "dead")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        for number in range(MAX_CONSECUTIVE_FAILURES):
            assert is_online(tier)
            assert (Outcome.FAILED,) == store(tier, [meta_of(number, 100)])
        assert not is_online(tier)
        assert 1 == tier.offline_count
        before = len(calls)
        assert (Outcome.FAILED,) == store(tier, [meta_of(9, 100)])
        assert before == len(calls), "an offline tier does not touch the disk"
        clock.now += FIRST_BACK_OFF_S
        assert is_online(tier)
        assert (Outcome.FAILED,) == store(tier, [meta_of(9, 100)])  # the one try
        assert not is_online(tier)
        assert 2 == tier.offline_count
        clock.now += FIRST_BACK_OFF_S
        assert not is_online(tier), "the second time lasts longer"
    clock.now += FIRST_BACK_OFF_S
    assert (Outcome.OK,) == store(tier, [meta_of(9, 100)])
    assert is_online(tier)
    assert (Outcome.OK,) == load(tier, [meta_of(9, 100)])
    tier.close()


def test_offline_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While reading is offline nothing is looked up and loads fail at once; the blocks are there again afterwards."""
    clock = Clock()
    tier = open_tier(tmp_path, clock)
    metas = [meta_of(1, 100)]
    store(tier, metas)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(errno.EIO))
        for _ in range(MAX_CONSECUTIVE_FAILURES):
            assert (Outcome.FAILED,) == load(tier, metas)
    assert 0 == tier.lookup([metas[0].key])
    assert (Outcome.FAILED,) == load(tier, metas)
    clock.now += FIRST_BACK_OFF_S
    assert 1 == tier.lookup([metas[0].key])
    assert (Outcome.OK,) == load(tier, metas)
    assert is_online(tier)
    tier.close()


def test_back_off_is_bounded() -> None:
    """The back-off doubles up to a minute and starts anew after a success."""
    clock = Clock()
    health = Health("the test", clock)
    pauses = []
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        health.failed(OSError())
    for _ in range(9):
        health.failed(OSError())
        start = clock.now
        while not health.is_online:
            clock.now += 0.5
        pauses.append(clock.now - start)
    assert [1, 2, 4, 8, 16, 32, 60, 60, 60] == pauses
    health.succeeded()
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        assert health.is_online
        health.failed(OSError())
    clock.now += 1.0
    assert health.is_online


def test_index_that_fails_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the index file, stores fail; the next one finds a new index file, without what was removed."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(4)]
    store(tier, metas[:2])

    def commit(*arguments: object) -> None:
        raise IndexFileError("LMDB: injected")

    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "commit", commit)
        assert (Outcome.FAILED,) == store(tier, metas[2:3])
        tier.remove([metas[0].key])
    assert (Outcome.OK,) == store(tier, metas[3:])
    assert [] == tier.check()
    tier.abandon()
    tier = open_tier(tmp_path)
    assert [metas[1], metas[3]] == list(tier.entries())
    assert {Outcome.OK} == set(load(tier, [metas[1], metas[3]]))
    tier.close()


def test_stores_that_wait_for_a_failing_deletion_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store into the place of a removed block does not hang when the removal cannot be recorded, nor overwrite the block."""
    tier = open_tier(tmp_path)
    bound = tier.max_blocks(5000)
    old = [meta_of(number, 5000) for number in range(bound)]
    store(tier, old)

    def commit(*arguments: object) -> None:
        raise IndexFileError("LMDB: injected")

    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "commit", commit)
        tier.remove([old[0].key])
        assert (Outcome.FAILED,) == store(tier, [meta_of(1000, 5000)])
    tier.abandon()
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(load(tier, list(tier.entries())))
    assert [] == tier.check()
    tier.close()


def test_close_with_a_failing_index_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing gives up on removals that cannot be recorded; the next opening finds all blocks that were not overwritten."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(4)]
    store(tier, metas)

    def commit(*arguments: object) -> None:
        raise IndexFileError("LMDB: injected")

    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "commit", commit)
        tier.remove([metas[0].key])
        tier.close()
    tier = open_tier(tmp_path)
    assert "salvaged" == tier.recovery.source
    assert set(metas[1:]) <= set(tier.entries())
    assert {Outcome.OK} == set(load(tier, metas[1:]))
    tier.close()


def test_in_flight_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores above the in-flight bound are REJECTED at once; loads are not, and the room is free again afterwards."""
    tier = open_tier(tmp_path, max_in_flight_bytes=12000)
    metas = [meta_of(number, 5000) for number in range(4)]
    assert (Outcome.OK, Outcome.OK, Outcome.REJECTED, Outcome.REJECTED) == store(tier, metas)
    assert (Outcome.OK, Outcome.OK, Outcome.OK, Outcome.OK) == store(tier, metas)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()
    other = DiskTier(tmp_path / "other", CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, max_in_flight_bytes=10)
    assert (Outcome.OK,) == store(other, metas[:1]), "a block larger than the bound may go alone"
    other.close()


def test_bad_buffers_are_failures(tmp_path: Path) -> None:
    """A buffer of the wrong length, or one that cannot be written for a load, is FAILED with a reason, never an exception."""
    tier = open_tier(tmp_path)
    meta = meta_of(1, 5000)
    tier.submit(TransferJob(1, JobKind.STORE, NAMESPACE, (BlockIO(meta, memoryview(bytes(4999))),)))
    (result,) = wait_for(tier)
    assert (Outcome.FAILED,) == result.outcomes
    assert "4999" in (result.error or "")
    read_only = memoryview(payload_of(meta.key, 5000))
    tier.submit(TransferJob(2, JobKind.STORE, NAMESPACE, (BlockIO(meta, read_only),)))
    assert (Outcome.OK,) == wait_for(tier)[0].outcomes
    tier.submit(TransferJob(3, JobKind.LOAD, NAMESPACE, (BlockIO(meta, read_only),)))
    assert (Outcome.FAILED,) == wait_for(tier)[0].outcomes
    assert (Outcome.OK,) == load(tier, [meta])
    assert (Outcome.REJECTED,) == store(tier, [meta_of(2, 0)])
    assert (Outcome.REJECTED,) == store(tier, [meta_of(3, SEGMENT_BYTES)])
    tier.close()


@pytest.mark.parametrize("kind", list(JobKind))
def test_released_buffers_are_failures(tmp_path: Path, kind: JobKind) -> None:
    """A buffer that its owner has released is FAILED like any other bad one; the job's other blocks and ``close`` do not suffer."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(3)]
    if kind is JobKind.LOAD:
        store(tier, metas)
    job = store_job(3, metas) if kind is JobKind.STORE else load_job(3, metas)
    job.blocks[1].buffer.release()
    tier.submit(job)
    (result,) = wait_for(tier)
    assert (Outcome.OK, Outcome.FAILED, Outcome.OK) == result.outcomes
    assert "released" in (result.error or "")
    tier.close()


def test_crowding_out(tmp_path: Path) -> None:
    """A size without a free slot takes the emptiest segment of another size and reports what was in it."""
    tier = open_tier(tmp_path)
    small = [meta_of(number, 5000) for number in range(tier.max_blocks(5000))]
    store(tier, small)
    large = [meta_of(1000, 40000)]
    tier.submit(store_job(1, large))
    (result,) = wait_for(tier)
    assert (Outcome.OK,) == result.outcomes
    assert SEGMENT_BYTES // (3 * 4096) == len(result.dropped)
    rest = [meta for meta in small if meta.key not in result.dropped]
    assert {*rest, *large} == set(tier.entries())
    assert {Outcome.OK} == set(load(tier, [*rest, *large]))
    assert [] == tier.check()
    tier.close()


def test_blocks_of_another_size_leave_until_none_are_left(tmp_path: Path) -> None:
    """What an engine with other blocks has left behind gives way, and no block of the same size does: its owner makes that room."""
    tier = open_tier(tmp_path)
    small = [meta_of(number, 5000) for number in range(tier.max_blocks(5000))]
    store(tier, small)
    large = [meta_of(1000 + number, 40000) for number in range(tier.max_blocks(40000) + 1)]
    outcomes = [outcome for meta in large for outcome in store(tier, [meta])]
    assert [Outcome.OK] * (len(large) - 1) + [Outcome.REJECTED] == outcomes
    assert set(large[:-1]) == set(tier.entries())
    assert {Outcome.OK} == set(load(tier, large[:-1]))
    assert [] == tier.check()
    tier.close()


def test_file_size_limit(tmp_path: Path) -> None:
    """The real kernel refusing to make a segment (here by a resource limit) is a FAILED store."""
    tier = open_tier(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
        assert (Outcome.FAILED,) == store(tier, [meta_of(1, 20000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (Outcome.OK,) == store(tier, [meta_of(1, 20000)])
    tier.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_no_room_for_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A segment that finds no room is not left behind, what is there stays readable, and with room the store succeeds."""
    tier = open_tier(tmp_path)
    kept, more = [meta_of(1, 5000)], [meta_of(2, 40000)]
    store(tier, kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(error))
        assert (Outcome.FAILED,) == store(tier, more)
        assert ["segment-000000.kv"] == [path.name for path in tmp_path.glob("segment-*")]
        assert (Outcome.OK,) == load(tier, kept)
    assert (Outcome.OK,) == store(tier, more)
    assert (Outcome.OK, Outcome.OK) == load(tier, kept + more)
    assert [] == tier.check()
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 3 MiB large."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(point)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system needs privileges")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_full_disk(small_disk: Path) -> None:
    """Somebody else fills the disk: stores fail, the tier goes offline, blocks stay readable; with room it comes back."""
    clock = Clock()
    tier = open_tier(small_disk / "tier", clock)
    kept = [meta_of(number, 5000) for number in range(5)]
    assert {Outcome.OK} == set(store(tier, kept))
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        for _ in range(3 << 10):
            try:
                os.write(file.fileno(), bytes(1024))
            except OSError:
                break
    more = [meta_of(number, 5000) for number in range(5, 10)]
    outcomes = [store(tier, [meta])[0] for meta in more]
    assert [Outcome.FAILED] * 5 == outcomes
    assert not is_online(tier)
    assert {Outcome.OK} == set(load(tier, kept))
    assert not list(small_disk.glob("tier/segment-000001.kv")), "a segment that found no room is not left behind"
    filler.unlink()
    clock.now += 60
    assert {Outcome.OK} == set(store(tier, more))
    assert is_online(tier)
    assert [] == tier.check()
    tier.close()
    assert [] == check_path(small_disk / "tier")


def test_one_segment_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several segments synced together only the blocks of the failing one are lost."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, SEGMENT_BYTES - 4096) for number in range(3)]  # one in each segment
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("segment-000001.kv"):
            raise OSError(errno.EIO, "no")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        outcomes = store(tier, metas)
    assert [Outcome.FAILED, Outcome.OK, Outcome.OK] == sorted(outcomes, key=lambda outcome: outcome is Outcome.OK)
    assert outcomes == tuple(Outcome.OK if outcome is Outcome.OK else Outcome.FAILED for outcome in load_outcomes(tier, metas))
    tier.close()


@pytest.mark.parametrize("where", ["commit", "close"])
def test_no_store_gets_two_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A segment that cannot be synced, then an index that fails in a way that nobody expected: the thread lives on."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, SEGMENT_BYTES - 4096) for number in range(4)]

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("segment-000001.kv"):
            raise OSError(errno.EIO, "no")

    def commit(*arguments: object) -> None:
        raise IndexFileError("LMDB: injected") if where == "close" else RuntimeError("injected")

    def close(*arguments: object, leave_proof: bool) -> None:
        raise IndexFileError("LMDB: injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        patch.setattr(IndexFile, "commit", commit)
        if where == "close":
            patch.setattr(IndexFile, "close", close)
        assert (Outcome.FAILED,) * 3 == store(tier, metas[:3])
    assert (Outcome.OK,) == store(tier, metas[3:])
    assert [] == tier.check()
    tier.close()


def test_an_index_that_fails_is_let_go(tmp_path: Path) -> None:
    """An LMDB environment that answers nothing any more is closed all the same, once."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(2)]
    index = tier._committer._index
    assert index is not None
    index._environment.close()
    index.close(leave_proof=False)
    assert (Outcome.FAILED,) == store(tier, metas[:1])
    assert (Outcome.OK,) == store(tier, metas[1:])
    tier.close()


def load_outcomes(tier: DiskTier, metas: Sequence[BlockMeta]) -> list[Outcome]:
    """What loading the blocks one by one gives."""
    return [load(tier, [meta])[0] for meta in metas]


def test_blocks_written_together_share_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is written once for all blocks that are on their way, and at once when the last of them is there."""
    monkeypatch.setattr(committer, "_GATHER_S", 60.0)
    tier = open_tier(tmp_path, max_in_flight_bytes=1 << 30, io_threads=1, queue_depth=1)
    commits: list[int] = []
    real = IndexFile.commit

    def commit(index: IndexFile, places: Sequence[int], entries: Sequence[tuple[int, bytes]], next_sequence: int) -> None:
        commits.append(len(entries))
        real(index, places, entries, next_sequence)

    monkeypatch.setattr(IndexFile, "commit", commit)
    assert {Outcome.OK} == set(store(tier, [meta_of(number, SEGMENT_BYTES - 4096) for number in range(4)]))
    assert [4] == commits
    tier.close()
