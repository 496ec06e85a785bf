"""Aligned files and worker threads."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from kvtier.io import PAGE_BYTES, AlignedFile, Scratch, WorkerPool, is_page_aligned, preallocate, round_up_to_page


def scratch_of(num_bytes: int) -> memoryview:
    """Page-aligned memory."""
    scratch = Scratch()
    scratch.reset(num_bytes)
    return scratch.take(num_bytes)


def test_preallocate(tmp_path: Path) -> None:
    """The file has exactly the size asked for, whatever was there, with its blocks reserved."""
    path = tmp_path / "file"
    assert preallocate(path, 1 << 20)
    assert (1 << 20) == path.stat().st_size
    assert (1 << 20) <= path.stat().st_blocks * 512
    for size in (100, 2 << 20):
        os.truncate(path, size)
        assert not preallocate(path, 1 << 20)
        assert (1 << 20) == path.stat().st_size


def test_preallocate_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file without room is removed again; an old one stays."""

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full"):
        preallocate(tmp_path / "new", 1 << 20)
    assert [] == list(tmp_path.iterdir())
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="full"):
        preallocate(tmp_path / "old", 1 << 20)
    assert b"old" == (tmp_path / "old").read_bytes()


def test_preallocate_without_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot reserve gets a file of the right length."""

    def unsupported(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    preallocate(tmp_path / "file", 8192)
    assert 8192 == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_vectors_round_trip(tmp_path: Path, direct: str) -> None:
    """Many buffers, more than one call takes, arrive in order; reading stops at the end of the file."""
    path = tmp_path / "file"
    num_pages = 1500
    preallocate(path, num_pages * PAGE_BYTES)
    file = AlignedFile(path, direct="auto" if direct == "auto" else "off")
    outgoing = scratch_of(num_pages * PAGE_BYTES)
    outgoing[:] = os.urandom(len(outgoing))
    pages = [outgoing[start : start + PAGE_BYTES] for start in range(0, len(outgoing), PAGE_BYTES)]
    file.writev(pages, 0)
    file.sync()
    incoming = scratch_of((num_pages + 3) * PAGE_BYTES)
    views = [incoming[start : start + PAGE_BYTES] for start in range(0, len(incoming), PAGE_BYTES)]
    assert num_pages * PAGE_BYTES == file.readv(views, 0)
    assert outgoing == incoming[: len(outgoing)]
    assert 0 == file.readv(views[:1], num_pages * PAGE_BYTES)
    file.close()
    file.close()


def test_refusal_of_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` falls back whether the file system refuses at open or at the first transfer; ``on`` reports it."""
    path = tmp_path / "file"
    preallocate(path, PAGE_BYTES)
    page = scratch_of(PAGE_BYTES)
    real_open, real_write = os.open, os.pwritev

    def open_refusing(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(name, flags, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_refusing)
        file = AlignedFile(path)
        assert not file.is_direct
        file.writev([page], 0)
        file.close()
        with pytest.raises(OSError, match="no direct"):
            AlignedFile(path, direct="on")

    refused: list[int] = []

    def write_refusing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if not refused:
            refused.append(fd)
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", write_refusing)
    file = AlignedFile(path)
    file.writev([page], 0)
    assert not file.is_direct
    refused.clear()
    file.close()
    strict = AlignedFile(path, direct="on")
    with pytest.raises(OSError, match="no direct"):
        strict.writev([page], 0)
    strict.close()


def test_alignment() -> None:
    """Page borders are recognised; read-only and empty buffers count as unaligned."""
    memory = scratch_of(2 * PAGE_BYTES)
    assert is_page_aligned(memory)
    assert is_page_aligned(memory[PAGE_BYTES:])
    assert not is_page_aligned(memory[1:])
    assert not is_page_aligned(memory.toreadonly())
    assert not is_page_aligned(memory[:0])
    assert [0, 4096, 4096, 8192] == [round_up_to_page(num_bytes) for num_bytes in (0, 1, 4096, 4097)]


def test_scratch_is_bounded() -> None:
    """More than was announced is an error, not somebody else's memory."""
    scratch = Scratch()
    scratch.reset(PAGE_BYTES)
    scratch.take(PAGE_BYTES)
    with pytest.raises(ValueError, match="4096 bytes asked for, 0 left"):
        scratch.take(PAGE_BYTES)
    scratch.reset(PAGE_BYTES)
    scratch.take(PAGE_BYTES)


class Job:
    """A task that notes when it ran."""

    def __init__(self, name: str, log: list[str], gate: threading.Event | None = None, error: Exception | None = None) -> None:
        self.name = name
        self.log = log
        self.gate = gate
        self.error = error

    def run(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.log.append(self.name)

    def fail(self, error: BaseException) -> None:
        self.log.append(f"{self.name} failed: {error}")


def test_urgent_tasks_go_first() -> None:
    """Tasks run in order, urgent ones before all that wait; closing waits for all of them."""
    log: list[str] = []
    gate = threading.Event()
    pool = WorkerPool(1, "test")
    pool.submit(Job("first", log, gate))
    for name in "abc":
        pool.submit(Job(name, log))
        pool.submit(Job(name.upper(), log), urgent=True)
    gate.set()
    pool.close()
    assert [*"ABCabc"] == [name for name in log if name != "first"]
    assert 7 == len(log)


def test_errors_reach_their_task() -> None:
    """A task that raises is told so, and the thread goes on; so is one that comes after the close."""
    log: list[str] = []
    pool = WorkerPool(1, "test")
    pool.submit(Job("bad", log, error=RuntimeError("broken")))
    pool.submit(Job("good", log))
    pool.close()
    pool.submit(Job("late", log))
    assert ["bad failed: broken", "good", "late failed: the worker pool is closed"] == log


def test_discarding_close() -> None:
    """A discarding close waits for the running task and drops the others."""
    log: list[str] = []
    started, gate = threading.Event(), threading.Event()

    class Slow(Job):
        def run(self) -> None:
            started.set()
            super().run()

    pool = WorkerPool(1, "test")
    pool.submit(Slow("running", log, gate))
    pool.submit(Job("waiting", log))
    assert started.wait(10)
    threading.Timer(0.05, gate.set).start()
    pool.close(discard=True)
    assert ["running"] == log


def test_a_pool_needs_threads() -> None:
    """Zero threads would never do anything."""
    with pytest.raises(ValueError, match="num_threads"):
        WorkerPool(0, "test")
