"""Opening a disk tier: clear errors for what cannot work, and quick recovery for what can."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvtier.errors import TierBusyError, TierError, TierFormatError
from kvtier.io import EngineKind
from kvtier.testing.starts import nothing_left, refused_threads
from kvtier.testing.tiers import key_of, load, meta_of, store
from kvtier.tiers.disk import DiskTier, check_path, lock
from kvtier.tiers.disk.format import pack_entry, pack_place
from kvtier.tiers.disk.geometry import divide
from kvtier.tiers.disk.index_file import IndexFile
from kvtier.tiers.disk.lock import LOCK_NAME
from kvtier.tiers.record import RecordFields, pack_text
from kvtier.types import Outcome

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 4 * SEGMENT_BYTES


def open_tier(directory: Path, capacity_bytes: int = CAPACITY_BYTES, segment_bytes: int = SEGMENT_BYTES) -> DiskTier:
    """The tier of these tests."""
    return DiskTier(directory, capacity_bytes, segment_bytes=segment_bytes)


def test_two_openings_in_one_process(tmp_path: Path) -> None:
    """A directory has one holder; the error names it; after the close it is free."""
    tier = open_tier(tmp_path)
    with pytest.raises(TierBusyError, match=f"pid {os.getpid()} on "):
        open_tier(tmp_path)
    with pytest.raises(TierBusyError):
        check_path(tmp_path)
    tier.close()
    assert [] == check_path(tmp_path)
    open_tier(tmp_path).close()


def test_a_holder_that_is_dying_is_waited_for(tmp_path: Path) -> None:
    """A process that was killed may hold the lock a little longer than it lives: the kernel ends its transfers first."""
    open_tier(tmp_path).close()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with (tmp_path / LOCK_NAME).open("w") as file:
        file.write(f"pid {ended.pid} on {socket.gethostname()}: engine")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        open_tier(tmp_path).close()
        timer.join()


def test_two_processes(tmp_path: Path) -> None:
    """Another process holding the directory is named; its death frees the directory."""
    code = f"""
import sys, time
from kvtier.tiers.disk import DiskTier
tier = DiskTier({str(tmp_path)!r}, {CAPACITY_BYTES}, segment_bytes={SEGMENT_BYTES})
print("open", flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], bufsize=0, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert b"open\n" == holder.stdout.readline()
        with pytest.raises(TierBusyError, match=f"pid {holder.pid} on "):
            open_tier(tmp_path)
        holder.kill()
        holder.wait()
    open_tier(tmp_path).close()


