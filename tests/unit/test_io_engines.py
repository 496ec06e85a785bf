"""Both I/O engines keep the same contract; the ring goes on whatever its system calls do."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import _core, _fallback, _native
from kvtier.errors import TierError
from kvtier.io import PAGE_BYTES, IoEngine, Transfer, address_of, open_engine
from kvtier.io.aligned_file import AlignedFile
from kvtier.io.ring_engine import NativeRing, RingEngine
from kvtier.io.thread_engine import ThreadEngine
from kvtier.io.transfers import TransferQueue
from kvtier.testing.io_engines import FaultyRing, IoEngineContract, completions_of, open_file, pages
from kvtier.testing.tiers import load, meta_of, store
from kvtier.tiers.disk import DiskTier
from kvtier.types import Outcome


def _ring_refusal() -> str | None:
    try:
        NativeRing(4).close()
    except OSError as error:
        return str(error)
    return None


needs_ring = pytest.mark.skipif(_ring_refusal() is not None, reason=f"no io_uring here: {_ring_refusal()}")


class TestThreads(IoEngineContract):
    """Threads in positional system calls."""

    def make_engine(self, queue_depth: int = 4, max_bytes: int = 1 << 20) -> IoEngine:
        return ThreadEngine(queue_depth, max_bytes)


@needs_ring
class TestRing(IoEngineContract):
    """io_uring."""

    def make_engine(self, queue_depth: int = 4, max_bytes: int = 1 << 20) -> IoEngine:
        return RingEngine(queue_depth, max_bytes)


class TestRingOfSmallSteps(IoEngineContract):
    """A ring that moves one page a time, and is interrupted or busy again and again."""

    def make_engine(self, queue_depth: int = 4, max_bytes: int = 1 << 20) -> IoEngine:
        decisions = itertools.cycle([PAGE_BYTES, -errno.EINTR, PAGE_BYTES, None, -errno.EAGAIN, PAGE_BYTES])
        ring = FaultyRing(lambda num_bytes: min(num_bytes, many) if (many := next(decisions)) is not None and many > 0 else many)
        return RingEngine(queue_depth, max_bytes, make_ring=lambda _: ring)


steps = st.lists(
    st.one_of(st.integers(1, 5).map(PAGE_BYTES.__mul__), st.sampled_from([-errno.EINTR, -errno.EAGAIN, None, 1 << 30])), max_size=40
)
lengths = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=8)


@given(steps=steps, lengths=lengths, depth=st.integers(1, 4), max_pages=st.integers(1, 20), has_memory=st.booleans())
@settings(max_examples=60, deadline=None)
def test_faults_cost_nothing(steps: list[int | None], lengths: list[list[int]], depth: int, max_pages: int, has_memory: bool) -> None:
    """Whatever is cut short, interrupted or put off, all bytes arrive, and never more transfers run than allowed."""
    decisions = itertools.chain(steps, itertools.repeat(1 << 30))
    ring = FaultyRing(lambda num_bytes: min(num_bytes, many) if (many := next(decisions)) is not None and many > 0 else many)
    size = sum(map(sum, lengths)) * PAGE_BYTES
    memory, back = pages(size, os.urandom(5000)), pages(size)
    known = (address_of(memory), size) if has_memory else None
    engine = RingEngine(depth, max_pages * PAGE_BYTES, memory=known, make_ring=lambda _: ring)
    with tempfile.TemporaryDirectory() as directory, open_file(Path(directory) / "file", size, "off") as file:
        for is_read, view in ((False, memory), (True, back)):
            transfers = []
            offset = 0
            for group in lengths:
                start, buffers = offset, []
                for length in group:
                    buffers.append(view[offset : offset + length * PAGE_BYTES])
                    offset += length * PAGE_BYTES
                transfers.append(Transfer(file, is_read, start, buffers))
            engine.submit(transfers)
            found = completions_of(engine, len(transfers))
            assert {None} == {completion.error for completion in found}
            assert size == sum(completion.num_bytes for completion in found)
        engine.close()
    assert memory == back
    assert ring.most_waiting <= depth
    assert ring.is_closed


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EAGAIN])
def test_an_error_ends_a_transfer(tmp_path: Path, error: int) -> None:
    """An error in the middle, or an interruption without end, is reported once; the engine goes on."""
    decisions: Iterator[int] = itertools.chain([PAGE_BYTES], itertools.repeat(-error, 200 if error in (errno.EINTR, errno.EAGAIN) else 1))
    engine = RingEngine(2, 1 << 20, make_ring=lambda _: FaultyRing(lambda num_bytes: next(decisions, num_bytes)))
    with open_file(tmp_path / "file", 4 * PAGE_BYTES) as file:
        for _ in range(2):
            engine.submit([Transfer(file, False, 0, [pages(3 * PAGE_BYTES)])])
            (completion,) = completions_of(engine, 1)
            if completion.error is None:
                break
            assert error == completion.error.errno
            assert str(file.path) == completion.error.filename
        decisions = itertools.repeat(1 << 30)
        engine.submit([Transfer(file, False, 0, [pages(3 * PAGE_BYTES)])])
        assert completions_of(engine, 1)[0].error is None
    engine.close()


def ring_fds() -> set[int]:
    """The descriptors of all rings of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