def test_a_lock_file_that_is_deleted_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the tier is open: neither an opening nor a check, again and again; its close frees the directory."""
    monkeypatch.setattr(lock, "_DYING_S", 0.05)
    metas = [meta_of(number, 5000) for number in range(5)]
    tier = open_tier(tmp_path)
    store(tier, metas)
    for _ in range(2):
        (tmp_path / LOCK_NAME).unlink()
        with pytest.raises(TierBusyError, match=f"{tmp_path} is in use by another process .its lock file was deleted"):
            check_path(tmp_path)
        for _ in range(2):
            with pytest.raises(TierBusyError, match=f"{tmp_path} is in use by another process .its lock file was deleted"):
                open_tier(tmp_path)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()
    (tmp_path / LOCK_NAME).unlink()
    assert [] == check_path(tmp_path)
    tier = open_tier(tmp_path)
    assert "clean" == tier.recovery.source
    tier.close()


def test_a_directory_that_is_locked_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """Programs that clean up lock directories while they look into them."""
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, lambda: os.close(fd))
    timer.start()
    open_tier(tmp_path).close()
    timer.join()


def test_a_file_system_that_locks_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file alone is enough."""
    flock = fcntl.flock

    def files_only(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", files_only)
    tier = open_tier(tmp_path)
    with pytest.raises(TierBusyError, match=f"pid {os.getpid()} on "):
        open_tier(tmp_path)
    tier.close()
    open_tier(tmp_path).close()


def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path) -> None:
    """Closing frees the directory whatever the process has forked."""
    tier = open_tier(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    tier.close()
    open_tier(tmp_path).close()
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_an_orphan_does_not_keep_the_directory(tmp_path: Path) -> None:
    """A killed process frees the directory although a child that it forked lives on."""
    code = f"""
import os, time
from kvtier.tiers.disk import DiskTier
tier = DiskTier({str(tmp_path)!r}, {CAPACITY_BYTES}, segment_bytes={SEGMENT_BYTES})
if os.fork():
    time.sleep(60)
os.write(1, b"forked\\n")
os.read(0, 1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert b"forked\n" == holder.stdout.readline()
        with pytest.raises(TierBusyError):
            open_tier(tmp_path)
        holder.kill()
        holder.wait()
        open_tier(tmp_path).close()


@pytest.mark.parametrize(
    ("name", "io_engine"),
    [
        ("kvtier-io-1", "threads"),
        ("kvtier-disk-sums-1", "threads"),
        ("kvtier-disk-sums-1", "auto"),
        ("kvtier-disk-io", "auto"),
        ("kvtier-disk-sync-1", "auto"),
        ("kvtier-disk-index", "auto"),
    ],
)
def test_no_thread_to_be_had(tmp_path: Path, name: str, io_engine: EngineKind) -> None:
    """A limit on processes is a TierError that says so and leaves nothing behind; with the limit raised the blocks are there."""
    metas = [meta_of(number, 5000) for number in range(5)]
    tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_engine=io_engine)
    store(tier, metas)
    tier.close()
    problem = rf"{tmp_path} cannot be opened: can't start new thread \({name}\): raise the limit"
    with nothing_left(), refused_threads(name), pytest.raises(TierError, match=problem):
        DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_engine=io_engine)
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()


def test_capacity_below_one_segment(tmp_path: Path) -> None:
    """The error says how much is needed, and that much is enough."""
    with pytest.raises(TierError, match=r"set at least ([0-9]+) bytes") as caught:
        open_tier(tmp_path, capacity_bytes=SEGMENT_BYTES)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    tier = open_tier(tmp_path, capacity_bytes=least)
    assert 1 <= tier.max_blocks(SEGMENT_BYTES - 4096)
    tier.close()


@pytest.mark.parametrize("segment_bytes", [0, 4096, 10000, 1 << 32])
def test_impossible_segment_sizes(tmp_path: Path, segment_bytes: int) -> None:
    """The error names the value and the rule."""
    with pytest.raises(TierError, match=f"segment_bytes is {segment_bytes}"):
        open_tier(tmp_path, segment_bytes=segment_bytes)


def test_too_little_space(tmp_path: Path) -> None:
    """A capacity above what the disk has is refused at start, with both numbers."""
    with pytest.raises(TierError, match=r"does not fit, only [0-9]+ bytes are there"):
        open_tier(tmp_path, capacity_bytes=1 << 60)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A disk or quota that turns out to be full while the tier opens: the error names the directory and what to do; then it opens."""

    def full(*arguments: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TierError, match=rf"{tmp_path} has no room .*{os.strerror(error)}.*free some space"):
            open_tier(tmp_path)
    open_tier(tmp_path).close()


def test_index_that_cannot_be_replaced(tmp_path: Path) -> None:
    """Something in the index file's place that is no file: the error names it, and with it gone the blocks are all there."""
    metas = [meta_of(number, 5000) for number in range(5)]
    tier = open_tier(tmp_path)
    store(tier, metas)
    tier.close()
    (tmp_path / "index.mdb").unlink()
    (tmp_path / "index.mdb").mkdir()
    with pytest.raises(TierError, match=rf"{tmp_path} cannot be used .*index\.mdb"):
        open_tier(tmp_path)
    (tmp_path / "index.mdb").rmdir()
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()


def test_path_that_is_a_file(tmp_path: Path) -> None:
    """A path that cannot be a directory is refused with the path in the message."""
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(TierError, match=str(path)):
        open_tier(path)


def test_unwritable_directory(tmp_path: Path) -> None:
    """A directory that cannot be written is refused, with what to do."""
    directory = tmp_path / "tier"
    directory.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(directory)], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip("root can write everywhere and may not mount")
    else:
        directory.chmod(0o500)
    try:
        with pytest.raises(TierError, match="writable"):
            open_tier(directory)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(directory)], check=True)


def test_no_tier_to_check(tmp_path: Path) -> None:
    """``check_path`` of anything else says that there is no tier."""
    with pytest.raises(TierError, match="holds no kvtier disk tier"):
        check_path(tmp_path)