def lose(fd: int) -> None:
    """Puts another file in the place of one."""
    with open(os.devnull) as null:
        os.dup2(null.fileno(), fd)


@needs_ring
def test_a_ring_that_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where somebody closes its descriptor, what the kernel has ends when the kernel has ended it, and all that follows fails at once."""
    before = ring_fds()
    engine = RingEngine(1, 1 << 20)
    (ring_fd,) = ring_fds() - before
    reading, writing = os.pipe()
    memory = pages(PAGE_BYTES, b"before")
    with open_file(tmp_path / "file", 4 * PAGE_BYTES, "off") as file, open_file(tmp_path / "other", 4 * PAGE_BYTES, "off") as pipe:
        os.dup2(reading, pipe.fileno)  # a read that does not end by itself
        engine.submit(
            [Transfer(pipe, True, 0, [memory], "the kernel has it"), Transfer(file, True, 0, [pages(PAGE_BYTES)], "waits for it")]
        )
        lose(ring_fd)
        assert ["waits for it"] == [completion.transfer.owner for completion in completions_of(engine, 1) if completion.error]
        engine.submit([Transfer(file, False, 0, [pages(PAGE_BYTES)], "came later")])
        assert ["came later"] == [completion.transfer.owner for completion in completions_of(engine, 1) if completion.error]
        assert engine.oldest_start(is_read=True) is not None
        assert [] == engine.poll(0.05)
        assert pages(PAGE_BYTES, b"before") == memory
        os.write(writing, bytes(memory[:100]) + bytes(PAGE_BYTES - 100))
        (completion,) = completions_of(engine, 1)
        assert ("the kernel has it", PAGE_BYTES, None) == (completion.transfer.owner, completion.num_bytes, completion.error)
        assert engine.oldest_start(is_read=True) is None
        assert [] == engine.poll(0.01)
        assert 1 == [record.message for record in caplog.records].count(
            f"io_uring is lost, every transfer fails from now on: {OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))}"
        )
        engine.close()
        engine.close()
    os.close(reading)
    os.close(writing)


@needs_ring
def test_a_disk_tier_whose_ring_is_lost(tmp_path: Path) -> None:
    """It fails what it cannot write, still reads what it has, and closes."""
    before = ring_fds()
    tier = DiskTier(tmp_path, 8 << 20, segment_bytes=1 << 20, io_engine="io_uring")
    metas = [meta_of(number, 5000) for number in range(3)]
    assert {Outcome.OK} == set(store(tier, metas[:2]))
    for fd in ring_fds() - before:
        lose(fd)
    assert (Outcome.FAILED,) == store(tier, metas[2:])
    assert {Outcome.OK} == set(load(tier, metas[:2]))
    tier.close()
    tier = DiskTier(tmp_path, 8 << 20, segment_bytes=1 << 20)
    assert {Outcome.OK} == set(load(tier, metas[:2]))
    tier.close()


def test_large_buffers_in_known_memory(tmp_path: Path) -> None:
    """The kernel is told of memory when it is first used, and large buffers in it go as pieces of their own."""
    ring = FaultyRing(lambda num_bytes: num_bytes)
    memory = memoryview(mmap.mmap(-1, 130 << 20))
    address = address_of(memory)
    engine = RingEngine(2, 1 << 30, memory=(address, len(memory)), make_ring=lambda _: ring)
    large = 1 << 20
    with open_file(tmp_path / "file", 16 << 20) as file:
        cases = [
            ([pages(PAGE_BYTES), memory[:large], memory[large : large + PAGE_BYTES]], [-1, 0, -1]),  # what is small goes together
            ([memory[(128 << 20) : (128 << 20) + large]], [2]),
            ([memory[(63 << 20) + 4096 : (64 << 20) + 4096]], [-1]),  # in two slots
            ([pages(large)], [-1]),  # elsewhere
            ([memory[:large].toreadonly()], [-1]),
        ]
        for buffers, slots in cases:
            ring.slots.clear()
            engine.submit([Transfer(file, False, 0, buffers)])
            (completion,) = completions_of(engine, 1)
            assert (sum(map(len, buffers)), None) == (completion.num_bytes, completion.error)
            assert slots == ring.slots
    assert {0: (address, 64 << 20), 2: (address + (128 << 20), 2 << 20)} == ring.registered
    assert 66 << 20 == engine.registered_bytes
    engine.close()


def test_memory_that_cannot_be_registered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without leave to lock memory everything goes as well, said in one line."""
    ring = FaultyRing(lambda num_bytes: num_bytes, refuses_memory=True)
    memory = pages(1 << 20)
    engine = RingEngine(2, 1 << 30, memory=(address_of(memory), len(memory)), make_ring=lambda _: ring)
    with open_file(tmp_path / "file", 1 << 20) as file, caplog.at_level(logging.INFO):
        engine.submit([Transfer(file, False, 0, [memory]), Transfer(file, False, 0, [memory])])
        assert {None} == {completion.error for completion in completions_of(engine, 2)}
    assert [-1, -1] == ring.slots
    assert 1 == sum("without registered memory" in line for line in caplog.messages)
    engine.close()


@needs_ring
def test_registered_memory(tmp_path: Path) -> None:
    """The real ring moves the same bytes through registered memory as without."""
    memory = pages(8 << 20, os.urandom(70_001))
    engine = RingEngine(4, 1 << 30, memory=(address_of(memory), len(memory)))
    half = 4 << 20
    wanted = bytes(memory[:half])
    with open_file(tmp_path / "file", half) as file:
        for is_read, view in ((False, memory[:half]), (True, memory[half:])):
            engine.submit([Transfer(file, is_read, start, [view[start : start + (1 << 20)]]) for start in range(0, half, 1 << 20)])
            assert {(1 << 20, None)} == {(completion.num_bytes, completion.error) for completion in completions_of(engine, 4)}
    assert wanted == memory[half:]
    assert engine.registered_bytes in (0, 8 << 20)  # 0: the system does not allow it
    engine.close()


@given(st.lists(st.one_of(st.tuples(st.booleans(), st.integers(0, 9)), st.none()), max_size=60), st.integers(1, 4), st.integers(1, 12))
def test_the_queue(steps: list[tuple[bool, int] | None], depth: int, max_pages: int) -> None:
    """Reads go before writes, each in the order they came; both bounds hold, except that a larger transfer may run alone."""
    file = AlignedFile(Path("/dev/null"), direct="off")
    queue = TransferQueue(depth, max_pages * PAGE_BYTES)
    waiting: dict[bool, list[Transfer]] = {True: [], False: []}
    running: list[Transfer] = []
    for number, step in enumerate(steps):
        if step is not None:
            is_read, num_pages = step
            transfer = Transfer(file, is_read, number, [pages(num_pages * PAGE_BYTES)] if num_pages else [])
            queue.add([transfer])
            waiting[is_read].append(transfer)
        elif running:
            queue.finished(running.pop(number % len(running)))
        while (taken := queue.take()) is not None:
            assert waiting[bool(waiting[True])].pop(0) is taken
            running.append(taken)
        total = sum(transfer.num_bytes for transfer in running)
        assert (len(running), total) == (queue.num_running, queue.running_bytes)
        assert len(running) <= depth
        assert total <= max_pages * PAGE_BYTES or len(running) == 1
        assert running or not (waiting[True] or waiting[False])
        for is_read in (True, False):
            assert any(transfer.is_read is is_read for transfer in running) == (queue.oldest_start(is_read=is_read) is not None)
    assert [*waiting[True], *waiting[False]] == queue.take_waiting()
    assert queue.take() is None
    file.close()