def test_other_format_version(tmp_path: Path) -> None:
    """A directory of another version is refused as it is: nothing in it is changed."""
    open_tier(tmp_path).close()
    (tmp_path / "format").write_bytes(pack_text("kvtier disk tier", {"format": "2", "segment_bytes": "65536"}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    with pytest.raises(TierFormatError, match="version 2, this kvtier reads version 1"):
        open_tier(tmp_path)
    with pytest.raises(TierFormatError):
        check_path(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}


def test_segment_size_of_a_directory_stays(tmp_path: Path) -> None:
    """Another configured segment size does not cost the blocks that are there."""
    metas = [meta_of(number, 5000) for number in range(5)]
    tier = open_tier(tmp_path)
    store(tier, metas)
    tier.close()
    tier = open_tier(tmp_path, segment_bytes=2 * SEGMENT_BYTES)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()


def test_a_start_that_failed_binds_nobody(tmp_path: Path) -> None:
    """A directory without blocks has no segment size yet, whatever was tried there before."""
    with pytest.raises(TierError, match="does not fit"):
        open_tier(tmp_path, capacity_bytes=1 << 60, segment_bytes=1 << 30)
    assert not (tmp_path / "format").exists()
    (tmp_path / "format").write_bytes(pack_text("kvtier disk tier", {"format": "1", "segment_bytes": str(1 << 30)}))  # an older version's
    metas = [meta_of(number, 5000) for number in range(5)]
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(store(tier, metas))
    tier.close()
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()


def test_smaller_capacity(tmp_path: Path) -> None:
    """Reopened with less capacity, the tier keeps what fits and obeys the new bound at once."""
    metas = [meta_of(number, 5000) for number in range(20)]
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(store(tier, metas))
    tier.close()
    smaller = CAPACITY_BYTES - 3 * SEGMENT_BYTES
    tier = open_tier(tmp_path, capacity_bytes=smaller)
    assert smaller >= sum(path.stat().st_size for path in tmp_path.iterdir())
    kept = list(tier.entries())
    assert 5 == len(kept) == 20 - tier.recovery.num_lost
    assert {Outcome.OK} == set(load(tier, kept))
    assert [] == tier.check()
    tier.close()


def test_capacity_is_a_bound_on_the_files(tmp_path: Path) -> None:
    """A tier filled to the brim, emptied and filled with another size never exceeds its capacity by a byte."""
    tier = open_tier(tmp_path)
    for num_bytes in (100, 28000, 5000):
        bound = tier.max_blocks(num_bytes)
        metas = [meta_of(number, num_bytes) for number in range(bound + 3)]
        outcomes = store(tier, metas)
        assert bound == outcomes.count(Outcome.OK)
        assert CAPACITY_BYTES >= sum(path.stat().st_size for path in tmp_path.iterdir())
        tier.remove([meta.key for meta in metas])
    tier.close()
    assert CAPACITY_BYTES >= sum(path.stat().st_size for path in tmp_path.iterdir())


def test_many_small_blocks_are_bounded_by_the_index(tmp_path: Path) -> None:
    """Where the index is full before the segments are, ``max_blocks`` says so, and churning at the bound never overflows it."""
    tier = DiskTier(tmp_path, 8 << 20, segment_bytes=SEGMENT_BYTES, durable=False)
    bound = tier.max_blocks(100)
    assert divide(8 << 20, SEGMENT_BYTES).max_entries == bound
    metas = [meta_of(number, 100) for number in range(bound + 100)]
    outcomes = store(tier, metas)
    assert (Outcome.OK,) * bound + (Outcome.REJECTED,) * 100 == outcomes
    for start in range(0, bound - 200, 100):
        tier.remove([meta.key for meta in metas[start : start + 200 : 2]])
        assert {Outcome.OK} == set(store(tier, metas[start : start + 200 : 2]))
    assert {Outcome.OK} == set(load(tier, metas[:bound]))
    assert [] == tier.check()
    tier.close()


def test_recovery_reads_the_index_and_no_record(tmp_path: Path) -> None:
    """Twenty thousand entries are read, ordered and adopted, clean or salvaged, from the index alone: the segments are empty files."""
    num_blocks = 20_000
    segment_bytes = 64 << 20
    capacity_bytes = 3 << 30
    geometry = divide(capacity_bytes, segment_bytes)
    tier = DiskTier(tmp_path, capacity_bytes, segment_bytes=segment_bytes)
    tier.close()
    per_segment = segment_bytes // (16 * 4096)
    places = [number // per_segment * geometry.pages_per_segment + number % per_segment * 16 for number in range(num_blocks)]
    fields = [RecordFields(key_of(n), key_of(n - 1) if n else None, bytes(16), 60000, n + 1, place) for n, place in enumerate(places)]
    rows = (pack_place(record.place) + pack_entry(record) for record in fields)
    IndexFile.create(tmp_path, geometry.index_bytes, rows, num_blocks + 1, durable=False).close(leave_proof=True)
    for segment in range(-(-num_blocks // per_segment)):
        with open(tmp_path / f"segment-{segment:06d}.kv", "wb") as file:
            file.truncate(segment_bytes)
    for source in ("clean", "salvaged"):
        tier = DiskTier(tmp_path, capacity_bytes, segment_bytes=segment_bytes)
        assert source == tier.recovery.source
        assert [key_of(number) for number in range(num_blocks)] == [meta.key for meta in tier.entries()]
        tier.abandon()