def refusing(error: int) -> Callable[[int], object]:
    """A system without io_uring."""

    def ring_open(num_entries: int) -> object:
        raise OSError(error, os.strerror(error))

    return ring_open


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_without_a_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int) -> None:
    """``auto`` takes threads and says so in one line; ``io_uring`` is an error that names the setting."""
    monkeypatch.setattr(_native, "ring_open", refusing(error))
    with caplog.at_level(logging.INFO):
        engine = open_engine("auto", 3, 1 << 20)
    assert "threads" == engine.name
    assert [f"no io_uring here ([Errno {error}] {os.strerror(error)}): 3 threads read and write"] == caplog.messages
    engine.close()
    with pytest.raises(OSError, match=os.strerror(error)):
        open_engine("io_uring", 3, 1 << 20)
    for _ in range(2):  # the directory is not left locked
        with pytest.raises(TierError, match="io_engine is io_uring, and this system refuses it"):
            DiskTier(tmp_path, 4 << 20, segment_bytes=1 << 20, io_engine="io_uring")
    tier = DiskTier(tmp_path, 4 << 20, segment_bytes=1 << 20)
    assert "threads" == tier.io_engine
    tier.close()


def test_the_engine_can_be_chosen() -> None:
    """``threads`` does not even try the ring; the fallback of the core has none."""
    engine = open_engine("threads", 1, 1)
    assert "threads" == engine.name
    engine.close()
    for call in (_fallback.ring_open, _fallback.ring_wake, _fallback.ring_close):
        with pytest.raises(OSError, match="takes the compiled core"):
            call(1)


@needs_ring
class TestRingCalls:
    """The core's functions refuse what would harm the process."""

    def test_arguments(self) -> None:
        """Wrong arguments are an error that names them, not a crash."""
        ring = _core.ring_open(4)
        page = bytearray(PAGE_BYTES)
        with pytest.raises(ValueError, match="num_entries is 0"):
            _core.ring_open(0)
        with pytest.raises(ValueError, match="token is 0"):
            _core.ring_submit(ring, 0, True, 0, 0, [page], -1)
        with pytest.raises(ValueError, match="fd is -1"):
            _core.ring_submit(ring, 1, True, -1, 0, [page], -1)
        with pytest.raises(ValueError, match="offset is -1"):
            _core.ring_submit(ring, 1, True, 0, -1, [page], -1)
        with pytest.raises(ValueError, match="slot is 16384"):
            _core.ring_submit(ring, 1, True, 0, 0, [page], 1 << 14)
        with pytest.raises(ValueError, match="0 buffers, not from 1 to 1024"):
            _core.ring_submit(ring, 1, True, 0, 0, [], -1)
        with pytest.raises(ValueError, match="2 buffers, not from 1 to 1"):
            _core.ring_submit(ring, 1, True, 0, 0, [page, page], 3)
        with pytest.raises(BufferError):
            _core.ring_submit(ring, 1, True, 0, 0, [bytes(page)], -1)
        with pytest.raises(TypeError):
            _core.ring_submit(ring, 1, True, 0, 0, 7, -1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="num_bytes is"):
            _core.ring_register(ring, 0, 4096, (1 << 30) + 1)
        with pytest.raises(OSError, match=r"Bad address|Operation not permitted|Cannot allocate"):
            _core.ring_register(ring, 0, 4096, 4096)
        with pytest.raises(ValueError, match="PyCapsule"):
            _core.ring_wait(object(), 0)
        assert [] == _core.ring_wait(ring, 0)
        _core.ring_close(ring)

    def test_results(self, tmp_path: Path) -> None:
        """A result is the number of bytes or a negative errno; waking shows as token 0; closing is final."""
        ring = _core.ring_open(4)
        (tmp_path / "file").write_bytes(b"hello")
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        page = bytearray(8)
        _core.ring_submit(ring, 7, True, fd, 1, [page], -1)
        assert [(7, 4)] == _core.ring_wait(ring, -1)
        assert b"ello\0\0\0\0" == page
        _core.ring_submit(ring, 8, False, fd, 0, [page], -1)
        assert [(8, -errno.EBADF)] == _core.ring_wait(ring, -1)
        _core.ring_wake(ring)
        assert [(0, 0)] == _core.ring_wait(ring, -1)
        assert [] == _core.ring_wait(ring, 1000)
        os.close(fd)
        _core.ring_close(ring)
        _core.ring_close(ring)
        for call in (lambda: _core.ring_wait(ring, 0), lambda: _core.ring_wake(ring)):
            with pytest.raises(ValueError, match="the ring is closed"):
                call()
